"""Write and read the `quantization_config` of a checkpoint's config.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import compressed_tensors
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme, QuantizationStatus
from pydantic import ValidationError

from runtime.errors import RecipeError, WeightsError
from runtime.formats.presets import MIN_MAX_OBSERVERS, checked, checked_cache
from runtime.formats.targets import class_names, matches_name
from runtime.formats.transforms import TransformGroup, transform_config
from runtime.patterns import fault

METHOD = "compressed-tensors"


def quantization_config(
    groups: Sequence[QuantizationScheme],
    ignore: Sequence[str],
    cache: QuantizationArgs | None = None,
    attention: Sequence[str] = (),
    transforms: Sequence[TransformGroup] = (),
) -> dict[str, Any]:
    """Build the "quantization_config" of config.json.

    Args:
        groups: the schemes, in order; they become group_0, group_1 and so on.
        ignore: every unquantized Linear that a target matches, by the checkpoint's names.
        cache: the key-value cache's scheme.
        attention: classes of attention modules whose queries are rounded by the cache's scheme, too.
        transforms: the rotations that are computed while the model runs.

    Returns:
        Plain values, ready for `json.dumps`.
    """
    schemes = [_readable(checked(scheme)) for scheme in groups]
    formats = list(dict.fromkeys(str(scheme.format) for scheme in schemes)) or [CompressionFormat.dense.value]
    # A group for each class: vLLM recognizes a group for attention by its single target, which ends in "Attention".
    schemes += [QuantizationScheme(targets=[kind], input_activations=cache) for kind in attention]
    config = QuantizationConfig(
        config_groups={f"group_{index}": scheme for index, scheme in enumerate(schemes)},
        format=formats[0] if len(formats) == 1 else CompressionFormat.mixed_precision.value,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=list(ignore),
        kv_cache_scheme=cache,
    )
    return {
        "version": compressed_tensors.__version__,
        "sparsity_config": {},
        "transform_config": transform_config(transforms),
        **config.model_dump(mode="json"),
    }


def _readable(scheme: QuantizationScheme) -> QuantizationScheme:
    """Replace an observer that readers do not know; observers have no effect after the weights are quantized."""
    args = scheme.weights
    if args.observer in (None, *MIN_MAX_OBSERVERS, "mse", "memoryless_mse"):
        return scheme
    weights = args.model_copy(update={"observer": "mse", "observer_kwargs": {}})
    return scheme.model_copy(update={"weights": weights})


def _unobserved(args: QuantizationArgs) -> QuantizationArgs:
    """Remove the observer, which has no effect on a written checkpoint, so that those of other tools are accepted."""
    return args.model_copy(update={"observer": None, "observer_kwargs": {}})


def _stored(scheme: QuantizationScheme, format_of_all: str) -> QuantizationScheme:
    """Return a checkpoint's scheme with its format; int-quantized may also store fewer than 8 bits in a byte each."""
    parts = {name: getattr(scheme, name) for name in ("weights", "input_activations")}
    bare = {name: _unobserved(args) for name, args in parts.items() if args is not None}
    named = CompressionFormat(scheme.format or format_of_all)
    is_spread = named == CompressionFormat.int_quantized and scheme.weights is not None and scheme.weights.type == "int"
    found = checked(scheme.model_copy(update={**bare, "format": None if is_spread else named.value}))
    return found.model_copy(update={"format": named.value}) if is_spread else found


def _reason(error: Exception) -> str:
    """State in one line why compressed-tensors does not accept a config: the first of pydantic's reasons."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        return " ".join(f"{'.'.join(map(str, first['loc']))}: {first['msg']}".split())[:300]
    return " ".join(str(error).split())[:300]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSchemes:
    """The schemes of a quantized checkpoint and the modules they apply to.

    Args:
        groups: the schemes in the config's order, each with its format.
        ignore: patterns of modules that are stored unquantized.
        cache: the key-value cache's scheme.
        has_queries: whether attention's queries are rounded by the cache's scheme, too.
    """

    groups: tuple[QuantizationScheme, ...]
    ignore: tuple[str, ...]
    cache: QuantizationArgs | None = None
    has_queries: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> CheckpointSchemes:
        """Read config.json's "quantization_config".

        Raises:
            WeightsError: if it was not written by compressed-tensors, or has an unsupported scheme.
        """
        if config.get("quant_method") != METHOD:
            raise WeightsError(
                f"the checkpoint is quantized by {config.get('quant_method')!r}",
                hint=f"only {METHOD} is supported",
            )
        try:
            parsed = QuantizationConfig.model_validate(dict(config))
        except (ValueError, TypeError, NotImplementedError, KeyError) as error:
            raise WeightsError(f"the checkpoint's quantization_config cannot be read: {_reason(error)}") from error
        if parsed.quantization_status != QuantizationStatus.COMPRESSED:
            status = parsed.quantization_status.value
            raise WeightsError(
                f"the checkpoint's quantization_config has the quantization_status {status}, not compressed",
                hint="save it compressed (save_compressed=True); if its weights are unquantized, remove the entry",
            )
        schemes = parsed.config_groups.values()
        for scheme in schemes:
            if scheme.weights is None and (
                scheme.input_activations is None or set(scheme.targets) & {"Linear", "Embedding"}
            ):
                listed = ", ".join(scheme.targets)
                raise WeightsError(f"the checkpoint's quantization_config has a group without weights for {listed}")
        queries = [scheme.input_activations for scheme in schemes if scheme.weights is None]
        has_queries = any(args is not None for args in queries)
        cache = next((args for args in (parsed.kv_cache_scheme, *queries) if args is not None), None)
        try:
            cache = None if cache is None else checked_cache(_unobserved(cache))
            groups = tuple(_stored(scheme, parsed.format) for scheme in schemes if scheme.weights is not None)
        except RecipeError as error:
            raise WeightsError(f"the checkpoint's quantization_config: {error.message}", hint=error.hint) from error
        ignore = tuple(parsed.ignore or ())
        for text in (*ignore, *(target for group in groups for target in group.targets)):
            expression = text.removeprefix("re:") if text.startswith("re:") else ""
            wrong = fault(expression)
            if wrong:
                what = f"{text[:80]!r} is not a valid regular expression: {wrong}"
                raise WeightsError(f"the checkpoint's quantization_config: {what}")
        return cls(groups=groups, ignore=ignore, cache=cache, has_queries=has_queries)

    def find(self, name: str, module_class: type | str) -> QuantizationScheme | None:
        """Find the scheme of a module; `None` if it is stored unquantized.

        In transformers' order: a target equal to the name, then `re:` targets alphabetically, then classes. Of groups
        with the same target the last one wins.

        Args:
            name: the module's dotted name.
            module_class: its class, or the class's name.
        """
        names = class_names(module_class)
        if any(matches_name(pattern, name) or pattern in names for pattern in self.ignore):
            return None
        by_name, others = self._by_target(name)
        by_class = [scheme for target, scheme in others.items() if target in names]
        return next(iter([*by_name.values(), *by_class]), None)

    def candidates(self, name: str) -> list[QuantizationScheme]:
        """List all schemes for a module of an unknown class: first those with a target that matches its name."""
        by_name, others = self._by_target(name)
        found = [*by_name.values(), *others.values()]
        return [*found, *(scheme for scheme in self.groups if not any(scheme is one for one in found))]

    def _by_target(self, name: str) -> tuple[dict[str, QuantizationScheme], dict[str, QuantizationScheme]]:
        """Return the schemes by target, those that match a name and the others, in transformers' order."""
        by_target = {target: scheme for scheme in self.groups for target in scheme.targets}
        ordered = sorted(by_target, key=lambda target: (target.startswith("re:"), target))
        matching = {target: by_target[target] for target in ordered if matches_name(target, name)}
        return matching, {target: by_target[target] for target in ordered if target not in matching}
