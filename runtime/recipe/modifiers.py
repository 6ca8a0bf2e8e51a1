"""The modifiers of a recipe: the classes of llm-compressor's dialect that are supported, and all of their fields.

Each field of llm-compressor's modifiers is supported, accepted with the values that change nothing, or rejected with
its name and line. Modifiers that rescale (`AWQModifier`, `SmoothQuantModifier`) come before those that quantize.

Importing this module imports torch, through compressed-tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, QuantizationStrategy
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    TypeAdapter,
    model_validator,
)
from pydantic_core import PydanticUseDefault

from runtime.formats.presets import MIN_MAX_OBSERVERS, checked, checked_cache, plain_value, scheme_from_preset
from runtime.recipe.fields import (
    Count,
    Fraction,
    Located,
    Pattern,
    Patterns,
    Positive,
    Switch,
    Targets,
    allowed,
    as_number,
    as_tuple,
    located,
    only,
    rejection,
    require_known,
    require_table,
)
from runtime.recipe.yaml import Items, Table, Text

if TYPE_CHECKING:
    from typing_extensions import Self

Algorithm = Literal["rtn", "gptq"]
Location = tuple[str, ...]

_Schedule = Annotated[None, only(None, reason="schedules belong to training")]
_State = Annotated[bool, only(False, reason="it is the state of a modifier, not a setting")]
_Derived = Annotated[None, only(None, reason="it is the state of a modifier, not a setting")]
_Output = Annotated[None, only(None, reason="outputs are not quantized")]
_LOWER = BeforeValidator(lambda value: value.lower() if isinstance(value, str) else value)
_Observer = Annotated[str | None, _LOWER, allowed("the name of an observer")]
_STRATEGIES = ", ".join(strategy.value for strategy in QuantizationStrategy)


class _ArgumentTypes(BaseModel):
    """Strict types of quantization arguments: compressed-tensors accepts "4" for 4 and 1 for true."""

    model_config = ConfigDict(strict=True, extra="allow")

    num_bits: Annotated[int | None, allowed("an integer")] = None
    type: Annotated[Literal["int", "float"] | None, _LOWER, allowed("int or float")] = None
    symmetric: Annotated[bool | None, allowed("true or false")] = None
    strategy: Annotated[QuantizationStrategy | None, Field(strict=False), _LOWER, allowed(_STRATEGIES)] = None
    group_size: Annotated[int | None, allowed("an integer")] = None
    observer: _Observer = None


def _read_arguments(value: Any) -> QuantizationArgs | None:
    if value is None:
        return None
    table, known = require_table(value), QuantizationArgs.model_fields
    require_known(table, known, known)
    with located():
        return QuantizationArgs(**_ArgumentTypes.model_validate(table).model_dump(exclude_unset=True))


Arguments = Annotated[Any, PlainValidator(_read_arguments)]


class ConfigGroup(Located):
    """Targets and how they are quantized; a group without weights is for attention."""

    targets: Targets
    weights: Arguments = None
    input_activations: Arguments = None
    output_activations: _Output = None
    format: Any = None

    @cached_property
    def scheme(self) -> QuantizationScheme:
        """The scheme as compressed-tensors defines it, not checked for support."""
        return QuantizationScheme(
            targets=[str(target) for target in self.targets],
            weights=self.weights,
            input_activations=self.input_activations,
            format=self.format,
        )

    @property
    def is_attention(self) -> bool:
        """Whether it rounds the inputs of modules without quantizing weights."""
        return self.weights is None and self.input_activations is not None

    @model_validator(mode="after")
    def _check(self) -> Self:
        with located():
            _ = self.scheme
        if self.is_attention and self.format is not None:
            raise rejection("{name} is not supported in a group for attention", "format", hint="remove it")
        return self


class Observers(Located):
    """Observers that replace those of the schemes."""

    weights: _Observer = None
    input: _Observer = None
    output: _Output = None


def _default_of(value: Any) -> Any:
    if value is None:
        raise PydanticUseDefault
    return value


class GptqOptions(BaseModel):
    """Options of GPTQ; their names are those of `quantize_siblings`.

    Attributes:
        dampening_frac: added to the diagonal of the Hessian, as a fraction of its mean.
        block_size: columns that are updated together.
        actorder: the order of columns.
        fallback: what to do with a module that GPTQ cannot solve; None for an error.
        refine: how many times columns and scales are optimized again.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    dampening_frac: Annotated[
        float,
        Field(gt=0, le=1),
        BeforeValidator(as_number),
        allowed("a number above 0 and at most 1"),
        BeforeValidator(_default_of),
    ] = 0.01
    block_size: Positive = 128
    actorder: Annotated[
        Literal["static", "weight"] | None,
        allowed("static, weight or null", hint="checkpoints no longer have a g_idx, which group needs; use static"),
    ] = "static"
    fallback: Annotated[Literal["rtn", "all_tokens"] | None, allowed("rtn, all_tokens or null")] = None
    refine: Count = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Targets of a modifier that share a scheme. `options` is None for an algorithm without options."""

    scheme: QuantizationScheme
    targets: tuple[Text, ...]
    options: GptqOptions | None
    modifier: QuantizationModifier = field(compare=False, repr=False)


class _Modifier(Located):
    """Fields of all modifiers."""

    ignore: Patterns = ()
    min_tokens: Count = 0
    requires_calibration_data: Annotated[
        bool, only(True, False, reason="it must be true or false, and follows from the algorithm")
    ] = True
    index: _Schedule = None
    group: _Schedule = None
    start: _Schedule = None
    end: _Schedule = None
    update: _Schedule = None
    initialized_: _State = False
    finalized_: _State = False
    started_: _State = False
    ended_: _State = False


_PRESETS = TypeAdapter(dict[str, Targets])


def _read_presets(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, Table):
        raise rejection("{name} must be a preset or a mapping of presets to targets, not {value}", value=value)
    return _PRESETS.validate_python(value)


class QuantizationModifier(_Modifier):
    """Rounds the weights of modules to nearest, and the key-value cache if asked."""

    algorithm: ClassVar[Algorithm] = "rtn"

    targets: Targets = ()
    scheme: Annotated[Any, PlainValidator(_read_presets)] = None
    config_groups: dict[str, ConfigGroup] | None = None
    kv_cache_scheme: Arguments = None
    weight_observer: _Observer = None
    input_observer: _Observer = None
    observer: Observers | None = None
    sequential_targets: Patterns = ()
    output_observer: _Output = None
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
        return Group(scheme=scheme, targets=targets, options=None, modifier=self)

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
        options = self.model_dump(include=set(GptqOptions.model_fields)) | {"actorder": actorder}
        scheme = group.scheme.model_copy(update={"weights": weights})
        return replace(group, scheme=scheme, options=GptqOptions(**options))


def _as_table(value: Any) -> Any:
    """Give the pair `[balance_layers, smooth_layer]` the form of a mapping."""
    if not isinstance(value, Items):
        return value
    if len(value) != 2:
        raise rejection("a mapping is a list of balance_layers and smooth_layer, or a mapping with these keys")
    table = Table(zip(("balance_layers", "smooth_layer"), value, strict=True))
    table.name, table.line, table.lines = "a mapping", value.line, {}
    return table


class LayerMapping(Located):
    """A module whose output is divided, and patterns of the modules whose input is multiplied in turn."""

    smooth_layer: Pattern
    balance_layers: Targets
    activation_hook_target: Annotated[None, only(None, reason="inputs are measured where they are used")] = None


class _RescalingModifier(_Modifier):
    """Fields of modifiers that rescale."""

    # Empty for those that the compiler found.
    mappings: Annotated[tuple[Annotated[LayerMapping, BeforeValidator(_as_table)], ...], BeforeValidator(as_tuple)] = ()
    requires_calibration_data: Annotated[bool, only(True, reason="it always does")] = True
    resolved_mappings_: _Derived = None
    scales_: _Derived = None


class SmoothQuantModifier(_RescalingModifier):
    """Divides inputs with outliers by SmoothQuant's scales."""

    smoothing_strength: Fraction = 0.5
    algorithm: Annotated[Literal["smoothquant"], only("smoothquant", reason="log equalization is not implemented")] = (
        "smoothquant"
    )
    num_calibration_steps: Annotated[None, only(None, reason="all data is used; limit it with --samples")] = None
    calibration_function: Annotated[None, only(None, reason="the run feeds the model")] = None


class AWQModifier(_RescalingModifier):
    """Multiplies important columns by AWQ's scales.

    Attributes:
        duo_scaling: whether the search considers the magnitude of weights; "both" tries both.
        n_grid: how many candidates are tried.
        clip: whether ranges are searched for weights that are rounded to nearest.
    """

    algorithm: ClassVar[Literal["awq"]] = "awq"

    duo_scaling: Annotated[bool | Literal["both"], allowed("true, false or both")] = True
    n_grid: Positive = 20
    clip: Switch = True
    offload_device: Annotated[str | None, only(None, "cpu", reason="nothing is cached that could be offloaded")] = None


Transform = AWQModifier | SmoothQuantModifier
