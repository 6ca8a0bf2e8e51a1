"""Which modules are leaves when a model is traced through: those that a host builds by itself, and foreign ones.

The experts of a mixture are one leaf (`experts.py`, `dense_experts.py`). A class that inherits from `Linear` and
calculates in its own way (Falcon's, for instance) is a leaf, too, so that it can be quantized: what it calculates is
traced by itself, and the host executes that.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import fx, nn
from transformers.pytorch_utils import Conv1D

from runtime.errors import SeqbuildError
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
    """A kind of leaf, and the source of the program that it executes where its class calculates in its own way."""

    kind: LeafKind
    source: str = ""


class LeafPolicy:
    """Decides what is a leaf.

    Args:
        foreign: paths of forwards (`module:Class.forward`) whose modules are leaves all the same.
        dtype: the dtype that stands for the weights' in programs of leaves; None for their own.
        trace: records the forward of one module on one sample, with weights of that dtype.
    """

    def __init__(self, foreign: Collection[str], dtype: torch.dtype | None, trace: TraceModule) -> None:
        self.foreign = frozenset(foreign)
        self.dtype = dtype
        self._trace = trace
        self._leaves: dict[nn.Module, Leaf | None] = {}

    def prepare(self, root: nn.Module) -> None:
        """Look at every module of a model, as long as nothing of it has been replaced."""
        for module in root.modules():
            self.leaf(module)

    def is_step(self, module: nn.Module) -> bool:
        """Whether a module is called as one step."""
        return forward_path(module) in self.foreign or self.leaf(module) is not None

    def leaf(self, module: nn.Module) -> Leaf | None:
        """What a host builds for a module; None when it cannot."""
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
        """The code of what a single matrix does with a single input; None when it is more than that."""
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
    """`module:Class.forward`, by the class that defines the module's forward."""
    home = next(cls for cls in type(module).__mro__ if "forward" in vars(cls))
    return f"{home.__module__}:{home.__qualname__}.forward"


def always_foreign(model: nn.Module) -> list[str]:
    """Forwards of modules that are neither leaves nor traced through: fused experts of an unknown kind, for what they
    do on fake tensors (they gather weights for each token) is not what they do in a run.
    """
    found = (module for module in model.modules() if is_experts(module) and experts_leaf(module) is None)
    return list(dict.fromkeys(forward_path(module) for module in found))
