"""Quantization schemes by preset name, and the check that a scheme is supported.

    format                  weights                                     inputs
    pack-quantized          2 to 8 bit int, group or channel            unquantized, or dynamic 4 to 8 bit
    int-quantized           8 bit int, symmetric                        8 bit int, dynamic or static
    float-quantized         8 bit float by channel, tensor or block     8 bit float, dynamic or static
    naive-quantized         8 bit float by channel, tensor or block     unquantized
    nvfp4-pack-quantized    4 bit float, groups of 16, 8 bit scales     unquantized, or the same
    mxfp4-pack-quantized    4 bit float, groups of 32, powers of two    unquantized, or MX or 8 bit float groups
    mxfp6-pack-quantized    6 bit float, groups of 32, powers of two    likewise
    mxfp8-quantized         8 bit float, groups of 32, powers of two    likewise

The presets' names are those of compressed-tensors. Each release has its own list; a preset that is missing in the
installed release is rejected by name.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    is_preset_scheme,
    preset_name_to_scheme,
)

from runtime.console import shown
from runtime.errors import RecipeError

AVERAGING_CONSTANT = 0.01

_NAMES = (
    *(f"W{bits}A16" for bits in range(2, 9)),
    "W4A16_ASYM",
    *(f"W{bits}A8" for bits in range(2, 9)),
    "INT8",
    *(f"W{bits}A4" for bits in range(2, 5)),
    "W4AFP8",
    *("FP8", "FP8_DYNAMIC", "FP8_BLOCK"),
    *("NVFP4", "NVFP4A16"),
    *("MXFP4", "MXFP4A16", "MXFP4XFP8", "MXFP6A16", "MXFP6A8", "MXFP8", "MXFP8A16"),
)
PRESETS = tuple(name for name in _NAMES if is_preset_scheme(name))

MIN_MAX_OBSERVERS = ("minmax", "memoryless_minmax", "static_minmax")
MSE_OBSERVERS = ("mse", "memoryless_mse", "nvfp4_expanded_mse", "fouroversix", "imatrix_mse", "signed_mse")
WEIGHT_OBSERVERS = (*MIN_MAX_OBSERVERS, *MSE_OBSERVERS, "percentile")
INPUT_OBSERVERS = ("minmax", "static_minmax")
CACHE_STRATEGIES = ("tensor", "attn_head")
OBSERVER_OPTIONS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(MIN_MAX_OBSERVERS, ("averaging_constant",)),
    **dict.fromkeys(MSE_OBSERVERS, ("maxshrink", "patience", "grid", "norm", "expand", "averaging_constant")),
    "percentile": ("percentile",),
}


def scheme_from_preset(name: str, targets: Iterable[str]) -> QuantizationScheme:
    """Look up the scheme of a preset by its name, in upper or lower case.

    Raises:
        RecipeError: for an unknown or unsupported preset.
    """
    upper = name.upper()
    if upper in PRESETS:
        return checked(preset_name_to_scheme(upper, list(targets)))
    supported = f"supported: {', '.join(PRESETS)}"
    if upper in _NAMES or is_preset_scheme(name):
        raise RecipeError(f"the scheme {upper} is not supported with this compressed-tensors", hint=supported)
    near = difflib.get_close_matches(upper, PRESETS, n=1)
    raise RecipeError(f"unknown scheme {name!r}", hint=(f"did you mean {near[0]}? " if near else "") + supported)


def checked(scheme: QuantizationScheme) -> QuantizationScheme:
    """Check that a scheme is supported, and return a copy that names its format.

    Raises:
        RecipeError: for an unsupported scheme, with the reason.
    """
    weights, inputs = scheme.weights, scheme.input_activations
    if weights is None:
        raise RecipeError("a scheme without weights quantizes nothing", hint="add weights to it")
    if scheme.output_activations is not None:
        raise RecipeError("output_activations are not supported", hint="remove them")
    _check_weights(weights)
    if weights.observer == "signed_mse" and inputs is not None:
        raise RecipeError(
            "the observer signed_mse cannot be combined with input_activations",
            hint="kernels for rounded inputs may require scales above zero; use mse",
        )
    if inputs is not None:
        _check_inputs(inputs)
    found = _format(weights, inputs)
    if scheme.format not in (None, found):
        raise RecipeError(
            f"the format {CompressionFormat(scheme.format).value} cannot store this scheme",
            hint=f"its format is {found}",
        )
    return scheme.model_copy(update={"format": found}, deep=True)


def checked_cache(args: QuantizationArgs) -> QuantizationArgs:
    """Check that a scheme of a key-value cache or of attention is supported, and return it.

    Raises:
        RecipeError: for anything but 8 bit float with static scales, by tensor or by head.
    """
    strategy = plain_value(args.strategy)
    plain = (args.num_bits, plain_value(args.type), args.symmetric, strategy in CACHE_STRATEGIES, bool(args.dynamic))
    if plain != (8, "float", True, True, False) or args.scale_dtype is not None:
        raise RecipeError(
            f"a key-value cache of {args.num_bits} bit {plain_value(args.type)} by {strategy} "
            f"(symmetric={args.symmetric}, dynamic={args.dynamic}) is not supported",
            hint="supported: {num_bits: 8, type: float, strategy: tensor, symmetric: true, dynamic: false}, "
            "and strategy: attn_head",
        )
    _check_observer(args, INPUT_OBSERVERS)
    return args


def averaging_of(args: QuantizationArgs) -> float | None:
    """The weight of the newest batch in the moving average of an input's or cache's span; None for no average.

    `minmax`, which is also the default observer, averages.
    """
    if args.observer not in (None, "minmax"):
        return None
    return float(args.observer_kwargs.get("averaging_constant", AVERAGING_CONSTANT))


def _check_weights(weights: QuantizationArgs) -> None:
    if weights.dynamic:
        raise RecipeError("weights cannot be dynamic", hint="set dynamic: false")
    if weights.type == "int" and not 2 <= weights.num_bits <= 8:
        raise RecipeError(f"{weights.num_bits} bit weights cannot be packed", hint="supported: 2 to 8 bits")
    if weights.type == "float" and not weights.symmetric:
        raise RecipeError("float weights cannot be asymmetric", hint="set symmetric: true")
    if weights.type == "int" and weights.scale_dtype is not None:
        raise RecipeError(f"int weights with scale_dtype {weights.scale_dtype} are not supported", hint="remove it")
    _check_observer(weights, WEIGHT_OBSERVERS)
    if weights.observer == "fouroversix" and not _is_nv(weights):
        raise RecipeError("the observer fouroversix requires NVFP4 weights", hint="use mse")
    is_grouped = plain_value(weights.strategy) in ("group", "channel")
    if weights.observer == "signed_mse" and not (weights.type == "int" and weights.symmetric and is_grouped):
        raise RecipeError("the observer signed_mse requires symmetric int weights by group or channel", hint="use mse")


def _check_observer(args: QuantizationArgs, supported: tuple[str, ...]) -> None:
    if args.observer is not None and args.observer not in supported:
        raise RecipeError(f"the observer {args.observer!r} is not supported", hint=f"supported: {', '.join(supported)}")
    known = OBSERVER_OPTIONS.get(str(args.observer or "memoryless_minmax"), ())
    for name, value in args.observer_kwargs.items():
        if name not in known:
            raise RecipeError(
                f"observer_kwargs {name!r} is not supported for the observer {args.observer}",
                hint=f"supported: {', '.join(known)}" if known else "remove it",
            )
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise RecipeError(f"observer_kwargs {name} must be a positive number, not {shown(value)}")


def _check_inputs(inputs: QuantizationArgs) -> None:
    kind, strategy, dynamic = plain_value(inputs.type), plain_value(inputs.strategy), plain_value(inputs.dynamic)
    known = (kind == "int" and inputs.num_bits in (4, 8)) or (kind == "float" and inputs.num_bits in (4, 6, 8))
    if not known or (kind == "float" and not inputs.symmetric):
        raise RecipeError(
            f"{inputs.num_bits} bit {kind} input_activations (symmetric={inputs.symmetric}) are not supported",
            hint="supported: 4 and 8 bit int, and symmetric 4, 6 and 8 bit float",
        )
    if dynamic is False:
        if strategy != "tensor" or inputs.num_bits != 8 or inputs.scale_dtype is not None:
            raise RecipeError(
                f"static {inputs.num_bits} bit input_activations by {strategy} are not supported",
                hint="static inputs must be 8 bit, by tensor",
            )
        _check_observer(inputs, INPUT_OBSERVERS)
        return
    if dynamic == "local":
        _check_observer(inputs, INPUT_OBSERVERS)
    is_nv = strategy == "tensor_group" and dynamic == "local" and _is_nv(inputs)
    is_mx = strategy == "group" and dynamic is True and _is_mx(inputs)
    is_group = strategy == "group" and dynamic is True and inputs.num_bits == 8 and inputs.scale_dtype is None
    is_token = strategy == "token" and dynamic is True and inputs.num_bits != 6 and inputs.scale_dtype is None
    if not (is_nv or is_mx or is_group or is_token):
        raise RecipeError(
            f"dynamic {inputs.num_bits} bit {kind} input_activations by {strategy} with scale_dtype "
            f"{inputs.scale_dtype} are not supported",
            hint="set strategy: token and dynamic: true, or use a preset",
        )


def _format(weights: QuantizationArgs, inputs: QuantizationArgs | None) -> str:
    strategy = plain_value(weights.strategy)
    if weights.type == "int":
        return _int_format(weights, inputs, str(strategy))
    if _is_nv(weights):
        found = CompressionFormat.nvfp4_pack_quantized
    elif _is_mx(weights):
        found = CompressionFormat(
            {4: "mxfp4-pack-quantized", 6: "mxfp6-pack-quantized", 8: "mxfp8-quantized"}[weights.num_bits]
        )
    elif weights.num_bits == 8 and weights.scale_dtype is None and strategy in ("channel", "tensor", "block"):
        if inputs is not None and (inputs.type != "float" or inputs.num_bits != 8):
            raise RecipeError(
                f"8 bit float weights with {inputs.num_bits} bit {plain_value(inputs.type)} inputs are not supported",
                hint="use 8 bit float inputs, or none",
            )
        found = CompressionFormat.naive_quantized if inputs is None else CompressionFormat.float_quantized
    else:
        raise RecipeError(
            f"{weights.num_bits} bit float weights by {strategy} (scale_dtype={weights.scale_dtype}) are not supported",
            hint="use one of the presets for float weights",
        )
    if found.value not in BaseCompressor.registered_names():
        raise RecipeError(
            f"the format {found.value} is not supported by this compressed-tensors", hint="install a newer release"
        )
    return str(found.value)


def _int_format(weights: QuantizationArgs, inputs: QuantizationArgs | None, strategy: str) -> str:
    fits_int8 = weights.num_bits == 8 and weights.symmetric and inputs is not None and inputs.type == "int"
    if fits_int8 and strategy in ("channel", "tensor", "group"):
        return str(CompressionFormat.int_quantized.value)
    if strategy not in ("group", "channel"):
        raise RecipeError(
            f"{weights.num_bits} bit int weights by {strategy} are not supported with these inputs",
            hint="use group or channel",
        )
    return str(CompressionFormat.pack_quantized.value)


def _is_nv(args: QuantizationArgs) -> bool:
    is_group = plain_value(args.strategy) == "tensor_group" and args.group_size == 16
    return is_group and args.type == "float" and args.num_bits == 4 and args.scale_dtype == torch.float8_e4m3fn


def _is_mx(args: QuantizationArgs) -> bool:
    is_group = plain_value(args.strategy) == "group" and args.group_size == 32
    return is_group and args.type == "float" and args.num_bits in (4, 6, 8) and args.scale_dtype == torch.uint8


def plain_value(value: object) -> object:
    """The plain value of a scheme's field, which may be an enum member or a string."""
    return getattr(value, "value", value)
