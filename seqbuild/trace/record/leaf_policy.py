"""Decide which modules are leaves of a deep trace: those that a host builds by itself, and foreign ones.

The experts of a mixture are one leaf (`seqbuild.trace.experts`). A subclass of `Linear` with its own forward, such as
Falcon's, is also a leaf, so that it can be quantized: its forward is traced separately, and the host executes the
resulting program.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from transformers.pytorch_utils import Conv1D

from runtime.errors import SeqbuildError, TraceError
from runtime.model.leaves import leaf_kind
from seqbuild.chain.emit import EmittedCode, emit
from seqbuild.trace.experts.dense import dense_experts_leaf, is_dense_experts
from seqbuild.trace.experts.learn import experts_leaf, is_experts

if TYPE_CHECKING:
    from runtime.artifact.manifest import LeafKind

_QUANTIZED = (nn.Linear, Conv1D)
TraceModule = Callable[[nn.Module, Mapping[str, torch.Tensor]], fx.Graph]


@dataclass(frozen=True, kw_only=True, slots=True)
class Leaf:
    """A kind of leaf, and the source of its program if its class has its own computation."""

    kind: LeafKind
    source: str = ""


class LeafPolicy:
    """Decides which modules are leaves.

    Args:
        foreign: paths of forwards (`module:Class.forward`) whose modules are leaves although they are not the host's.
        dtype: the dtype that represents the weights' in programs of leaves; None for their own.
        trace: records the forward of one module on one sample, with weights of that dtype.
    """

    def __init__(self, foreign: Collection[str], dtype: torch.dtype | None, trace: TraceModule) -> None:
        self.foreign = frozenset(foreign)
        self.dtype = dtype
        self._trace = trace
        self._leaves: dict[nn.Module, Leaf | None] = {}

    def prepare(self, root: nn.Module) -> None:
        """Classify all modules of a model before any of its forwards is replaced."""
        for module in root.modules():
            self.leaf(module)

    def is_step(self, module: nn.Module) -> bool:
        """Return whether a module is called as one step."""
        return forward_path(module) in self.foreign or self.leaf(module) is not None

    def leaf(self, module: nn.Module) -> Leaf | None:
        """Return the leaf that a host builds for a module; None if it cannot build one."""
        if module not in self._leaves:
            self._leaves[module] = self._find(module)
        return self._leaves[module]

    def _find(self, module: nn.Module) -> Leaf | None:
        if is_experts(module):
            found = experts_leaf(module)
            return Leaf(kind=found[0], source=found[1].source) if found is not None else None
        if is_dense_experts(module):
            found = dense_experts_leaf(module)
            if found is not None:
                return Leaf(kind=found[0], source=found[1].source)
        kind = leaf_kind(module)
        if kind is not None or not isinstance(module, _QUANTIZED):
            return Leaf(kind=kind) if kind is not None else None
        base = leaf_kind(nn.Linear(1, 1) if isinstance(module, nn.Linear) else Conv1D(1, 1))  # type: ignore[no-untyped-call]
        code = self._program(module)
        if base is None or code is None:
            return None
        kind = dataclasses.replace(base, arguments=code.arguments, attributes=code.attributes)
        return Leaf(kind=kind, source=code.source)

    def _program(self, module: nn.Module) -> EmittedCode | None:
        """Trace a module with one matrix and one input; None if it has more than that."""
        names = list(inspect.signature(module.forward).parameters)
        own = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
        if len(names) != 1 or not set(own) <= {"weight", "bias"} or list(module.children()):
            return None
        weight = module.get_parameter("weight")
        width = weight.shape[1 if isinstance(module, nn.Linear) else 0]
        sample = {names[0]: torch.empty(3, 37, width, dtype=weight.dtype, device="meta")}
        try:
            graph = self._trace(module, sample)
            code = emit(graph, traced_dtype=self.dtype, scope="")
        except SeqbuildError:
            return None
        is_plain = code.output_names == ("output",) and not (code.constants or code.opaque or code.submodules)
        return code if is_plain else None


def forward_path(module: nn.Module) -> str:
    """Return `module:Class.forward` for the class that defines the module's forward."""
    home = next(cls for cls in type(module).__mro__ if "forward" in vars(cls))
    return f"{home.__module__}:{home.__qualname__}.forward"


def always_foreign(model: nn.Module) -> list[str]:
    """Return the forwards of fused experts of an unknown kind, which are neither leaves nor traced through.

    On fake tensors they gather weights for each token, which differs from what they do in a run.
    """
    found = (module for module in model.modules() if is_experts(module) and experts_leaf(module) is None)
    return list(dict.fromkeys(forward_path(module) for module in found))


_MISSING = object()


@contextlib.contextmanager
def leaves_left_alone(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Reject recorded code that sets an attribute of one of these modules to a different value.

    Some models select another kind of attention for short inputs this way. A chain calls the leaves of a new model, on
    which the attribute is not set. If the function that sets it is an opaque step, it is part of the chain.
    """
    leaves = frozenset(modules)
    plain = nn.Module.__setattr__

    def setattr_(self: nn.Module, name: str, value: Any) -> None:
        if self in leaves and get_proxy_mode() is not None and not _is_same(getattr(self, name, _MISSING), value):
            raise TraceError(f"the model's forward sets {name} of {type(self).__name__}, which is inside a step")
        plain(self, name, value)

    nn.Module.__setattr__ = setattr_  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__setattr__ = plain  # type: ignore[method-assign]


def _is_same(old: Any, new: Any) -> bool:
    if old is new:
        return True
    return not isinstance(new, (torch.Tensor, nn.Module)) and type(old) is type(new) and bool(old == new)
