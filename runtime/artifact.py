"""Read an artifact: check everything, then compile, and never trace.

The order is the point: manifest, then the digest of every file, then the grammar of every program, and only then is
code compiled (docs/format.md, "What a reader must do").
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from runtime.errors import ArtifactError, VersionError
from runtime.grammar import Allowed, check_program
from runtime.host_sources import changed_sources
from runtime.manifest import (
    MANIFEST_NAME,
    ConversionEntry,
    FileEntry,
    Manifest,
    SubgraphEntry,
    sha256,
)
from runtime.model_code import ModelCode, check_model_code, is_own_module
from runtime.tables import check_tables

if TYPE_CHECKING:
    import torch
    from torch import nn

    from runtime.code_loader import LoadedCode
    from runtime.program import Program, Run

CONSTANTS_NAME = "constants.safetensors"
_SOURCES_SHOWN = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedSubgraph:
    """One step of the chain, compiled from the artifact's code."""

    entry: SubgraphEntry
    source: str
    _artifact: Artifact = field(repr=False)
    _program: Program = field(repr=False)

    @property
    def input_names(self) -> tuple[str, ...]:
        """What `forward` takes, in the order of the generated signature."""
        return self.entry.input_names

    @property
    def consumed_names(self) -> tuple[str, ...]:
        """The inputs that no later subgraph takes, so that they can be freed afterwards."""
        return self.entry.consumed_names

    def forward(self, model: nn.Module, **inputs: Any) -> dict[str, Any]:
        """Execute the subgraph with the weights of `model`.

        Args:
            model: the artifact's module tree (see `Artifact.empty_model`) with at least this subgraph's parameters
                loaded.
            inputs: a value for each of `input_names`, on the device to run on.

        Returns:
            Output names to values; from the last subgraph, the fields of the model's output.
        """
        from runtime.program import run_device, run_dtype

        return self.execute(model, inputs, self._artifact.run(run_device(inputs, model), run_dtype(model)))

    def execute(self, model: nn.Module, inputs: Mapping[str, Any], run: Run) -> dict[str, Any]:
        """The same in a stated run, on a device of which no input need tell."""
        from runtime.key_values import watched

        entry = self.entry
        with watched(model, entry):
            if not entry.arguments and not entry.results:
                return self._program(model, **inputs, run=run)
            ordered = (inputs[name] for name in entry.input_names)
            values = self._program(model.get_submodule(entry.scope), *ordered, run=run)
        return dict(zip(entry.output_names, values.values(), strict=True))

    def submodules(self, model: nn.Module, recurse: bool = True) -> list[nn.Module]:
        """The modules that the subgraph calls, in call order, each once; with `recurse`, those inside them as well."""
        called = [model.get_submodule(name) for name in self.entry.submodules]
        modules = [inner for module in called for inner in module.modules()] if recurse else called
        return list(dict.fromkeys(modules))


@dataclass(kw_only=True)
class Artifact:
    """A checked artifact.

    Attributes:
        path: its directory.
        manifest: its table of contents.
        subgraphs: the compiled chain, in order of execution.
        conversions: programs that make parameters from several tensors.
        leaf_programs: what leaves do that calculate in their own way, by file.
        model_code: the files of the model's own code; None for a model that is part of transformers.
        code: the same, ready to be imported, where that is allowed.
    """

    path: Path
    manifest: Manifest
    subgraphs: tuple[LoadedSubgraph, ...] = ()
    conversions: tuple[Program, ...] = field(default=(), repr=False)
    leaf_programs: dict[str, Program] = field(default_factory=dict, repr=False)
    constants: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)
    model_code: ModelCode | None = field(default=None, repr=False)
    code: LoadedCode | None = field(default=None, repr=False)
    _runs: dict[tuple[str, str], Run] = field(default_factory=dict, repr=False)

    @property
    def config_class(self) -> type | None:
        """The class of the model's config where its own code defines that; None where transformers does.

        Raises:
            ModelError: when the code cannot be executed.
        """
        from transformers import PretrainedConfig

        entry = self.manifest.model
        if not is_own_module(entry.config_module):
            return None
        self.require_consent()
        assert self.code is not None, "a config class of a model without code"
        return self.code.find(entry.config_module, entry.config_class_name, PretrainedConfig)

    def require_consent(self) -> None:
        """For whatever executes the model's own code: refuse unless that has been allowed, or there is none.

        Raises:
            ModelError: naming what would be executed.
        """
        if self.model_code is not None and self.code is None:
            model = self.manifest.model
            named = {model.config_module: model.config_class_name, model.module: model.class_name}
            own = {module: name for module, name in named.items() if is_own_module(module)}
            raise self.model_code.refusal(str(self.path), own.values(), own)

    def empty_model(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The model's module tree with every parameter on the meta device, in eval mode.

        Args:
            dtype: of the floating point parameters; None takes the dtype of the manifest.

        Raises:
            ModelError: when the installed transformers does not have the model's class, or its own code fails.
        """
        from runtime.skeleton import build_skeleton

        return build_skeleton(self, dtype)

    def run(self, device: torch.device, dtype: torch.dtype) -> Run:
        """What generated code is given on `device` with weights of `dtype`; constants are moved there once."""
        from runtime.program import Run
        from runtime.skeleton import resolve_opaque

        key = (str(device), str(dtype))
        if key not in self._runs:
            self._runs[key] = Run(
                device=device,
                dtype=dtype,
                constants={name: tensor.to(device) for name, tensor in self.constants.items()},
                opaque={path: resolve_opaque(path, self.code) for path in self.manifest.opaque_steps},
            )
        return self._runs[key]


def load(
    path: str | os.PathLike[str], *, allow_version_skew: bool = False, trust_remote_code: bool = False
) -> Artifact:
    """Check an artifact and compile its code.

    Args:
        path: the artifact's directory.
        allow_version_skew: go on when the sources on this host are not those it was compiled with.
        trust_remote_code: allow the model's own code, if the artifact brings any, to be executed.

    Raises:
        ArtifactError: when anything of docs/format.md is broken; nothing has been executed then.
        VersionError: when the sources on this host are not those it was compiled with.
        ModelError: when it needs code that nobody has allowed to run; nothing has been executed then.
    """
    root = Path(path)
    manifest, sources, code = _check(root)
    check_versions(manifest, allow_version_skew=allow_version_skew)
    artifact = _compile(root, manifest, sources)
    artifact.model_code = code
    if code is not None and not trust_remote_code and not manifest.is_portable:
        artifact.require_consent()
    if code is not None and trust_remote_code:
        from runtime.code_loader import LoadedCode

        artifact.code = LoadedCode(code)
    return artifact


def check(root: Path) -> tuple[Manifest, dict[str, str]]:
    """Check an artifact without executing or importing anything of it.

    Returns:
        The manifest and the source of every program, by file path.

    Raises:
        ArtifactError: naming the file and what is wrong with it.
    """
    manifest, sources, _ = _check(root)
    return manifest, sources


def _check(root: Path) -> tuple[Manifest, dict[str, str], ModelCode | None]:
    manifest = read_manifest(root)
    contents = _check_files(root, manifest)
    code = check_model_code(manifest, contents)
    own_modules = code.modules if code is not None else ()
    operators: dict[str, str] = {}
    sources: dict[str, str] = {}
    programs: list[tuple[str, Allowed]] = [(e.file, _allowed(e, own_modules)) for e in manifest.subgraphs]
    programs += [(entry.file, _allowed_conversion(entry)) for entry in manifest.conversions]
    for kind in manifest.leaf_kinds:
        if kind.program:
            allowed = Allowed(input_names=kind.arguments, output_names=("output",), attributes=kind.attributes)
            programs.append((kind.program, allowed))
    for file, allowed in dict.fromkeys(programs):
        if file not in contents:
            raise ArtifactError(f"{file} is named as a program but not listed among the files of {root}")
        if file in manifest.model.code:
            raise ArtifactError(f"{file} is named as a program and as the model's own code")
        for operator in check_program(contents[file], allowed, file):
            operators.setdefault(operator, file)
        sources[file] = contents[file].decode("ascii")
    unnamed = [path for path in contents if path.endswith(".py") and path not in (*sources, *manifest.model.code)]
    if unnamed:
        raise ArtifactError(f"{unnamed[0]} is code that {root / MANIFEST_NAME} names as no program")
    check_tables(manifest)
    _check_operators(operators)
    return manifest, sources, code


def read_manifest(root: Path) -> Manifest:
    """Read and check the manifest alone.

    Raises:
        ArtifactError: when there is none, or it is not well-formed.
    """
    path = root / MANIFEST_NAME
    if not root.is_dir():
        raise ArtifactError(f"{root} is not a directory", hint="an artifact is a directory that seqbuild compile wrote")
    if not path.is_file() or path.is_symlink():
        raise ArtifactError(f"{root} is not an artifact: it has no {MANIFEST_NAME}")
    return Manifest.from_bytes(path.read_bytes(), str(path))


def check_versions(manifest: Manifest, *, allow_version_skew: bool) -> None:
    """Compare the sources that the artifact relies on with those on this host. The version alone decides only for
    artifacts that record no digests.

    Raises:
        VersionError: when they differ and that is not allowed.
    """
    if allow_version_skew:
        return
    if manifest.is_portable:
        return  # nothing of this host's transformers calculates
    wanted, found = manifest.versions.get("transformers", ""), importlib.metadata.version("transformers")
    changed = changed_sources(manifest.sources)
    if not changed and (manifest.sources or wanted == found):
        return
    what = f"the artifact was compiled with transformers {wanted}, this host has {found}"
    if changed:
        shown = ", ".join(changed[:_SOURCES_SHOWN]) + (" and others" if len(changed) > _SOURCES_SHOWN else "")
        what += f", and {len(changed)} of the {len(manifest.sources)} source files it relies on differ: {shown}"
    mend = "put the files back as released" if wanted == found else f"install transformers=={wanted}"
    raise VersionError(
        what,
        hint="layers are called as modules of transformers, so other sources may compute something else: "
        f"{mend}, compile again, or accept it with --allow-version-skew",
    )


def _allowed_conversion(entry: ConversionEntry) -> Allowed:
    names = tuple(f"source_{index}" for index in range(entry.num_sources))
    return Allowed(input_names=names, output_names=("value",))


def _allowed(entry: SubgraphEntry, own_modules: Sequence[str]) -> Allowed:
    inside = f"{entry.scope}." if entry.scope else ""
    outside = [n for n in (*entry.submodules, *entry.attributes, *entry.objects) if not n.startswith(inside)]
    if outside or (entry.arguments and len(entry.arguments) != len(entry.input_names)):
        raise ArtifactError(f"{entry.file} reaches out of its scope, or takes other inputs than its subgraph")
    relative = {
        kind: tuple(name.removeprefix(inside) for name in getattr(entry, kind))
        for kind in ("submodules", "attributes", "objects")
    }
    return Allowed(
        input_names=entry.arguments or entry.input_names,
        output_names=entry.results or entry.output_names,
        constants=entry.constants,
        opaque=entry.opaque,
        own_modules=tuple(own_modules),
        **relative,
    )


def _check_files(root: Path, manifest: Manifest) -> dict[str, bytes]:
    """Compare every file with its entry; return what the listed text files hold."""
    listed: dict[str, FileEntry] = {}
    for entry in manifest.files:
        parts = PurePosixPath(entry.path).parts
        is_plain = parts and all(
            part not in ("..", ".", "/") and "\\" not in part and "\0" not in part for part in parts
        )
        if not is_plain or "/".join(parts) != entry.path or entry.path == MANIFEST_NAME:
            raise ArtifactError(f"{root} lists a file with the path {entry.path!r}, which leaves it or is not plain")
        if entry.path in listed:
            raise ArtifactError(f"{root} lists {entry.path} twice")
        listed[entry.path] = entry
    present = _present_files(root)
    for name in present:
        if name != MANIFEST_NAME and name not in listed:
            raise ArtifactError(f"{root} holds {name}, which its manifest does not list", hint="remove it")
    contents = {}
    for name, entry in listed.items():
        if name not in present:
            raise ArtifactError(f"{root} has lost {name}", hint="copy or compile it again")
        data = (root / name).read_bytes()
        if len(data) != entry.bytes or sha256(data) != entry.sha256:
            raise ArtifactError(
                f"{root / name} is damaged: its content does not match the manifest",
                hint="copy or compile it again; nothing of it was executed",
            )
        contents[name] = data
    return contents


def _present_files(root: Path) -> dict[str, None]:
    present: dict[str, None] = {}
    for folder, directories, names in os.walk(root):
        for name in sorted((*directories, *names)):
            path = Path(folder, name)
            if path.is_symlink() or not (path.is_dir() or path.is_file()):
                raise ArtifactError(f"{path} is not a plain file", hint="artifacts hold no links or devices")
            if path.is_file():
                present[path.relative_to(root).as_posix()] = None
    return present


def _check_operators(operators: dict[str, str]) -> None:
    import torch

    for operator, file in operators.items():
        name, _, overload = operator.partition(".")
        packet = getattr(torch.ops.aten, name, None)
        overloads: list[str] = packet.overloads() if isinstance(packet, torch._ops.OpOverloadPacket) else []  # type: ignore[no-untyped-call]
        if overload not in overloads:
            raise ArtifactError(
                f"{file} calls torch.ops.aten.{operator}, which torch {torch.__version__} does not have",
                hint="install the torch version that the artifact was compiled with",
            )


def _compile(root: Path, manifest: Manifest, sources: dict[str, str]) -> Artifact:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from runtime.program import compile_program

    artifact = Artifact(path=root, manifest=manifest)
    if manifest.constants:
        try:
            artifact.constants = load_file(root / CONSTANTS_NAME)
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"{root / CONSTANTS_NAME} cannot be read: {error}") from error
        if sorted(artifact.constants) != sorted(manifest.constants):
            raise ArtifactError(f"{root / CONSTANTS_NAME} holds other tensors than the manifest states")
    programs = {
        file: compile_program(sources[file], str(root / file))
        for file in dict.fromkeys(entry.file for entry in manifest.subgraphs)
    }
    artifact.subgraphs = tuple(
        LoadedSubgraph(
            entry=entry,
            source=sources[entry.file],
            _artifact=artifact,
            _program=programs[entry.file],
        )
        for entry in manifest.subgraphs
    )
    artifact.leaf_programs = {
        file: compile_program(sources[file], str(root / file))
        for file in dict.fromkeys(kind.program for kind in manifest.leaf_kinds if kind.program)
    }
    artifact.conversions = tuple(
        compile_program(sources[entry.file], str(root / entry.file)) for entry in manifest.conversions
    )
    return artifact
