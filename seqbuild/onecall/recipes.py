"""Choose the recipe of one call: the user's, or one made from the name of a scheme."""

from __future__ import annotations

from typing import TYPE_CHECKING

from runtime.recipe.named import known_algorithm, known_scheme, recipe_from_scheme, recipe_of

if TYPE_CHECKING:
    from runtime.artifact.manifest import Manifest
    from runtime.recipe.recipe import Recipe
    from seqbuild.onecall.options import QuantizeOptions

# Heads, routers, and towers and projectors for images and sounds: quantizing them saves little and loses much, and
# vLLM does not load quantized routers. llm-compressor's examples ignore the same modules.
NEVER_QUANTIZED = (
    "lm_head",
    r"re:.*\.(gate|router|shared_expert_gate)$",
    r"re:(.*\.)?(visual|vision_tower|vision_model|audio_tower|multi_modal_projector)\..*",
)


def require_recipe_name(options: QuantizeOptions) -> Recipe | None:
    """Check the scheme and the algorithm, or return the user's recipe, before the model is known.

    Raises:
        RecipeError, UsageError: naming the invalid value and the nearest valid one.
    """
    if options.recipe is not None:
        return recipe_of(options.recipe)
    known_scheme(str(options.scheme))
    known_algorithm(options.algorithm)
    return None


def choose_recipe(options: QuantizeOptions, manifest: Manifest) -> Recipe:
    """Return the recipe for a compiled model.

    Raises:
        RecipeError, UsageError: as `require_recipe_name`.
    """
    from runtime.formats.targets import matches_name

    found = require_recipe_name(options)
    if found is not None:
        return found
    modules = {name.rpartition(".")[0] for name in manifest.parameters}
    never = [pattern for pattern in NEVER_QUANTIZED if any(matches_name(pattern, name) for name in modules)]
    never += [name for name in _tied_heads(manifest) if not any(matches_name(pattern, name) for pattern in never)]
    return recipe_from_scheme(
        str(options.scheme),
        options.algorithm,
        targets=options.targets or ("Linear",),
        ignore=list(dict.fromkeys((*never, *options.ignore))),
    )


def _tied_heads(manifest: Manifest) -> list[str]:
    """Return the modules outside of the layers that share their weight with an embedding, whatever their names."""
    owners = {entry.tied_to for entry in manifest.parameters.values()}
    tied = {name for name, entry in manifest.parameters.items() if entry.tied_to or name in owners}
    outside = [entry for entry in manifest.subgraphs if not entry.targets]
    called = {name: None for entry in outside for name in entry.submodules}
    return [name for name in called if f"{name}.weight" in tied]
