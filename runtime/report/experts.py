"""The number of calibration tokens that reached each expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runtime.report.facts import ReportedModule
from runtime.report.places import places

_FEW = 0.1  # of the mean of a layer
_MOST_LISTED = 50
_MOST_CELLS = 200_000


@dataclass(frozen=True, kw_only=True, slots=True)
class RareExpert:
    """An expert that saw few tokens or none; `share` is that of the mean of its layer's experts."""

    layer: int
    expert: int
    tokens: int
    share: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertTokens:
    """The tokens of the experts of one kind of mixture.

    Attributes:
        mixture: its name.
        layers, experts: numbers of the rows and columns.
        counts: by layer and expert, None where there is no such expert.
        total: the largest number of tokens of an expert.
        is_same: whether all experts saw the same number of tokens.
        rare: those that saw few tokens or none, the fewest first.
        num_unused, num_rare: how many saw none, and few.
    """

    mixture: str
    layers: Sequence[int]
    experts: Sequence[int]
    counts: Sequence[Sequence[int | None]]
    total: int
    is_same: bool
    rare: Sequence[RareExpert]
    num_unused: int
    num_rare: int


def expert_tokens(modules: Sequence[ReportedModule]) -> list[ExpertTokens]:
    """Count the tokens of the experts of each mixture; the modules of one expert read the same tokens."""
    found = places(module.name for module in modules)
    groups: dict[tuple[str, str], dict[tuple[int, int], int]] = {}
    for module in modules:
        place = found[module.name]
        if place.expert >= 0:
            counts = groups.setdefault((place.stack, place.mixture), {})
            key = (place.layer, place.expert)
            counts[key] = max(counts.get(key, 0), module.num_tokens)
    tables = [_table(f"{stack}.{mixture}" if stack else mixture, counts) for (stack, mixture), counts in groups.items()]
    return [table for table in tables if table is not None and table.total][:4]


def _table(name: str, counts: dict[tuple[int, int], int]) -> ExpertTokens | None:
    layers = sorted({layer for layer, _ in counts})
    experts = sorted({expert for _, expert in counts})
    if len(layers) * len(experts) > _MOST_CELLS:
        return None
    rows = [[counts.get((layer, expert)) for expert in experts] for layer in layers]
    rare = []
    for layer, row in zip(layers, rows, strict=True):
        seen = [tokens for tokens in row if tokens is not None]
        mean = sum(seen) / len(seen)
        for expert, tokens in zip(experts, row, strict=True):
            if tokens is not None and tokens < _FEW * mean:
                rare.append(RareExpert(layer=layer, expert=expert, tokens=tokens, share=tokens / mean))
    rare.sort(key=lambda one: (one.tokens, one.share, one.layer, one.expert))
    return ExpertTokens(
        mixture=name,
        layers=layers,
        experts=experts,
        counts=rows,
        total=max(counts.values()),
        is_same=len(set(counts.values())) == 1,
        rare=rare[:_MOST_LISTED],
        num_unused=sum(not tokens for tokens in counts.values()),
        num_rare=len(rare),
    )
