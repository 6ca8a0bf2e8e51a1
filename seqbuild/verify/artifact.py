"""Verify an artifact: check that the chain computes the same as the model.

load        load the artifact as a host does                            runtime.chain
recompile   without weights: compile a small model of the architecture  seqbuild.verify.recompile
model       run the model on inputs of several shapes, then free it     seqbuild.verify.running
chain       run the chain on the same inputs with the same weights      seqbuild.verify.running
compare     compare the outputs and find the first differing subgraph   seqbuild.verify.difference
plain       compare with the model's plain call, as for real data       seqbuild.verify.plain
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from runtime.arguments import shown
from runtime.chain import load
from runtime.checkpoint.dequantize import open_checkpoint
from runtime.checkpoint.source_formats import ENTRY, OLD_ENTRY
from runtime.checkpoint.view import DerivedCheckpoint
from runtime.console import quiet
from runtime.data.inputs import require_in_range
from runtime.errors import DataError, ModelError, UsageError, WeightsError
from runtime.host.hub import weights_directory
from runtime.model.build import model_class
from runtime.model.config import artifact_config, read_config
from runtime.model.weightless import from_config
from runtime.status import doing
from runtime.weights.parameters import Weights, place_buffers
from seqbuild.sample.shape import SampleShape
from seqbuild.sample.thin import randomize
from seqbuild.verify.difference import difference, tensors
from seqbuild.verify.plain import PlainReference, missing_input_remarks, plain_difference, plain_reference
from seqbuild.verify.recompile import changed_files, compile_small, is_text_only, sample_of
from seqbuild.verify.report import Compared, Verification
from seqbuild.verify.running import SHAPES, Prints, fingerprints, run_chain, run_model, with_weights

if TYPE_CHECKING:
    from torch import nn

    from runtime.chain import Artifact

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyOptions:
    """Options of a verification; see `verify_artifact`."""

    weights: Path | None
    dtype: str
    tolerance: float
    shapes: Sequence[SampleShape]
    trust_remote_code: bool
    allow_version_skew: bool

    def __post_init__(self) -> None:
        """Reject invalid values.

        Raises:
            UsageError: naming the option.
        """
        if not isinstance(self.dtype, str) or self.dtype not in _DTYPES:
            raise UsageError(f"--dtype must be one of {', '.join(_DTYPES)}; got {shown(self.dtype)}")
        if not isinstance(self.tolerance, (int, float)) or not 0 <= self.tolerance < math.inf:
            raise UsageError(f"--tolerance must be a finite number, 0 or more; got {shown(self.tolerance)}")
        if not isinstance(self.shapes, Sequence) or not all(isinstance(shape, SampleShape) for shape in self.shapes):
            hint = "it must be a list of seqbuild.sample.shape.SampleShape"
            raise UsageError(f"shapes is {shown(self.shapes)}", hint=hint)


def verify_artifact(
    path: str | os.PathLike[str],
    *,
    weights: str | os.PathLike[str] | None = None,
    dtype: str = "float32",
    tolerance: float = 0.0,
    shapes: Sequence[SampleShape] = SHAPES,
    trust_remote_code: bool = False,
    allow_version_skew: bool = False,
) -> Verification:
    """Compare a compiled chain with the model itself, on the CPU.

    Without weights, a small model of the same architecture is compiled with the artifact's options and random weights
    from a fixed seed. This verifies the architecture; the artifact's own code is not run, but compared with the result
    of compiling its config again. With weights, the artifact itself and the model that transformers loads from them are
    run one after the other, so there must be memory for one of them in `dtype`.

    Args:
        path: the artifact's directory.
        weights: a model directory with config.json and safetensors, or a hub id; None selects the small model.
        dtype: the dtype of weights and activations: `float32`, `bfloat16` or `float16`.
        tolerance: the largest difference that counts as equal, relative to the largest magnitude in its tensor (at
            least 1).
        shapes: the shapes of the inputs: token ids int64 [batch, sequence], masks of the same shape, images and sounds
            in `dtype` with shapes that depend on the config.
        trust_remote_code: allow executing the model's own code in the artifact, if any.
        allow_version_skew: continue if sources on this host differ from those at compile time.

    Returns:
        The report; `is_equal` is the result.

    Raises:
        UsageError: if the dtype or tolerance is invalid.
        ArtifactError, VersionError: if the artifact is missing, damaged, or for another host.
        WeightsError: if the checkpoint is damaged, quantized, or of another model.
        ModelError: if code needs consent, the config cannot be reduced, or the model does not run.
        TraceError, TargetError: if inputs cannot be generated or the small model cannot be compiled.
    """
    start = time.perf_counter()
    options = VerifyOptions(
        weights=None if weights is None else weights_directory(weights),
        dtype=dtype,
        tolerance=tolerance,
        shapes=shapes,
        trust_remote_code=trust_remote_code,
        allow_version_skew=allow_version_skew,
    )
    artifact = load(path, allow_version_skew=allow_version_skew, trust_remote_code=trust_remote_code)
    artifact.require_consent()  # the model itself is run
    return dataclasses.replace(_verified(artifact, options), seconds=time.perf_counter() - start)


def _verified(artifact: Artifact, options: VerifyOptions) -> Verification:
    changed, remarks, dtype = None, [], _DTYPES[options.dtype]
    with tempfile.TemporaryDirectory(prefix="seqbuild-verify-") as name, _quiet_libraries():
        if options.weights is None:
            small = load(compile_small(artifact, Path(name)), trust_remote_code=options.trust_remote_code)
            changed, why = changed_files(artifact, Path(name))
            remarks.append(_code_remark(changed, why))
            pair: _Pair = _RandomPair(artifact=small, dtype=dtype)
        else:
            pair = _LoadedPair(artifact=artifact, dtype=dtype, weights=options.weights)
        compared = tuple(_compare(pair, options))
        remarks += missing_input_remarks(artifact.manifest, model_class(artifact))
    return Verification(
        path=artifact.path,
        class_name=artifact.manifest.model.class_name,
        weights=options.weights,
        dtype=options.dtype,
        tolerance=options.tolerance,
        shapes=compared,
        changed=changed,
        remarks=tuple(remarks),
    )


def _code_remark(changed: tuple[str, ...] | None, why: str) -> str:
    """Describe the comparison of the artifact's code, which is not executed itself."""
    head = "This verifies the architecture with a small model; the artifact's own code was not run"
    if changed is None:
        return f"{head}, and cannot be compared with the result of compiling its config again: {why}."
    if changed:
        return f"{head}; compiling its config again gives a different {', '.join(changed)}."
    return f"{head}, but it is byte for byte the result of compiling its config again."


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Suppress library warnings about small random models, and progress bars."""
    from transformers.utils import logging

    was_shown = logging.is_progress_bar_enabled()
    with quiet("transformers"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            if was_shown:
                logging.enable_progress_bar()  # type: ignore[no-untyped-call]


@dataclass(kw_only=True)
class _RandomPair:
    """A model and a module tree (`twin`) for the chain that share random weights, created on demand."""

    artifact: Artifact
    dtype: torch.dtype
    _model: nn.Module | None = field(default=None, init=False)

    def check(self) -> None:
        """Accept: random weights always fit."""

    def model(self) -> nn.Module:
        if self._model is None:
            cls = model_class(self.artifact)
            config = artifact_config(self.artifact)
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.manual_seed(0)
                self._model = from_config(cls, config, dtype=self.dtype, attention=_attention(self.artifact))
            randomize(self._model)
            self._model.eval()
        return self._model

    def twin(self) -> nn.Module:
        return with_weights(self.artifact, self.model())


@dataclass(kw_only=True)
class _LoadedPair:
    """A model and a module tree (`twin`) for the chain with a checkpoint, loaded by transformers and the runtime."""

    artifact: Artifact
    dtype: torch.dtype
    weights: Path

    def check(self) -> None:
        """Reject an unsuitable checkpoint before anything large is allocated."""
        self._source(self.artifact.empty_model(self.dtype))

    def model(self) -> nn.Module:
        config = read_config(self.weights, self.artifact.config_class)
        given: dict[str, Any] = {"pretrained_model_name_or_path": self.weights}
        checkpoint = open_checkpoint(self.weights)
        if isinstance(checkpoint, DerivedCheckpoint):
            # transformers uses another block size if a weight's size is no multiple (5.24), or has no kernel here.
            given = {
                "pretrained_model_name_or_path": None,
                "state_dict": {key: checkpoint.read(key) for key in checkpoint},
            }
            for entry in (ENTRY, OLD_ENTRY):
                config.__dict__.pop(entry, None)
        try:
            model: nn.Module = model_class(self.artifact).from_pretrained(
                **given,
                config=config,
                dtype=self.dtype,
                attn_implementation=_attention(self.artifact),
                local_files_only=True,
            )
        except Exception as error:
            raise WeightsError(f"transformers cannot load {self.weights}: {' '.join(str(error).split())}") from error
        _align(model)
        return model.eval()

    def twin(self) -> nn.Module:
        twin = self.artifact.empty_model(self.dtype)
        device = torch.device("cpu")
        place_buffers(twin, device)
        self._source(twin).load(twin, self.artifact.manifest.parameters, device)
        return twin

    def _source(self, twin: nn.Module) -> Weights:
        if not (self.weights / "config.json").is_file():
            raise WeightsError(f"{self.weights} is not a model directory: config.json is missing")
        source = Weights(self.artifact, open_checkpoint(self.weights), self.dtype, twin)
        if self.artifact.manifest.parameters and source.schemes:
            raise WeightsError(f"{self.weights} is quantized", hint="verify with the unquantized checkpoint")
        return source


_Pair = _RandomPair | _LoadedPair


def _align(model: nn.Module) -> None:
    """Copy weights to memory allocated by torch.

    transformers keeps them at their position in the file. The order of summation in vectorized loops depends on the
    alignment of the data, and so do the last bits of a sum.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()


def _attention(artifact: Artifact) -> str | None:
    return artifact.manifest.model.attn_implementation or None


@dataclass(frozen=True, kw_only=True, slots=True)
class _ModelRun:
    """The model's output for one shape, or the reason of its `refusal`; `row` describes the inputs."""

    row: dict[str, Any]
    sample: Mapping[str, torch.Tensor] = field(default_factory=dict)
    output: Mapping[str, Any] = field(default_factory=dict)
    prints: Prints = field(default_factory=dict)
    plain: PlainReference | None = None
    refusal: str = ""


def _compare(pair: _Pair, options: VerifyOptions) -> Iterator[Compared]:
    """Run the model on all shapes first, so that it can be freed before the chain's weights are loaded."""
    pair.check()
    doing("running the model")
    model = pair.model()
    references = [_reference(pair, model, shape) for shape in options.shapes]
    if all(reference.refusal for reference in references):
        raise ModelError(
            f"{type(model).__name__} fails on all sample inputs, so there is nothing to compare: "
            f"{references[0].refusal}",
            hint="the artifact can be run but not verified",
        )
    del model
    twin = pair.twin()
    for number, reference in enumerate(references, start=1):
        doing(f"running the chain on shape {number} of {len(references)}")
        yield _compared(pair.artifact, twin, reference, options.tolerance)


def _reference(pair: _Pair, model: nn.Module, shape: SampleShape) -> _ModelRun:
    manifest = pair.artifact.manifest
    names = [entry.name for entry in manifest.inputs]
    made = sample_of(model, names, shape, text_only=is_text_only(model, names))
    sample = {name: value.to(pair.dtype) if value.is_floating_point() else value for name, value in made.items()}
    row = _row(sample, shape)
    try:
        require_in_range(manifest, [sample])
        with fingerprints(model, _called(pair.artifact)) as prints:
            output = run_model(model, sample)
        plain = plain_reference(manifest, model, sample)
    except DataError as error:
        return _ModelRun(row=row, refusal=error.message)
    except MemoryError:
        raise
    except Exception as error:
        return _ModelRun(row=row, refusal=f"the model itself fails: {_line(error)}")
    return _ModelRun(row=row, sample=sample, output=output, prints=prints, plain=plain)


def _row(sample: Mapping[str, torch.Tensor], shape: SampleShape) -> dict[str, Any]:
    """Return the part of a row that describes the inputs."""
    ids = sample.get("input_ids")
    is_seeing = any(value.is_floating_point() for value in sample.values())
    return {
        "batch": shape.batch if ids is None else int(ids.shape[0]),
        "sequence": shape.sequence if ids is None or ids.dim() < 2 else int(ids.shape[1]),
        "padding": shape.padding,
        "images": shape.images if is_seeing else None,
        "seed": shape.seed,
    }


def _compared(artifact: Artifact, twin: nn.Module, reference: _ModelRun, tolerance: float) -> Compared:
    if reference.refusal:
        return Compared(**reference.row, skipped=reference.refusal)
    if not _has_finite_value(reference.output):
        return Compared(**reference.row, problem="the model's output has no finite number, so nothing can be compared")
    try:
        with fingerprints(twin, _called(artifact)) as prints:
            got = run_chain(artifact.subgraphs, twin, reference.sample)
        found = difference(got, reference.output)
        if not found.absolute and reference.plain is not None:
            found = plain_difference(artifact, twin, reference.plain)
    except MemoryError:
        raise
    except Exception as error:
        return Compared(**reference.row, problem=_line(error))
    return Compared(
        **reference.row,
        absolute=found.absolute,
        relative=found.relative,
        output=found.output,
        subgraph=_first_difference(artifact, reference.prints, prints) if found.absolute else None,
        is_equal=found.relative <= tolerance,
    )


def _called(artifact: Artifact) -> dict[str, None]:
    """Return the names of the modules that the chain calls."""
    return dict.fromkeys(name for subgraph in artifact.subgraphs for name in subgraph.entry.submodules)


def _first_difference(artifact: Artifact, wanted: Prints, got: Prints) -> int | None:
    """Return the first subgraph with a module that returned a different value; the last if all are equal."""
    for index, subgraph in enumerate(artifact.subgraphs):
        if any(got.get(name) != wanted.get(name) for name in subgraph.entry.submodules):
            return index
    return len(artifact.subgraphs) - 1


def _has_finite_value(output: Mapping[str, Any]) -> bool:
    numbers = [tensor for tensor in tensors(output) if tensor.is_floating_point()]
    return not numbers or any(bool(tensor.isfinite().any()) for tensor in numbers)


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
