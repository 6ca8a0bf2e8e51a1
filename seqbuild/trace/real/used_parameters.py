"""Find the parameters that a step uses, and provide real ones during a dry run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from runtime.errors import TraceError
from seqbuild.trace.real.weightless import small_tensor


class ParametersSeen(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records in `tensors` the ids of the tensors that are passed to operators, in order."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tensors: dict[int, None] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for value in pytree.arg_tree_leaves(*args, **(kwargs or {})):
            if isinstance(value, torch.Tensor):
                self.tensors.setdefault(id(value))
        return func(*args, **(kwargs or {}))


class RealTensors:
    """Creates real tensors for fake ones on demand.

    Args:
        limit_bytes: the limit of their total size.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.num_bytes = 0
        self.generator = torch.Generator().manual_seed(0)
        self.made: dict[int, torch.Tensor] = {}

    def of(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        """Return small random numbers (zeros for integers) in the shape of a fake tensor, the same in each call."""
        if tensor is None or not (tensor.is_meta or isinstance(tensor, torch._subclasses.FakeTensor)):
            return tensor
        if id(tensor) not in self.made:
            self.num_bytes += tensor.numel() * tensor.element_size()
            if self.num_bytes > self.limit_bytes:
                raise TraceError(
                    f"the result shape of a step with more than {self.limit_bytes / 2**30:.0f} GiB of weights depends "
                    "on data; the step is too large to be executed at compile time"
                )
            value = small_tensor(tensor, self.generator)
            is_parameter = isinstance(tensor, nn.Parameter)
            self.made[id(tensor)] = nn.Parameter(value, requires_grad=False) if is_parameter else value
        return self.made[id(tensor)]


@contextlib.contextmanager
def real_tensors(modules: Sequence[nn.Module], limit_bytes: int) -> Iterator[RealTensors]:
    """Give these modules real tensors while the block runs, and submodules when they are called.

    A step may receive a whole model and call only its image tower. If all tensors are small enough, submodules get
    theirs at once, because code may also read a module's weight without calling the module.
    """
    real = RealTensors(limit_bytes)
    inner = dict.fromkeys(part for module in modules for part in module.modules())
    is_small = sum(p.numel() * p.element_size() for module in modules for p in module.parameters()) <= limit_bytes
    outer = inner if is_small else dict.fromkeys(modules)
    with contextlib.ExitStack() as stack:
        for module in inner:
            if module in outer:
                stack.enter_context(_exchanged(module, real))
            else:
                own = module.__dict__.get("forward")
                module.__dict__["forward"] = _exchanging(module, real, module.forward)
                stack.callback(_put_back, module, own)
        yield real


def _exchanging(module: nn.Module, real: RealTensors, forward: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with _exchanged(module, real):
            return forward(*args, **kwargs)

    return call


@contextlib.contextmanager
def _exchanged(module: nn.Module, real: RealTensors) -> Iterator[None]:
    found = {kind: module.__dict__[kind] for kind in ("_parameters", "_buffers")}
    try:
        for kind, tensors in found.items():
            module.__dict__[kind] = {name: real.of(tensor) for name, tensor in tensors.items()}
        yield
    finally:
        module.__dict__.update(found)


def _put_back(module: nn.Module, own: Any) -> None:
    if own is None:
        module.__dict__.pop("forward", None)
    else:
        module.__dict__["forward"] = own
