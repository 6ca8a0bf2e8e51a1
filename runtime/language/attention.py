"""Attention of an artifact's code: tell torch that a mask is exactly causal, and that heads are repeated.

A recorded forward makes its mask from data, so its code always passes one, and repeats keys and values for groups of
query heads. Torch computes causal attention in half the operations if it is told so instead (`is_causal`), and reads
repeated heads where they are (`enable_gqa`); on CUDA a mask rules out flash attention. Both are decided by values, once
for each mask: a mask of padded samples, a window shorter than the samples or a bias is passed as recorded.

On the CPU the results are equal to the bit, as long as scores are finite: a hidden score adds exactly 0 to the sums of
its row, whether it is computed or skipped. A fill such as finfo.min hides like -inf because it is below any score, and
because every row of a causal mask shows its diagonal.

Shapes: B samples, H query heads, N heads of keys and values, G query heads for each of those, S positions, D features.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runtime.errors import ArtifactError

if TYPE_CHECKING:
    import torch

_HIDES = -1e38  # a mask's number that no score comes near; -inf and finfo.min of float32 and bfloat16 are below
_SHORTEST = 32  # positions; comparing the mask would take as long as it saves
_NUMBERS_AT_A_TIME = 2**22
_MATH, _FLASH = 0, 1  # of torch.nn.attention.SDPBackend


@dataclass(frozen=True, slots=True)
class Repeated:
    """Heads that are repeated for a group of query heads, before they are copied.

    Attributes:
        heads_BNGSD: with stride 0 in G.
        shape: of the copy.
    """

    heads_BNGSD: torch.Tensor
    shape: Sequence[int]

    def copied(self) -> torch.Tensor:
        """Return the repeated heads, as recorded."""
        import torch

        result: torch.Tensor = torch.ops.aten.reshape.default(self.heads_BNGSD, self.shape)
        return result

    def once(self) -> torch.Tensor:
        """Return each head once, [B, N, S, D]."""
        return self.heads_BNGSD.select(2, 0)


def repeated(heads: Any, shape: Any) -> Any:
    """Reshape a tensor that only attention reads; the copy is left to `attention` if it only repeats heads."""
    import torch

    if type(heads) is torch.Tensor and heads.dim() == 5 and heads.shape[2] > 1 and heads.stride(2) == 0:
        samples, kept, groups, *rest = heads.shape
        if list(shape) == [samples, kept * groups, *rest]:
            return Repeated(heads, shape)
    return torch.ops.aten.reshape.default(heads, shape)


class CausalMasks:
    """Remembers which masks are exactly causal: each is compared once, until it changes."""

    def __init__(self) -> None:
        from torch.utils.weak import WeakTensorKeyDictionary

        self._known: Any = WeakTensorKeyDictionary()  # of a mask, its version and the answer

    def has(self, mask: torch.Tensor) -> bool:
        """Whether a mask is exactly causal; on a GPU this waits for its values, unless it is known."""
        if mask.is_inference():  # its version is not counted
            return is_exactly_causal(mask)
        version, known = self._known.get(mask, (None, False))
        if version != mask._version:
            known = is_exactly_causal(mask)
            self._known[mask] = mask._version, known
        return bool(known)

    def add(self, mask: torch.Tensor, is_causal: bool) -> None:
        """State whether a mask is exactly causal, for code that must not wait for its values."""
        if not mask.is_inference():
            self._known[mask] = mask._version, is_causal


@functools.cache
def causal_masks() -> CausalMasks:
    """The masks of this process."""
    return CausalMasks()


def may_be_mask(value: Any) -> bool:
    """Whether a value could be an exactly causal mask of attention."""
    import torch

    return (
        type(value) is torch.Tensor
        and value.dim() in (2, 4)
        and value.shape[-1] == value.shape[-2] >= _SHORTEST
        and (value.dtype == torch.bool or value.is_floating_point())
        and not value.is_meta
    )


def attention(
    run: Any,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: Any = 0.0,
    is_causal: Any = False,
    *,
    scale: Any = None,
    enable_gqa: Any = False,
) -> Any:
    """Return `scaled_dot_product_attention` of these arguments; keys and values may be `Repeated`.

    The first argument is the run of the program.

    Raises:
        ArtifactError: for operands that torch does not check and with which it would read other memory.
    """
    import torch

    keys = key.heads_BNGSD if isinstance(key, Repeated) else key
    values = value.heads_BNGSD if isinstance(value, Repeated) else value
    _require_alike(query, keys, values, attn_mask)
    is_masked_only = attn_mask is not None and not dropout_p and not is_causal and not torch.is_grad_enabled()
    if is_masked_only and _can_skip(query, keys, values, attn_mask) and causal_masks().has(attn_mask):
        attn_mask, is_causal = None, True
    if isinstance(key, Repeated) or isinstance(value, Repeated):
        if not enable_gqa and _shares_heads(run, query, key, value, attn_mask, dropout_p, is_causal, scale):
            key, value, enable_gqa = key.once(), value.once(), True
        else:
            key, value = (one.copied() if isinstance(one, Repeated) else one for one in (key, value))
    call = torch.ops.aten.scaled_dot_product_attention.default
    return call(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def _require_alike(query: Any, key: Any, value: Any, mask: Any) -> None:
    import torch

    lengths = [one.shape[-2] for one in (key, value) if isinstance(one, torch.Tensor) and one.dim() > 1]
    if len(set(lengths)) > 1:
        raise ArtifactError(f"an artifact's code calls attention with {lengths[0]} keys and {lengths[1]} values")
    tensors = isinstance(query, torch.Tensor) and isinstance(mask, torch.Tensor)
    if tensors and query.dtype == torch.float64 and mask.dtype == torch.float32 and query.device.type == "cpu":
        raise ArtifactError("an artifact's code calls attention in float64 with a mask in float32")


def _can_skip(query: Any, key: Any, value: Any, mask: Any) -> bool:
    """Whether torch would compute the same, with the same kernel, if this mask were causal and were not passed."""
    import torch

    if any(type(one) is not torch.Tensor or one.is_meta for one in (query, key, value, mask)):
        return False
    size = query.shape[-2] if query.dim() == 4 else 0
    shape = (*((1,) * (4 - mask.dim())), *mask.shape)
    return (
        may_be_mask(mask)
        and key.dim() >= 4
        and key.shape[-2] == value.shape[-2] == size == mask.shape[-1]
        and shape[0] in (1, query.shape[0])
        and shape[1] in (1, query.shape[1])
        and mask.dtype in (torch.bool, torch.float32, query.dtype)
    )


def is_exactly_causal(mask: torch.Tensor) -> bool:
    """Whether a mask [.., S, S] lets every position see itself and all positions before it, in every sample and head.

    Args:
        mask: of booleans, or of numbers that are added to scores: 0, or a number that hides.
    """
    import torch

    for dim in range(mask.dim() - 2):
        if mask.stride(dim) == 0:
            mask = mask.narrow(dim, 0, 1)
    size = mask.shape[-1]
    step = max(_NUMBERS_AT_A_TIME * size // max(mask.numel(), 1), 1)
    for first in range(0, size, step):
        rows = mask.narrow(-2, first, min(step, size - first))
        seen = torch.ones(rows.shape[-2:], dtype=torch.bool, device=mask.device).tril_(first).expand(rows.shape)
        if mask.dtype == torch.bool:
            is_equal = torch.equal(rows, seen)
        else:
            is_equal = torch.equal(rows == 0, seen) and torch.equal(rows <= _HIDES, ~seen)
        if not is_equal:
            return False
    return True


def _shares_heads(
    run: Any, query: Any, key: Any, value: Any, mask: Any, dropout: Any, is_causal: Any, scale: Any
) -> bool:
    """Whether torch has a fused kernel that reads each head of keys and values once; otherwise it would copy them."""
    import torch

    if not (isinstance(key, Repeated) and isinstance(value, Repeated)) or type(query) is not torch.Tensor:
        return False
    groups = key.heads_BNGSD.shape[:3]
    if query.dim() != 4 or value.heads_BNGSD.shape[:3] != groups or query.shape[:2] != (groups[0], groups[1:].numel()):
        return False
    if torch.is_grad_enabled():
        return False
    if query.is_meta:  # the plan assumes a mask, with which only the kernel of the CPU shares heads
        widths = {query.shape[-1], key.heads_BNGSD.shape[-1], value.heads_BNGSD.shape[-1]}
        return run.device_type == "cpu" and len(widths) == 1
    arguments = (query, key.once(), value.once(), mask, dropout, is_causal)
    chosen = torch._fused_sdp_choice(*arguments, scale=scale, enable_gqa=True)
    return chosen == _FLASH if query.device.type == "cpu" else chosen != _MATH
