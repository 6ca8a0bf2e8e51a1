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


def plain_recipe(
    recipe: Recipe, modifier: AutoBitsModifier, found: FoundBits, linears: Sequence[str], mixtures: Mapping[str, str]
) -> str:
    """Return the text of the recipe in which the choice replaces the modifier that asked for it.

    Args:
        recipe: that was searched for; its other modifiers are kept.
        modifier: that asked.
        found: the choice.
        linears: the names of all modules that a target could match.
        mixtures: for modules of experts the name of their mixture.
    """
    names: dict[str, list[str]] = {name: [] for name in found.candidates}
    for index, group in enumerate(found.groups):
        names[found.chosen(index)] += group.modules
    targets = {name: compact_targets(own, linears, mixtures) for name, own in names.items() if own}
    ignore = [*map(str, modifier.ignore), *targets.pop(UNQUANTIZED, ())]
    entries = [{type(other).__name__: other.table} for other in (*recipe.rotations, *recipe.transforms)]
    entries += [modifier.plain(targets, ignore)] if targets else []
    entries += [{type(other).__name__: other.table} for other in recipe.modifiers]
    stages = (
        in_blocks({f"stage_{number}_stage": {"default_modifiers": entry}}) for number, entry in enumerate(entries)
    )
    text = in_blocks(entries[0]) if len(entries) == 1 else "".join(stages)
    return "".join(f"# {line}\n".replace("#  \n", "#\n") for line in _comments(found)) + text


def _comments(found: FoundBits) -> Iterator[str]:
    """Describe the choice, with as many numbers as have a meaning."""
    yield f"Chosen by a search for {found.budget}: {found.bits:.3f} bits for each quantized weight, scales included."
    yield f"Predicted loss: {found.loss:.3g} {found.unit}. With one scheme for all of these modules:"
    for one in found.uniform():
        yield f"  {one.candidate}: {one.bits:.3f} bits, predicted loss {one.loss:.3g}"
