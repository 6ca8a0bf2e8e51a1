"""The modifiers of a recipe: the classes of llm-compressor's dialect that are supported, and all of their fields.

Each field of llm-compressor's modifiers is supported, accepted with the values that change nothing, or rejected with
its name and line. Modifiers that rescale (`rescaling_modifiers`) come before those that quantize, which are here.

Importing this module imports torch, through compressed-tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    TypeAdapter,
    model_validator,
)

from runtime.formats.presets import (
    MIN_MAX_OBSERVERS,
    MSE_OBSERVERS,
    checked,
    checked_cache,
    plain_value,
    scheme_from_preset,
)
from runtime.recipe.config_groups import Arguments, ConfigGroup, Observer, Observers, Output
from runtime.recipe.fields import (
    Count,
    Patterns,
    Positive,
    Seed,
    Switch,
    Targets,
    allowed,
    as_number,
    located,
    only,
    rejection,
)
from runtime.recipe.modifier import Modifier, default_of
from runtime.recipe.yaml import Table, Text

if TYPE_CHECKING:
    from typing_extensions import Self

Algorithm = Literal["rtn", "gptq", "auto_round"]
Location = tuple[str, ...]


class GptqOptions(BaseModel):
    """Options of GPTQ; their names are those of `quantize_siblings`.

    Attributes:
        dampening_frac: added to the diagonal of the Hessian, as a fraction of its mean.
        block_size: columns that are updated together.
        actorder: the order of columns.
        fallback: what to do with a module that GPTQ cannot solve; None for an error.
        refine: how many times columns and scales are optimized again.
        range_passes: 2 to search ranges and solve again, for what the first solve has rounded.
        target: the output to keep: that for inputs from quantized layers, or that for inputs of the original model.
        strength: of the correction by which weights make up for the errors of earlier layers, if the target is
            `original`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    dampening_frac: Annotated[
        float,
        Field(gt=0, le=1),
        BeforeValidator(as_number),
        allowed("a number above 0 and at most 1"),
        BeforeValidator(default_of),
    ] = 0.01
    block_size: Positive = 128
    actorder: Annotated[
        Literal["static", "weight"] | None,
        allowed("static, weight or null", hint="checkpoints no longer have a g_idx, which group needs; use static"),
    ] = "static"
    fallback: Annotated[Literal["rtn", "all_tokens"] | None, allowed("rtn, all_tokens or null")] = None
    refine: Count = 0
    range_passes: Annotated[Literal[1, 2], allowed("1 or 2")] = 1
    target: Annotated[
        Literal["quantized", "original"], allowed("quantized or original"), BeforeValidator(default_of)
    ] = "quantized"
    strength: Annotated[
        float,
        Field(ge=0, le=1),
        BeforeValidator(as_number),
        allowed("a number from 0 to 1"),
        BeforeValidator(default_of),
    ] = 0.5

    @model_validator(mode="after")
    def _require_effect(self) -> Self:
        if "strength" in self.model_fields_set and "target" not in self.model_fields_set:
            raise rejection("{name} has no effect without target: original", "strength", hint="add target: original")
        return self

    @property
    def is_error_aware(self) -> bool:
        """Whether weights make up for the errors of earlier layers."""
        return self.target == "original" and self.strength > 0


class AutoRoundOptions(BaseModel):
    """Options of AutoRound.

    Attributes:
        iters: the number of steps for each block; 0 keeps the start.
        batch_size: the samples of a step: as many whole batches of the run as have so many.
        lr: the first rate of offsets and ranges, which falls to zero; None for 1 / iters.
        disable_opt_rtn: start from weights rounded to nearest in the ranges of the scheme's observer, instead of GPTQ's
            solution.
        seed: of the order of batches.
        amp: compute gradients with products in bf16, on processors and GPUs that multiply bf16 in less time; errors by
            which a result is chosen are always computed in float32. False gives the same steps on all of them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    iters: Annotated[int, Field(ge=0, le=1_000_000), allowed("an integer from 0 to 1000000")] = 200
    batch_size: Positive = 8
    lr: Annotated[
        float | None,
        Field(gt=0, le=1),
        BeforeValidator(as_number),
        allowed("a number above 0 and at most 1, or null"),
    ] = None
    disable_opt_rtn: Switch = False
    seed: Seed = 0
    amp: Switch = True

    @property
    def rate(self) -> float:
        """The first rate."""
        return self.lr if self.lr is not None else 1 / max(self.iters, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Targets of a modifier that share a scheme. `options` is None for other algorithms than GPTQ, `tuning` for others
    than AutoRound; `name` is that of the preset, or the key of the group.
    """

    name: str
    scheme: QuantizationScheme
    targets: tuple[Text, ...]
    options: GptqOptions | None
    modifier: QuantizationModifier = field(compare=False, repr=False)
    tuning: AutoRoundOptions | None = None


_PRESETS = TypeAdapter(dict[str, Targets])


def _read_presets(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, Table):
        raise rejection("{name} must be a preset or a mapping of presets to targets, not {value}", value=value)
    return _PRESETS.validate_python(value)


class QuantizationModifier(Modifier):
    """Rounds the weights of modules to nearest, and the key-value cache if asked."""

    algorithm: ClassVar[Algorithm] = "rtn"

    targets: Targets = ()
    scheme: Annotated[Any, PlainValidator(_read_presets)] = None
    config_groups: dict[str, ConfigGroup] | None = None
    kv_cache_scheme: Arguments = None
    weight_observer: Observer = None
    input_observer: Observer = None
    observer: Observers | None = None
    sequential_targets: Patterns = ()
    output_observer: Output = None
    bypass_divisibility_checks: Annotated[
        bool, only(False, reason="a weight whose last group is incomplete cannot be packed")
    ] = False

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The schemes for weights, each with its targets."""
        return tuple(self._group(*found) for found in self._schemes())

    @property
    def attention(self) -> tuple[ConfigGroup, ...]:
        """The groups that round queries, keys and values of attention modules."""
        return tuple(group for group in (self.config_groups or {}).values() if group.is_attention)

    @cached_property
    def cache(self) -> QuantizationArgs | None:
        """How the key-value cache is rounded; None if it is not."""
        args = self.kv_cache_scheme
        if args is not None:
            with located("kv_cache_scheme"):
                checked_cache(args)
        for group in self.attention:
            own = group.input_activations
            with located("config_groups", group.name, "input_activations"):
                checked_cache(own)
            observer, location = self._observer("input")
            if observer is not None:
                own = own.model_copy(update={"observer": observer})
                with located(*location):
                    checked_cache(own)
            if args is not None and args.model_dump() != own.model_dump():
                raise rejection(
                    "{name} rounds keys and values in another way than the cache",
                    *("config_groups", group.name),
                    hint="readers have one scheme for both: leave kv_cache_scheme out",
                )
            args = own
        return args

    @model_validator(mode="after")
    def _check(self) -> Self:
        _ = self.cache, self.groups  # computed here, so that errors have a line
        return self

    def _schemes(self) -> Iterator[tuple[QuantizationScheme, tuple[Text, ...], Location]]:
        """Each scheme with its targets, and the location that an error about it names."""
        given = {name: getattr(self, name) for name in ("scheme", "config_groups") if getattr(self, name) is not None}
        if self.cache is not None and not any(given.values()):
            return
        if len(given) != 1:
            found = "both scheme and config_groups" if given else "neither scheme nor config_groups"
            raise rejection(f"{{name}} has {found}", hint="give one of them")
        ((key, entries),) = given.items()
        if isinstance(entries, str):
            targets = self.targets or (Text("Linear", self.line),)
            with located(key):
                yield scheme_from_preset(entries, targets), targets, (key,)
            return
        # llm-compressor writes the default into every recipe that it saves, and ignores it here.
        if self.targets not in ((), ("Linear",)):
            raise rejection(f"targets are already stated in {key}", "targets", hint="remove them here")
        if not entries:
            raise rejection("{name} is empty", key)
        for name, entry in entries.items():
            with located(key, name):
                if isinstance(entry, tuple):
                    yield scheme_from_preset(name, entry), entry, (key, name)
                elif entry.weights is not None or self.cache is None:
                    yield checked(entry.scheme), entry.targets, (key, name)

    def _group(self, scheme: QuantizationScheme, targets: tuple[Text, ...], location: Location) -> Group:
        for part, role in (("weights", "weights"), ("input_activations", "input")):
            args = getattr(scheme, part)
            observer, at = self._observer(role)
            if observer is None or args is None:
                continue
            if part == "weights" and observer in MIN_MAX_OBSERVERS and args.observer in (None, *MIN_MAX_OBSERVERS):
                continue  # a weight is observed once, whole, so these are the same
            with located(*at):
                scheme = checked(scheme.model_copy(update={part: args.model_copy(update={"observer": observer})}))
        name = self.scheme if isinstance(self.scheme, str) else location[-1]
        return Group(name=str(name), scheme=scheme, targets=targets, options=None, modifier=self)

    def _observer(self, role: str) -> tuple[str | None, Location]:
        """The observer of `weights` or `input`, and the field that names it; `observer` goes before older fields."""
        named = None if self.observer is None else getattr(self.observer, role)
        if named is not None:
            return named, ("observer", role)
        older = "weight_observer" if role == "weights" else "input_observer"
        return getattr(self, older), (older,)


class GPTQModifier(QuantizationModifier, GptqOptions):
    """Quantizes weights by GPTQ."""

    algorithm: ClassVar[Algorithm] = "gptq"

    # Accepted and ignored: modules with the same inputs are always solved together.
    batched_quantization: Annotated[Positive | Literal["auto"] | None, allowed("a positive integer, auto or null")] = (
        None
    )

    def _group(self, scheme: QuantizationScheme, targets: tuple[Text, ...], location: Location) -> Group:
        group = super()._group(scheme, targets, location)
        weights = group.scheme.weights
        stated = None if weights.actorder is None else str(plain_value(weights.actorder))
        actorder = self.actorder if "actorder" in self.model_fields_set else stated or self.actorder
        if stated is not None and actorder is None:
            raise rejection(f"actorder null contradicts {stated!r} in {location[-1]}", "actorder")
        weights = weights.model_copy(update={"actorder": actorder})
        is_grouped = weights.strategy in ("group", "channel")
        if self.range_passes > 1 and not (actorder and is_grouped and weights.observer in MSE_OBSERVERS):
            raise rejection(
                "{name} {value} requires ranges that are searched by group or channel, and static order",
                "range_passes",
                value=self.range_passes,
                hint="set weight_observer: signed_mse and actorder: static, or range_passes: 1",
            )
        options = self.model_dump(include=set(GptqOptions.model_fields)) | {"actorder": actorder}
        scheme = group.scheme.model_copy(update={"weights": weights})
        return replace(group, scheme=scheme, options=GptqOptions(**options))
