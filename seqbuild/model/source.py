"""Resolve SOURCE: a model in the local Hugging Face cache, a model directory, or a bare config.json."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.artifact.config_policy import require_possible
from runtime.checkpoint.source_checks import require_no_adapter, require_true_names, with_entry_of_file
from runtime.checkpoint.source_formats import SourceHeaders
from runtime.checkpoint.source_tensors import as_integers, plain_shapes
from runtime.checkpoint.stored import Stored
from runtime.errors import ArtifactError, ModelError, UsageError, WeightsError
from runtime.host.hub import INDEX_NAME, SINGLE_NAME, completion_of, name_of, resolve_directory
from runtime.host.regular_files import is_there, open_regular, read_regular, read_text, reason_of

# Files copied to the artifact besides the config, if present: a host needs them to prepare data and to save the model.
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
)
_HEADER_LIMIT_BYTES = 100 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A model's description on disk.

    Attributes:
        name: the base of the artifact's name.
        directory: the directory with the files.
        config_file: the config.json.
        config: its content.
        tensors: names and shapes of the checkpoint's tensors if these are in memory; None for those in the directory.
    """

    name: str
    directory: Path
    config_file: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, tuple[int, ...]] | None = None

    def companions(self) -> dict[str, bytes]:
        """Return the files that are copied to the artifact besides the config, by name."""
        if self.config_file.name != "config.json":
            return {}
        found = ((name, self.directory / name) for name in COMPANIONS)
        try:
            return {name: read_regular(path) for name, path in found if is_there(path)}
        except OSError as error:
            raise ModelError(f"{error.filename} cannot be read: {error.strerror}") from error

    def checkpoint_shapes(self) -> dict[str, tuple[int, ...]] | None:
        """Read names and shapes of the checkpoint's tensors from the headers of its shards; None without a checkpoint.

        Packed tensors that a host unpacks while reading are listed with their unpacked names and shapes.

        Raises:
            WeightsError: if shards are missing or damaged, or quantized in a form that no host can read.
        """
        if self.tensors is not None:
            return dict(self.tensors)
        index = self.directory / INDEX_NAME
        if is_there(index):
            try:
                shards = list(dict.fromkeys(json.loads(read_regular(index))["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise WeightsError(f"{index} is not an index of a checkpoint: {error}") from error
        else:
            shards = [SINGLE_NAME]
        paths = [self.directory / str(shard) for shard in sorted(shards)]
        missing = [path for path in paths if not is_there(path)]
        if len(missing) == len(paths):
            return None
        if missing:
            command = completion_of(self.directory)
            complete = f"complete it with {command}" if command else "complete the checkpoint"
            raise WeightsError(
                f"missing {missing[0].name} in {self.directory}, one of the {len(paths)} shards of its checkpoint",
                hint=f"{complete}, or compile from the config.json alone",
            )
        require_no_adapter(self.directory)
        places: dict[str, _TensorPlace] = {}
        for path in paths:
            places.update(_header(path))
        dtypes = {name: place.stored.dtype for name, place in places.items()}
        config = with_entry_of_file(self.config, self.directory, dtypes)
        require_true_names(self.directory, config, dtypes)
        tensors = {name: place.stored for name, place in places.items()}
        headers = SourceHeaders(
            tensors=tensors, origin=str(self.directory), integers=lambda name: places[name].integers()
        )
        return plain_shapes(config, headers)


@dataclass(frozen=True, slots=True)
class _TensorPlace:
    """The place of a tensor: `begin` is the position of its first byte in a shard."""

    path: Path
    stored: Stored
    begin: int

    def integers(self) -> tuple[int, ...]:
        """Read a small tensor of whole numbers."""
        with open_regular(self.path) as file:
            file.seek(self.begin)
            return as_integers([file.read(min(self.stored.num_bytes, 128))], self.stored.dtype, self.stored.shape)


def _header(path: Path) -> dict[str, _TensorPlace]:
    """Return the place of each tensor of a shard."""
    try:
        with open_regular(path) as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _HEADER_LIMIT_BYTES:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length))
        return {
            name: _TensorPlace(
                path,
                Stored(name, str(entry["dtype"]), tuple(map(int, entry["shape"]))),
                8 + length + int(entry["data_offsets"][0]),
            )
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise WeightsError(f"{path} is not a safetensors file: {error}") from error


def resolve_source(source: str, *, revision: str | None = None) -> Source:
    """Find the model's files without network access.

    Args:
        source: a directory with a config.json, a config file, or a hub id whose files are in the local cache.
        revision: branch, tag or commit of a hub id.

    Raises:
        ModelError: if there is no such model, or it has no config.
        UsageError: for a revision of a directory or file.
    """
    path = Path(source)
    if path.suffix == ".json" and path.is_file():
        if revision is not None:
            raise UsageError(f"a revision ({revision}) requires a hub id, but {source} is a file")
        name = path.resolve().parent.name if path.name == "config.json" else path.stem
        return _from_file(name, path, source)
    directory = resolve_directory(source, revision=revision, what="model")
    name = directory.resolve().name if source and path.is_dir() else name_of(source)
    return _from_file(name, directory / "config.json", source)


def loaded_name(config: Any, default: str) -> str:
    """Return the name of a model in memory: that of the directory or hub id that it was loaded from."""
    given = str(config.name_or_path or "")
    path = Path(given)
    return (path.resolve().name if given and path.is_dir() else path.name) or default


def _from_file(name: str, config_file: Path, source: str) -> Source:
    if not config_file.exists():
        require_no_adapter(config_file.parent)
        raise ModelError(f"{source} has no config.json", hint="add it; weights are not required")
    try:
        config = json.loads(read_text(config_file))
    except (ValueError, OSError, RecursionError) as error:
        raise ModelError(f"{config_file} cannot be read: {reason_of(error)}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{config_file} is not a model config: it must contain a JSON object")
    try:
        require_possible(config, str(config_file))
    except ArtifactError as error:
        raise ModelError(error.message, hint=error.hint) from error
    return Source(name=name, directory=config_file.parent, config_file=config_file, config=config)
