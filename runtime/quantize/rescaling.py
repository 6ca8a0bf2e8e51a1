"""Carry out the rescalings of a step: the ones that a recipe's modifiers ask for, on what was measured so far."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from runtime.quantize.proof import require_same_output
from runtime.quantize.smoothing import Rescaled, find_scales
from runtime.recipe.recipe import some

if TYPE_CHECKING:
    import torch

    from runtime.quantize.mappings import Rescaling
    from runtime.quantize.statistics import InputStatistics
    from runtime.recipe.modifiers import Transform
    from runtime.streaming.work import Work

Statistics = Mapping[str, "InputStatistics"]


class StepRescaler:
    """What has been rescaled in a step, and what is known of the inputs of its modules.

    Batches run through the model as it was, so whatever is measured later is divided by what its modules' inputs have
    been divided by before.

    Args:
        work: the step.
        rescaled: its parameters.
        source: the recipe's name, for messages.
    """

    def __init__(self, work: Work, rescaled: Rescaled, source: str) -> None:
        self.work = work
        self.rescaled = rescaled
        self.source = source
        self._divided: dict[str, list[torch.Tensor]] = {}
        self._unseen: dict[str, list[str]] = {}

    def adjust(self, statistics: Statistics) -> None:
        """Make what was measured just now that of the inputs as they are by now."""
        for name, entry in _each_once(statistics.items()):
            for factor_I in self._divided.get(name, ()):
                entry.scale(factor_I)

    def rescale(
        self, rescalings: Iterable[tuple[Transform, Rescaling]], statistics: Statistics, witnesses: Statistics
    ) -> None:
        """Rescale groups, in order.

        Args:
            rescalings: the groups, and the modifiers that ask for it.
            statistics: of modules' inputs; those of groups that are rescaled are divided.
            witnesses: likewise, of modules that were measured for all that read the same tensor.
        """
        for transform, rescaling in rescalings:
            group = rescaling.group
            measured = [
                (name, found[name]) for found in (witnesses, statistics) for name in group.modules if name in found
            ]
            entries = [entry for _, entry in _each_once(measured)]
            if not entries or not entries[0].num_tokens:
                self._unseen.setdefault(transform.name, []).extend(group.modules)
                continue
            dtypes = {name: self.work.scale_dtype(name) for name in group.modules if name in self.rescaled.jobs}
            scale_I = find_scales(transform, group, self.rescaled, entries[0], dtypes)
            before = self.rescaled.copy() if rescaling.is_named else None
            used_I = self.rescaled.apply(group, scale_I)
            if before is not None:
                where = f"{self.source}:{transform.line}: the mapping of {group.producer.removesuffix('.weight')}"
                require_same_output(self.work, before, self.rescaled, where)
            for entry in entries:
                entry.scale(used_I)
            for name in group.modules:
                self._divided.setdefault(name, []).append(used_I)

    def say_what_was_left(self) -> None:
        """Warn of groups that no token has reached."""
        for modifier, names in self._unseen.items():
            self.work.warnings.append(
                f"warning: {modifier} does not rescale the inputs of {some(names)}: no token reached them"
            )


def _each_once(found: Iterable[tuple[str, InputStatistics]]) -> Sequence[tuple[str, InputStatistics]]:
    """Each sum under the first of its names."""
    return list({id(entry): (name, entry) for name, entry in reversed(list(found))}.values())[::-1]
