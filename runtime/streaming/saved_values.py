"""Save the values between subgraphs to disk, so that a resumed run need not compute them again.

One safetensors file for each batch, so that only one batch is in memory at a time. It has the values of the original
model, too, if the run carries them. It is named after the batch's lane
and its position in the lane, and not after the worker, so that another number of workers can load it. A tensor that
batches of a lane share is in the first one's file. The metadata of a file is a JSON text of the batch's values, with
references to tensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from runtime.checkpoint.dtypes import DTYPES
from runtime.errors import OutputError
from runtime.host.publish import flush_one
from runtime.streaming.activations import Activations, Held
from runtime.streaming.disk_tensor import DiskTensor, memory_order, write_tensors

_VALUES, _ORIGINAL = "values", "original"  # keys of the metadata
Place = tuple[int, int]  # of a batch: its lane, and its position in the lane


class CannotSaveError(Exception):
    """A value cannot be saved; the message names its type."""


def save_boundary(activations: Activations, folder: Path, index: int, places: Sequence[Place]) -> int:
    """Write the values of this worker's batches durably; returns the number of bytes.

    Args:
        activations: the values.
        folder: for the files of all workers.
        index: of the step that has computed them.
        places: of the batches.

    Raises:
        CannotSaveError: when a value is not a tensor, number, text, list, tuple or dictionary of those.
        OSError: when the disk does not take them.
    """
    num_bytes = 0
    references: dict[int, dict[str, Any]] = {}
    for batch, place in enumerate(places):
        if not place[1]:
            references.clear()  # another worker may load the next lane
        tensors: dict[str, torch.Tensor] = {}
        put = partial(_put, activations, references, tensors, f"{place[0]}-{place[1]}")
        metadata = {}
        for key, number in _parts(activations, batch):
            values = {name: _encode(value, put) for name, value in activations.values(number).items()}
            metadata[key] = json.dumps(values)
        path = _path(folder, index, place)
        write_tensors(path, tensors, metadata)
        flush_one(path)
        num_bytes += path.stat().st_size
    flush_one(folder)
    return num_bytes


def load_boundary(activations: Activations, folder: Path, index: int, places: Sequence[Place]) -> None:
    """Replace the values of this worker's batches by saved ones; the arguments are those of `save_boundary`.

    Raises:
        OutputError: when a file is missing or damaged.
    """
    known: dict[str, Held] = {}
    try:
        for batch, place in enumerate(places):
            path = _path(folder, index, place)
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
            if _ORIGINAL in metadata and not activations.is_split:
                activations.split()
            for key, number in _parts(activations, batch):
                loaded = {}
                for name, node in json.loads(metadata[key]).items():
                    get = partial(_get, activations, known, path, activations.twin(number, name))
                    loaded[name] = _decode(node, get)
                activations.restore(number, loaded)
    except (OSError, SafetensorError, ValueError, KeyError, IndexError, TypeError) as error:
        raise OutputError(
            f"cannot read the activations saved in {folder}: {error}", hint="start again in another output directory"
        ) from error


def has_boundary(folder: Path, index: int, places: Sequence[Place]) -> bool:
    """Whether the values of this worker's batches were saved after a step, in this file format."""
    return all(_path(folder, index, place).is_file() for place in places)


def remove_boundary(folder: Path, index: int) -> None:
    """Delete saved values."""
    for path in folder.glob(f"boundary-{index}[-.]*"):
        path.unlink(missing_ok=True)


def _parts(activations: Activations, batch: int) -> list[tuple[str, int]]:
    """The keys of a batch's values in the metadata of its file, and their indices in the activations."""
    found = [(_VALUES, batch)]
    return [*found, (_ORIGINAL, activations.original(batch))] if activations.is_split else found


def _path(folder: Path, index: int, place: Place) -> Path:
    return folder / f"boundary-{index}-{place[0]}-{place[1]}.safetensors"


def _put(
    activations: Activations,
    references: dict[int, dict[str, Any]],
    tensors: dict[str, torch.Tensor],
    prefix: str,
    held: Held,
) -> dict[str, Any]:
    """Add a tensor to those of a batch, unless an earlier batch has saved it; returns a reference to it."""
    if id(held) not in references:
        base = activations.base(held).cpu()
        if base.dtype not in DTYPES.values():
            raise CannotSaveError(f"a tensor of dtype {base.dtype}")
        key, order = f"{prefix}.{len(tensors)}", memory_order(base)
        tensors[key] = base.permute(order).contiguous()
        references[id(held)] = {"tensor": key, "order": order, "shape": list(held.shape)}
    return references[id(held)]


def _get(
    activations: Activations, known: dict[str, Held], path: Path, twin: Held | None, reference: Mapping[str, Any]
) -> Held:
    """The tensor of a reference, read once for the batches of a lane that share it, and held once for lanes that do."""
    key = reference["tensor"]
    if key in known:
        known[key].users += 1
    else:
        base = DiskTensor(path, key, tuple(reference["order"])).read()
        known[key] = activations.hold(base.expand(torch.Size(reference["shape"])), twin)
    return known[key]


def _encode(value: Any, put: Callable[[Held], dict[str, Any]]) -> dict[str, Any]:
    if isinstance(value, Held):
        return put(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"plain": value}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_encode(item, put) for item in value]}
    if type(value) is dict and all(isinstance(key, str) for key in value):
        return {"dict": {key: _encode(item, put) for key, item in value.items()}}
    raise CannotSaveError(f"a value of type {type(value).__name__}")


def _decode(node: Mapping[str, Any], get: Callable[[Mapping[str, Any]], Held]) -> Any:
    if "tensor" in node:
        return get(node)
    ((kind, content),) = node.items()
    if kind == "dict":
        return {key: _decode(item, get) for key, item in content.items()}
    if kind in ("list", "tuple"):
        items = [_decode(item, get) for item in content]
        return items if kind == "list" else tuple(items)
    return content
