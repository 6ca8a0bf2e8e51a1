"""Check whether this host can run a calibration, and list what is missing or does not match.

The steps are those of a calibration, in the same order, but the model is not run.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from runtime.artifact.bundle import Job, artifact_of, damaged, find_job, is_bundle, read_bundle
from runtime.artifact.check import check_artifact, check_versions
from runtime.artifact.files import read_signature
from runtime.cli.batches import DEFAULT_BATCH_SIZE, DEFAULT_SAMPLES
from runtime.console import human_bytes
from runtime.data.options import DEFAULT_SEQ_LEN, DataOptions, data_sources
from runtime.errors import SeqbuildError, UsageError
from runtime.status import doing

if TYPE_CHECKING:
    import torch

    from runtime.artifact.manifest import Manifest
    from runtime.chain import Artifact
    from runtime.data.named_tensors import Sample
    from runtime.data.token_file import TokenData

_T = TypeVar("_T")
LIBRARIES = (
    *("torch", "transformers", "accelerate", "safetensors", "msgspec", "compressed-tensors"),
    *("pydantic", "pyyaml", "regex", "typer"),
)
OLDEST_PYTHON = (3, 10)


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """The result of one check: `kind` is `ok`, `note` or `problem`."""

    kind: str
    text: str


@dataclass(kw_only=True)
class Examination:
    """The options of `doctor`, and its findings so far.

    Attributes:
        path: an artifact or a bundle.
        weights: an option of `calibrate`, like all that are not described here; None takes the bundle's.
        public_key: the key that must have signed the artifact.
        findings: the results of the checks.
    """

    path: Path
    weights: str | None = None
    revision: str | None = None
    recipe: Path | None = None
    data: tuple[str, ...] = ()
    out: Path | None = None
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False
    public_key: Path | None = None
    findings: list[Finding] = field(default_factory=list)

    @property
    def is_ready(self) -> bool:
        """Whether no problem was found."""
        return not any(finding.kind == "problem" for finding in self.findings)

    def add(self, kind: str, text: str) -> None:
        """Add a finding."""
        self.findings.append(Finding(kind=kind, text=text))

    def run(self, step: Callable[[], tuple[str, _T]]) -> _T | None:
        """Run a step, add its text or the error that it raised, and return its result; None after an error."""
        try:
            text, result = step()
        except SeqbuildError as error:
            self.add("problem", str(error))
        except (OSError, ImportError) as error:
            self.add("problem", f"{type(error).__name__}: {error}")
        else:
            self.add("ok", text)
            return result
        return None


def examine(examination: Examination) -> Iterator[Finding]:
    """Run all checks, and yield their findings one after the other.

    Args:
        examination: the options; collects the findings.

    Raises:
        UsageError: for an unknown dtype.
    """
    num_yielded = 0
    for step in (_python, _libraries, _bundle, _artifact, _calibration):
        step(examination)
        yield from examination.findings[num_yielded:]
        num_yielded = len(examination.findings)
        if step is _libraries:
            if not examination.is_ready:
                return  # the other checks need these libraries
            from runtime.host.devices import resolve_dtype

            resolve_dtype(examination.dtype)


def _python(found: Examination) -> None:
    version = ".".join(map(str, sys.version_info[:3]))
    is_new = sys.version_info >= OLDEST_PYTHON
    found.add("ok" if is_new else "problem", f"Python {version}" + ("" if is_new else ": 3.10 or newer is required"))


def _libraries(found: Examination) -> None:
    pinned: Mapping[str, str] = {}
    if is_bundle(found.path):
        with contextlib.suppress(SeqbuildError):  # `_bundle` reports the error
            pinned = read_bundle(found.path).requirements
    for name in LIBRARIES:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pin = f"=={pinned[name]}" if name in pinned else ""
            found.add("problem", f"{name} is not installed (pip install {name}{pin})")
            continue
        wanted = pinned.get(name, "")
        if wanted and version.partition("+")[0] != wanted:
            found.add("note", f"{name} {version}; the bundle was packed with {wanted}")
        else:
            found.add("ok", f"{name} {version}")


def _bundle(found: Examination) -> None:
    def check() -> tuple[str, None]:
        bundle = read_bundle(found.path)
        bad = damaged(bundle, with_weights=True)
        if bad:
            raise UsageError(
                f"{len(bad)} files of the bundle are damaged or missing: {', '.join(bad[:5])}",
                hint="copy the bundle again",
            )
        return f"bundle: all {len(bundle.files)} files match their digests", None

    if is_bundle(found.path):
        found.run(check)


def _artifact(found: Examination) -> None:
    path = artifact_of(found.path)

    def check() -> tuple[str, Manifest]:
        result = check_artifact(path, [found.public_key] if found.public_key is not None else [])
        signed = "valid signature" if result.signed else "no signature required"
        return f"artifact: valid, model {result.manifest.model.class_name}, {signed}", result.manifest

    manifest = found.run(check)
    if manifest is None:
        return
    if found.public_key is None:
        is_signed = read_signature(path) is not None
        found.add("note", f"artifact: {'signed; verify it with --public-key' if is_signed else 'not signed'}")
    if manifest.is_portable:
        found.add("ok", "artifact: portable, needs no model code from transformers")
        return
    found.run(lambda: _same_sources(manifest))
    if manifest.model.code and not found.trust_remote_code:
        found.add(
            "problem",
            f"the model has its own code ({', '.join(manifest.model.code)}); read it, and allow it with "
            "--trust-remote-code",
        )


def _same_sources(manifest: Manifest) -> tuple[str, None]:
    check_versions(manifest, allow_version_skew=False)
    return "libraries: the sources that the artifact relies on are the same on this host", None


def _calibration(found: Examination) -> None:
    """Check paths, device, weights, data, memory and disk, as a calibration does before its first batch."""
    if not found.is_ready:
        found.add("note", "weights, data, memory and disk were not checked because of the problems above")
        return
    doing("loading libraries")
    from runtime.chain import load
    from runtime.host.devices import resolve_dtype

    job = found.run(lambda: _paths(found))
    device = found.run(lambda: _device(found.device)) if job is not None else None
    if job is None or device is None:
        return
    artifact = load(job.artifact, allow_version_skew=True, trust_remote_code=found.trust_remote_code)
    dtype = artifact.run_dtype(resolve_dtype(found.dtype))
    doing("checking the weights and the memory")
    num_bytes = found.run(lambda: _checkpoint(artifact, job, dtype))
    if num_bytes is None:
        return
    tokens = found.run(partial(_data, artifact, job.data)) if job.data else None
    _memory(found, artifact, job, device, dtype, tokens)
    found.run(lambda: _disk(job, num_bytes))


def _paths(found: Examination) -> tuple[str, Job]:
    job = find_job(
        found.path,
        weights=found.weights,
        revision=found.revision,
        recipe=found.recipe,
        data=found.data,
        out=found.out,
    )
    return f"paths: reads {job.weights}, writes {job.out}", job


def _device(name: str) -> tuple[str, torch.device]:
    import torch

    from runtime.host.devices import resolve_device

    device = resolve_device(name)
    if device.type != "cuda":
        return f"device: {device}", device
    properties = torch.cuda.get_device_properties(device)
    return f"device: {device}, {properties.name}, {human_bytes(properties.total_memory)}", device


def _checkpoint(artifact: Artifact, job: Job, dtype: torch.dtype) -> tuple[str, int]:
    """Compare weights and recipe with the artifact; return the least bytes of the result."""
    from runtime.checkpoint.dequantize import open_checkpoint
    from runtime.quantize.readiness import require_fitting
    from runtime.recipe.named import recipe_of

    recipe = recipe_of(job.recipe)
    ready = require_fitting(artifact, open_checkpoint(job.weights, plain=True), recipe, dtype)
    if not job.data and ready.needs_data:
        raise UsageError(f"{recipe.source} needs calibration data", hint="pass --data")
    size = human_bytes(ready.weights_bytes)
    return f"weights: {size}, match the artifact; {ready.num_modules} modules will be quantized", ready.least_bytes


def _data(artifact: Artifact, data: tuple[str, ...]) -> tuple[str, TokenData | list[Sample] | None]:
    from runtime.data.inputs import require_decoder, require_length
    from runtime.data.named_batches import named_batches
    from runtime.data.named_tensors import NamedSamples
    from runtime.data.reading import parts_of
    from runtime.data.samples import is_token_file, load_data
    from runtime.data.sources import STANDARD_INPUT
    from runtime.model.config import text_limits

    sources = data_sources(DataOptions(sources=data))
    if not is_token_file(sources):
        for source in (source for source in sources if source.location != STANDARD_INPUT):
            with contextlib.suppress(UsageError):  # an option of `calibrate` may state the split
                parts_of(source)
        return f"data: {', '.join(data)} is text, which the run will tokenize", None
    vocab_size, longest = text_limits(artifact)
    tokens, _ = load_data(DataOptions(sources=data), None, vocab_size=vocab_size)
    if isinstance(tokens, NamedSamples):
        text = f"data: {len(tokens.samples)} samples with images, sounds or videos"
        return text, named_batches(artifact.manifest, tokens, DEFAULT_BATCH_SIZE)
    require_length((*tokens.samples, *(tokens.targets or ())), longest)
    require_decoder(artifact.manifest, tokens.targets)
    return f"data: {len(tokens.samples)} samples", tokens


def _memory(
    found: Examination,
    artifact: Artifact,
    job: Job,
    device: torch.device,
    dtype: torch.dtype,
    data: TokenData | list[Sample] | None,
) -> None:
    """Predict the memory of the run from the sizes of its data, or from the default sizes for text."""
    from runtime.planning.request import memory_here, num_rows, plan_artifact
    from runtime.recipe.named import recipe_of

    sizes, batches = (DEFAULT_SAMPLES, DEFAULT_SEQ_LEN), list[Any]()
    if isinstance(data, list):
        sizes, batches = (sum(map(num_rows, data)), 1), data
    elif data is not None:
        sizes = (len(data.samples), max(map(len, data.samples)))
    try:
        plan, shortages, advice = plan_artifact(
            artifact,
            num_samples=sizes[0],
            seq_len=sizes[1],
            batch_size=DEFAULT_BATCH_SIZE,
            batches=batches,
            recipe=recipe_of(job.recipe),
            dtype=dtype,
            device_type=device.type,
            limits=memory_here(device),
        )
    except UsageError as error:
        found.add("note", f"memory was not checked: {error}")
        return
    needed = f"{human_bytes(plan.host_bytes)} of host memory"
    if device.type == "cuda":
        needed += f" and {human_bytes(plan.device_bytes)} on {device}"
    text = f"memory: {sizes[0]} samples{'' if batches else f' of {sizes[1]} tokens'} need {needed}"
    if not shortages:
        found.add("ok", text)
        return
    found.add("problem", f"{text}, which does not fit: {'; '.join((*shortages, *(f'advice: {a}' for a in advice)))}")


def _disk(job: Job, least_bytes: int) -> tuple[str, None]:
    from runtime.checkpoint.writer import require_space
    from runtime.host.publish import require_free, require_outside

    require_free(job.out)
    require_outside(job.out, job.artifact, job.weights)
    require_space(job.out, least_bytes)
    folder = next(folder for folder in (job.out, *job.out.absolute().parents) if folder.is_dir())
    free = human_bytes(shutil.disk_usage(folder).free)
    return f"disk: the result needs at least {human_bytes(least_bytes)}, {free} are free in {folder}", None
