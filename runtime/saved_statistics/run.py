"""The part of saved statistics in a calibration: a run keeps them, is solved from them, or neither."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.checkpoint.dequantize import open_checkpoint
from runtime.errors import RecipeError
from runtime.saved_statistics.keeper import StatisticsKeeper
from runtime.saved_statistics.kept_folder import KeptFolder, open_kept
from runtime.saved_statistics.store import DATA, StatisticsStore, statistics_identity, surroundings
from runtime.streaming import journal

if TYPE_CHECKING:
    import torch

    from runtime.chain import Artifact
    from runtime.checkpoint.reader import Checkpoint
    from runtime.quantize.needs import RecipeNeeds
    from runtime.quantize.preparation import Prepared
    from runtime.recipe.recipe import Recipe
    from runtime.saved_statistics.step_reader import StepReader
    from runtime.streaming.options import RunOptions
    from runtime.streaming.workplace import Workplace
    from runtime.workers.group import Workers


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStatistics:
    """The saved statistics of a run.

    Attributes:
        identity: of statistics of this model, without data.
        store: the statistics that it is solved from; None to measure.
        keeper: the modifier that writes statistics; None to keep none.
        folder: where these appear.
    """

    identity: Mapping[str, str]
    store: StatisticsStore | None = None
    keeper: StatisticsKeeper | None = None
    folder: Path | None = None

    @classmethod
    def of(
        cls, options: RunOptions, artifact: Artifact, weights: Path | Checkpoint, recipe: Recipe, prepared: Prepared
    ) -> RunStatistics:
        """Open the statistics that the options name.

        Args:
            options: of the run.
            artifact: as it was loaded.
            weights: as they were given: views of them depend on the recipe.
            recipe: its rotations change what is measured.
            prepared: the model.

        Raises:
            DataError: they are damaged, or of another model.
        """
        if options.statistics is None and options.keep_statistics is None:
            return cls(identity={})
        dtype, checkpoint = artifact.run_dtype(options.dtype), open_checkpoint(weights, plain=True)
        identity = statistics_identity(artifact, checkpoint, dtype, rotation_facts(recipe))
        if options.statistics is not None:
            store = StatisticsStore.open(options.statistics)
            store.require_same(identity, len(prepared.artifact.subgraphs))
            return cls(identity=identity, store=store)
        keeper = StatisticsKeeper(prepared.artifact, prepared.model)
        return cls(identity=identity, keeper=keeper, folder=options.keep_statistics)

    @property
    def modifiers(self) -> Sequence[StatisticsKeeper]:
        """The modifiers to apply before the recipe."""
        return () if self.keeper is None else (self.keeper,)

    @property
    def saved_of(self) -> Callable[[int], StepReader] | None:
        """Return the reader of a step; None if steps are measured."""
        return None if self.store is None else self.store.step

    @property
    def ingredients(self) -> dict[str, str]:
        """The ingredients of the run's identity that replace or follow those of its batches."""
        if self.store is None:
            return {}
        return {DATA: self.store.identity.get(DATA, ""), "statistics": self.store.digest}

    def remarks(self, device: torch.device) -> list[str]:
        """Say what saved statistics mean for the result."""
        if self.store is None:
            return []
        text = (
            "warning: solved from saved statistics, without running the model: they are those of the original layers, "
            "so errors of quantized layers are not propagated to later ones (as with --no-propagate-error)"
        )
        return [text, *self.store.remarks(self.identity, device)]

    def keep(
        self, stack: ExitStack, out: Path, options: RunOptions, workers: Workers, data: tuple[str, str]
    ) -> KeptFolder | None:
        """Lock the directory for the statistics until the stack ends; None if none are kept.

        Args:
            stack: of the run; its own directory is opened afterwards.
            out: the output of the run.
            options: of the run.
            workers: that share it.
            data: the digest of the batches, and facts about them as JSON.
        """
        if self.keeper is None or self.folder is None:
            return None
        kept = KeptFolder(
            path=self.folder,
            identity={**self.identity, DATA: data[0]},
            surroundings=surroundings(options.device),
            data=data[1],
            workers=workers,
        )
        self.keeper.kept = stack.enter_context(open_kept(kept, out, resume=options.resume))
        return kept


def rotation_facts(recipe: Recipe) -> list[Any]:
    """Return the names and fields of the modifiers that rotate the model before it is measured."""
    return [[type(one).__name__, *vars(one).items()] for one in recipe.rotations]


def require_shared(recipes: Sequence[tuple[Recipe, RecipeNeeds]], *, is_measured: bool) -> None:
    """Reject recipes that cannot be solved from the same statistics.

    Args:
        recipes: with what they need; unless `is_measured`, the run of the first one measures the statistics.
        is_measured: whether the first one is solved from them as well.

    Raises:
        RecipeError: naming what a recipe needs.
    """
    for recipe, needs in recipes if is_measured else recipes[1:]:
        needs.require_no_forward(recipe.source)
        first = recipes[0][0]
        if rotation_facts(recipe) != rotation_facts(first):
            what = f"{recipe.source} and {first.source} rotate the model differently"
            hint = "sweep them separately, or pass --propagate-error"
            raise RecipeError(f"{what}, so they have no statistics in common", hint=hint)


def begin(kept: KeptFolder | None, workplace: Workplace, num_bytes: int) -> None:
    """Prepare a directory of statistics for the steps that a run has not finished."""
    if kept is not None:
        kept.begin(len(workplace.journal.of_kind(journal.STEP)), num_bytes)
