"""The loss of each group of modules with each candidate: errors of rows, weighed by sensitivities."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from runtime.algorithms.output_fisher import predicted_divergence
from runtime.data.batches import split_batches
from runtime.data.lanes import Lanes
from runtime.recipe.auto_bits_modifier import UNQUANTIZED
from runtime.saved_statistics.store import StatisticsStore, statistics_identity
from runtime.search.found_bits import ERRORS, NATS
from runtime.search.loss_pass import LossPass
from runtime.search.sensitivity_pass import NoGradientError
from runtime.search.stand_in_errors import StandInErrors

if TYPE_CHECKING:
    from runtime.algorithms.output_fisher import OutputGradients
    from runtime.quantize.preparation import Prepared
    from runtime.recipe.recipe import Assignment
    from runtime.search.bit_groups import BitGroup
    from runtime.search.options import BitSearch
    from runtime.search.row_losses import RowLosses

_TOKENS_OF_GRADIENTS = 2**15  # that the samples for gradients have together, by default
_TOKENS_WITH_ERRORS = 2**12  # the same for forwards with errors, of which there is one for each group


@dataclass(frozen=True, kw_only=True, slots=True)
class WeighedLosses:
    """The losses of groups.

    Attributes:
        losses: of each group with each candidate.
        unit: of the losses.
        remarks: for the user, a line each.
    """

    losses: Sequence[Sequence[float]]
    unit: str
    remarks: Sequence[str] = ()


def weighed_losses(
    search: BitSearch,
    prepared: Prepared,
    jobs: Mapping[str, Mapping[str, Assignment]],
    groups: Sequence[BitGroup],
    most_bytes: int,
) -> WeighedLosses:
    """Measure the losses of groups.

    Args:
        search: what is searched.
        prepared: the model.
        jobs: the assignments of each candidate that quantizes.
        groups: the modules of each group, and their sizes.
        most_bytes: the budget of all groups.

    Raises:
        QuantizationError: a module cannot be quantized, or the model has no logits by which errors could be weighed.
    """
    modifier, names = search.modifier, [name for name in search.modifier.candidates if name != UNQUANTIZED]
    lanes = Lanes.of(prepared.artifact.manifest, search.batches)
    by_gradient = modifier.sensitivity == "gradient"
    measured = LossPass(
        prepared=prepared,
        candidates=[jobs[name] for name in names],
        lanes=lanes,
        device=search.device,
        samples=_samples(search, prepared, lanes, _TOKENS_OF_GRADIENTS) if by_gradient else [],
        budget=search.activation_memory,
        progress=search.progress,
        saved=_saved_statistics(search, prepared),
    )
    rows = measured.forward()
    plain = [
        [sum(_squares(rows, own, place) for own in group.modules) for place in range(len(names))] for group in groups
    ]
    remarks = []
    if by_gradient:
        try:
            known = _of_all(groups, rows, _shares(measured.backward(), measured.all_tokens))
            found = [
                [_divergence(group, rows, known, place, measured.num_tokens) for place in range(len(names))]
                for group in groups
            ]
            return WeighedLosses(losses=_with_unquantized(search, names, found), unit=NATS)
        except NoGradientError as error:
            remarks.append(f"warning: errors are weighed by forwards, because no gradient reaches all modules: {error}")
            search.progress(remarks[-1])
    elif modifier.sensitivity == "none":
        mean = [[loss / max(measured.num_tokens, 1) for loss in own] for own in plain]
        return WeighedLosses(losses=_with_unquantized(search, names, mean), unit=ERRORS)
    reference = names.index(_reference(search, groups, most_bytes))
    divergences = _divergences(search, prepared, lanes, groups, measured, rows, reference)
    found = [
        [divergence * loss / (own[reference] or 1.0) for loss in own]
        for own, divergence in zip(plain, divergences, strict=True)
    ]
    return WeighedLosses(losses=_with_unquantized(search, names, found), unit=NATS, remarks=remarks)


def _with_unquantized(search: BitSearch, names: Sequence[str], losses: Sequence[Sequence[float]]) -> list[list[float]]:
    """Add the candidate that loses nothing."""
    places = {name: place for place, name in enumerate(names)}
    wanted = search.modifier.candidates
    return [[own[places[name]] if name in places else 0.0 for name in wanted] for own in losses]


def _samples(search: BitSearch, prepared: Prepared, lanes: Lanes, num_tokens: int) -> list[dict[str, Any]]:
    """Choose samples, evenly spread over the data, one in each batch."""
    whole = lanes.batches()
    batches = split_batches(prepared.artifact.manifest, whole, 1) or whole
    count = search.modifier.sensitivity_samples
    if count is None:
        count = max(num_tokens // max(next(iter(batch.values())).numel() for batch in batches), 1)
    count = min(count, len(batches))
    return [batches[place * len(batches) // count] for place in range(count)]


def _saved_statistics(search: BitSearch, prepared: Prepared) -> StatisticsStore | None:
    """Open the saved statistics.

    Raises:
        DataError: they are damaged, or of another model.
    """
    if search.statistics is None:
        return None
    dtype = search.artifact.run_dtype(search.dtype)
    identity = statistics_identity(search.artifact, prepared.weights.checkpoint, dtype)
    store = StatisticsStore.open(search.statistics)
    store.require_same(identity, len(prepared.artifact.subgraphs))
    return store


def _shares(found: Mapping[str, OutputGradients], all_tokens: Collection[str]) -> dict[str, torch.Tensor]:
    """Return the mean squares of gradients; for losses over all tokens, times the part that is routed to the expert."""
    most = max((entry.num_tokens for entry in found.values()), default=1)
    means = {name: entry.mean_O().cpu() for name, entry in found.items() if entry.num_tokens}
    return {
        name: mean_O * (found[name].num_tokens / most) if name in all_tokens else mean_O
        for name, mean_O in means.items()
    }


def _of_all(groups: Sequence[BitGroup], rows: RowLosses, known: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the sensitivity of each module: that of an expert that no sample reaches is the mean of the others.

    Raises:
        NoGradientError: a module with errors has none, and is no expert.
    """
    sensitivities = {}
    for group in groups:
        for name in group.modules:
            size = len(rows[name][0])
            own = name.rpartition(".")[2]
            alike = [known[one] for one in group.modules if one in known and one.rpartition(".")[2] == own]
            if name in known:
                sensitivities[name] = known[name]
            elif alike:
                sensitivities[name] = torch.stack(alike).mean(dim=0)
            elif any(bool(loss_O.any()) for loss_O in rows[name]):
                raise NoGradientError(f"{name} received none")
            else:
                sensitivities[name] = torch.zeros(size, dtype=torch.float64)
    return sensitivities


def _divergence(
    group: BitGroup, rows: RowLosses, sensitivities: Mapping[str, torch.Tensor], place: int, num_tokens: int
) -> float:
    return sum(predicted_divergence(rows[name][place], sensitivities[name], num_tokens) for name in group.modules)


def _squares(rows: RowLosses, name: str, place: int) -> float:
    return float(rows[name][place].sum(dtype=torch.float64))


def _reference(search: BitSearch, groups: Sequence[BitGroup], most_bytes: int) -> str:
    """Return the candidate whose errors stand for those of all: the largest one within the budget, or the smallest."""
    names = enumerate(search.modifier.candidates)
    sizes = {name: sum(group.sizes[place] for group in groups) for place, name in names if name != UNQUANTIZED}
    fitting = [name for name in sizes if sizes[name] <= most_bytes]
    return max(fitting, key=lambda name: sizes[name]) if fitting else min(sizes, key=lambda name: sizes[name])


def _divergences(
    search: BitSearch,
    prepared: Prepared,
    lanes: Lanes,
    groups: Sequence[BitGroup],
    measured: LossPass,
    rows: RowLosses,
    place: int,
) -> list[float]:
    """Return the divergence that the errors of each group cause with one candidate, in nats for each token."""
    noise = {
        name: (rows[name][place] / max(measured.tokens.get(name, 0), 1)).sqrt()
        for group in groups
        for name in group.modules
    }
    errors = StandInErrors(
        prepared=prepared,
        groups=[group.modules for group in groups],
        noise=noise,
        samples=_samples(search, prepared, lanes, _TOKENS_WITH_ERRORS),
        device=search.device,
        budget=search.activation_memory,
    )
    for step in measured.loaded(measured.steps, "errors"):
        errors.run(step)
    errors.close()
    return errors.divergences
