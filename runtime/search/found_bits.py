"""The result of a search: the scheme of each group of modules, what it costs, and the plain recipe."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from runtime.console import human_bytes
from runtime.search.bit_groups import BitGroup

NATS = "nats"  # the unit of losses that are divergences
ERRORS = "squared output error"


@dataclass(frozen=True, kw_only=True, slots=True)
class UniformChoice:
    """What it costs to quantize all groups with one candidate.

    Attributes:
        candidate: its name.
        num_bytes: of the searched modules.
        bits: stored bits for each weight.
        loss: predicted.
    """

    candidate: str
    num_bytes: int
    bits: float
    loss: float


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundBits:
    """The result of a search.

    Attributes:
        candidates: their names.
        groups: the modules that have one scheme.
        losses: predicted, of each group with each candidate: the divergence of the model's predictions, in nats for
            each token, or without sensitivities the mean squared error of outputs.
        choice: the candidate of each group, by its index.
        budget: as it was given.
        most_bytes: that the searched modules may take.
        gap: see `runtime.algorithms.bit_allocation.Allocation`.
        num_other_bytes: of the tensors of the checkpoint that do not depend on the choice.
        unit: of losses.
        remarks: for the user, a line each.
        targets: of each candidate that is chosen for any module.
        recipe_text: the plain recipe.
    """

    candidates: Sequence[str]
    groups: Sequence[BitGroup]
    losses: Sequence[Sequence[float]]
    choice: Sequence[int]
    budget: str
    most_bytes: int
    gap: float
    num_other_bytes: int
    unit: str = NATS
    remarks: Sequence[str] = field(default=())
    targets: Mapping[str, Sequence[str]] = field(default_factory=dict)
    recipe_text: str = ""

    @property
    def num_weights(self) -> int:
        """Of all searched modules."""
        return sum(group.num_weights for group in self.groups)

    @property
    def num_bytes(self) -> int:
        """Of the tensors of the searched modules."""
        return sum(group.sizes[own] for group, own in zip(self.groups, self.choice, strict=True))

    @property
    def bits(self) -> float:
        """The stored bits for each weight of the searched modules."""
        return 8 * self.num_bytes / self.num_weights

    @property
    def loss(self) -> float:
        """Predicted, of the choice."""
        return sum(own[chosen] for own, chosen in zip(self.losses, self.choice, strict=True))

    def chosen(self, index: int) -> str:
        """Return the name of the candidate of a group."""
        return self.candidates[self.choice[index]]

    def uniform(self) -> list[UniformChoice]:
        """Return what each candidate costs alone."""
        found = []
        for place, name in enumerate(self.candidates):
            num_bytes = sum(group.sizes[place] for group in self.groups)
            bits, loss = 8 * num_bytes / self.num_weights, sum(own[place] for own in self.losses)
            found.append(UniformChoice(candidate=name, num_bytes=num_bytes, bits=bits, loss=loss))
        return found

    def lines(self) -> Iterator[str]:
        """Describe the choice: a line for each group, the totals, and the uniform schemes."""
        total = self.loss or 1.0
        rows = [("modules", "scheme", "bits", "loss", "share")]
        for index, group in enumerate(self.groups):
            bits = 8 * group.sizes[self.choice[index]] / group.num_weights
            loss = self.losses[index][self.choice[index]]
            rows.append((group_name(group), self.chosen(index), f"{bits:.2f}", f"{loss:.3g}", f"{loss / total:.1%}"))
        yield from _table(rows)
        yield ""
        whole = self.num_bytes + self.num_other_bytes
        gap = "the best choice" if not self.gap else f"at most {self.gap:.2%} from the best choice"
        yield (
            f"{self.bits:.3f} bits on average in {human_bytes(self.num_bytes)} of {human_bytes(whole)}; "
            f"predicted loss {self.loss:.4g} {self.unit}; {gap} for {self.budget}"
        )
        yield ""
        totals = [("all modules", "bits", "size", f"predicted {self.unit}")]
        totals += [
            (one.candidate, f"{one.bits:.3f}", human_bytes(one.num_bytes), f"{one.loss:.4g}") for one in self.uniform()
        ]
        totals.append(("this choice", f"{self.bits:.3f}", human_bytes(self.num_bytes), f"{self.loss:.4g}"))
        yield from _table(totals)


def group_name(group: BitGroup) -> str:
    """Name a group: its only module, or what its modules have in common and how they differ."""
    first, *others = group.modules
    if not others:
        return first
    owner = first.rpartition(".")[0]
    if all(name.rpartition(".")[0] == owner for name in others):
        return f"{owner}.{'/'.join(name.rpartition('.')[2] for name in group.modules)}"
    numbered = re.match(r"(.*?experts)\.", first)
    return f"{numbered[1] if numbered else first} ({len(group.modules)} modules)"


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *numbers in rows:
        cells = [
            f"{first:<{widths[0]}}",
            *(f"{cell:>{width}}" for cell, width in zip(numbers, widths[1:], strict=True)),
        ]
        yield "  ".join(cells).rstrip()
