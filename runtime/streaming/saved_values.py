"""Save the values between subgraphs to disk, so that a resumed run need not compute them again.

One safetensors file for each batch, so that only one batch is in memory at a time. A tensor that batches share is in
the first one's file. The metadata of a file is a JSON text of the batch's values, with references to tensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
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

_VALUES = "values"  # the key of the metadata


class CannotSaveError(Exception):
    """A value cannot be saved; the message names its type."""


def save_boundary(activations: Activations, folder: Path, index: int) -> int:
    """Write the values of all batches durably; returns the number of bytes.

    Raises:
        CannotSaveError: when a value is not a tensor, number, text, list, tuple or dictionary of those.
        OSError: when the disk does not take them.
    """
    num_bytes = 0
    references: dict[int, dict[str, Any]] = {}
    for batch in range(len(activations)):
        tensors: dict[str, torch.Tensor] = {}
        put = partial(_put, activations, references, tensors, batch)
        values = {name: _encode(value, put) for name, value in activations.values(batch).items()}
        path = _path(folder, index, batch)
        write_tensors(path, tensors, {_VALUES: json.dumps(values)})
        flush_one(path)
        num_bytes += path.stat().st_size
    flush_one(folder)
    return num_bytes


def load_boundary(activations: Activations, folder: Path, index: int) -> None:
    """Replace the values of all batches by saved ones.

    Raises:
        OutputError: when a file is missing or damaged.
    """
    known: dict[str, Held] = {}
    try:
        for batch in range(len(activations)):
            path = _path(folder, index, batch)
            with safe_open(path, framework="pt") as file:
                values = json.loads((file.metadata() or {})[_VALUES])
            get = partial(_get, activations, known, path)
            activations.restore(batch, {name: _decode(node, get) for name, node in values.items()})
    except (OSError, SafetensorError, ValueError, KeyError, IndexError, TypeError) as error:
        raise OutputError(
            f"cannot read the activations saved in {folder}: {error}", hint="start again in another output directory"
        ) from error


def has_boundary(folder: Path, index: int) -> bool:
    """Whether values were saved after a step, in this file format."""
    return _path(folder, index, 0).is_file()


def remove_boundary(folder: Path, index: int) -> None:
    """Delete saved values."""
    for path in folder.glob(f"boundary-{index}[-.]*"):
        path.unlink(missing_ok=True)


def _path(folder: Path, index: int, batch: int) -> Path:
    return folder / f"boundary-{index}-{batch}.safetensors"


def _put(
    activations: Activations,
    references: dict[int, dict[str, Any]],
    tensors: dict[str, torch.Tensor],
    batch: int,
    held: Held,
) -> dict[str, Any]:
    """Add a tensor to those of a batch, unless an earlier batch has saved it; returns a reference to it."""
    if id(held) not in references:
        base = activations.base(held).cpu()
        if base.dtype not in DTYPES.values():
            raise CannotSaveError(f"a tensor of dtype {base.dtype}")
        key, order = f"{batch}.{len(tensors)}", memory_order(base)
        tensors[key] = base.permute(order).contiguous()
        references[id(held)] = {"tensor": key, "order": order, "shape": list(held.shape)}
    return references[id(held)]


def _get(activations: Activations, known: dict[str, Held], path: Path, reference: Mapping[str, Any]) -> Held:
    """The tensor of a reference, read once however many batches share it."""
    key = reference["tensor"]
    if key in known:
        known[key].users += 1
    else:
        base = DiskTensor(path, key, tuple(reference["order"])).read()
        known[key] = activations.hold(base.expand(torch.Size(reference["shape"])))
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
