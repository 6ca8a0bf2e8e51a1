"""Quantization schemes, and the tensors and config that a quantized checkpoint stores for them.

The adapter to compressed-tensors: nothing else here knows how that package packs a weight, rounds an
activation or spells `config.json["quantization_config"]`. What is offered:

    format            weights                               inputs                 presets
    pack-quantized    2 to 8 bit int, group or channel      as they are            W4A16, W4A16_ASYM, W8A16
    int-quantized     8 bit int, symmetric, channel/tensor  8 bit int, dynamic     W8A8 (INT8)
    float-quantized   8 bit float, channel/tensor           8 bit float, dynamic   FP8_DYNAMIC

Not offered yet, and refused by name: static activation quantization, block weights, NVFP4, MXFP, and
quantized key-value caches.

Shapes: O out features, I in features.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import compressed_tensors
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    is_preset_scheme,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

from runtime.errors import QuantizationError, RecipeError, WeightsError

PRESETS = ("W4A16", "W4A16_ASYM", "W8A16", "W8A8", "INT8", "FP8_DYNAMIC")
METHOD = "compressed-tensors"

# A weight is observed once, whole: then the peers' three min-max observers are one and the same.
MIN_MAX_OBSERVERS = (None, "minmax", "memoryless_minmax", "static_minmax")


def scheme_from_preset(name: str, targets: Iterable[str]) -> QuantizationScheme:
    """The scheme that a preset's name stands for, in upper or lower case.

    Raises:
        RecipeError: for a preset that does not exist or is not offered.
    """
    offered = f"offered are {', '.join(PRESETS)}"
    upper = name.upper()
    if upper in PRESETS:
        return checked(preset_name_to_scheme(upper, list(targets)))
    if is_preset_scheme(name):
        raise RecipeError(
            f"the scheme {upper} is not offered yet",
            hint=f"{offered}; config_groups takes any group or channel scheme for int weights alone",
        )
    near = difflib.get_close_matches(upper, PRESETS, n=1)
    raise RecipeError(f"there is no scheme {name!r}", hint=(f"nearest is {near[0]}; " if near else "") + offered)


def checked(scheme: QuantizationScheme) -> QuantizationScheme:
    """A copy of the scheme that names its format.

    Raises:
        RecipeError: for a scheme that is not offered, saying why.
    """
    weights, inputs = scheme.weights, scheme.input_activations
    if weights is None:
        raise RecipeError("a scheme without weights quantizes nothing")
    if scheme.output_activations is not None:
        raise RecipeError("output_activations are not offered", hint="leave them out")
    _check_weights(weights)
    if inputs is None:
        found = _weight_only_format(weights)
    else:
        _check_inputs(inputs)
        found = _weight_and_input_format(weights, inputs)
    if scheme.format not in (None, found):
        raise RecipeError(
            f"the format {CompressionFormat(scheme.format).value} does not fit this scheme",
            hint=f"its format is {found}",
        )
    return scheme.model_copy(update={"format": found}, deep=True)


def _check_weights(weights: QuantizationArgs) -> None:
    if weights.type == "float" and weights.num_bits != 8:
        raise RecipeError(f"{weights.num_bits} bit float weights (NVFP4, MXFP4) are not offered yet")
    if weights.scale_dtype is not None:
        raise RecipeError(f"scale_dtype {weights.scale_dtype} (NVFP4, MXFP4, MXFP8) is not offered yet")
    if not 2 <= weights.num_bits <= 8:
        raise RecipeError(f"{weights.num_bits} bit weights cannot be packed", hint="offered are 2 to 8 bits")
    if weights.dynamic:
        raise RecipeError("weights cannot be dynamic")
    if weights.observer not in MIN_MAX_OBSERVERS:
        raise RecipeError(f"the weight observer {weights.observer!r} is not offered", hint="leave it out")
    if weights.observer_kwargs:
        raise RecipeError(f"observer_kwargs {weights.observer_kwargs} are not offered", hint="leave them out")


def _check_inputs(inputs: QuantizationArgs) -> None:
    if inputs.num_bits != 8 or inputs.scale_dtype is not None:
        raise RecipeError(
            f"{inputs.num_bits} bit input_activations with scale_dtype {inputs.scale_dtype} are not offered"
        )
    if inputs.dynamic is not True:
        raise RecipeError(
            "static activation quantization is not offered yet", hint="set strategy: token and dynamic: true"
        )
    if inputs.strategy != "token":
        raise RecipeError(
            f"input_activations by {_plain(inputs.strategy)} are not offered yet", hint="set strategy: token"
        )


def _weight_only_format(weights: QuantizationArgs) -> str:
    if weights.type != "int":
        raise RecipeError("float weights without input_activations are not offered yet", hint="use FP8_DYNAMIC")
    if weights.strategy not in ("group", "channel"):
        raise RecipeError(
            f"int weights alone with strategy {_plain(weights.strategy)} are not offered", hint="use group or channel"
        )
    return str(CompressionFormat.pack_quantized.value)


def _weight_and_input_format(weights: QuantizationArgs, inputs: QuantizationArgs) -> str:
    fits = (
        weights.num_bits == 8
        and weights.symmetric
        and weights.type == inputs.type
        and weights.strategy in ("channel", "tensor")
        and (inputs.symmetric or inputs.type == "int")
    )
    if not fits:
        raise RecipeError(
            f"{weights.num_bits} bit {_plain(weights.type)} weights with strategy {_plain(weights.strategy)}"
            f" and 8 bit {_plain(inputs.type)} input_activations are not offered yet",
            hint="weights must then be symmetric, 8 bit, of the same type, by channel or tensor",
        )
    is_int = weights.type == "int"
    return str((CompressionFormat.int_quantized if is_int else CompressionFormat.float_quantized).value)


def _plain(value: object) -> object:
    """A field's value for a message; a field that was inferred holds an enum member, one that was given a string."""
    return getattr(value, "value", value)


def compress_module(
    name: str,
    weight_OI: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    scheme: QuantizationScheme,
) -> dict[str, torch.Tensor]:
    """The tensors that the checkpoint holds for a module.

    Args:
        name: the module's name, for messages.
        weight_OI: the dequantized weight in float32; a narrower dtype may move it off its grid.
        scale: as `QuantizedWeight` has it.
        zero_point: likewise.
        scheme: with its format, as `checked` returns it.

    Returns:
        Contiguous tensors by their name in the module: weight_packed, weight_scale, weight_shape and, for an
        asymmetric grid, weight_zero_point; or weight and weight_scale.

    Raises:
        QuantizationError: when weight, scale, zero point and scheme do not fit together.
    """
    shape = _scale_shape(weight_OI, scheme.weights)
    if list(scale.shape) != shape:
        raise QuantizationError(
            f"{name}: a scale of shape {list(scale.shape)} does not fit the weight, which needs {shape}"
        )
    if (zero_point is None) != scheme.weights.symmetric:
        raise QuantizationError(f"{name}: an asymmetric scheme needs a zero point, a symmetric one has none")
    state = {"weight": weight_OI, "weight_scale": scale}
    if zero_point is not None:
        state["weight_zero_point"] = zero_point
    return {key: t.contiguous() for key, t in _compressor(scheme).compress(state, scheme).items()}


def _scale_shape(weight_OI: torch.Tensor, args: QuantizationArgs) -> list[int]:
    num_out, num_in = weight_OI.shape
    if args.strategy == "tensor":
        return [1]
    return [num_out, -(-num_in // args.group_size) if args.strategy == "group" else 1]


def decompress_module(tensors: Mapping[str, torch.Tensor], scheme: QuantizationScheme) -> torch.Tensor:
    """The dense weight that a reader of the checkpoint computes with.

    Args:
        tensors: by their name in the module, as `compress_module` returns them.
        scheme: with its format.

    Returns:
        weight_OI in the scale's dtype.

    Raises:
        WeightsError: when a tensor is missing.
    """
    compressor = _compressor(scheme)
    missing = [key for key in compressor.compression_param_names(scheme) if key not in tensors]
    if missing:
        raise WeightsError(
            f"a {CompressionFormat(scheme.format).value} module lacks {', '.join(missing)}",
            hint=f"it has {', '.join(tensors)}",
        )
    weight_OI: torch.Tensor = compressor.decompress(dict(tensors), scheme)["weight"]
    return weight_OI


def stored_shapes(shape: tuple[int, ...], scheme: QuantizationScheme) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a checkpoint holds for a weight.

    Args:
        shape: of the dense weight, [O, I].
        scheme: with its format.
    """
    weight_OI = torch.empty(shape, device="meta")
    num_rows, *rest = _scale_shape(weight_OI, scheme.weights)
    state = {"weight": weight_OI, "weight_scale": torch.empty(num_rows, *rest, device="meta")}
    found = {name: tuple(tensor.shape) for name, tensor in _compressor(scheme).compress(state, scheme).items()}
    if not scheme.weights.symmetric:  # packed along the rows, which `compress` does for real tensors only
        found["weight_zero_point"] = (math.ceil(num_rows * scheme.weights.num_bits / 32), *rest)
    return found


def stored_dtypes(scheme: QuantizationScheme, scale_dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Names and dtypes of the tensors that a checkpoint holds for a weight, in the order of `compress_module`.

    Args:
        scheme: with its format.
        scale_dtype: the dtype that scales are stored in.
    """
    weights = scheme.weights
    num_in = weights.group_size if weights.strategy == "group" else 32
    weight_OI = torch.zeros(1, num_in)
    shape = _scale_shape(weight_OI, weights)
    zero_point = None if weights.symmetric else torch.zeros(shape, dtype=torch.int8)
    tensors = compress_module("", weight_OI, torch.ones(shape, dtype=scale_dtype), zero_point, scheme)
    return {name: tensor.dtype for name, tensor in tensors.items()}


def _compressor(scheme: QuantizationScheme) -> Any:
    return BaseCompressor.get_value_from_registry(CompressionFormat(scheme.format).value)


def quantize_activation(inputs: torch.Tensor, args: QuantizationArgs) -> torch.Tensor:
    """A Linear's input, rounded as a reader of the checkpoint rounds it on the fly.

    Kept to the letter, also where it surprises: strategy "token" has one scale for each index of the first
    two dimensions. In [batch, sequence, I] that is one for each token; an input of [T, I] would have one for
    each number, and gets a single scale for the whole tensor.

    Args:
        inputs: any float dtype, normally [batch, sequence, I]; not changed.
        args: the scheme's `input_activations`, dynamic.

    Returns:
        The dequantized inputs, same shape and dtype.
    """
    if inputs.numel() == 0:
        return inputs
    scale, zero_point = compute_dynamic_scales_and_zp(inputs, args, None)
    rounded: torch.Tensor = fake_quantize(inputs, scale, zero_point, args)
    return rounded


def quantization_config(groups: Sequence[QuantizationScheme], ignore: Sequence[str]) -> dict[str, Any]:
    """What goes into config.json as "quantization_config".

    Args:
        groups: the schemes, in order; they become group_0, group_1 and so on.
        ignore: every Linear that a target would hit and that was left as it is, by the checkpoint's names.

    Returns:
        Plain values, ready for `json.dumps`.
    """
    schemes = [checked(scheme) for scheme in groups]
    formats = list(dict.fromkeys(str(scheme.format) for scheme in schemes))
    config = QuantizationConfig(
        config_groups={f"group_{index}": scheme for index, scheme in enumerate(schemes)},
        format=formats[0] if len(formats) == 1 else CompressionFormat.mixed_precision.value,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=list(ignore),
    )
    return {
        "version": compressed_tensors.__version__,
        "sparsity_config": {},
        "transform_config": {},
        **config.model_dump(mode="json"),
    }


def class_names(module_class: type | str) -> tuple[str, ...]:
    """The names by which a target can mean a class: its own and those of the classes it derives from."""
    return (module_class,) if isinstance(module_class, str) else tuple(c.__name__ for c in module_class.__mro__)


def matches_name(pattern: str, name: str) -> bool:
    """Whether a target or ignore pattern means a module by its name, in full or by `re:`.

    A regular expression must match from the name's beginning, not to its end.
    """
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), name) is not None
    return pattern == name


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSchemes:
    """Which module of a quantized checkpoint is stored how.

    Args:
        groups: the schemes in the config's order, each with its format.
        ignore: patterns of modules that are stored as they are.
    """

    groups: tuple[QuantizationScheme, ...]
    ignore: tuple[str, ...]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> CheckpointSchemes:
        """Read config.json's "quantization_config".

        Raises:
            WeightsError: when it is not one of compressed-tensors, or holds a scheme that is not offered.
        """
        if config.get("quant_method") != METHOD:
            raise WeightsError(
                f"the checkpoint is quantized by {config.get('quant_method')!r}",
                hint=f"only {METHOD} can be read",
            )
        try:
            parsed = QuantizationConfig.model_validate(dict(config))
        except (ValueError, TypeError, NotImplementedError, KeyError) as error:
            raise WeightsError(f"the checkpoint's quantization_config cannot be read: {error}") from error
        if parsed.kv_cache_scheme is not None:
            raise WeightsError("the checkpoint quantizes the key-value cache, which is not offered yet")
        if parsed.quantization_status != QuantizationStatus.COMPRESSED:
            raise WeightsError(f"the checkpoint is {parsed.quantization_status.value}, not compressed")
        try:
            groups = tuple(
                checked(scheme.model_copy(update={"format": scheme.format or parsed.format}))
                for scheme in parsed.config_groups.values()
            )
        except RecipeError as error:
            raise WeightsError(f"the checkpoint's quantization_config: {error.message}", hint=error.hint) from error
        return cls(groups=groups, ignore=tuple(parsed.ignore or ()))

    def find(self, name: str, module_class: type | str) -> QuantizationScheme | None:
        """The scheme of a Linear, or `None` when it is stored as it is.

        Transformers' order: a target that is the name, then `re:` targets by the alphabet, then classes; of
        groups with the same target the last.

        Args:
            name: the module's dotted name.
            module_class: its class, or the class's name.
        """
        names = class_names(module_class)
        if any(matches_name(pattern, name) or pattern in names for pattern in self.ignore):
            return None
        by_target = {target: scheme for scheme in self.groups for target in scheme.targets}
        ordered = sorted(by_target, key=lambda target: (target.startswith("re:"), target))
        by_name = [target for target in ordered if matches_name(target, name)]
        by_class = [target for target in ordered if target in names]
        return next((by_target[target] for target in by_name + by_class), None)
