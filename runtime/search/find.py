"""Find a scheme for each layer within a budget.

prepare     candidates, groups of modules that must have one scheme, and the bytes of each with each candidate
losses      all batches pass through the original model once; the loss of every row of a weight with each candidate
            follows from the Gram matrix of its inputs
weigh       by gradients, or by forwards with errors: how much the model's predictions depend on each output
allocate    an integer program chooses the candidate of each group
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from runtime.algorithms.bit_allocation import allocate, smallest_bytes
from runtime.checkpoint.dequantize import open_checkpoint
from runtime.console import human_bytes
from runtime.data.masks import require_tokens
from runtime.errors import DataError, RecipeError, UsageError
from runtime.experts.split import expert_of
from runtime.quantize.preparation import Prepared, prepare
from runtime.recipe.auto_bits_modifier import UNQUANTIZED
from runtime.recipe.bit_budget import BitBudget
from runtime.recipe.fields import reported
from runtime.recipe.recipe import some
from runtime.recipe.targeting import targeted_modules
from runtime.search.bit_groups import BitGroup, bit_groups
from runtime.search.candidates import CandidateJobs
from runtime.search.found_bits import FoundBits
from runtime.search.plain_recipe import chosen_targets, commented, plain_text
from runtime.search.weighed_losses import weighed_losses
from runtime.status import doing
from runtime.streaming.schedule import ModuleTensors, plan_steps

if TYPE_CHECKING:
    from runtime.recipe.auto_bits_modifier import AutoBitsModifier
    from runtime.recipe.recipe import Assignment, Recipe
    from runtime.search.options import BitSearch


def find_bits(search: BitSearch) -> FoundBits:
    """Find a scheme for each layer.

    Raises:
        SeqbuildError: before anything runs, for a budget that is too small and for arguments that do not fit.
    """
    if not search.batches:
        raise DataError("a search needs calibration data", hint="pass --data")
    require_tokens(search.batches)
    modifier, run_dtype = search.modifier, search.artifact.run_dtype(search.dtype)
    candidates = CandidateJobs(recipes=_candidate_recipes(search))
    doing("checking the weights")
    checkpoint = open_checkpoint(search.weights, plain=True)
    first = next(iter(candidates.recipes.values()))
    prepared = prepare(search.artifact, checkpoint, first, run_dtype, search.device, assign=candidates)
    _require_linear(prepared, modifier)
    jobs = [candidates.jobs.get(name) for name in modifier.candidates]
    groups = bit_groups(prepared, jobs)
    most, others = _most_bytes(search, prepared, groups, candidates)
    weighed = weighed_losses(search, prepared, candidates.jobs, groups, most)
    choice = allocate(weighed.losses, [group.sizes for group in groups], most)
    found = FoundBits(
        candidates=modifier.candidates,
        groups=groups,
        losses=weighed.losses,
        choice=choice.choice,
        budget=modifier.budget,
        most_bytes=most,
        gap=choice.gap,
        num_other_bytes=others,
        unit=weighed.unit,
        remarks=weighed.remarks,
    )
    known = targeted_modules(prepared.model, prepared.artifact.manifest, first)
    mixtures = {name: mixture for name, (mixture, _) in expert_of(prepared.artifact).items()}
    targets = chosen_targets(found, list(known), mixtures)
    text = commented(found) + plain_text(search.recipe, modifier, targets)
    return replace(found, targets=targets, recipe_text=text)


def _require_linear(prepared: Prepared, modifier: AutoBitsModifier) -> None:
    """Reject embeddings, which have no inputs to measure."""
    tables = [name for name in prepared.jobs if not isinstance(prepared.model.get_submodule(name), nn.Linear)]
    if tables:
        raise RecipeError(
            f"{modifier.name} targets {some(tables)}, and a search compares errors of Linear modules only",
            hint="quantize embeddings with a QuantizationModifier of their own",
        )


def _candidate_recipes(search: BitSearch) -> dict[str, Recipe]:
    """Return a recipe for each candidate that quantizes, and last for the scheme whose size is the budget."""
    modifier, scheme = search.modifier, BitBudget.parse(search.modifier.budget).scheme
    names = [name for name in (*modifier.candidates, scheme) if name is not None and name != UNQUANTIZED]
    found = {}
    for name in names:
        with reported(modifier.table, search.recipe.source):
            found[name] = replace(search.recipe, modifiers=(modifier.with_candidate(name),), transforms=(), search=None)
    return found


def _most_bytes(
    search: BitSearch, prepared: Prepared, groups: Sequence[BitGroup], candidates: CandidateJobs
) -> tuple[int, int]:
    """Return the most bytes of the searched modules, and the bytes of all other tensors of the checkpoint.

    Raises:
        UsageError: no choice is so small.
    """
    schedule = plan_steps(prepared.artifact, prepared.source, prepared.jobs, [])
    everything = sum(stored.num_bytes for stored in schedule.outputs(prepared.weights.checkpoint.directory))
    others = everything - _num_bytes(prepared, prepared.jobs)
    budget, num_weights = BitBudget.parse(search.modifier.budget), sum(group.num_weights for group in groups)
    if budget.scheme is not None:
        most = _num_bytes(prepared, candidates.jobs[budget.scheme])
    elif budget.bits is not None:
        most = int(budget.bits * num_weights / 8)
    else:
        assert budget.num_bytes is not None, "a budget has one number"
        most = budget.num_bytes - others
    sizes = [group.sizes for group in groups]
    least = smallest_bytes([[0.0] * len(own) for own in sizes], sizes)
    if least <= most:
        _require_choice(search.modifier, sizes, most)
        return most, others
    bits, num_bytes = math.ceil(8000 * least / num_weights) / 1000, least + others
    smallest = f"{num_bytes} bytes ({human_bytes(num_bytes)})" if budget.num_bytes is not None else f"{bits}bits"
    raise UsageError(
        f"the budget {budget.text} is too small: the smallest possible with these candidates is {smallest}",
        hint="raise the budget, or add a smaller candidate",
    )


def _require_choice(modifier: AutoBitsModifier, sizes: Sequence[Sequence[int]], most: int) -> None:
    """Reject a budget in which all modules fit as they are: no loss is smaller, and the recipe would quantize none."""
    if UNQUANTIZED not in modifier.candidates:
        return
    index = modifier.candidates.index(UNQUANTIZED)
    if sum(own[index] for own in sizes) <= most:
        raise UsageError(
            f"the budget {modifier.budget} leaves every searched module unquantized, so there is nothing to choose",
            hint=f"lower the budget, or remove {UNQUANTIZED} from the candidates",
        )


def _num_bytes(prepared: Prepared, jobs: Mapping[str, Assignment]) -> int:
    """Return the bytes of all searched modules with one assignment."""
    tensors = ModuleTensors(prepared.source)
    return sum(stored.num_bytes for name, job in jobs.items() for stored in tensors.of(name, job))
