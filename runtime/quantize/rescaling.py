"""Apply the rescalings of a step, with factors computed from its input statistics."""

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
    """The rescalings of a step; `source` is the recipe's name, for messages.

    Batches always run through the original model, so statistics that are measured later are divided by the factors of
    earlier rescalings.
    """

    def __init__(self, work: Work, rescaled: Rescaled, source: str) -> None:
        self.work = work
        self.rescaled = rescaled
        self.source = source
        self._divided: dict[str, list[torch.Tensor]] = {}
        self._unreached: dict[str, list[str]] = {}

    def adjust(self, statistics: Statistics) -> None:
        """Divide newly measured statistics by the factors of earlier rescalings."""
        for name, entry in _each_once(statistics.items()):
            for factor_I in self._divided.get(name, ()):
                entry.scale(factor_I)

    def rescale(
        self, rescalings: Iterable[tuple[Transform, Rescaling]], statistics: Statistics, representatives: Statistics
    ) -> None:
        """Rescale groups, in order.

        Args:
            rescalings: the groups, with the modifiers that rescale them.
            statistics: input statistics of modules; those of rescaled groups are divided.
            representatives: the same for modules that were measured for all that read the same tensor.
        """
        for transform, rescaling in rescalings:
            group = rescaling.group
            measured = [
                (name, found[name])
                for found in (representatives, statistics)
                for name in group.modules
                if name in found
            ]
            entries = [entry for _, entry in _each_once(measured)]
            if not entries or not entries[0].num_tokens:
                self._unreached.setdefault(transform.name, []).extend(group.modules)
                continue
            dtypes = {name: self.work.scale_dtype(name) for name in group.modules if name in self.rescaled.jobs}
            scale_I = find_scales(transform, group, self.rescaled, entries[0], dtypes)
            before = self.rescaled.copy() if rescaling.is_unproven else None
            used_I = self.rescaled.apply(group, scale_I)
            if before is not None:
                where = f"{self.source}:{transform.line}: the mapping of {group.producer.removesuffix('.weight')}"
                require_same_output(self.work, before, self.rescaled, where)
            for entry in entries:
                entry.scale(used_I)
            for name in group.modules:
                self._divided.setdefault(name, []).append(used_I)

    def warn_of_unreached(self) -> None:
        """Warn of groups that no token has reached."""
        for modifier, names in self._unreached.items():
            self.work.warnings.append(
                f"warning: {modifier} does not rescale the inputs of {some(names)}: no token reached them"
            )


def _each_once(found: Iterable[tuple[str, InputStatistics]]) -> Sequence[tuple[str, InputStatistics]]:
    """Return each entry once, under the first of its names."""
    return list({id(entry): (name, entry) for name, entry in reversed(list(found))}.values())[::-1]
