"""A checkpoint on disk, read tensor by tensor: safetensors shards, memory-mapped, each opened once."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.errors import WeightsError

if TYPE_CHECKING:
    import torch

INDEX_NAME, SINGLE_NAME = "model.safetensors.index.json", "model.safetensors"


class Checkpoint:
    """The tensors of a model directory.

    Args:
        directory: holds `model.safetensors`, or shards and their index.

    Raises:
        WeightsError: when there is no checkpoint, or its index names what is not there.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._files: dict[str, Any] = {}
        self._file_of = self._read_index()
        self.config = self._read_config()

    def __contains__(self, key: str) -> bool:
        return key in self._file_of

    def __iter__(self) -> Iterator[str]:
        """Names of all tensors, sorted."""
        return iter(self._file_of)

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor, from its shard's header."""
        return tuple(self._file(key).get_slice(key).get_shape())

    def num_bytes(self, key: str, *, bits: int | None = None) -> int:
        """The size of a tensor, or the size that it would have with so many bits a number."""
        view = self._file(key).get_slice(key)
        width = re.search(r"\d+", view.get_dtype())  # F32, BF16, F8_E4M3, I64; BOOL has none and takes a byte
        numbers = math.prod(int(size) for size in view.get_shape())
        return numbers * (bits or (int(width[0]) if width else 8)) // 8

    def read(self, key: str) -> torch.Tensor:
        """A tensor as it is on disk, on the CPU."""
        try:
            tensor: torch.Tensor = self._file(key).get_tensor(key)
        except Exception as error:
            raise WeightsError(
                f"tensor {key} of {self.directory / self._file_of[key]} cannot be read: {error}"
            ) from error
        return tensor

    @property
    def total_bytes(self) -> int:
        """Size of all shards on disk."""
        return sum((self.directory / name).stat().st_size for name in dict.fromkeys(self._file_of.values()))

    def _file(self, key: str) -> Any:
        return self._files[self._file_of[key]]

    def _read_index(self) -> dict[str, str]:
        if not self.directory.is_dir():
            raise WeightsError(f"there is no checkpoint directory {self.directory}")
        index = self.directory / INDEX_NAME
        if index.is_file():
            found = _read_json(index).get("weight_map")
            if not isinstance(found, dict) or not found:
                raise WeightsError(f"{index} is not an index of a checkpoint: it has no weight_map")
            file_of = {key: str(found[key]) for key in sorted(found)}
            for key, name in file_of.items():
                if "/" in name or not (self.directory / name).is_file():
                    raise WeightsError(
                        f"{index} puts {key} into {name}, which is not there", hint="copy the checkpoint again"
                    )
            return self._with_headers(dict.fromkeys(file_of.values()), file_of)
        if not (self.directory / SINGLE_NAME).is_file():
            others = [path.name for path in sorted(self.directory.glob("pytorch_model*.bin"))]
            hint = f"{others[0]} is a pickle: convert it to safetensors" if others else f"it has no {SINGLE_NAME}"
            raise WeightsError(f"{self.directory} holds no safetensors checkpoint", hint=hint)
        return self._with_headers({SINGLE_NAME: None}, None)

    def _with_headers(self, names: dict[str, None], stated: dict[str, str] | None) -> dict[str, str]:
        """Names from the shards themselves; an index must agree with them."""
        from safetensors import safe_open

        found: dict[str, str] = {}
        for name in names:
            try:
                self._files[name] = safe_open(self.directory / name, framework="pt")
            except Exception as error:
                raise WeightsError(
                    f"{self.directory / name} is damaged, or no safetensors file: {error}",
                    hint="copy the checkpoint again",
                ) from error
            found.update(dict.fromkeys(self._files[name].keys(), name))
        for key, name in (stated or {}).items():
            if found.get(key) != name:
                raise WeightsError(f"the index of {self.directory} puts {key} into {name}, which does not hold it")
        return {key: found[key] for key in sorted(found)}

    def _read_config(self) -> dict[str, Any]:
        path = self.directory / "config.json"
        return _read_json(path) if path.is_file() else {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise WeightsError(f"{path} holds no JSON object")
    return value
