"""What readers do not compute of the rotations that stay in a model, as measured by loading them (docs/readers.md)."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from typing import TYPE_CHECKING

from runtime.formats.transforms import INPUT, OF_ATTENTION, ModelTransforms
from runtime.quantize.solve_batches import siblings_by_name
from runtime.recipe.recipe import some

if TYPE_CHECKING:
    from torch import nn

_VLLM = "vLLM 0.32"


def transform_limits(
    found: ModelTransforms, model: nn.Module, experts: Container[str], *, has_cache: bool
) -> Iterator[str]:
    """Yield a sentence for each limit that applies.

    Args:
        found: the rotations.
        model: the module tree.
        experts: the modules of experts.
        has_cache: whether keys and values are rounded.
    """
    if not found.transforms:
        return
    changed = list(dict.fromkeys(one.module for one in found.transforms if one.location not in OF_ATTENTION))
    rotated = list(dict.fromkeys(one.module for one in found.transforms if one.location in OF_ATTENTION))
    if changed:
        yield (
            "transformers 5.17 and 5.24 load the rotated weights and compute wrong numbers: they ignore "
            "transform_config; docs/readers.md has the lines that apply it"
        )
        yield f"transforms run in {_VLLM} on a GPU only, and without tensor parallelism: {len(changed)} modules"
    if rotated:
        yield f"{_VLLM} does not load checkpoints that rotate queries and keys (R3): {some(rotated)}"
    if rotated and has_cache:
        yield (
            "transformers 5.24 computes wrong numbers with rotated queries and keys (R3): compressed-tensors rotates "
            "only the queries there"
        )
    inside = [name for name in changed if name in experts]
    if inside:
        yield f"{_VLLM} ignores transforms of experts and computes wrong numbers: {some(inside)}"
    biased = [name for name in changed if name not in experts and "bias" in model.get_submodule(name)._parameters]
    biased = [name for name in biased if model.get_submodule(name)._parameters["bias"] is not None]
    if biased:
        yield f"{_VLLM} does not run modules that have a bias and a transform: {some(biased)}"
    heads = [name for name in changed if name.rpartition(".")[2] == "lm_head"]
    if heads:
        yield f"{_VLLM} ignores transforms of {some(heads)} and computes wrong numbers"
    partly = list(_partly([one.module for one in found.transforms if one.location == INPUT], model))
    if partly:
        yield f"{_VLLM} does not load modules that it fuses if only some are transformed: {some(partly)}"


def _partly(transformed: Sequence[str], model: nn.Module) -> Iterator[str]:
    """Yield modules without a transform that vLLM fuses with transformed ones."""
    from torch import nn

    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    fused = siblings_by_name(linears)
    with_transform = {fused[name] for name in transformed if name in fused}
    known = frozenset(transformed)
    return (name for name, group in fused.items() if group in with_transform and name not in known)
