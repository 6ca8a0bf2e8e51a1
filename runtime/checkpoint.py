"""A checkpoint on disk, read tensor by tensor: safetensors shards, memory-mapped, each opened once."""

from __future__ import annotations

import json
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
        from safetensors import safe_open

        name = self._file_of[key]
        if name not in self._files:
            path = self.directory / name
            try:
                self._files[name] = safe_open(path, framework="pt")
            except Exception as error:
                raise WeightsError(f"{path} is not a safetensors file: {error}") from error
        return self._files[name]

    def _read_index(self) -> dict[str, str]:
        if not self.directory.is_dir():
            raise WeightsError(f"there is no checkpoint directory {self.directory}")
        index = self.directory / INDEX_NAME
        if index.is_file():
            try:
                found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                file_of = {str(key): str(found[key]) for key in sorted(found)}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise WeightsError(f"{index} is not an index of a checkpoint: {error}") from error
            for key, name in file_of.items():
                if "/" in name or not (self.directory / name).is_file():
                    raise WeightsError(f"{index} puts {key} into {name}, which is not there")
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
                raise WeightsError(f"{self.directory / name} is not a safetensors file: {error}") from error
            found.update(dict.fromkeys(self._files[name].keys(), name))
        for key, name in (stated or {}).items():
            if found.get(key) != name:
                raise WeightsError(f"the index of {self.directory} puts {key} into {name}, which does not hold it")
        return {key: found[key] for key in sorted(found)}

    def _read_config(self) -> dict[str, Any]:
        path = self.directory / "config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except ValueError as error:
            raise WeightsError(f"{path} cannot be read: {error}") from error
        return config if isinstance(config, dict) else {}
