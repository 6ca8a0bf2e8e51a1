"""Checkpoints of compressed-tensors, of this project or another, made plain: every scheme that can be evaluated.

Evaluation reads such a checkpoint as it is stored, with the rounding of inputs that its config states. Here only the
weights matter. The scheme of a module is the first one that stores tensors of these dtypes and shapes, beginning with
those whose targets name the module: its class is not known without a model.

The arithmetic is that of compressed-tensors. Shapes of scales may have axes of size 1 more or fewer, and `weight_shape`
may be empty or missing if the weight has groups. Old checkpoints with the activation order "group" store `weight_g_idx`
[I], the group of each in feature, which compressed-tensors no longer reads.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runtime.checkpoint.source_formats import FLOATS, Packed, PackedTensors, SourceHeaders
from runtime.errors import WeightsError

if TYPE_CHECKING:
    import torch
    from compressed_tensors.quantization import QuantizationScheme

    from runtime.checkpoint.stored import Stored
    from runtime.formats.checkpoint_config import CheckpointSchemes

    _Shapes = dict[str, tuple[int, ...]]
    _Dtypes = dict[str, tuple[str, ...]]

_PARTS = (
    *("weight", "weight_packed", "weight_scale", "weight_zero_point"),
    *("weight_shape", "weight_global_scale", "weight_g_idx"),
)
_SCALES_OF_WEIGHTS = ("weight_scale", "weight_zero_point", "weight_global_scale")
_SCALES_OF_INPUTS = tuple(
    f"{part}_{kind}" for part in ("input", "output", "k", "v", "q") for kind in ("scale", "zero_point", "global_scale")
)
_ORDER = "weight_g_idx"
_LARGEST_SIZE = 2**31


def find_compressed(entry: Mapping[str, Any], headers: SourceHeaders) -> PackedTensors:
    """Find the weights that a compressed-tensors checkpoint stores in another form.

    Raises:
        WeightsError: for sparse weights, for an unsupported scheme or transform, and for tensors that do not fit each
            other or any scheme.
    """
    from runtime.formats.checkpoint_config import CheckpointSchemes

    _require_dense(entry, headers.origin)
    schemes = CheckpointSchemes.from_config(entry)
    layouts = _Layouts(schemes)
    tensors = {}
    for key in headers.ending_with("weight_scale"):
        module = key.rpartition(".")[0]
        stored = {part: headers.tensors[name] for part in _PARTS if (name := f"{module}.{part}") in headers.tensors}
        tensors[f"{module}.weight"] = _packed(module, stored, layouts, headers)
    used = {part for packed in tensors.values() for part in packed.parts.values()}
    for key in headers.ending_with("weight_packed", "weight_zero_point", "weight_global_scale", _ORDER):
        if key not in used:
            headers.need(f"{key.rpartition('.')[0]}.weight_scale", (*FLOATS, "F8_E4M3", "U8"), key)
    from runtime.checkpoint.source_transforms import without_transforms  # imports torch

    tensors, matrices = without_transforms(entry, headers, tensors, schemes.ignore)
    unused = (*headers.ending_with(*_SCALES_OF_INPUTS), *matrices)
    return PackedTensors(tensors=tensors, unused=unused)


def _require_dense(entry: Mapping[str, Any], origin: str) -> None:
    """Reject sparse weights."""
    sparse = entry.get("sparsity_config")
    form = sparse.get("format") if isinstance(sparse, Mapping) else None
    if form not in (None, "dense"):
        raise WeightsError(
            f"{origin} has sparse weights (sparsity_config of the format {str(form)[:80]!r}), which are not supported "
            "as input",
            hint="start from the original checkpoint",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Fit:
    """The scheme of a module, the shape of its weight, and those of the tensors that it is stored in."""

    scheme: QuantizationScheme
    shape: tuple[int, int]
    shapes: _Shapes


class _Layouts:
    """What the schemes of a checkpoint store for a weight.

    A model has few shapes of weights and thousands of experts, so each is computed once.
    """

    def __init__(self, schemes: CheckpointSchemes) -> None:
        self.schemes = schemes
        self._known: dict[tuple[int, tuple[int, int]], tuple[_Shapes, _Dtypes]] = {}

    def fitting(self, module: str, stored: Mapping[str, Stored], stated: tuple[int, int] | None) -> _Fit | None:
        """Return the first scheme that stores a weight in these tensors; `stated` is its shape, if they state it."""
        for scheme in self.schemes.candidates(module):
            shape = stated or _shape_of_groups(stored, scheme)
            if shape is None:
                continue
            try:
                shapes, dtypes = self._of(scheme, shape)
            except (ValueError, RuntimeError):  # the shape cannot be cut into the scheme's groups
                continue
            optional = [_ORDER] if scheme.weights.strategy == "group" else []
            optional += ["weight_shape"] if stated is None else []
            found = {part: tensor for part, tensor in stored.items() if part not in optional}
            if found.keys() == shapes.keys() - optional and all(
                _is_same(part, tensor.shape, shapes[part]) and tensor.dtype in dtypes[part]
                for part, tensor in found.items()
            ):
                return _Fit(scheme=scheme, shape=shape, shapes=shapes)
        return None

    def _of(self, scheme: QuantizationScheme, shape: tuple[int, int]) -> tuple[_Shapes, _Dtypes]:
        """Return shapes and possible dtypes of the tensors that a scheme stores for a weight."""
        import torch

        from runtime.checkpoint.dtypes import dtype_name
        from runtime.formats.compressed import input_parts, stored_dtypes, stored_shapes

        if (id(scheme), shape) not in self._known:
            of_inputs = input_parts(scheme)
            shapes = {part: size for part, size in stored_shapes(shape, scheme).items() if part not in of_inputs}
            dtypes: _Dtypes = {
                part: FLOATS if dtype in (torch.bfloat16, torch.float32) else (dtype_name(dtype),)
                for part, dtype in stored_dtypes(scheme, torch.bfloat16).items()
            }
            self._known[id(scheme), shape] = shapes, dtypes | {"weight_shape": ("I32", "I64")}
        return self._known[id(scheme), shape]


def _is_same(part: str, found: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Whether a tensor has the expected shape; a scale or zero point may differ in axes of size 1."""
    if part not in _SCALES_OF_WEIGHTS:
        return found == expected
    return [size for size in found if size != 1] == [size for size in expected if size != 1]


def _packed(module: str, stored: Mapping[str, Stored], layouts: _Layouts, headers: SourceHeaders) -> Packed:
    fit = layouts.fitting(module, stored, _stated_shape(module, stored, headers))
    if fit is None:
        found = ", ".join(f"{part} {tensor.dtype} {list(tensor.shape)}" for part, tensor in stored.items())
        raise WeightsError(
            f"{headers.origin}: the tensors of {module!r} ({found}) do not fit any scheme of its quantization_config",
            hint="use the config.json of this checkpoint",
        )
    order = stored.get(_ORDER)
    if order is not None and (order.dtype not in ("I32", "I64") or order.shape != fit.shape[1:]):
        raise headers.misfit(order, f"[{fit.shape[1]}] whole numbers", repr(module))
    return Packed(
        parts={part: tensor.name for part, tensor in stored.items()},
        shape=fit.shape,
        compute=functools.partial(_undo, fit=fit),
        has_signed_scales=fit.scheme.weights.type == "int",
    )


def _stated_shape(module: str, stored: Mapping[str, Stored], headers: SourceHeaders) -> tuple[int, int] | None:
    """Return the shape of a plain weight, [O, I]; None for packed integers without it."""
    weight, shape = stored.get("weight_packed", stored.get("weight")), stored.get("weight_shape")
    if shape is not None and shape.shape != (0,):
        headers.need(shape.name, ("I64", "I32"), module)
        values = tuple(headers.integers(shape.name)) if shape.shape == (2,) else ()
        if len(values) != 2 or not all(0 < size < _LARGEST_SIZE for size in values):
            raise headers.misfit(shape, f"two sizes instead of {list(values)}", repr(module))
        return values[0], values[1]
    if weight is None or len(weight.shape) != 2 or 0 in weight.shape:
        raise WeightsError(f"{headers.origin}: {module!r} has a weight_scale and no matrix of weights")
    if "weight_packed" in stored and weight.dtype == "I32":
        return None
    return weight.shape[0], weight.shape[1] * (2 if "weight_packed" in stored else 1)


def _shape_of_groups(stored: Mapping[str, Stored], scheme: QuantizationScheme) -> tuple[int, int] | None:
    """Return the shape of a packed weight as the scales of its groups state it."""
    scale = stored["weight_scale"].shape
    if scheme.weights.strategy != "group" or len(scale) != 2:
        return None
    return scale[0], scale[1] * scheme.weights.group_size


def _undo(parts: Mapping[str, torch.Tensor], dtype: torch.dtype, *, fit: _Fit) -> torch.Tensor:
    import torch

    from runtime.formats.compressed import decompress_module

    shaped = {part: tensor.reshape(fit.shapes[part]) for part, tensor in parts.items() if part in _SCALES_OF_WEIGHTS}
    made = {**parts, **shaped}
    if "weight_shape" in fit.shapes:
        made["weight_shape"] = torch.tensor(fit.shape)
    if _ORDER in parts:
        return _undo_ordered(made, fit.scheme).to(dtype)
    return decompress_module(made, fit.scheme).to(dtype)


def _undo_ordered(parts: Mapping[str, torch.Tensor], scheme: QuantizationScheme) -> torch.Tensor:
    """Compute a weight whose groups are not consecutive, in the dtype of the scale."""
    import torch
    from compressed_tensors.compressors.pack_quantized import unpack_from_int32

    scale_OG, bits = parts["weight_scale"], scheme.weights.num_bits
    groups_I = parts[_ORDER].long()
    if int(groups_I.min()) < 0 or int(groups_I.max()) >= scale_OG.shape[1]:
        raise ValueError(f"{_ORDER} contains a group outside the range 0 to {scale_OG.shape[1] - 1}")
    size = torch.Size(parts["weight_shape"].tolist())
    weight_OI: torch.Tensor = unpack_from_int32(parts["weight_packed"], bits, size).to(scale_OG.dtype)
    if "weight_zero_point" in parts:
        zeros = unpack_from_int32(parts["weight_zero_point"], bits, scale_OG.shape, packed_dim=0)
        weight_OI -= zeros.to(scale_OG.dtype)[:, groups_I]
    return weight_OI.mul_(scale_OG[:, groups_I])
