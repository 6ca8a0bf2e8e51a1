"""Read the modifiers of a recipe file, which stand at its top level or in stages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from runtime.console import shown
from runtime.errors import RecipeError
from runtime.recipe.auto_bits_modifier import AutoBitsModifier
from runtime.recipe.auto_round_modifier import AutoRoundModifier
from runtime.recipe.fields import nearest, rejection, reported, require_table
from runtime.recipe.modifiers import GPTQModifier, QuantizationModifier
from runtime.recipe.rescaling_modifiers import AWQModifier, SmoothQuantModifier, Transform
from runtime.recipe.rotation_modifiers import QuIPModifier, Rotation, SpinQuantModifier
from runtime.recipe.yaml import Table, parse

# By name; modifiers that rotate come before those that rescale, and these before those that quantize.
_ROTATING: dict[str, type[Rotation]] = {"SpinQuantModifier": SpinQuantModifier, "QuIPModifier": QuIPModifier}
_QUANTIZING: dict[str, type[QuantizationModifier]] = {
    "QuantizationModifier": QuantizationModifier,
    "GPTQModifier": GPTQModifier,
    "AutoRoundModifier": AutoRoundModifier,
}
_RESCALING: dict[str, type[Transform]] = {"AWQModifier": AWQModifier, "SmoothQuantModifier": SmoothQuantModifier}
_SEARCHING = "AutoBitsModifier"
SUPPORTED = (*_QUANTIZING, _SEARCHING, *_RESCALING, *_ROTATING)
# By depth: how names of nested mappings end, and all keys.
_NESTED = ("_stage", "_modifiers", ())
_KEYS = ((*SUPPORTED, "*_stage", "args"), ("*_modifiers", "run_type"), SUPPORTED)


@dataclass(frozen=True, slots=True)
class Modifiers:
    """The modifiers of a recipe file by what they do, each in the order of the file."""

    quantizing: tuple[QuantizationModifier, ...]
    rescaling: tuple[Transform, ...]
    rotating: tuple[Rotation, ...]
    searching: AutoBitsModifier | None = None


def read_modifiers(text: str, origin: str) -> Modifiers:
    """Read the modifiers of a recipe file.

    Raises:
        RecipeError: for anything invalid or unsupported, with its line.
    """
    root = parse(text, origin=origin)
    if not isinstance(root, Table):
        what = "a list" if isinstance(root, list) else shown(root)
        raise RecipeError(f"{origin}:{getattr(root, 'line', 1)}: the file must be a mapping, not {what}")
    modifiers: list[QuantizationModifier] = []
    transforms: list[Transform] = []
    rotations: list[Rotation] = []
    searching: AutoBitsModifier | None = None
    stand_in: tuple[QuantizationModifier, ...] = ()
    with reported(root, origin):
        tables = list(_find_modifiers(root))
    for table in tables:
        with reported(table, origin):
            if table.name == _SEARCHING:
                if searching is not None:
                    raise rejection("the recipe has two modifiers {name}", hint="put all candidates into one of them")
                searching = AutoBitsModifier.model_validate(table)
                stand_in = (searching.stand_in(),)
            elif table.name in _QUANTIZING:
                modifiers.append(_QUANTIZING[table.name].model_validate(table))
            elif modifiers or searching is not None:
                last = modifiers[-1].name if modifiers else _SEARCHING
                verb = "rotate" if table.name in _ROTATING else "rescale"
                raise rejection(f"{{name}} comes after {last}", hint=f"{verb} before quantizing")
            elif table.name in _ROTATING:
                if transforms:
                    raise rejection(f"{{name}} comes after {transforms[-1].name}", hint="rotate before rescaling")
                if any(entry.name == table.name for entry in rotations):
                    raise rejection("the recipe has two modifiers {name}", hint="give one of them all rotations")
                rotations.append(_ROTATING[table.name].model_validate(table))
            else:
                kind = _RESCALING[table.name]
                rescaling, rounding = AWQModifier.split(table) if kind is AWQModifier else (table, [])
                transforms.append(kind.model_validate(rescaling))
                modifiers += [QuantizationModifier.model_validate(part) for part in rounding]
    if modifiers or searching is not None:
        return Modifiers((*stand_in, *modifiers), tuple(transforms), tuple(rotations), searching)
    if not transforms and not rotations:
        raise RecipeError(
            f"{origin}:{root.line}: the recipe has no modifier", hint=f"supported: {', '.join(SUPPORTED)}"
        )
    last, verb = (transforms[-1].name, "rescales") if transforms else (rotations[-1].name, "rotates")
    raise RecipeError(
        f"{origin}:{root.line}: {last} {verb} weights, but no modifier quantizes them",
        hint="add a QuantizationModifier or a GPTQModifier after it",
    )


def _find_modifiers(entries: Table, *location: str) -> Iterator[Table]:
    """Find modifiers at the top level, and in groups (`*_modifiers`) of stages (`*_stage`)."""
    depth = len(location)
    for key, value in entries.items():
        path = (*location, key)
        if key.endswith(_NESTED[depth]):
            yield from _find_modifiers(require_table(value, *path), *path)
        elif depth != 1 and key in SUPPORTED:
            yield require_table(value, *path)
        elif depth == 0 and key == "args":
            if value:
                raise rejection("args are not supported", key, hint="write the values where they are used")
        elif depth == 1 and key == "run_type":
            if value != "oneshot":
                raise rejection("{name} must be oneshot, not {value}", *path, value=value)
        else:
            # A modifier of llm-compressor that is not implemented is no misspelling.
            cutoff = 0.8 if key.endswith("Modifier") else 0.4
            raise rejection(f"{key!r} is not supported", *path, hint=nearest(key, _KEYS[depth], cutoff))
