"""Apply the rescalings of a step, with factors computed from its input statistics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from runtime.quantize.proof import require_same_output
from runtime.quantize.smoothing import Rescaled, find_scales
from runtime.recipe.recipe import some
from runtime.workers.agreement import agreed
from runtime.workers.division import Division

if TYPE_CHECKING:
    from runtime.quantize.mappings import Rescaling
    from runtime.quantize.statistics import InputStatistics
    from runtime.recipe.rescaling_modifiers import Transform
    from runtime.streaming.work import Work

Statistics = Mapping[str, "InputStatistics"]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Measured:
    """A group to rescale, and the statistics of its inputs; the first entry decides the factors."""

    transform: Transform
    rescaling: Rescaling
    entries: Sequence[InputStatistics]

    @property
    def read(self) -> set[str]:
        """The parameters that the search reads."""
        return {f"{name}.weight" for name in self.rescaling.group.modules}

    @property
    def changed(self) -> set[str]:
        """The parameters that the rescaling changes."""
        group = self.rescaling.group
        return self.read | {group.producer, group.bias, *(other.name for other in group.others)}


def _independent(pending: Sequence[_Measured]) -> Iterator[_Measured]:
    """Yield the first groups as far as their searches read nothing that an earlier one of them changes."""
    changed: set[str] = set()
    scaled: set[int] = set()
    for place, one in enumerate(pending):
        entries = {id(entry) for entry in one.entries}
        if place and (one.rescaling.is_unproven or changed & one.read or scaled & entries):
            return
        yield one
        if one.rescaling.is_unproven:
            return
        changed |= one.changed
        scaled |= entries


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
        pending = []
        for transform, rescaling in rescalings:
            measured = [
                (name, found[name])
                for found in (representatives, statistics)
                for name in rescaling.group.modules
                if name in found
            ]
            entries = [entry for _, entry in _each_once(measured)]
            if not entries or not entries[0].num_tokens:
                self._unreached.setdefault(transform.name, []).extend(rescaling.group.modules)
                continue
            pending.append(_Measured(transform=transform, rescaling=rescaling, entries=entries))
        while pending:
            together = list(_independent(pending))
            del pending[: len(together)]
            for one, scale_I in zip(together, self._searched(together), strict=True):
                self._apply(one, scale_I)

    def _searched(self, together: Sequence[_Measured]) -> list[torch.Tensor]:
        """Find the factors of groups that do not depend on each other; each is searched by one worker.

        AWQ searches on the worker that has the Gram matrix.
        """
        workers = self.work.workers
        division = Division(workers.size)
        found: list[torch.Tensor] = []
        owners: list[int] = []
        with agreed(workers):
            for one in together:
                first, group = one.entries[0], one.rescaling.group
                is_awq = one.transform.algorithm == "awq"
                owners.append(first.owner if is_awq else division.assign(first.num_in_features))
                if owners[-1] == workers.rank:
                    names = (name for name in group.modules if name in self.rescaled.jobs)
                    dtypes = {name: self.work.scale_dtype(name) for name in names}
                    found.append(find_scales(one.transform, group, self.rescaled, first, dtypes).contiguous())
                else:
                    found.append(torch.empty(first.num_in_features, device=first.device))
        for scale_I, owner in zip(found, owners, strict=True):
            workers.broadcast(scale_I, owner)
        return found

    def _apply(self, one: _Measured, scale_I: torch.Tensor) -> None:
        group, rescaling = one.rescaling.group, one.rescaling
        before = self.rescaled.copy() if rescaling.is_unproven else None
        used_I = self.rescaled.apply(group, scale_I)
        if before is not None:
            where = f"{self.source}:{one.transform.line}: the mapping of {group.producer.removesuffix('.weight')}"
            require_same_output(self.work, before, self.rescaled, where)
        for entry in one.entries:
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
