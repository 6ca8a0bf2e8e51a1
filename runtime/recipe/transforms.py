"""Modifiers of a recipe that rescale weights before they are rounded: AWQModifier and SmoothQuantModifier."""

from __future__ import annotations

from collections.abc import Mapping as Table
from dataclasses import dataclass
from typing import Any, Literal

from runtime.recipe.fields import read_part, read_whole, require_no_op
from runtime.recipe.yaml import Value

Rescaler = Literal["awq", "smoothquant"]

TRANSFORMS: dict[str, Rescaler] = {"AWQModifier": "awq", "SmoothQuantModifier": "smoothquant"}
_FIELDS = {
    "awq": ("mappings", "duo_scaling", "n_grid", "clip", "ignore", "min_tokens"),
    "smoothquant": ("mappings", "smoothing_strength", "ignore", "min_tokens"),
}
_DEVICE = "nothing is cached that could be offloaded"
_NO_OPS: dict[str, dict[str, tuple[tuple[Any, ...], str]]] = {
    "awq": {"offload_device": ((None, "cpu"), _DEVICE)},
    "smoothquant": {
        "algorithm": (("smoothquant",), "log equalization is not offered"),
        "num_calibration_steps": ((None,), "all data is used; give less with --samples"),
        "calibration_function": ((None,), "the run feeds the model"),
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Mapping:
    """A module whose output is divided, and patterns of those whose input that is; and its line."""

    smooth_layer: str
    balance_layers: tuple[str, ...]
    line: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Transform:
    """A modifier that rescales.

    Attributes:
        algorithm: `awq` or `smoothquant`.
        mappings: what is rescaled; empty for what the compiler has found.
        ignore: patterns of modules whose groups are left alone.
        strength: SmoothQuant's a.
        duo_scaling: of AWQ: true, false or both.
        n_grid: likewise, how many candidates are tried.
        clip: likewise, whether ranges are searched for weights that are rounded to nearest.
        min_tokens: how many tokens each module must have seen.
        name: the modifier's.
        line: where it stands.
    """

    algorithm: Rescaler
    mappings: tuple[Mapping, ...]
    ignore: tuple[str, ...]
    strength: float
    duo_scaling: bool | str
    n_grid: int
    clip: bool
    min_tokens: int
    name: str
    line: int


def read_transform(value: Value, fields: Table[str, Value]) -> Transform:
    """One modifier.

    Args:
        value: the modifier.
        fields: its fields, without those of a scheme.

    Raises:
        RecipeError: for anything that cannot be obeyed, with its line.
    """
    algorithm = TRANSFORMS[value.name]
    known, no_ops = _FIELDS[algorithm], _NO_OPS[algorithm]
    for name, field in fields.items():
        if name in no_ops:
            require_no_op(field, *no_ops[name])
        elif name not in known and name not in COMMON_NO_OPS:
            raise field.unknown(f"key of {value.name}", known)
        elif name in COMMON_NO_OPS:
            require_no_op(field, *COMMON_NO_OPS[name])
    duo_scaling = fields["duo_scaling"].plain() if "duo_scaling" in fields else True
    if duo_scaling not in (True, False, "both") or isinstance(duo_scaling, (int, float)) is not isinstance(
        duo_scaling, bool
    ):
        raise fields["duo_scaling"].error(f"duo_scaling must be true, false or both, not {duo_scaling!r}")
    clip = fields["clip"].plain() if "clip" in fields else True
    if not isinstance(clip, bool):
        raise fields["clip"].error(f"clip must be true or false, not {clip!r}")
    return Transform(
        algorithm=algorithm,
        mappings=tuple(_read_mapping(item) for item in _entries(fields.get("mappings"))),
        ignore=tuple(item.pattern() for item in _entries(fields.get("ignore"))),
        strength=read_part(fields.get("smoothing_strength"), default=0.5),
        duo_scaling=duo_scaling,
        n_grid=read_whole(fields.get("n_grid"), default=20, least=1),
        clip=clip,
        min_tokens=read_whole(fields.get("min_tokens"), default=0, least=0),
        name=value.name,
        line=value.line,
    )


COMMON_NO_OPS: dict[str, tuple[tuple[Any, ...], str]] = {
    "requires_calibration_data": ((True,), "it always does"),
    **dict.fromkeys(("index", "group", "start", "end", "update"), ((None,), "schedules belong to training")),
    **dict.fromkeys(
        ("initialized_", "finalized_", "started_", "ended_"), ((False,), "it is a modifier's state, not a setting")
    ),
    **dict.fromkeys(("resolved_mappings_", "scales_"), ((None,), "it is a modifier's state, not a setting")),
}


def _entries(value: Value | None) -> list[Value]:
    return [] if value is None or value.plain() is None else value.items()


def _read_mapping(value: Value) -> Mapping:
    """`{smooth_layer, balance_layers}`, or the pair `[balance_layers, smooth_layer]`."""
    if isinstance(value.plain(), list):
        parts = value.items()
        if len(parts) != 2:
            raise value.error("a mapping is the list of balance_layers and the smooth_layer")
        balance, smooth = parts
    else:
        table = value.mapping()
        for name, field in table.items():
            if name == "activation_hook_target":
                require_no_op(field, (None,), "inputs are measured where they are")
            elif name not in ("smooth_layer", "balance_layers"):
                raise field.unknown("key of a mapping", ("smooth_layer", "balance_layers"))
        missing = [name for name in ("smooth_layer", "balance_layers") if name not in table]
        if missing:
            raise value.error(f"a mapping has no {missing[0]}")
        balance, smooth = table["balance_layers"], table["smooth_layer"]
    layers = tuple(item.pattern() for item in balance.items())
    if not layers:
        raise balance.error("balance_layers must name at least one module")
    return Mapping(smooth_layer=smooth.pattern(), balance_layers=layers, line=value.line)
