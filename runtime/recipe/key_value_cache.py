"""What a recipe says of the key-value cache and of attention: schemes that round values, and no weights.

Two spellings mean a cache: `kv_cache_scheme`, with or without schemes for weights beside it, and a group of
`config_groups` without weights whose targets are attention modules. The latter rounds queries, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runtime.errors import RecipeError
from runtime.recipe.fields import Observers, Pattern, read_args, read_targets
from runtime.recipe.yaml import Value

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs

_KEYS = ("targets", "input_activations", "weights", "output_activations", "format")


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionGroup:
    """Attention modules whose queries, keys and values are rounded."""

    args: QuantizationArgs
    targets: tuple[Pattern, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSchemes:
    """What one modifier says of them.

    Attributes:
        args: of the cache; None where it is not rounded.
        attention: the groups that round queries, too.
        groups: names of the `config_groups` that quantize no weights, and so are read.
    """

    args: QuantizationArgs | None
    attention: tuple[AttentionGroup, ...] = ()
    groups: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self.args is not None


def read_cache(fields: Mapping[str, Value], observers: Observers) -> CacheSchemes:
    """What the fields of a modifier say of the key-value cache and of attention.

    Raises:
        RecipeError: for what is not supported, with its line.
    """
    given = fields.get("kv_cache_scheme")
    args = _checked(given) if given is not None and given.plain() is not None else None
    groups = fields.get("config_groups")
    entries = groups.mapping() if groups is not None and isinstance(groups.plain(), dict) else {}
    attention: list[AttentionGroup] = []
    idle: list[str] = []
    for name, entry in entries.items():
        group = entry.mapping() if isinstance(entry.plain(), dict) else {"weights": entry}
        if _is_given(group, "weights"):
            continue
        if _is_given(group, "input_activations"):
            attention.append(_read_attention(entry, group, observers))
            if args is not None and args.model_dump() != attention[-1].args.model_dump():
                raise entry.error(
                    f"{name} rounds keys and values in another way than the cache does",
                    hint="readers have one scheme for both: leave kv_cache_scheme out",
                )
            args = attention[-1].args
        idle.append(name)
    # A group that rounds nothing at all is passed over beside a cache, and by itself a mistake.
    return CacheSchemes(args=args, attention=tuple(attention), groups=tuple(idle) if args is not None else ())


def _is_given(group: Mapping[str, Value], name: str) -> bool:
    return name in group and group[name].plain() is not None


def _read_attention(entry: Value, group: Mapping[str, Value], observers: Observers) -> AttentionGroup:
    for name, field in group.items():
        if name not in _KEYS:
            raise field.unknown(f"key of {entry.name}", _KEYS)
        if name in ("output_activations", "format") and field.plain() is not None:
            raise field.error(f"{name} is unsupported in a group for attention", hint="leave it out")
    if "targets" not in group:
        raise entry.error(f"{entry.name} has no targets")
    args = _checked(group["input_activations"])
    if observers.inputs is not None:
        args = _checked(observers.inputs, args.model_copy(update={"observer": observers.inputs.text().lower()}))
    return AttentionGroup(args=args, targets=read_targets(group["targets"]))


def _checked(value: Value, args: QuantizationArgs | None = None) -> QuantizationArgs:
    from runtime.formats.presets import checked_cache

    try:
        return checked_cache(args if args is not None else read_args(value))
    except RecipeError as error:
        if error.message.startswith(f"{value.origin}:"):
            raise
        raise value.error(error.message, hint=error.hint) from error
