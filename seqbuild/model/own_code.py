"""Load a model's own code (`auto_map` in its config.json): find it, require consent, make it importable.

Nothing is downloaded, and nothing is executed before it is allowed. The files are read once: the code shown, executed
and stored in the artifact consists of the same bytes.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.artifact.own_code import ModelCode, needed_files
from runtime.errors import ModelError
from runtime.host.hub import cached_snapshot, download_command
from runtime.host.regular_files import is_there, read_regular, read_text
from seqbuild.model.source import Source

if TYPE_CHECKING:
    from runtime.artifact.own_code_import import LoadedCode

# `module.Class`, or `owner/name--module.Class` for code in another repository.
_REFERENCE = re.compile(
    r"(?:(?P<repo>[\w.-]+(?:/[\w.-]+)?)--)?(?P<module>[A-Za-z_][\w.]*)\.(?P<name>[A-Za-z_]\w*)", re.A
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """One class named by an auto_map: its purpose, repository (empty for the model's own), module and class."""

    kind: str
    repo: str
    module: str
    class_name: str


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnCode:
    """A model's own code, allowed and importable.

    Attributes:
        references: the classes that its config names.
        architectures: the class names that config.json prefers.
        loaded: imports it.
    """

    references: tuple[Reference, ...]
    architectures: tuple[str, ...]
    loaded: LoadedCode

    @property
    def files(self) -> Mapping[str, bytes]:
        """Return the content by path."""
        return self.loaded.code.files

    @property
    def modules(self) -> tuple[str, ...]:
        """Return the import names of its modules."""
        return self.loaded.modules

    def config_class(self) -> type | None:
        """Return the class of the config; None if the code relies on transformers for it.

        Raises:
            ModelError: if the code fails, or has no such class.
        """
        from transformers import PretrainedConfig

        return self._class(_config(self.references), PretrainedConfig)

    def model_class(self) -> type | None:
        """Return the class of the model; None if the code relies on transformers for it.

        Raises:
            ModelError: if the code fails, or has no such class.
        """
        from transformers import PreTrainedModel

        return self._class(_model(self.references, self.architectures), PreTrainedModel)

    def _class(self, reference: Reference | None, base: type) -> type | None:
        if reference is None:
            return None
        found = self.loaded.find(f"{self.loaded.package}.{reference.module}", reference.class_name, base)
        if found.__module__ not in self.modules and found.__module__.split(".")[0] != "transformers":
            raise ModelError(
                f"{reference.class_name} of {reference.module} is defined elsewhere, in {found.__module__}"
            )
        return found


@contextlib.contextmanager
def own_code_of(source: Source, *, is_allowed: bool) -> Iterator[OwnCode | None]:
    """Make the model's own code importable while the block runs; yield None if it has none.

    Args:
        source: the model.
        is_allowed: whether the user has allowed executing the code.

    Raises:
        ModelError: for code that is not allowed, incomplete, or not available offline.
    """
    references = read_references(source.config.get("auto_map"), source.name)
    architectures = tuple(map(str, source.config.get("architectures") or ()))
    chosen = [found for found in (_config(references), _model(references, architectures)) if found is not None]
    if not chosen:
        yield None
        return
    code = _collect(source, (*references, *_tokenizer_references(source)))
    if not is_allowed:
        names = dict.fromkeys(f"{entry.class_name} ({entry.kind})" for entry in references)
        raise code.refusal(source.name, names, (f"{code.package}.{entry.module}" for entry in chosen))
    from runtime.artifact.own_code_import import LoadedCode

    with LoadedCode(code) as loaded:
        yield OwnCode(references=references, architectures=architectures, loaded=loaded)


def read_references(auto_map: Any, origin: str) -> tuple[Reference, ...]:
    """Parse an auto_map, in the order of its keys.

    Raises:
        ModelError: for anything except `module.Class`, with an optional repository before it.
    """
    if auto_map is None:
        return ()
    if not isinstance(auto_map, Mapping):
        raise ModelError(f"the auto_map of {origin} must be a table of classes; got {type(auto_map).__name__}")
    found = []
    for kind in sorted(auto_map):
        values = auto_map[kind] if isinstance(auto_map[kind], list) else [auto_map[kind]]
        for value in values:
            match = _REFERENCE.fullmatch(value) if isinstance(value, str) else None
            if match is not None and all(match["module"].split(".")):
                found.append(
                    Reference(kind=kind, repo=match["repo"] or "", module=match["module"], class_name=match["name"])
                )
            elif value is not None:
                raise ModelError(
                    f"the auto_map of {origin} has an invalid class for {kind}: {value!r}",
                    hint="write it as module.Class, or owner/name--module.Class for code of another repository",
                )
    return tuple(found)


def _config(references: tuple[Reference, ...]) -> Reference | None:
    return next((entry for entry in references if entry.kind == "AutoConfig"), None)


def _model(references: tuple[Reference, ...], architectures: tuple[str, ...]) -> Reference | None:
    """Choose the class that config.json names under `architectures`, else the causal LM, else the base model."""
    models = {entry.class_name: entry for entry in references if entry.kind.startswith("AutoModel")}
    kinds = {entry.kind: entry for entry in models.values()}
    wanted = [models.get(name) for name in architectures]
    wanted += [kinds.get(kind) for kind in ("AutoModelForCausalLM", "AutoModel")]
    return next((entry for entry in (*wanted, *models.values()) if entry is not None), None)


def _tokenizer_references(source: Source) -> list[Reference]:
    """Return the references to the tokenizer's own code, which is copied to quantized checkpoints, never executed."""
    try:
        config = json.loads(read_text(source.directory / "tokenizer_config.json"))
    except (OSError, ValueError, RecursionError):
        return []
    auto_map = config.get("auto_map") if isinstance(config, dict) else None
    references = read_references(auto_map, f"{source.name}'s tokenizer") if isinstance(auto_map, dict) else ()
    return [entry for entry in references if not entry.repo]


def _collect(source: Source, references: tuple[Reference, ...]) -> ModelCode:
    """Collect all files that the classes need, including those of other repositories."""
    files: dict[str, bytes] = {}
    for repo in dict.fromkeys(entry.repo for entry in references):
        directory = cached_snapshot(repo) if repo else source.directory
        if directory is None:
            raise ModelError(
                f"{source.name} brings its own code, and its repository {repo} is not in the local cache",
                hint=f"download that repository first: {download_command(repo)}",
            )
        modules = dict.fromkeys(entry.module for entry in references if entry.repo == repo)
        for path, data in needed_files(modules, _Reader(directory).read, repo or source.name).items():
            if files.setdefault(path, data) != data:
                raise ModelError(f"{source.name} brings its own code, with two different files {path}")
    return ModelCode(files=dict(sorted(files.items())))


class _Reader:
    """Reader of a model's directory. It reads each file once, so that the inspected bytes are the executed bytes."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        root = directory.resolve()
        # In the hub's cache, a snapshot consists of links into the repository's own folder.
        self.root = root.parent.parent if root.parent.name == "snapshots" else root
        self._contents: dict[str, bytes | None] = {}

    def read(self, path: str) -> bytes | None:
        """Return the content, or None if there is no such file.

        Raises:
            ModelError: for a link out of the directory, or an unreadable file.
        """
        if path not in self._contents:
            self._contents[path] = self._read(path)
        return self._contents[path]

    def _read(self, path: str) -> bytes | None:
        file = self.directory / path
        try:
            if not is_there(file):
                return None
        except OSError as error:
            raise ModelError(f"{file} cannot be read: {error.strerror}") from error
        real = file.resolve()
        if not real.is_relative_to(self.root):
            raise ModelError(
                f"{file} is a link to {real}, outside the model's directory", hint="replace it by the file itself"
            )
        try:
            return read_regular(real)
        except OSError as error:
            raise ModelError(f"{file} cannot be read: {error.strerror}") from error
