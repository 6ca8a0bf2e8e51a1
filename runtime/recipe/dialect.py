"""The recipe's dialect: what llm-compressor's modifiers accept, read with the line of every value.

What this project does not do is never skipped in silence: each field of the peer's modifiers is either
obeyed, or accepted because its value changes nothing, or refused by name with the reason.

Modifiers that rescale (AWQModifier, SmoothQuantModifier; `recipe_transforms`) stand before those that round.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from runtime.console import shown
from runtime.errors import RecipeError
from runtime.recipe.fields import (
    Pattern,
    as_number,
    read_args,
    read_observers,
    read_patterns,
    read_targets,
    read_whole,
    reason_of,
    require_no_op,
    with_observers,
)
from runtime.recipe.key_value_cache import AttentionGroup, CacheSchemes, read_cache
from runtime.recipe.transforms import TRANSFORMS, Transform, read_transform
from runtime.recipe.yaml import Value

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

Algorithm = Literal["rtn", "gptq"]

ALGORITHMS: dict[str, Algorithm] = {"QuantizationModifier": "rtn", "GPTQModifier": "gptq"}
OFFERED = (*ALGORITHMS, *TRANSFORMS)

# The peer's other modifiers, to tell what is not there yet from what is misspelt.
FOREIGN_MODIFIERS = (
    "AutoRoundModifier",
    "ConstantPruningModifier",
    "IMatrixGatherer",
    "LogarithmicEqualizationModifier",
    "MagnitudePruningModifier",
    "QuIPModifier",
    "SparseGPTModifier",
    "SpinQuantModifier",
    "WandaPruningModifier",
)

SCHEME_FIELDS = (
    "targets",
    "scheme",
    "config_groups",
    "kv_cache_scheme",
    "weight_observer",
    "input_observer",
    "observer",
    "sequential_targets",
)
FIELDS = (*SCHEME_FIELDS, "ignore", "min_tokens")
GPTQ_FIELDS = ("dampening_frac", "block_size", "actorder", "batched_quantization", "fallback", "refine")
GROUP_FIELDS = ("targets", "weights", "input_activations", "output_activations", "format")
DEFAULT_TARGETS = ("Linear",)

_TRAINING = "schedules belong to training"
_STATE = "it is a modifier's state, not a setting"

# Fields of the peer's modifiers that are not implemented: the values that change nothing, and the reason.
NO_OPS: dict[str, tuple[tuple[Any, ...], str]] = {
    "output_observer": ((None,), "outputs are not quantized"),
    "bypass_divisibility_checks": ((False,), "a weight whose last group is not full cannot be packed"),
    "requires_calibration_data": ((True, False), "it must be true or false, and follows from the algorithm"),
    "index": ((None,), _TRAINING),
    "group": ((None,), _TRAINING),
    "start": ((None,), _TRAINING),
    "end": ((None,), _TRAINING),
    "update": ((None,), _TRAINING),
    "initialized_": ((False,), _STATE),
    "finalized_": ((False,), _STATE),
    "started_": ((False,), _STATE),
    "ended_": ((False,), _STATE),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GptqOptions:
    """The options of GPTQ, named as in `quantize_siblings`; `fallback` is the method to use if it fails, `refine` the
    number of sweeps of refinement afterwards.
    """

    dampening_frac: float
    block_size: int
    actorder: str | None
    fallback: str | None = None
    refine: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Targets that share a scheme. `options` is `None` for an algorithm without any."""

    scheme: QuantizationScheme
    targets: tuple[Pattern, ...]
    options: GptqOptions | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Modifier:
    """An algorithm with its groups of targets, patterns of modules that it leaves alone, the scheme of the key-value
    cache, those of attention, and how many tokens each module must have seen.
    """

    algorithm: Algorithm
    groups: tuple[Group, ...]
    ignore: tuple[str, ...]
    sequential_targets: tuple[str, ...]
    name: str
    line: int
    cache: QuantizationArgs | None = None
    attention: tuple[AttentionGroup, ...] = ()
    min_tokens: int = 0


def read_modifiers(root: Value) -> tuple[tuple[Modifier, ...], tuple[Transform, ...]]:
    """All modifiers of a recipe in the file's order: those that round, and those that rescale before.

    Raises:
        RecipeError: for anything that cannot be obeyed, with its line.
    """
    modifiers: list[Modifier] = []
    transforms: list[Transform] = []
    for value in _find_modifiers(root):
        if value.name in ALGORITHMS:
            modifiers.append(_read_modifier(value, value.mapping()))
            continue
        if modifiers:
            raise value.error(f"{value.name} comes after {modifiers[-1].name}", hint="rescale before rounding")
        fields = value.mapping()
        is_awq = value.name == "AWQModifier"
        # In the dialect's older form an AWQModifier rounds its modules, too, and says which it leaves unrounded.
        rounds = is_awq and any(name in fields for name in ("scheme", "config_groups"))
        other = (*(SCHEME_FIELDS if is_awq else ()), *(("ignore",) if rounds else ()))
        transforms.append(read_transform(value, {name: f for name, f in fields.items() if name not in other}))
        own = {name: field for name, field in fields.items() if name in (*FIELDS, *NO_OPS)}
        if rounds:
            modifiers.append(_read_modifier(value, own))
        elif any(name in fields for name in SCHEME_FIELDS):
            raise next(fields[name] for name in SCHEME_FIELDS if name in fields).error(
                f"{value.name} has no scheme", hint="the modifier after it says what modules are rounded to"
            )
    if not modifiers and not transforms:
        raise root.error("the recipe names no modifier", hint=f"offered are {', '.join(OFFERED)}")
    if not modifiers:
        raise root.error(
            f"{transforms[-1].name} rescales weights, and nothing rounds them",
            hint="add a QuantizationModifier or a GPTQModifier after it",
        )
    return tuple(modifiers), tuple(transforms)


def _find_modifiers(root: Value) -> Iterator[Value]:
    """The modifiers at the top of the file and in its stages."""
    for value in root.mapping().values():
        if value.name.endswith("_stage"):
            yield from _find_in_stage(value)
        elif value.name == "args":
            if value.plain():
                raise value.error("args are not offered", hint="write the values where they are used")
        elif _is_modifier(value, other=("*_stage", "args")):
            yield value


def _find_in_stage(stage: Value) -> Iterator[Value]:
    for value in stage.mapping().values():
        if value.name.endswith("_modifiers"):
            yield from (entry for entry in value.mapping().values() if _is_modifier(entry))
        elif value.name == "run_type":
            if value.plain() != "oneshot":
                raise value.error(f"run_type {shown(value.plain())} is not offered", hint="recipes run as oneshot")
        else:
            raise value.unknown("key", ("*_modifiers", "run_type"))


def _is_modifier(value: Value, *, other: tuple[str, ...] = ()) -> bool:
    if value.name in OFFERED:
        return True
    if value.name in FOREIGN_MODIFIERS:
        raise value.error(f"{value.name} is not offered yet", hint=f"offered are {', '.join(OFFERED)}")
    raise value.unknown("key" if other else "modifier", (*OFFERED, *other))


def _read_modifier(value: Value, fields: Mapping[str, Value]) -> Modifier:
    algorithm = ALGORITHMS.get(value.name, "rtn")
    is_gptq = algorithm == "gptq"
    _check_fields(value.name, fields, is_gptq=is_gptq)
    observers = read_observers(fields)
    cache = read_cache(fields, observers)
    groups = []
    for origin, plain, targets in _read_schemes(value, fields, cache):
        scheme = with_observers(origin, plain, observers)
        options = None
        if is_gptq:
            scheme, options = _read_options(origin, fields, scheme)
        groups.append(Group(scheme=scheme, targets=targets, options=options))
    return Modifier(
        algorithm=algorithm,
        groups=tuple(groups),
        ignore=tuple(pattern.text for pattern in read_patterns(fields.get("ignore"))),
        sequential_targets=tuple(pattern.text for pattern in read_patterns(fields.get("sequential_targets"))),
        name=value.name,
        line=value.line,
        cache=cache.args,
        attention=cache.attention,
        min_tokens=read_whole(fields.get("min_tokens"), default=0, least=0),
    )


def _check_fields(modifier: str, fields: Mapping[str, Value], *, is_gptq: bool) -> None:
    known = FIELDS + (GPTQ_FIELDS if is_gptq else ())
    for name, field in fields.items():
        if name in NO_OPS:
            require_no_op(field, *NO_OPS[name])
        elif name not in known:
            raise field.unknown(f"key of {modifier}", known)


_Schemed = tuple[Value, "QuantizationScheme", tuple[Pattern, ...]]


def _read_schemes(modifier: Value, fields: Mapping[str, Value], cache: CacheSchemes) -> list[_Schemed]:
    """The schemes of a modifier, with their targets and the value that an error about them points to. None where all
    that it rounds is the cache.
    """
    given = [fields[n] for n in ("scheme", "config_groups") if n in fields and fields[n].plain() is not None]
    if cache and not any(value.plain() for value in given):
        return []
    if len(given) != 1:
        found = "both scheme and config_groups" if given else "neither scheme nor config_groups"
        raise modifier.error(f"{modifier.name} has {found}", hint="give one of them")
    value = given[0]
    targets = read_targets(fields["targets"]) if "targets" in fields else ()
    if value.name == "scheme" and isinstance(value.plain(), str):
        default = tuple(Pattern(text=text, line=modifier.line) for text in DEFAULT_TARGETS)
        return [_read_preset(value, value.text(), targets or default)]
    # The peer writes the default into every recipe that it saves, and ignores it here.
    if tuple(pattern.text for pattern in targets) not in ((), DEFAULT_TARGETS):
        raise fields["targets"].error(f"targets stand inside {value.name} already", hint="leave them out here")
    entries = value.mapping().values()
    if not entries:
        raise value.error(f"{value.name} is empty")
    if value.name == "scheme":
        return [_read_preset(entry, entry.name, read_targets(entry)) for entry in entries]
    return [_read_group(entry) for entry in entries if entry.name not in cache.groups]


def _read_preset(value: Value, name: str, targets: tuple[Pattern, ...]) -> _Schemed:
    from runtime.formats.presets import scheme_from_preset

    try:
        return value, scheme_from_preset(name, [pattern.text for pattern in targets]), targets
    except RecipeError as error:
        raise value.error(error.message, hint=error.hint) from error


def _read_group(value: Value) -> _Schemed:
    from compressed_tensors.quantization import QuantizationScheme

    from runtime.formats.presets import checked

    fields = value.mapping()
    for name, field in fields.items():
        if name not in GROUP_FIELDS:
            raise field.unknown(f"key of {value.name}", GROUP_FIELDS)
    if "targets" not in fields:
        raise value.error(f"{value.name} has no targets")
    targets = read_targets(fields["targets"])
    content: dict[str, Any] = {"targets": [pattern.text for pattern in targets]}
    for name in GROUP_FIELDS[1:-1]:
        if name in fields and fields[name].plain() is not None:
            content[name] = read_args(fields[name])
    if "format" in fields:
        content["format"] = fields["format"].plain()
    try:
        return value, checked(QuantizationScheme(**content)), targets
    except RecipeError as error:
        raise value.error(error.message, hint=error.hint) from error
    except (ValueError, NotImplementedError) as error:
        raise value.error(f"{value.name} is no scheme: {reason_of(error)}") from error


def _read_options(
    origin: Value, fields: Mapping[str, Value], scheme: QuantizationScheme
) -> tuple[QuantizationScheme, GptqOptions]:
    """GPTQ's options, and the scheme with the order of columns noted in it."""
    dampening_frac = 0.01
    if "dampening_frac" in fields and fields["dampening_frac"].plain() is not None:
        dampening_frac = as_number(fields["dampening_frac"].plain())
        if type(dampening_frac) not in (int, float) or not 0 < dampening_frac <= 1:
            raise fields["dampening_frac"].error(
                f"dampening_frac must be a number above 0 and at most 1, not {dampening_frac!r}"
            )
    block_size = read_whole(fields.get("block_size"), default=128, least=1)
    batches = fields.get("batched_quantization")
    if batches is not None and batches.plain() not in (None, "auto"):
        read_whole(batches, default=1, least=1)  # siblings are solved together whatever it says
    refine = read_whole(fields.get("refine"), default=0, least=0)
    fallback = fields["fallback"].plain() if "fallback" in fields else None
    if fallback not in (None, "rtn", "all_tokens"):
        raise fields["fallback"].error(f"fallback must be rtn, all_tokens or null, not {fallback!r}")
    actorder = _read_actorder(origin, fields.get("actorder"), scheme)
    weights = scheme.weights.model_copy(update={"actorder": actorder})
    return scheme.model_copy(update={"weights": weights}), GptqOptions(
        dampening_frac=float(dampening_frac), block_size=block_size, actorder=actorder, fallback=fallback, refine=refine
    )


def _read_actorder(origin: Value, field: Value | None, scheme: QuantizationScheme) -> str | None:
    """The order of columns: the modifier's, or the scheme's, or static; the first two may not contradict."""
    noted = scheme.weights.actorder
    existing = None if noted is None else str(getattr(noted, "value", noted))
    if field is None:
        return existing or "static"
    actorder = field.plain()
    if actorder in ("group", "dynamic"):
        raise field.error(
            f"actorder {actorder!r} is gone from the checkpoint's format",
            hint="use static, which needs no g_idx",
        )
    if actorder not in (None, "static", "weight"):
        raise field.error(f"actorder must be static, weight or null, not {actorder!r}")
    if existing is not None and (actorder is None) is not (existing is None):
        raise field.error(f"actorder {actorder!r} contradicts {existing!r} in {origin.name}")
    return None if actorder is None else str(actorder)
