"""Checkpoints of GPTQ and AWQ: whole numbers of 2 to 8 bits in 32-bit words, with a scale and a zero point per group.

Shapes: O out features, I in features, G groups of in features; `words` hold 32 / bits numbers each.

GPTQ    `qweight` [words of I, O], `qzeros` [G, words of O], `scales` [G, O], and `g_idx` [I], the group of each in
        feature; without it groups are consecutive. The first checkpoint format stores zero points less one. Some
        checkpoints state it and store those of the second, so the zero points of symmetric ones, which are always
        2^(bits - 1), are recognized in both forms.
AWQ     AutoAWQ's GEMM layout: `qweight` [I, words of O], `qzeros` [G, words of O], `scales` [G, O]; the 8 numbers of a
        word are in the order 0, 2, 4, 6, 1, 3, 5, 7.

A weight is (number - zero point) * scale in float32, rounded once. AutoRound stores both layouts under its own name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from runtime.checkpoint.source_formats import FLOATS, Packed, PackedTensors, SourceHeaders
from runtime.errors import WeightsError

if TYPE_CHECKING:
    import torch

    from runtime.checkpoint.stored import Stored

GPTQ, AWQ, AUTO_ROUND = "gptq", "awq", "auto-round"
_BITS = (4, 8, 3, 2)
_AWQ_BITS = 4
_FIRST, _SECOND = "gptq", "gptq_v2"  # checkpoint formats of GPTQ
_GEMM = "gemm"  # the layout of AWQ
# AutoRound's names of these layouts.
_PACKINGS = {"auto_round:auto_gptq": (GPTQ, _FIRST), "auto_round:auto_awq": (AWQ, _GEMM)}
_PACKINGS |= {"auto_round:gptqmodel": (GPTQ, _SECOND)}
_NUMBERS_AT_A_TIME = 2**22  # of a weight


def find_integers(entry: Mapping[str, Any], headers: SourceHeaders) -> PackedTensors:
    """Find the modules that GPTQ, AWQ or AutoRound has quantized.

    Bits and groups are taken from the shapes of a module's tensors, because GPTQModel may quantize modules differently.

    Args:
        entry: the checkpoint's quantization entry.
        headers: its tensors.

    Raises:
        WeightsError: for another layout, and for tensors that do not fit each other or the entry.
    """
    method, layout = _layout(entry, headers.origin)
    tensors: dict[str, Packed] = {}
    used: set[str] = set()
    for key in headers.ending_with("qweight"):
        module = key.removesuffix(".qweight")
        packed = _gptq(module, layout, entry, headers) if method == GPTQ else _awq(module, entry, headers)
        used.update(packed.parts.values())
        tensors[f"{module}.weight"] = packed
    for key in headers.ending_with("qzeros", "scales", "g_idx"):
        module = key.rpartition(".")[0]
        if f"{module}.qweight" not in headers.tensors:
            what = f"{headers.origin} contains {key!r} without {module + '.qweight'!r}"
            if key.endswith("act.scales"):
                raise WeightsError(f"{what}: AWQ's scaled activations are not supported as input")
            raise WeightsError(what, hint="copy or export the checkpoint again")
    unused = tuple(key for key in headers.ending_with("g_idx", "qzeros") if key not in used)
    return PackedTensors(tensors=tensors, unused=unused)


def _layout(entry: Mapping[str, Any], origin: str) -> tuple[str, str]:
    """Return the method, GPTQ or AWQ, and the layout of its tensors.

    Raises:
        WeightsError: naming one that is not supported.
    """
    method = entry.get("quant_method")
    if method == AUTO_ROUND:
        packing = str(entry.get("packing_format") or "auto_round:auto_gptq")
        if packing not in _PACKINGS or entry.get("data_type", "int") != "int":
            supported = "auto_round:auto_gptq and auto_round:auto_awq with integers are"
            raise _unsupported(origin, f"AutoRound's packing_format {packing!r}", supported)
        return _PACKINGS[packing]
    names = ("checkpoint_format", "format") if method == GPTQ else ("version", "checkpoint_format", "format")
    default, supported = (_FIRST, f"{_FIRST} and {_SECOND} are") if method == GPTQ else (_GEMM, f"{_GEMM} is")
    layout = str(next((entry[name] for name in names if entry.get(name)), default)).lower()
    if entry.get("is_marlin_format"):
        layout = "marlin"
    if layout not in ((_FIRST, _SECOND) if method == GPTQ else (_GEMM,)):
        raise _unsupported(origin, f"{str(method).upper()}'s layout {layout!r}", supported)
    return str(method), layout


def _unsupported(origin: str, what: str, supported: str) -> WeightsError:
    return WeightsError(
        f"{origin} is stored in {what[:80]}, which is not supported as input",
        hint=f"{supported}; export it again, or start from the original checkpoint",
    )


def _gptq(module: str, layout: str, entry: Mapping[str, Any], headers: SourceHeaders) -> Packed:
    qweight, qzeros, scales = _common_parts(module, headers)
    num_out = scales.shape[1]
    if qweight.shape[1] != num_out:
        raise headers.misfit(qweight, f"{num_out} columns", f"{scales.name!r} {list(scales.shape)}")
    num_rows, num_words = qweight.shape[0], qzeros.shape[1]
    usual = _number(entry, "bits", headers.origin)
    bits = next((n for n in (usual, *_BITS) if n in _BITS and -(-num_out * n // 32) == num_words), 0)
    if not bits or (bits != usual and not entry.get("dynamic") and not entry.get("extra_config")):
        raise headers.misfit(qzeros, f"{-(-num_out * usual // 32)} columns", f"{num_out} zero points of {usual} bits")
    parts = {"qweight": qweight.name, "qzeros": qzeros.name, "scales": scales.name}
    num_in = num_rows * 32 // bits
    group_size = 0
    if f"{module}.g_idx" in headers.tensors:
        order = headers.need(f"{module}.g_idx", ("I32", "I64"), module)
        parts["g_idx"] = order.name
        if len(order.shape) != 1 or -(-order.shape[0] * bits // 32) != num_rows:
            raise headers.misfit(order, f"[{num_in}]", f"{qweight.name!r} {list(qweight.shape)} of {bits} bits")
        num_in = order.shape[0]
    else:
        group_size = _group_size(entry, num_in, scales, headers)
    return Packed(
        parts=parts,
        shape=(num_out, num_in),
        compute=functools.partial(
            _undo_gptq, bits=bits, group_size=group_size, is_first=layout == _FIRST, is_symmetric=_symmetry(entry)
        ),
        has_signed_scales=True,
    )


def _awq(module: str, entry: Mapping[str, Any], headers: SourceHeaders) -> Packed:
    qweight, qzeros, scales = _common_parts(module, headers)
    bits = _number(entry, "bits", headers.origin)
    if bits != _AWQ_BITS:
        raise _unsupported(headers.origin, f"AWQ with {bits} bits", f"{_AWQ_BITS} bits are")
    num_in, num_out = qweight.shape[0], scales.shape[1]
    for stored in (qweight, qzeros):
        if stored.shape[1] * 32 != num_out * bits:
            raise headers.misfit(stored, f"{num_out * bits // 32} columns", f"{num_out} numbers of {bits} bits")
    return Packed(
        parts={"qweight": qweight.name, "qzeros": qzeros.name, "scales": scales.name},
        shape=(num_out, num_in),
        compute=functools.partial(_undo_awq, group_size=_group_size(entry, num_in, scales, headers)),
        has_signed_scales=True,
    )


def _common_parts(module: str, headers: SourceHeaders) -> tuple[Stored, Stored, Stored]:
    """Return the numbers, zero points and scales of a module, which are matrices with one row per group or more."""
    parts = [headers.need(f"{module}.{name}", ("I32",), module) for name in ("qweight", "qzeros")]
    scales = headers.need(f"{module}.scales", FLOATS, module)
    for stored in (*parts, scales):
        if len(stored.shape) != 2 or 0 in stored.shape:
            raise headers.misfit(stored, "a matrix", repr(module))
    if parts[1].shape[0] != scales.shape[0]:
        raise headers.misfit(parts[1], f"{scales.shape[0]} rows", f"{scales.name!r} {list(scales.shape)}")
    return parts[0], parts[1], scales


def _number(entry: Mapping[str, Any], name: str, origin: str) -> int:
    older = {"bits": "w_bit", "group_size": "q_group_size"}
    value = entry.get(name, entry.get(older[name]))
    if type(value) is not int or not -1 <= value <= 2**31 or value == 0:
        raise WeightsError(f"{origin}: its quantization entry has {name} = {value!r}, not a whole number above zero")
    return value


def _group_size(entry: Mapping[str, Any], num_in: int, scales: Stored, headers: SourceHeaders) -> int:
    """Return the in features of each group; consecutive ones form a group."""
    num_groups = scales.shape[0]
    stated = _number(entry, "group_size", headers.origin)
    size = num_in if stated < 0 else stated
    if -(-num_in // size) == num_groups:
        return size
    if num_in % num_groups or not (entry.get("dynamic") or entry.get("extra_config")):
        raise headers.misfit(scales, f"{-(-num_in // size)} rows", f"{num_in} in features in groups of {size}")
    return num_in // num_groups


def _symmetry(entry: Mapping[str, Any]) -> bool | None:
    """Whether modules are symmetric; None if the entry does not state it, or not for all of them."""
    tables = [entry.get(name) for name in ("dynamic", "extra_config")]
    rules = [rule for table in tables if isinstance(table, Mapping) for rule in table.values()]
    if any(isinstance(rule, Mapping) and "sym" in rule for rule in rules):
        return None
    stated = entry.get("sym")
    return stated if isinstance(stated, bool) else None


def _undo_gptq(
    parts: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    *,
    bits: int,
    group_size: int,
    is_first: bool,
    is_symmetric: bool | None,
) -> torch.Tensor:
    from compressed_tensors.compressors.pack_quantized import unpack_from_int32

    qweight, scales_GO = parts["qweight"], parts["scales"]
    num_groups, num_out = scales_GO.shape
    zeros_GO = _zero_points(parts["qzeros"], bits, (num_groups, num_out), is_first, is_symmetric)
    if "g_idx" in parts:
        groups_I = parts["g_idx"].long()
        if int(groups_I.min()) < 0 or int(groups_I.max()) >= num_groups:
            low, high = int(groups_I.min()), int(groups_I.max())
            raise ValueError(f"g_idx contains {low if low < 0 else high}, outside the range 0 to {num_groups - 1}")
    else:
        groups_I = _consecutive(qweight.shape[0] * 32 // bits, group_size)

    def rows(begin: int, end: int) -> torch.Tensor:
        words = qweight[begin * bits // 32 : -(-end * bits // 32)]
        numbers: torch.Tensor = unpack_from_int32(words, bits, _size(end - begin, num_out), packed_dim=0)
        return numbers

    return _scaled(rows, zeros_GO, scales_GO, groups_I, dtype)


def _zero_points(
    qzeros: torch.Tensor, bits: int, shape: tuple[int, int], is_first: bool, is_symmetric: bool | None
) -> torch.Tensor:
    """Return the zero points [G, O] of a module of GPTQ, less 2^(bits - 1)."""
    from compressed_tensors.compressors.pack_quantized import unpack_from_int32

    if is_symmetric is not False:
        stored_GO: torch.Tensor = unpack_from_int32(qzeros, bits, _size(*shape), packed_dim=1)
        low, high = int(stored_GO.min()), int(stored_GO.max())
        if low == high and low in (-1, 0):  # -1 in the first format
            return stored_GO.zero_()
        if is_symmetric:
            middle = 2 ** (bits - 1)
            found = low if low not in (-1, 0) else high
            raise ValueError(
                f"its entry states sym: true, so all zero points must be stored as {middle - 1} or as {middle}; got "
                f"{found + middle}" + (f" and {low + middle}" if low != found else "")
            )
    if is_first and bits != 3:  # GPTQModel adds to whole words, and its checkpoints are made for it
        qzeros = qzeros + sum(1 << place for place in range(0, 31, bits))
    zeros_GO: torch.Tensor = unpack_from_int32(qzeros, bits, _size(*shape), packed_dim=1)
    return ((zeros_GO + 4 + 1) & 7) - 4 if is_first and bits == 3 else zeros_GO  # a number may cross words


def _undo_awq(parts: Mapping[str, torch.Tensor], dtype: torch.dtype, *, group_size: int) -> torch.Tensor:
    from compressed_tensors.compressors.pack_quantized import unpack_from_int32
    from compressed_tensors.entrypoints.convert import AutoAWQConverter

    qweight, scales_GO = parts["qweight"], parts["scales"]
    num_out = scales_GO.shape[1]

    def unpacked(words: torch.Tensor) -> torch.Tensor:
        numbers: torch.Tensor = unpack_from_int32(words, _AWQ_BITS, _size(len(words), num_out), packed_dim=1)
        order = AutoAWQConverter.AWQ_REVERSE_ORDER
        return numbers.reshape(len(words), -1, len(order))[:, :, order].reshape(len(words), num_out)

    groups_I = _consecutive(len(qweight), group_size)
    return _scaled(
        lambda begin, end: unpacked(qweight[begin:end]), unpacked(parts["qzeros"]), scales_GO, groups_I, dtype
    )


def _scaled(
    rows: Callable[[int, int], torch.Tensor],
    zeros_GO: torch.Tensor,
    scales_GO: torch.Tensor,
    groups_I: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Compute weight_OI a few in features at a time; `rows` returns the numbers of some, [in features, O]."""
    import torch

    num_in, num_out = len(groups_I), scales_GO.shape[1]
    weight_OI = torch.empty(num_out, num_in, dtype=dtype)
    step = max(_NUMBERS_AT_A_TIME // num_out // 32, 1) * 32
    wide_zeros, wide_scales = zeros_GO.to(torch.int16), scales_GO.float()
    for begin in range(0, num_in, step):
        end = min(begin + step, num_in)
        groups = groups_I[begin:end]
        whole = rows(begin, end).to(torch.int16).sub_(wide_zeros[groups])
        weight_OI[:, begin:end] = (whole.float() * wide_scales[groups]).T
    return weight_OI


def _consecutive(num_in: int, group_size: int) -> torch.Tensor:
    import torch

    return torch.arange(num_in) // group_size


def _size(rows: int, columns: int) -> torch.Size:
    import torch

    return torch.Size((rows, columns))
