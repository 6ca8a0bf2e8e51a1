"""Build a model's module tree without memory for its weights."""

from __future__ import annotations

import contextlib
import copy
import mmap
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

# Larger than any table that a model computes; fused experts exceed it.
_LARGE_ELEMENTS = 2**24
# Larger zeros are separate pages: those that are not written take no memory, and freed ones are returned at once. On
# the heap, the routers of sixty layers would leave hundreds of megabytes of holes.
_PAGED_ELEMENTS = 2**18


@contextlib.contextmanager
def without_weights() -> Iterator[None]:
    """Create parameters on the meta device; buffers are real, because they are computed, not loaded.

    accelerate moves a parameter to the meta device when it is registered, after it has been created: the experts of one
    layer may have 40 GB. So large tensors without content are created on the meta device in the first place.
    """
    import torch
    from accelerate import init_empty_weights
    from torch.overrides import TorchFunctionMode

    randomizers = (torch.Tensor.normal_, torch.Tensor.uniform_)
    makers = (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn)

    class LargeOnMeta(TorchFunctionMode):
        def __torch_function__(
            self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            kwargs = kwargs or {}
            if func in randomizers and isinstance(args[0], torch.Tensor) and args[0].is_meta:
                return args[0]  # as torch does, but slowly
            if func in makers and kwargs.get("out") is None:
                shape_only: torch.Tensor = func(*args, **{**kwargs, "device": "meta"})
                if shape_only.numel() > _LARGE_ELEMENTS:
                    return shape_only
                is_plain = kwargs.keys() <= {"size", "dtype"} and shape_only.layout is torch.strided
                if func is torch.zeros and shape_only.numel() > _PAGED_ELEMENTS and is_plain:
                    pages = mmap.mmap(-1, shape_only.numel() * shape_only.itemsize)
                    return torch.frombuffer(pages, dtype=shape_only.dtype).view(shape_only.shape)
            return func(*args, **kwargs)

    with init_empty_weights(include_buffers=False), LargeOnMeta(), _nothing_to_initialize():
        yield


def from_config(cls: Any, config: Any, *, dtype: torch.dtype, attention: str | None) -> Any:
    """Build a model of a class of transformers.

    Args:
        cls: the class.
        config: its config.
        dtype: of the weights.
        attention: `eager` or `sdpa`; None for transformers' own choice. Parts without such an attention keep theirs, as
            they do when transformers chooses.
    """
    try:
        return cls._from_config(copy.deepcopy(config), dtype=dtype, attn_implementation=attention)
    except ValueError:
        if attention is None:
            raise
        model = cls._from_config(config, dtype=dtype, attn_implementation=None)
        if str(model.config._attn_implementation) != attention:
            raise
        return model


def calculate_buffers(model: nn.Module) -> None:
    """Recompute the buffers that no checkpoint has, as loading a checkpoint does: the constructor ran in the dtype of
    the weights, which rounds intermediate values.
    """
    import torch
    from transformers import PreTrainedModel

    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.no_grad():
            for module, owner in _with_owners(model, None):
                buffers = (module._buffers.get(name) for name in module._non_persistent_buffers_set)
                if isinstance(owner, PreTrainedModel) and any(b is not None and not b.is_meta for b in buffers):
                    owner._init_weights(module)  # type: ignore[no-untyped-call]
    finally:
        torch.set_default_dtype(usual)


def _with_owners(module: nn.Module, owner: nn.Module | None) -> Iterator[tuple[nn.Module, nn.Module | None]]:
    """Yield all modules, each with the model of transformers that contains it and can initialize it."""
    from transformers import PreTrainedModel

    owner = module if isinstance(module, PreTrainedModel) else owner
    yield module, owner
    for child in module.children():
        yield from _with_owners(child, owner)


@contextlib.contextmanager
def _nothing_to_initialize() -> Iterator[None]:
    """Skip transformers' initialization of modules with nothing but parameters on the meta device."""
    from transformers import PreTrainedModel

    cls: Any = PreTrainedModel
    usual = cls._initialize_weights

    def initialize(self: Any, module: Any, *args: Any, **kwargs: Any) -> None:
        holds_more = module._buffers or module._modules
        if holds_more or not all(parameter is None or parameter.is_meta for parameter in module._parameters.values()):
            usual(self, module, *args, **kwargs)

    cls._initialize_weights = initialize
    try:
        yield
    finally:
        cls._initialize_weights = usual
