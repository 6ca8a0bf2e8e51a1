"""Reject model directories whose weights do not match their names and config.json.

Three cases would otherwise give a wrong result without a message: a LoRA adapter that readers load on top of the
weights, weights that another tool quantized without an entry in config.json, and a quantization entry in config.json
although the weights are plain. Only file names, config files and the headers of shards are read.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from runtime.checkpoint.source_formats import ENTRY, FP8, described, entry_path, stated
from runtime.errors import WeightsError

# Files in which other tools describe a quantization, and the tools.
QUANTIZATION_FILES: Mapping[str, str] = {
    "hf_quant_config.json": "ModelOpt",
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "quantization_config.json": "AutoRound",
    "quant_strategy.json": "EXL2",
    "quant_model_description.json": "msModelSlim",
}
# The method of a quantization that only such a file states, as older versions of these tools have written it.
_METHODS = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq", "quant_config.json": "awq"}
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_FILE_LIMIT_BYTES = 2**20

# Name suffixes that only tensors of a quantized checkpoint have, and the format that uses them.
_MARKS: Mapping[str, str] = {
    name: tool
    for tool, names in (
        ("torchao", "_weight_qdata"),
        ("GPTQ or AWQ", "qweight qzeros"),
        ("GPTQ", "g_idx"),
        ("bitsandbytes", "absmax quant_map nested_absmax nested_quant_map SCB weight_format"),
        ("compressed-tensors or ModelOpt", "weight_scale input_scale"),
        ("ModelOpt", "weight_scale_2 pre_quant_scale"),
        (
            "compressed-tensors",
            "weight_packed weight_global_scale weight_zero_point input_global_scale input_zero_point",
        ),
    )
    for name in names.split()
}
_CACHE_MARKS = ("k_scale", "v_scale", "q_scale")
_BLOCKS, _SCALES, _SCALE_INV = "_blocks", "_scales", "_scale_inv"  # of stacked experts
_QUANTIZED_IN_FORWARD = ("bitnet",)  # stores plain weights
_NARROW = ("F8_", "F6_", "F4")
_BYTES = ("I8", "U8")  # of two numbers or one


def require_true_names(directory: Path, config: Mapping[str, Any], dtypes: Mapping[str, str]) -> None:
    """Reject quantized weights that config.json does not mention, and quantization entries of plain weights.

    `dtypes` has safetensors' name of the dtype of each tensor.

    Raises:
        WeightsError: naming the file, the tensor or the entry.
    """
    quantized = _quantized(dtypes)
    entry = stated(config)
    if entry and quantized is None and not _may_have_plain_weights(entry, dtypes):
        path = entry_path(config)
        message = f"{directory / 'config.json'} has a {path.rpartition('.')[2]} ({described(entry)})"
        if entry.get("quant_method") in _QUANTIZED_IN_FORWARD:
            raise WeightsError(
                f"{message}: layers of this model quantize weights and inputs in the forward pass",
                hint="this is not supported; use a model that computes with its stored weights",
            )
        raise WeightsError(
            f"{message}, but the weights are not quantized", hint=f"remove the entry {path!r} from config.json"
        )
    if quantized is not None and not entry:
        raise WeightsError(
            f"{directory} contains quantized weights ({quantized!r} in {dtypes[quantized]}, "
            f"{described_files(directory) or _mark(quantized, dtypes) or 'unknown format'}), "
            f"and its config.json has no {ENTRY}",
            hint="start from the original checkpoint, or restore that entry if the format is supported",
        )
    if entry.get("quant_method") == FP8:
        _require_scales(directory, dtypes)


def require_no_adapter(directory: Path) -> None:
    """Reject a directory with a PEFT adapter: readers would apply it on top of the weights.

    Raises:
        WeightsError: naming the file.
    """
    for name in ADAPTER_FILES:
        if (directory / name).is_file():
            raise WeightsError(
                f"{directory} contains a PEFT adapter ({name}), which quantization would leave out",
                hint="merge it into the weights (merge_and_unload) and save the result, or move the adapter elsewhere",
            )


def is_quantization_name(key: str) -> bool:
    """Whether only a quantized checkpoint has tensors of this name."""
    return bool(_mark(key, ()))


def is_unreadable(key: str, dtypes: Mapping[str, str]) -> bool:
    """Whether a tensor has the name or dtype of a part of a quantized weight; `dtypes` are those of all tensors."""
    is_weight = key.endswith(".weight") or ".experts." in key
    return bool(_mark(key, dtypes)) or dtypes[key].startswith(_NARROW) or (is_weight and dtypes[key] in _BYTES)


def numbered_list(keys: Sequence[str]) -> str:
    """Return the name of the module list if the tensors belong to several of its members; empty otherwise."""
    parts = [key.split(".") for key in keys]
    columns = zip(*parts, strict=False)
    depth = sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))
    is_list = len(keys) > 1 and all(len(part) > depth and part[depth].isdigit() for part in parts)
    return ".".join(parts[0][:depth]) if is_list else ""


def described_files(directory: Path) -> str:
    """Describe the quantization files of other tools in a directory, with their content; may be empty."""
    found = []
    for name, tool in QUANTIZATION_FILES.items():
        path = directory / name
        if path.is_file():
            found.append(f"{name}: {' '.join(part for part in (tool, _algorithm(path)) if part)}")
    return ", ".join(found)


def with_entry_of_file(config: Mapping[str, Any], directory: Path, dtypes: Mapping[str, str]) -> dict[str, Any]:
    """Return a config with the quantization entry of another tool's file, if it states none but has quantized weights.

    `dtypes` has safetensors' name of the dtype of each tensor.
    """
    if stated(config) or _quantized(dtypes) is None:
        return dict(config)
    for name, method in _METHODS.items():
        entry = _file_entry(directory / name)
        if entry:
            return {**config, ENTRY: {**entry, "quant_method": method}}
    return dict(config)


def _algorithm(path: Path) -> str:
    """Return the algorithm or number of bits that such a file states; empty if it states none."""
    entry = _file_entry(path)
    bits = entry.get("bits", entry.get("w_bit"))
    return str(entry.get("quant_algo") or (f"{bits} bits" if bits is not None else ""))[:60]


def _file_entry(path: Path) -> dict[str, Any]:
    """Return the description of a quantization in such a file; empty without one."""
    try:
        if path.stat().st_size > _FILE_LIMIT_BYTES:
            return {}
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    inner = table.get("quantization", table) if isinstance(table, dict) else {}
    return inner if isinstance(inner, dict) else {}


def _quantized(dtypes: Mapping[str, str]) -> str | None:
    """Return a tensor that only a quantized checkpoint has; the first whose name states the format, if any does."""
    named = (key for key in dtypes if _mark(key, dtypes))
    return next(named, next((key for key in dtypes if is_unreadable(key, dtypes)), None))


def _mark(key: str, names: Container[str]) -> str:
    """Return the format that uses this tensor name; empty for the name of a plain tensor."""
    leaf = key.rpartition(".")[2]
    if leaf.startswith("quant_state"):
        return "bitsandbytes"
    if leaf.endswith(_SCALE_INV) and key.removesuffix(_SCALE_INV) in names:
        return "DeepSeek's FP8"
    if leaf.endswith(_BLOCKS) and f"{key.removesuffix(_BLOCKS)}{_SCALES}" in names:
        return "MXFP4"
    return _MARKS.get(leaf, "")


def _may_have_plain_weights(entry: Mapping[str, Any], dtypes: Mapping[str, str]) -> bool:
    """Whether the entry concerns something other than weights: a key-value cache, or rotations."""
    has_cache = any(key.rpartition(".")[2] in _CACHE_MARKS for key in dtypes)
    has_no_groups = entry.get("config_groups") == {} and bool(entry.get("kv_cache_scheme"))
    return has_cache or bool(entry.get("transform_config")) or has_no_groups


def _require_scales(directory: Path, dtypes: Mapping[str, str]) -> None:
    """Reject float8 weights without a scale in a checkpoint whose config states that they have one."""
    for key, dtype in dtypes.items():
        scales = (f"{key}{_SCALE_INV}", f"{key}_scale")
        if dtype.startswith("F8_") and not key.endswith(_SCALE_INV) and not any(name in dtypes for name in scales):
            raise WeightsError(
                f"{directory}: {key!r} is in float8 and has no scale ({key}{_SCALE_INV})",
                hint="copy the checkpoint again, or start from the original one",
            )
