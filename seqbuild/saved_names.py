"""The names and shapes under which transformers would save a model: its rules for loading, in reverse.

The rules split fused experts into one tensor each, for a model with 384 experts in 60 layers 70,000 of them. Layers
that differ in their number alone are split alike, so two of them are, and what came out is numbered for the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from seqbuild.renaming import is_blind

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Shapes = dict[str, tuple[int, ...]]
Unit = tuple[str, str]  # of a name such as `model.layers.7.mlp.weight`: what comes before the first number, and that
# Rules' operations that look at the tensors, at the model's config and at the shape of the parameter they make, and at
# nothing else.
PLAIN_OPERATIONS = ("Chunk", "Concatenate", "Interleave", "MergeModulelist", "SplitModulelist", "Transpose")


def saved_shapes(model: PreTrainedModel) -> Shapes:
    """Names and shapes that `save_pretrained` would write, tied tensors once."""
    state: dict[str, torch.Tensor] = {}
    seen: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if seen.setdefault(id(tensor), name) == name:
            state[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    alike = _alike(state) if _are_apart(model, state) else []
    saved: Shapes = {}
    for names in alike:
        saved |= _numbered(model, state, names)
    for names in alike:
        for name in (name for unit in names.values() for name in unit):
            del state[name]
    return saved | _reverted(model, state)


def has_plain_operations(rule: Any) -> bool:
    """Whether a rule that calculates does nothing but what is known here."""
    home = type(rule).__module__
    kinds = [type(operation) for operation in rule.operations]
    return all(kind.__module__ == home and kind.__name__ in PLAIN_OPERATIONS for kind in kinds)


def _reverted(model: PreTrainedModel, state: dict[str, torch.Tensor]) -> Shapes:
    from transformers.core_model_loading import revert_weight_conversion

    return {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, state).items()}
