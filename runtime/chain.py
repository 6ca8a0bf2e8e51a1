"""Load an artifact: check everything, then compile its code, without tracing.

The order matters: the manifest, the digest of every file, the grammar of every program, and only then is code compiled
(docs/format.md, "What a reader must do").
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.arguments import as_path
from runtime.artifact.check import Checked, check_artifact, check_versions, read_manifest
from runtime.artifact.constants import load_constants
from runtime.artifact.files import CONSTANTS_NAME
from runtime.artifact.manifest import Manifest, ParameterEntry, SubgraphEntry
from runtime.artifact.parts import ArtifactParts
from runtime.errors import ArtifactError, DataError, SeqbuildError
from runtime.host.offline import offline
from runtime.language.opaque import require_harmless
from runtime.language.opaque_calls import GuardedStep
from runtime.language.operators import require_operators

if TYPE_CHECKING:
    import torch
    from torch import nn

    from runtime.artifact.own_code_import import LoadedCode
    from runtime.checkpoint.reader import Checkpoint
    from runtime.language.program import Program, Run

__all__ = ["CONSTANTS_NAME", "Artifact", "LoadedSubgraph", "check", "check_versions", "load", "read_manifest"]


# Torch's messages about memory and devices: these errors are not caused by the code.
_ABOUT_MACHINE = re.compile(r"memory|CUDA|XPU|device-side", re.IGNORECASE)
_HALVES = frozenset(("bfloat16", "float16"))
# Errors raised by code that is invalid for its values. A RuntimeError may or may not be one of these.
_OF_CODE = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, AssertionError, StopIteration)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedSubgraph:
    """One step of the chain, compiled from the artifact's code."""

    entry: SubgraphEntry
    source: str
    _artifact: Artifact = field(repr=False)
    _program: Program = field(repr=False)

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs of `forward`, in the order of the generated signature."""
        return self.entry.input_names

    @property
    def consumed_names(self) -> tuple[str, ...]:
        """Names of the inputs that no later subgraph takes: they can be freed after this one."""
        return self.entry.consumed_names

    def halves(self, model: nn.Module) -> tuple[torch.dtype, ...]:
        """The 16-bit dtypes that its code may compute in, with the weights of `model`."""
        from runtime.algorithms.exact_products import HALVES
        from runtime.language.program import run_dtype

        known = self._artifact.named_halves
        return tuple(half for half in HALVES if half == run_dtype(model) or str(half).removeprefix("torch.") in known)

    @property
    def label(self) -> str:
        """Its targets, or without any the modules of its first parameters, for messages."""
        modules = dict.fromkeys(name.rpartition(".")[0] for name in self.entry.parameters)
        return ", ".join(self.entry.targets or list(modules)[:3]) or "no parameters"

    def forward(self, model: nn.Module, **inputs: Any) -> dict[str, Any]:
        """Execute the subgraph with the weights of `model`.

        Args:
            model: the artifact's module tree (see `Artifact.empty_model`) with at least this subgraph's parameters
                loaded.
            inputs: a value for each of `input_names`, on the device to run on.

        Returns:
            Output names to values; from the last subgraph, the fields of the model's output.

        Raises:
            DataError: an input is missing or unknown.
        """
        from runtime.language.program import run_device, run_dtype

        for name in (*self.input_names, *inputs):
            if name not in inputs or name not in self.input_names:
                what = f"has no input {name!r}" if name in inputs else f"is missing its input {name!r}"
                raise DataError(f"the subgraph {what}", hint=f"its inputs are {', '.join(self.input_names)}")
        return self.execute(model, inputs, self._artifact.run(run_device(inputs, model), run_dtype(model)))

    def execute(self, model: nn.Module, inputs: Mapping[str, Any], run: Run) -> dict[str, Any]:
        """Execute the subgraph in a given run; the device is that of the run, not of an input."""
        from runtime.formats.key_values import of_model

        fetching = contextlib.nullcontext() if self._artifact.manifest.is_portable else offline()
        entry, key_values = self.entry, of_model(model)
        handing_out = key_values.program(self) if key_values is not None else None
        program = handing_out or self._program
        if key_values is not None and handing_out is not None:
            run = key_values.run(self, run)
        with _unchanged(entry, model, run), fetching:
            return self.compute(model, inputs, run, program)

    def compute(
        self, model: nn.Module, inputs: Mapping[str, Any], run: Run, program: Program | None = None
    ) -> dict[str, Any]:
        """Call the code without a check of what it changes: the modules may be others than those of the artifact."""
        entry, called = self.entry, program or self._program
        if not entry.arguments and not entry.results:
            return called(model, **inputs, run=run)
        ordered = (inputs[name] for name in entry.input_names)
        values = called(model.get_submodule(entry.scope), *ordered, run=run)
        return dict(zip(entry.output_names, values.values(), strict=True))

    def submodules(self, model: nn.Module, recurse: bool = True) -> list[nn.Module]:
        """List the modules that the subgraph calls, in call order, each once; with `recurse`, their submodules, too."""
        called = [model.get_submodule(name) for name in self.entry.submodules]
        modules = [inner for module in called for inner in module.modules()] if recurse else called
        return list(dict.fromkeys(modules))


@dataclass(kw_only=True)
class Artifact(ArtifactParts):
    """A checked artifact.

    Attributes:
        subgraphs: the compiled chain, in order of execution.
        conversions: programs that compute parameters from several checkpoint tensors.
        named_halves: 16-bit dtypes that its code may compute in, whatever the dtype of the run.
    """

    subgraphs: tuple[LoadedSubgraph, ...] = ()
    conversions: tuple[Program, ...] = field(default=(), repr=False)
    named_halves: frozenset[str] = field(default=_HALVES, repr=False)
    _runs: dict[tuple[str, str], Run] = field(default_factory=dict, repr=False)

    @property
    def compiled_parameters(self) -> Mapping[str, ParameterEntry]:
        """The parameter table as compiled; a view of the artifact may have a different one."""
        return self.manifest.parameters

    def empty_model(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Build the model's module tree with every parameter on the meta device, in eval mode.

        Args:
            dtype: of the floating point parameters; None takes the dtype of the manifest.

        Raises:
            ModelError: when the installed transformers does not have the model's class, or its own code fails.
        """
        from runtime.model.build import build_skeleton

        return build_skeleton(self, dtype)

    def seen(self, checkpoint: Checkpoint) -> Checkpoint:
        """Adapt the checkpoint to this artifact's parameter table."""
        return checkpoint

    def run(self, device: torch.device, dtype: torch.dtype) -> Run:
        """Create the run object of generated code for `device` and `dtype`; constants are moved to the device once."""
        from runtime.language.program import Run

        key, home = (str(device), str(dtype)), self.manifest.model.module
        if key not in self._runs:
            self._runs[key] = Run(
                device=device,
                dtype=dtype,
                constants={name: tensor.to(device) for name, tensor in self.constants.items()},
                opaque={path: resolve_opaque(path, self.code, home) for path in self.manifest.opaque_steps},
            )
        return self._runs[key]


def load(
    path: str | os.PathLike[str],
    *,
    allow_version_skew: bool = False,
    trust_remote_code: bool = False,
    public_key: str | os.PathLike[str] | None = None,
) -> Artifact:
    """Check an artifact and compile its code.

    Args:
        path: the artifact's directory.
        allow_version_skew: continue when the library sources on this host differ from those it was compiled with.
        trust_remote_code: allow the model's own code, if the artifact contains any, to be executed.
        public_key: a PEM file; the artifact must be signed with its private key. A host can require a signature with
            the environment variable SEQBUILD_REQUIRE_SIGNATURE.

    Raises:
        SignatureError: when a required signature is missing or invalid; nothing has been executed then.
        ArtifactError: when a rule of docs/format.md is violated; nothing has been executed then.
        VersionError: when the library sources on this host differ from those it was compiled with.
        ModelError: when it needs code that was not allowed to run; nothing has been executed then.
    """
    root = as_path("the artifact", path)
    checked = check_artifact(root, [Path(public_key)] if public_key is not None else [])
    require_operators(checked.operators)
    check_versions(checked.manifest, allow_version_skew=allow_version_skew)
    artifact = _compile(root, checked)
    if checked.code is not None and not trust_remote_code and not checked.manifest.is_portable:
        artifact.require_consent()
    if checked.code is not None and trust_remote_code:
        from runtime.artifact.own_code_import import LoadedCode

        artifact.code = LoadedCode(checked.code)
    return artifact


def check(root: Path) -> tuple[Manifest, Mapping[str, str]]:
    """Check an artifact without executing or importing any part of it.

    Returns:
        The manifest and the source of every program, by file path.

    Raises:
        ArtifactError: naming the file and the problem.
    """
    checked = check_artifact(root)
    return checked.manifest, checked.sources


@contextlib.contextmanager
def _unchanged(entry: SubgraphEntry, model: nn.Module, run: Run) -> Iterator[None]:
    """Check that a subgraph does not modify weights and constants, and name the subgraph whose code fails.

    Raises:
        ArtifactError: for code that modifies them, and for errors of Python and torch about invalid code.
    """
    watched = [(name, _find(model, name)) for name in entry.parameters]
    watched += [(name, run.constants[name]) for name in entry.constants]
    before = [(name, tensor, tensor._version) for name, tensor in watched if not tensor.is_inference()]
    try:
        yield
    except (SeqbuildError, MemoryError):
        raise
    except (*_OF_CODE, RuntimeError) as error:
        is_torchs = isinstance(error, RuntimeError) and type(error) not in (RuntimeError, NotImplementedError)
        if is_torchs or (isinstance(error, RuntimeError) and _ABOUT_MACHINE.search(str(error))):
            raise
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ArtifactError(f"{entry.file} cannot be executed with this model and data: {what}") from error
    for name, tensor, version in before:
        if tensor._version != version:
            raise ArtifactError(f"{entry.file} changes {name} in place", hint="weights must not be modified")


def _find(model: nn.Module, name: str) -> torch.Tensor:
    owner, _, own = name.rpartition(".")
    found: torch.Tensor = getattr(model.get_submodule(owner), own)
    return found


def _compile(root: Path, checked: Checked) -> Artifact:
    from runtime.language.program import compile_program

    manifest, contents = checked.manifest, checked.contents
    artifact = Artifact(path=root, manifest=manifest, model_code=checked.code)
    artifact.companions = {name: data for name, data in contents.items() if "/" not in name and name != CONSTANTS_NAME}
    if manifest.constants:
        artifact.constants = load_constants(contents[CONSTANTS_NAME])
    programs = {
        file: compile_program(source, str(root / file), is_rewritten=True) for file, source in checked.sources.items()
    }
    artifact.subgraphs = tuple(
        LoadedSubgraph(
            entry=entry,
            source=checked.sources[entry.file],
            _artifact=artifact,
            _program=programs[entry.file],
        )
        for entry in manifest.subgraphs
    )
    artifact.leaf_programs = {kind.program: programs[kind.program] for kind in manifest.leaf_kinds if kind.program}
    artifact.named_halves = _named_halves(artifact, checked.sources.values())
    artifact.conversions = tuple(programs[entry.file] for entry in manifest.conversions)
    return artifact


def _named_halves(artifact: Artifact, sources: Iterable[str]) -> frozenset[str]:
    """The 16-bit dtypes of tensors in the tables and constants, and those that programs name; all of them for an
    artifact that calls other code, or with inputs of any floating point dtype.
    """
    manifest = artifact.manifest
    are_integers = all(entry.dtype.startswith(("int", "uint", "bool")) for entry in manifest.inputs)
    if not manifest.is_portable or not are_integers:
        return _HALVES
    of_tensors = {entry.dtype for entry in manifest.parameters.values()}
    of_tensors |= {str(tensor.dtype).removeprefix("torch.") for tensor in artifact.constants.values()}
    texts = list(sources)
    return frozenset(name for name in _HALVES if name in of_tensors or any(f"torch.{name}" in text for text in texts))


def resolve_opaque(path: str, code: LoadedCode | None = None, home: str = "") -> Callable[..., Any]:
    """Find the function of an opaque step, `module:function` or `module:Class.method`, inside transformers or the
    model's own code.

    Args:
        path: of the step.
        code: the model's own code, ready to be imported.
        home: the module that defines the model's class.

    Raises:
        ArtifactError: when the path is not allowed (see `runtime.language.opaque`), or does not exist.
    """
    own_modules = code.modules if code is not None else ()
    require_harmless(path, (home,), own_modules)
    module_name, _, qualified = path.partition(":")
    try:
        value: Any = importlib.import_module(module_name)
        for part in qualified.split("."):
            value = getattr(value, part)
    except (ImportError, AttributeError) as error:
        raise ArtifactError(f"opaque step {path!r} does not exist on this host") from error
    if not callable(value) or isinstance(value, type) or getattr(value, "__module__", "") != module_name:
        raise ArtifactError(f"opaque step {path!r} is not a function that {module_name} defines")
    function: Callable[..., Any] = value
    return function if module_name in own_modules else GuardedStep(path, function)
