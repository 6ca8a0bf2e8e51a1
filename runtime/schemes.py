"""The tensors and the config that a quantized checkpoint stores for a scheme, and what a reader computes with them.

The adapter to compressed-tensors: nothing else here knows how that package packs a weight, rounds an activation or
spells `config.json["quantization_config"]`. Which schemes there are is the matter of `runtime.presets`.

Shapes: O out features, I in features.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import compressed_tensors
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
)
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

from runtime.errors import QuantizationError, RecipeError, WeightsError
from runtime.patterns import fault, starts_with
from runtime.presets import MIN_MAX_OBSERVERS, checked, checked_cache

if TYPE_CHECKING:
    from runtime.algorithms.result import QuantizedWeight

METHOD = "compressed-tensors"
_ROWS_AT_A_TIME = 480  # whatever packs numbers along the rows, of 2 to 8 bits, begins anew after so many
_LONG_ROW = 2**20  # an artifact states the shapes, and may state any
NUMBERS_AT_A_TIME = 2**20  # of a weight; a compressor holds several copies of what it is given


def compress_module(name: str, result: QuantizedWeight, scheme: QuantizationScheme) -> dict[str, torch.Tensor]:
    """The tensors that the checkpoint holds for a module.

    Args:
        name: the module's name, for messages.
        result: of an algorithm. Its weight is in float32; a narrower dtype may move it off its grid.
        scheme: with its format, as `presets.checked` returns it.

    Returns:
        Contiguous tensors by their name in the module: weight_packed or weight, weight_scale, and what else the format
        has: weight_shape, weight_zero_point, weight_global_scale, and the scales of static inputs.

    Raises:
        QuantizationError: when weight, scale, zero point and scheme do not fit together.
    """
    weights = scheme.weights
    shape = _scale_shape(result.weight_OI.shape, weights)
    if list(result.scale.shape) != shape:
        raise QuantizationError(
            f"{name}: a scale of shape {list(result.scale.shape)} does not fit the weight, which needs {shape}"
        )
    if (result.zero_point is None) != weights.symmetric:
        raise QuantizationError(f"{name}: an asymmetric scheme needs a zero point, a symmetric one has none")
    if (result.global_scale is None) != (weights.strategy != "tensor_group"):
        raise QuantizationError(f"{name}: NVFP4 needs a global scale, and no other scheme has one")
    missing = [part for part in input_parts(scheme) if part not in result.inputs]
    if missing or len(result.inputs) != len(input_parts(scheme)):
        raise QuantizationError(f"{name}: its inputs' scheme needs {input_parts(scheme)}, not {list(result.inputs)}")
    state = {"weight": result.weight_OI, "weight_scale": result.scale}
    if result.zero_point is not None:
        state["weight_zero_point"] = result.zero_point
    if result.global_scale is not None:
        state["weight_global_scale"] = result.global_scale
    compressor = _compressor(scheme)
    num_out = len(result.weight_OI)
    by_row = [key for key, tensor in state.items() if len(tensor) == num_out > 1]
    parts = [
        compressor.compress({key: t[rows] if key in by_row else t for key, t in state.items()}, scheme)
        for rows in _rows(result.weight_OI.shape, is_cut="weight_scale" in by_row)
    ]
    packed = {key: _joined(key, [part[key] for part in parts], by_row) for key in parts[0]}
    if "weight_shape" in packed:
        packed["weight_shape"] = packed["weight_shape"].new_tensor(result.weight_OI.shape)
    return {**packed, **result.inputs}


def _rows(shape: Sequence[int], *, is_cut: bool) -> list[slice]:
    """Parts of the rows of a weight, which are worked with one after the other, or all of them."""
    num_out, num_in = shape
    step = max(1, NUMBERS_AT_A_TIME // max(num_in, 1) // _ROWS_AT_A_TIME) * _ROWS_AT_A_TIME
    return [slice(start, start + step) for start in range(0, num_out, step)] if is_cut else [slice(0, num_out)]


def _joined(key: str, parts: Sequence[torch.Tensor], by_row: Sequence[str]) -> torch.Tensor:
    is_cut = key in by_row or key == "weight_packed"
    return torch.cat(list(parts)) if is_cut and len(parts) > 1 else parts[0].contiguous()


def input_parts(scheme: QuantizationScheme) -> tuple[str, ...]:
    """Names of the tensors that hold the scales of static inputs."""
    inputs = scheme.input_activations
    if inputs is None or inputs.dynamic is True:
        return ()
    if inputs.dynamic == "local":
        return ("input_global_scale",)
    return ("input_scale",) if inputs.symmetric else ("input_scale", "input_zero_point")


def _scale_shape(shape: Sequence[int], args: QuantizationArgs) -> list[int]:
    num_out, num_in = shape
    if args.strategy == "tensor":
        return [1]
    if args.strategy == "block":
        height, width = args.block_structure
        return [-(-num_out // height), -(-num_in // width)]
    return [num_out, -(-num_in // args.group_size) if args.strategy in ("group", "tensor_group") else 1]


def decompress_module(tensors: Mapping[str, torch.Tensor], scheme: QuantizationScheme) -> torch.Tensor:
    """The dense weight that a reader of the checkpoint computes with.

    Args:
        tensors: by their name in the module, as `compress_module` returns them.
        scheme: with its format.

    Returns:
        weight_OI in the scale's dtype; in bfloat16 for formats of small floats.

    Raises:
        WeightsError: when a tensor is missing.
    """
    compressor = _compressor(scheme)
    parts = {name: tensor for name, tensor in tensors.items() if not name.startswith("input_")}
    missing = [
        key for key in compressor.compression_param_names(scheme) if key not in parts and not key.startswith("input_")
    ]
    if missing:
        raise WeightsError(
            f"a {CompressionFormat(scheme.format).value} module lacks {', '.join(missing)}",
            hint=f"it has {', '.join(tensors)}",
        )
    if "weight_zero_point" in parts and len(parts["weight_zero_point"]) == 1:
        # The package views its transpose as bytes, for which torch wants the last of the strides to be one.
        parts["weight_zero_point"] = parts["weight_zero_point"].as_strided(parts["weight_zero_point"].shape, (1, 1))
    by_row = [key for key in ("weight", "weight_packed", "weight_scale") if key in parts]
    num_out = len(parts[by_row[0]])
    is_cut = "weight_zero_point" not in parts and num_out == len(parts["weight_scale"]) > _ROWS_AT_A_TIME
    if not is_cut:
        weight_OI: torch.Tensor = compressor.decompress(parts, scheme)["weight"]
        return weight_OI
    num_in = int(parts["weight_shape"][1]) if "weight_shape" in parts else parts[by_row[0]].shape[1]
    dense = []
    for rows in _rows((num_out, num_in), is_cut=True):
        some = {key: tensor[rows] if key in by_row else tensor for key, tensor in parts.items()}
        if "weight_shape" in some:
            some["weight_shape"] = parts["weight_shape"].new_tensor((len(some[by_row[0]]), num_in))
        dense.append(compressor.decompress(some, scheme)["weight"])
    return torch.cat(dense)


def stored_shapes(shape: tuple[int, ...], scheme: QuantizationScheme) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a checkpoint holds for a weight.

    Args:
        shape: of the dense weight, [O, I].
        scheme: with its format.
    """
    args = scheme.weights
    sizes = _scale_shape(shape, args)
    # A few rows tell what all would come to. Tensors without content do as well, but for rounding them torch imports
    # half a second of libraries, which stay in memory for as long as the process lives.
    height = args.block_structure[0] if args.strategy == "block" else 1
    few = (height, shape[1])
    with torch.device("cpu" if shape[1] <= _LONG_ROW else "meta"):
        state = {"weight": torch.zeros(few), "weight_scale": torch.ones(_scale_shape(few, args))}
        if not args.symmetric:
            state["weight_zero_point"] = torch.zeros(_scale_shape(few, args), dtype=torch.int8)
        if args.strategy == "tensor_group":
            state["weight_global_scale"] = torch.ones(1)
    packed = _compressor(scheme).compress(state, scheme)
    found = {
        name: (shape[0], *tensor.shape[1:]) if name in ("weight", "weight_packed") else tuple(tensor.shape)
        for name, tensor in packed.items()
    }
    found["weight_scale"] = tuple(sizes)
    if not args.symmetric:
        num_rows, *rest = sizes
        if scheme.format == CompressionFormat.pack_quantized.value:  # packed along the rows
            num_rows = math.ceil(num_rows * args.num_bits / 32)
        found["weight_zero_point"] = (num_rows, *rest)
    return found | dict.fromkeys(input_parts(scheme), (1,))


def stored_dtypes(scheme: QuantizationScheme, scale_dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Names and dtypes of the tensors that a checkpoint holds for a weight, in the order of `compress_module`.

    Args:
        scheme: with its format.
        scale_dtype: the dtype that scales are stored in, where the format has none of its own.
    """
    from runtime.algorithms.rtn import quantize_rtn

    args = scheme.weights
    weight_OI = torch.ones(1, max(args.group_size or 0, 32))  # -1 stands for all of a row
    plain = args.model_copy(update={"observer": None, "observer_kwargs": {}})
    result = quantize_rtn(weight_OI, plain, scale_dtype=scale_dtype)
    dtypes = {"input_scale": scale_dtype, "input_zero_point": torch.int8, "input_global_scale": torch.float32}
    inputs = {part: torch.ones(1, dtype=dtypes[part]) for part in input_parts(scheme)}
    tensors = compress_module("", dataclasses.replace(result, inputs=inputs), scheme)
    return {name: tensor.dtype for name, tensor in tensors.items()}


def _compressor(scheme: QuantizationScheme) -> Any:
    return BaseCompressor.get_value_from_registry(CompressionFormat(scheme.format).value)


def quantize_activation(
    inputs: torch.Tensor, args: QuantizationArgs, parts: Mapping[str, torch.Tensor] | None = None
) -> torch.Tensor:
    """A Linear's input, rounded as a reader of the checkpoint rounds it on the fly.

    Kept to the letter, also where it surprises: strategy "token" has one scale for each index of the first
    two dimensions. In [batch, sequence, I] that is one for each token; an input of [T, I] would have one for
    each number, and gets a single scale for the whole tensor.

    Args:
        inputs: any float dtype, normally [batch, sequence, I]; not changed.
        args: the scheme's `input_activations`.
        parts: the tensors that `input_parts` names, where scales are static.

    Returns:
        The dequantized inputs, same shape and dtype.
    """
    if inputs.numel() == 0:
        return inputs
    parts = parts or {}
    global_scale = parts.get("input_global_scale")
    if args.dynamic in (True, "local"):
        scale, zero_point = compute_dynamic_scales_and_zp(inputs, args, None, global_scale=global_scale)
    else:
        scale, zero_point = parts["input_scale"], parts.get("input_zero_point")
    rounded: torch.Tensor = fake_quantize(inputs, scale, zero_point, args, global_scale=global_scale)
    return rounded.to(inputs.dtype)


def static_input_parts(
    minimum: torch.Tensor, maximum: torch.Tensor, args: QuantizationArgs, scale_dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The tensors that `input_parts` names, from the smallest and largest number of an input, both scalars."""
    from runtime.algorithms import grid

    low, high = minimum.float().reshape(1), maximum.float().reshape(1)
    if args.dynamic == "local":
        return {"input_global_scale": grid.global_scale_for(low, high)}
    scale, zero_point = grid.fit(low, high, args, scale_dtype=scale_dtype)
    return {"input_scale": scale} if zero_point is None else {"input_scale": scale, "input_zero_point": zero_point}


def static_cache_scale(
    minimum: torch.Tensor, maximum: torch.Tensor, args: QuantizationArgs, dtype: torch.dtype
) -> torch.Tensor:
    """The scales [N] of keys, values or queries, from their smallest and largest numbers, [N] or []."""
    from runtime.algorithms import grid

    scale, _ = grid.fit(minimum.float().cpu().reshape(-1), maximum.float().cpu().reshape(-1), args, scale_dtype=dtype)
    return scale


def quantization_config(
    groups: Sequence[QuantizationScheme],
    ignore: Sequence[str],
    cache: QuantizationArgs | None = None,
    attention: Sequence[str] = (),
) -> dict[str, Any]:
    """What goes into config.json as "quantization_config".

    Args:
        groups: the schemes, in order; they become group_0, group_1 and so on.
        ignore: every Linear that a target would hit and that was left as it is, by the checkpoint's names.
        cache: the key-value cache's scheme.
        attention: the classes of attention modules whose queries are rounded by it, too.

    Returns:
        Plain values, ready for `json.dumps`.
    """
    schemes = [_readable(checked(scheme)) for scheme in groups]
    formats = list(dict.fromkeys(str(scheme.format) for scheme in schemes)) or [CompressionFormat.dense.value]
    # A group for each class: vLLM knows groups for attention by a single target that ends in its name.
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
        "transform_config": {},
        **config.model_dump(mode="json"),
    }


def _readable(scheme: QuantizationScheme) -> QuantizationScheme:
    """Without what readers do not know: observers of this project alone, which are spent when the weights are."""
    args = scheme.weights
    if args.observer in (None, *MIN_MAX_OBSERVERS, "mse", "memoryless_mse"):
        return scheme
    weights = args.model_copy(update={"observer": "mse", "observer_kwargs": {}})
    return scheme.model_copy(update={"weights": weights})


def _unobserved(args: QuantizationArgs) -> QuantizationArgs:
    """Without observers, which are spent when a checkpoint is written: those of any other tool will do."""
    return args.model_copy(update={"observer": None, "observer_kwargs": {}})


def _stored(scheme: QuantizationScheme, format_of_all: str) -> QuantizationScheme:
    """A scheme of a checkpoint, with its format; numbers of few bits may lie in a byte each."""
    parts = {name: getattr(scheme, name) for name in ("weights", "input_activations")}
    bare = {name: _unobserved(args) for name, args in parts.items() if args is not None}
    named = CompressionFormat(scheme.format or format_of_all)
    is_spread = named == CompressionFormat.int_quantized and scheme.weights is not None and scheme.weights.type == "int"
    found = checked(scheme.model_copy(update={**bare, "format": None if is_spread else named.value}))
    return found.model_copy(update={"format": named.value}) if is_spread else found


def class_names(module_class: type | str) -> tuple[str, ...]:
    """The names by which a target can mean a class: its own and those of the classes it derives from."""
    return (module_class,) if isinstance(module_class, str) else tuple(c.__name__ for c in module_class.__mro__)


def matches_name(pattern: str, name: str) -> bool:
    """Whether a target or ignore pattern means a module by its name, in full or by `re:`.

    A regular expression must match from the name's beginning, not to its end.
    """
    if pattern.startswith("re:"):
        return starts_with(pattern.removeprefix("re:"), name)
    return pattern == name


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSchemes:
    """Which module of a quantized checkpoint is stored how.

    Args:
        groups: the schemes in the config's order, each with its format.
        ignore: patterns of modules that are stored as they are.
        cache: the key-value cache's scheme.
        has_queries: whether attention's queries are rounded by it, too.
    """

    groups: tuple[QuantizationScheme, ...]
    ignore: tuple[str, ...]
    cache: QuantizationArgs | None = None
    has_queries: bool = False

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
        if parsed.quantization_status != QuantizationStatus.COMPRESSED:
            status = parsed.quantization_status.value
            raise WeightsError(
                f"the checkpoint's quantization_config says that it is {status}, not compressed",
                hint="save it compressed (save_compressed=True); if its weights are plain, remove the entry",
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
                what = f"{text[:80]!r} is no regular expression: {wrong}"
                raise WeightsError(f"the checkpoint's quantization_config: {what}")
        return cls(groups=groups, ignore=ignore, cache=cache, has_queries=has_queries)

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
