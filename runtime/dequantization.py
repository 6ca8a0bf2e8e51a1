"""Write the plain form of a quantized checkpoint, one tensor at a time. Neither an artifact nor a model is needed.

Names, shapes and shards are known from headers, so the place of every tensor on disk is computed first. A finished
shard is a step of the run, after which an interrupted one can continue.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.checkpoint.companions import copy_companions, is_own_code
from runtime.checkpoint.dequantize import FLOAT_NAMES, as_weights, config_dtype, open_checkpoint
from runtime.checkpoint.layout import Layout
from runtime.checkpoint.stored import Stored
from runtime.checkpoint.view import DerivedCheckpoint
from runtime.checkpoint.writer import DEFAULT_SHARD_BYTES, ShardWriter
from runtime.console import silent
from runtime.errors import UsageError, WeightsError
from runtime.host.publish import require_outside, require_writable
from runtime.streaming import journal
from runtime.streaming.identity import checkpoint_identity
from runtime.streaming.output_place import require_startable
from runtime.streaming.workplace import open_workplace

if TYPE_CHECKING:
    from runtime.checkpoint.reader import Checkpoint
    from runtime.streaming.workplace import Workplace

_HALVES = ("F16", "BF16")
_DTYPE_ENTRIES = ("dtype", "torch_dtype")
_EXPERT = re.compile(r"\.experts\.[0-9]+\.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Dequantized:
    """A plain checkpoint that was written.

    Attributes:
        path: its directory.
        method: how the source is quantized.
        dtype: torch's name of the dtype of the dequantized weights.
        num_dequantized: number of them.
        num_tensors: number of all tensors.
        num_bytes: size of the shards.
        dropped: scales of inputs and of the key-value cache, which a plain checkpoint does not have.
        seconds: time of this process.
        num_resumed: number of shards that an interrupted run had finished.
        remarks: warnings about readers of the result.
    """

    path: Path
    method: str
    dtype: str
    num_dequantized: int
    num_tensors: int
    num_bytes: int
    dropped: tuple[str, ...]
    seconds: float
    num_resumed: int
    remarks: tuple[str, ...] = ()


def dequantize(
    weights: str | Path,
    *,
    out: str | Path,
    dtype: str | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    resume: bool = False,
    progress: Callable[[str], None] = silent,
) -> Dequantized:
    """Write a plain checkpoint of a quantized one: weights, config.json without quantization, and the other files.

    Args:
        weights: directory or hub id of the checkpoint.
        out: the directory to write; it appears when it is complete.
        dtype: bfloat16, float16 or float32; by default that of the checkpoint's config.json, or bfloat16. Other
            tensors in a 16-bit dtype or in that of the config.json get it, too.
        max_shard_bytes: the size of a file.
        resume: continue an interrupted run.
        progress: is called with a line for each tensor.

    Raises:
        WeightsError: when the checkpoint is not quantized, is damaged, or has an unsupported format.
        OutputError: when the output exists, is inside the checkpoint, or does not fit on the disk.
        UsageError: for another dtype.
    """
    begin = time.monotonic()
    if dtype is not None and dtype not in FLOAT_NAMES:
        raise UsageError(f"dtype must be one of {', '.join(FLOAT_NAMES)}; got {dtype!r}")
    source, path = as_weights(weights), Path(out)
    require_startable(path, resume=resume)
    if isinstance(source, Path):
        require_outside(path, source)
    require_writable(path)
    checkpoint = _opened(source, dtype)
    name = dtype or config_dtype(checkpoint.config)
    layout = Layout(_stored(checkpoint, name), max_shard_bytes)
    identity = {"dtype": name, "shard size": str(max_shard_bytes), "unit": "shard"}
    identity |= checkpoint_identity(checkpoint.inner)
    with open_workplace(path, resume=resume, identity=identity) as place:
        place.require_space(layout.file_bytes)
        num_resumed = _write_tensors(place, checkpoint, layout, progress)
        _write_files(place.checkpoint, checkpoint, name)
        place.publish()
    return Dequantized(
        path=path,
        method=checkpoint.quantization,
        dtype=name,
        num_dequantized=sum(checkpoint.is_derived(tensor.name) for tensor in layout.tensors),
        num_tensors=len(layout.tensors),
        num_bytes=layout.file_bytes,
        dropped=checkpoint.hidden,
        seconds=time.monotonic() - begin,
        num_resumed=num_resumed,
        remarks=tuple(_about_experts(checkpoint)),
    )


def _opened(source: Path | Checkpoint, dtype: str | None) -> DerivedCheckpoint:
    checkpoint = open_checkpoint(source, plain=True, dtype=dtype)
    if not isinstance(checkpoint, DerivedCheckpoint):
        raise WeightsError(
            f"{checkpoint.directory} is not quantized, so there is nothing to dequantize", hint="use it as it is"
        )
    return checkpoint


def _stored(checkpoint: DerivedCheckpoint, dtype: str) -> Iterator[Stored]:
    """Yield the tensors to write, in the order of the source."""
    usual = (*_HALVES, FLOAT_NAMES[config_dtype(checkpoint.config)])
    for key in checkpoint:
        found = checkpoint.stored(key).dtype
        yield Stored(key, FLOAT_NAMES[dtype] if found in usual else found, checkpoint.shape(key))


def _about_experts(checkpoint: DerivedCheckpoint) -> Iterator[str]:
    """Warn of experts that are stored one by one for a model whose class in transformers reads stacked ones.

    Quantized checkpoints have separate experts, also those of models whose original checkpoints stack them.
    """
    key = next((key for key in checkpoint if _EXPERT.search(key) and checkpoint.is_derived(key)), None)
    if key is None or "auto_map" in checkpoint.config:
        return
    from transformers import conversion_mapping

    conversions: Any = conversion_mapping
    own = checkpoint.config.get("text_config")
    kind = str((own if isinstance(own, Mapping) else checkpoint.config).get("model_type") or "")
    name = _EXPERT.sub(".experts.*.", key)
    rules = conversions.get_checkpoint_conversion_mapping(kind) or []
    if not any(name.endswith(str(pattern)) for rule in rules for pattern in getattr(rule, "source_patterns", ())):
        yield (
            f"experts are stored one by one, as in the source ({key}), and transformers does not join those of "
            f"{kind or 'this model'}: it may initialize the experts at random"
        )


def _write_tensors(
    place: Workplace, checkpoint: DerivedCheckpoint, layout: Layout, progress: Callable[[str], None]
) -> int:
    """Write all tensors, shard by shard; return the number of shards that an earlier run has written."""
    names: list[list[str]] = [[] for _ in layout.shards]
    for tensor in layout.tensors:
        names[layout.slots[tensor.name].shard].append(tensor.name)
    writer = ShardWriter(place.checkpoint, layout)
    try:
        num_resumed = len(place.journal.of_kind(journal.STEP))
        for index, shard in enumerate(names):
            if index < num_resumed:
                writer.take_as_written(shard)
                continue
            for key in shard:
                progress(f"shard {index + 1} of {len(names)}, {key}")
                writer.write_bytes(key, _pieces(checkpoint, key, layout.slots[key].stored.dtype))
            writer.sync()
            place.journal.append(journal.STEP, index=index)
        writer.finish()
    finally:
        writer.close()
    return num_resumed


def _pieces(checkpoint: DerivedCheckpoint, key: str, dtype: str) -> Iterator[memoryview]:
    """Yield the bytes of a tensor in its new dtype.

    Raises:
        WeightsError: for a dequantized or converted number that is not finite.
    """
    import torch

    from runtime.checkpoint.dtypes import DTYPES, bytes_of

    found = checkpoint.stored(key).dtype
    if found == dtype and not checkpoint.is_derived(key):
        yield from checkpoint.pieces(key)
        return
    for piece in checkpoint.pieces(key):
        if not len(piece):
            continue
        converted = torch.frombuffer(piece, dtype=DTYPES[found]).to(DTYPES[dtype])
        low, high = torch.aminmax(converted)
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            is_too_large = not bool(torch.isnan(low)) and dtype == "F16"
            raise WeightsError(
                f"{checkpoint.directory}: {key!r} has numbers that are not finite in {_name(dtype)}",
                hint="pass another dtype, such as bfloat16" if is_too_large else "copy or export the checkpoint again",
            )
        yield bytes_of(converted)


def _name(dtype: str) -> str:
    return next(name for name, short in FLOAT_NAMES.items() if short == dtype)


def _write_files(directory: Path, checkpoint: DerivedCheckpoint, dtype: str) -> None:
    """Write config.json, and copy the other files, with the model's own code."""
    source = checkpoint.directory
    copy_companions(source, directory)
    if "auto_map" in checkpoint.config:
        for path in sorted(source.iterdir()):
            if is_own_code(path, source):
                shutil.copyfile(path, directory / path.name)
    config = _with_dtype(checkpoint.config, dtype, config_dtype(checkpoint.config))
    if not any(entry in config for entry in _DTYPE_ENTRIES):
        config["dtype"] = dtype
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (directory / "config.json").write_text(text + "\n", encoding="utf-8")


def _with_dtype(config: Mapping[str, Any], dtype: str, usual: str) -> dict[str, Any]:
    """Return a config, and those inside it, with the dtype that the tensors now have."""
    changed = {"float16", "bfloat16", usual}
    found: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            found[name] = _with_dtype(value, dtype, usual)
        elif name in _DTYPE_ENTRIES and str(value).removeprefix("torch.") in changed:
            found[name] = dtype
        else:
            found[name] = value
    return found
