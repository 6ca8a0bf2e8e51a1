"""The options of a search, in one object from the call to the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from runtime.chain import Artifact
    from runtime.checkpoint.reader import Checkpoint
    from runtime.recipe.auto_bits_modifier import AutoBitsModifier
    from runtime.recipe.recipe import Recipe
    from runtime.streaming.activations import Budget


@dataclass(frozen=True, kw_only=True, slots=True)
class BitSearch:
    """What is searched, and how.

    Attributes:
        artifact: the compiled model.
        weights: its checkpoint.
        batches: the model's inputs.
        recipe: that leaves the choice of schemes to a search.
        device: where subgraphs run and weights are solved.
        dtype: of weights and activations; None for the model's own.
        activation_memory: the memory of values between subgraphs.
        statistics: saved statistics of the model's inputs, so that the batches only weigh errors; None to measure.
        progress: called with one line for each subgraph, and with warnings.
    """

    artifact: Artifact
    weights: Path | Checkpoint
    batches: Sequence[Mapping[str, torch.Tensor]]
    recipe: Recipe
    device: torch.device
    dtype: torch.dtype | None = None
    activation_memory: Budget | None = None
    statistics: Path | None = None
    progress: Callable[[str], None] = lambda line: None

    @property
    def modifier(self) -> AutoBitsModifier:
        """The modifier that asks for the search."""
        assert self.recipe.search is not None, "the recipe asks for no search"
        return self.recipe.search
