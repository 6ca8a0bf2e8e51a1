"""The tensors of a model in memory under the names that `save_pretrained` would give them, without copying them.

transformers fuses and renames tensors while it loads a checkpoint, and undoes this when it saves one. Saving computes
all tensors of the checkpoint at once, which for a mixture takes as much memory as the model again. So the rules run on
tensors without data, their operations are recorded, and a tensor of the checkpoint is computed when it is read, from
those that it needs. Where an operation only makes a tensor contiguous, it is skipped: an expert's matrix is a view of
the stack that contains it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from runtime.checkpoint.dtypes import DTYPES, dtype_name
from runtime.checkpoint.in_memory import HeldTensor
from runtime.checkpoint.stored import Stored
from runtime.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CONTIGUOUS = torch.Tensor.contiguous


def saved_tensors(model: PreTrainedModel) -> dict[str, HeldTensor]:
    """Return the tensors of the model's checkpoint, by name.

    Raises:
        ModelError: if a tensor has no values in this process, or transformers' rules fail.
    """
    from transformers.core_model_loading import revert_weight_conversion

    record = _RecordedRules()
    names = _saved_names(model)
    state = {name: record.add(_getter(model, name, tensor), tensor) for name, tensor in names.items()}
    try:
        with record:
            reverted = revert_weight_conversion(model, dict(state))
    except Exception as error:
        raise ModelError(f"transformers cannot name the tensors of {type(model).__name__}: {error}") from error
    return {key: record.held(key, tensor) for key, tensor in reverted.items()}


def _saved_names(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the tensors that are saved: of tied ones, only those that the model does not derive from others."""
    state: Mapping[str, torch.Tensor] = model.state_dict(keep_vars=True)
    ignored, tied = model._keys_to_ignore_on_save or (), model.all_tied_weights_keys
    names: dict[int, list[str]] = {}
    for name, tensor in state.items():
        if name not in ignored:
            source = state.get(tied.get(name, ""))
            # accelerate gives each of the tied tensors that it offloads a parameter of its own.
            is_tied = tensor.is_meta and source is not None and source.is_meta
            names.setdefault(id(source if is_tied else tensor), []).append(name)
    dropped: set[str] = set()
    for same in names.values():
        derived = [name for name in sorted(same) if name in tied]
        dropped.update(derived[:-1] if len(derived) == len(same) else derived)
    kept = dict.fromkeys(name for same in names.values() for name in same if name not in dropped)
    return {name: tensor for name, tensor in state.items() if name in kept}


def _getter(model: nn.Module, name: str, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Return a function that gets a tensor of the model, which may be offloaded by accelerate.

    Raises:
        ModelError: if the tensor has no values, or is of another library.
    """
    kind = type(tensor)
    if kind not in (torch.Tensor, nn.Parameter, nn.Buffer) or tensor.layout is not torch.strided:
        raise ModelError(
            f"{name} of the model is {kind.__module__}.{kind.__name__}, not a plain tensor",
            hint="load the model without quantization and without sharding across processes",
        )
    if tensor.dtype not in DTYPES.values():
        raise ModelError(f"{name} of the model has the unsupported dtype {tensor.dtype}")
    if not tensor.is_meta:
        return lambda: tensor
    owner, own = _offloaded(model, name)
    if owner is None or own not in owner:
        raise ModelError(
            f"{name} of the model has no values (it is on the meta device)",
            hint="load the model's weights, or pass the path of its checkpoint",
        )
    return lambda: owner[own]


def _offloaded(model: nn.Module, name: str) -> tuple[Any, str]:
    """Return the table of offloaded weights that accelerate's hooks have for a tensor, and its name there."""
    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        hook = getattr(model.get_submodule(".".join(parts[:depth])), "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            table = getattr(one, "weights_map", None)
            if table is not None:
                return table, ".".join(parts[depth:])
    return None, ""


@dataclass(frozen=True, slots=True)
class _Operation:
    """How a tensor is computed: a function, its arguments, and the index of the tensor in a result of several."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    index: int | None


class _RecordedRules(TorchFunctionMode):
    """Records how tensors without data are computed, to compute one of them later from the model's own."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, tuple[torch.Tensor, Callable[[], torch.Tensor] | _Operation]] = {}

    def add(self, get: Callable[[], torch.Tensor], tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor without data that stands for one of the model."""
        made = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        self._known[id(made)] = made, get
        return made

    def held(self, key: str, tensor: torch.Tensor) -> HeldTensor:
        """Return a tensor of the checkpoint, which is computed when it is read."""
        stored = Stored(key, dtype_name(tensor.dtype), tuple(tensor.shape))
        return HeldTensor(stored, lambda: self._computed(tensor))

    def _computed(self, tensor: torch.Tensor) -> torch.Tensor:
        _, origin = self._known[id(tensor)]
        if not isinstance(origin, _Operation):
            return origin().detach()
        args, kwargs = pytree.tree_map_only(torch.Tensor, self._computed, (origin.args, dict(origin.kwargs)))
        if origin.function is _CONTIGUOUS:
            found: torch.Tensor = args[0]
            return found
        with torch.no_grad():
            result = origin.function(*args, **kwargs)
        one: torch.Tensor = result if origin.index is None else result[origin.index]
        return one

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call a function, and record the tensors that it returns."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        several = isinstance(result, (tuple, list))
        for index, made in enumerate(result if several else (result,)):
            if isinstance(made, torch.Tensor) and id(made) not in self._known:
                self._known[id(made)] = made, _Operation(func, args, kwargs, index if several else None)
        return result
