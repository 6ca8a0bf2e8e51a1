"""Save the values at a subgraph's end to disk, so that a resumed run need not compute them again.

Two files: the bytes of all tensors, each once however many batches share it, and a JSON text that says which is where.
Values that JSON has no word for (objects of the model's own classes) cannot be saved; a resumed run then computes them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from runtime.checkpoint.dtypes import DTYPES, bytes_of, dtype_name
from runtime.errors import OutputError
from runtime.host.publish import flush_one
from runtime.streaming.activations import Activations, Held
from runtime.streaming.disk_tensor import DiskTensor, memory_order, write_all


class CannotSaveError(Exception):
    """A value that only the process which made it can hold."""


def save_boundary(activations: Activations, folder: Path, index: int) -> int:
    """Write the values of all batches, durably; returns the number of bytes.

    Raises:
        CannotSaveError: when a value is no tensor, number, text, list, tuple or dictionary of those.
        OSError: when the disk says so.
    """
    entries: list[dict[str, Any]] = []
    places: dict[int, int] = {}
    data_path, text_path = _paths(folder, index)
    with data_path.open("wb") as file:

        def put(held: Held) -> int:
            if id(held) not in places:
                base = activations.base(held).cpu()
                order = memory_order(base)
                entries.append(
                    {
                        "dtype": dtype_name(base.dtype),
                        "shape": list(base.permute(order).shape),
                        "order": list(order),
                        "whole": list(held.shape),
                        "offset": file.tell(),
                    }
                )
                write_all(file.write, bytes_of(base.permute(order).contiguous()))
                places[id(held)] = len(entries) - 1
            return places[id(held)]

        batches = [
            {name: _encode(value, put) for name, value in activations.values(batch).items()}
            for batch in range(len(activations))
        ]
        file.flush()
        os.fsync(file.fileno())
        num_bytes = file.tell()
    with text_path.open("w", encoding="utf-8") as text:
        json.dump({"tensors": entries, "batches": batches}, text)
        text.flush()
        os.fsync(text.fileno())
    flush_one(folder)
    return num_bytes


def load_boundary(activations: Activations, folder: Path, index: int) -> None:
    """Put saved values in the place of those that are held.

    Raises:
        OutputError: when the files are not there, or not as they were written.
    """
    data_path, text_path = _paths(folder, index)
    try:
        content = json.loads(text_path.read_text(encoding="utf-8"))
        files = [
            DiskTensor(data_path, DTYPES[e["dtype"]], tuple(e["shape"]), tuple(e["order"]), e["offset"])
            for e in content["tensors"]
        ]
        wholes = [torch.Size(entry["whole"]) for entry in content["tensors"]]
        held: dict[int, Held] = {}

        def get(place: int) -> Held:
            if place in held:
                held[place].users += 1
            else:
                held[place] = activations.hold(files[place].read().expand(wholes[place]))
            return held[place]

        for batch, values in enumerate(content["batches"]):
            activations.restore(batch, {name: _decode(node, get) for name, node in values.items()})
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise OutputError(
            f"the activations saved in {folder} cannot be read: {error}", hint="start again in another output directory"
        ) from error


def remove_boundary(folder: Path, index: int) -> None:
    """Give back the disk that saved values take."""
    for path in _paths(folder, index):
        path.unlink(missing_ok=True)


def _paths(folder: Path, index: int) -> tuple[Path, Path]:
    return folder / f"boundary-{index}.bin", folder / f"boundary-{index}.json"


def _encode(value: Any, put: Any) -> Any:
    if isinstance(value, Held):
        return {"tensor": put(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"plain": value}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_encode(item, put) for item in value]}
    if type(value) is dict and all(isinstance(key, str) for key in value):
        return {"dict": {key: _encode(item, put) for key, item in value.items()}}
    raise CannotSaveError(f"a value of type {type(value).__name__}")


def _decode(node: Mapping[str, Any], get: Any) -> Any:
    ((kind, content),) = node.items()
    if kind == "tensor":
        return get(content)
    if kind == "dict":
        return {key: _decode(item, get) for key, item in content.items()}
    if kind in ("list", "tuple"):
        items = [_decode(item, get) for item in content]
        return items if kind == "list" else tuple(items)
    return content
