"""Write the choice of a search as a plain recipe, which can be edited and run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from runtime.recipe.auto_bits_modifier import UNQUANTIZED, AutoBitsModifier
from runtime.recipe.yaml import in_blocks
from runtime.search.compact_targets import compact_targets

if TYPE_CHECKING:
    from runtime.recipe.recipe import Recipe
    from runtime.search.found_bits import FoundBits

Targets = Mapping[str, Sequence[str]]


def chosen_targets(found: FoundBits, linears: Sequence[str], mixtures: Mapping[str, str]) -> dict[str, list[str]]:
    """Return targets of each candidate that is chosen for any module.

    Args:
        found: the choice.
        linears: the names of all modules that a target could match.
        mixtures: for modules of experts the name of their mixture.
    """
    names: dict[str, list[str]] = {name: [] for name in found.candidates}
    for index, group in enumerate(found.groups):
        names[found.chosen(index)] += group.modules
    return {name: compact_targets(own, linears, mixtures) for name, own in names.items() if own}


def plain_text(recipe: Recipe, modifier: AutoBitsModifier, targets: Targets) -> str:
    """Return the recipe in which a plain modifier with these targets replaces the one that asked for a search."""
    ignore = [*map(str, modifier.ignore), *targets.get(UNQUANTIZED, ())]
    quantized = {name: own for name, own in targets.items() if name != UNQUANTIZED}
    entries = [{type(other).__name__: other.table} for other in (*recipe.rotations, *recipe.transforms)]
    entries += [modifier.plain(quantized, ignore)] if quantized else []
    entries += [{type(other).__name__: other.table} for other in recipe.modifiers[1:]]
    if len(entries) == 1:
        return in_blocks(entries[0])
    stages = ({f"stage_{number}_stage": {"default_modifiers": entry}} for number, entry in enumerate(entries))
    return "".join(map(in_blocks, stages))


CHOSEN = "Chosen by a search for"  # in the first line of a recipe


def commented(found: FoundBits) -> str:
    """Return comments that describe the choice."""
    return "".join(f"# {line}\n" for line in _comments(found))


def _comments(found: FoundBits) -> Iterator[str]:
    yield f"{CHOSEN} {found.budget}: {found.bits:.3f} bits for each quantized weight, scales included."
    yield f"Predicted loss: {found.loss:.3g} {found.unit}. With one scheme for all of these modules:"
    for one in found.uniform():
        yield f"  {one.candidate}: {one.bits:.3f} bits, predicted loss {one.loss:.3g}"
