"""Tell a host in plain words what is missing or does not match, before anyone waits for it.

Everything is looked at that a calibration would come to, in its order, and nothing of the model is run.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.artifact.bundle import Job, artifact_of, damaged, find_job, is_bundle, read_bundle
from runtime.artifact.check import check_artifact, check_versions
from runtime.artifact.files import read_signature
from runtime.console import human_bytes
from runtime.errors import SeqbuildError, UsageError

if TYPE_CHECKING:
    import torch

    from runtime.artifact.manifest import Manifest
    from runtime.chain import Artifact
    from runtime.data.token_file import TokenData

LIBRARIES = ("torch", "transformers", "accelerate", "safetensors", "msgspec", "compressed-tensors", "typer", "pyyaml")
OLDEST_PYTHON = (3, 10)
# As `calibrate` has them by default: samples and tokens of each, and samples that run at a time.
_USUAL_SIZES, _USUAL_BATCH = (128, 2048), 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that was looked at: `kind` is `ok`, `note` or `problem`."""

    kind: str
    text: str


@dataclass(kw_only=True)
class Examination:
    """What is examined, and what has been found.

    Attributes:
        path: an artifact or a bundle.
        weights: likewise the following: what the user says; None takes what the bundle says.
        device: as for calibrate.
        dtype: likewise.
        trust_remote_code: whether the user would allow it.
        public_key: that must have signed it.
    """

    path: Path
    weights: Path | None = None
    recipe: Path | None = None
    data: Path | None = None
    out: Path | None = None
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False
    public_key: Path | None = None
    findings: list[Finding] = field(default_factory=list)

    @property
    def is_well(self) -> bool:
        """Whether a calibration may begin."""
        return not any(finding.kind == "problem" for finding in self.findings)

    def say(self, kind: str, text: str) -> None:
        """Add a finding."""
        self.findings.append(Finding(kind=kind, text=text))

    def tried(self, what: Callable[[], str]) -> bool:
        """Add what a step says: its result, or the error with which it ends."""
        try:
            self.say("ok", what())
        except SeqbuildError as error:
            self.say("problem", str(error))
        except (OSError, ImportError) as error:
            self.say("problem", f"{type(error).__name__}: {error}")
        else:
            return True
        return False


def examine(examination: Examination) -> Iterator[Finding]:
    """Look at everything, a finding at a time.

    Args:
        examination: what to look at; collects the findings.
    """
    shown = 0
    for step in (_python, _libraries, _bundle, _artifact, _run):
        step(examination)
        yield from examination.findings[shown:]
        if step is _libraries and not examination.is_well:
            return  # without them nothing else can be said
        shown = len(examination.findings)


def _python(found: Examination) -> None:
    version = ".".join(map(str, sys.version_info[:3]))
    is_new = sys.version_info >= OLDEST_PYTHON
    found.say("ok" if is_new else "problem", f"Python {version}" + ("" if is_new else ": 3.10 or newer is needed"))


def _libraries(found: Examination) -> None:
    pinned: Mapping[str, str] = {}
    if is_bundle(found.path):
        with contextlib.suppress(SeqbuildError):  # `_bundle` says so
            pinned = read_bundle(found.path).requirements
    for name in LIBRARIES:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found.say("problem", f"{name} is not installed (pip install {name}=={pinned.get(name, '...')})")
            continue
        wanted = pinned.get(name, "")
        if wanted and version.partition("+")[0] != wanted:
            found.say("note", f"{name} {version}; the bundle was packed with {wanted}")
        else:
            found.say("ok", f"{name} {version}")


def _bundle(found: Examination) -> None:
    if not is_bundle(found.path):
        return

    def whole() -> str:
        bundle = read_bundle(found.path)
        bad = damaged(bundle, with_weights=True)
        if bad:
            raise UsageError(f"{len(bad)} files of the bundle are damaged or missing: {', '.join(bad[:5])}")
        return f"the bundle's {len(bundle.files)} files are as they were packed"

    found.tried(whole)


def _artifact(found: Examination) -> None:
    path = artifact_of(found.path)
    checked: dict[str, Manifest] = {}

    def check() -> str:
        result = check_artifact(path, [found.public_key] if found.public_key is not None else [])
        checked["manifest"] = result.manifest
        signed = "signed by the owner of the key" if result.signed else "not asked for a signature"
        return f"the artifact of {result.manifest.model.class_name} is whole and within the grammar, {signed}"

    if not found.tried(check):
        return
    manifest = checked["manifest"]
    if found.public_key is None:
        is_there = read_signature(path) is not None
        found.say("note", "it carries a signature; --public-key compares it" if is_there else "it is not signed")
    if manifest.is_portable:
        found.say("ok", "it is portable: this host's transformers runs nothing of the model")
    else:
        found.tried(lambda: _fits_transformers(manifest))
    if manifest.model.code and not manifest.is_portable and not found.trust_remote_code:
        found.say(
            "problem",
            f"it brings its own code ({', '.join(manifest.model.code)}): read it, and allow it with "
            "--trust-remote-code",
        )


def _fits_transformers(manifest: Manifest) -> str:
    check_versions(manifest, allow_version_skew=False)
    return "the library sources that it relies on are the same here"


def _run(found: Examination) -> None:
    """What a calibration does before its first batch."""
    if not found.is_well:
        found.say("note", "weights, data and memory were not looked at, for a run would not come to them")
        return
    jobs: dict[str, Job] = {}

    def job() -> str:
        jobs["job"] = find_job(found.path, weights=found.weights, recipe=found.recipe, data=found.data, out=found.out)
        return f"reads {jobs['job'].weights}, writes {jobs['job'].out}"

    if found.tried(job):
        _look(found, jobs["job"])


def _look(found: Examination, job: Job) -> None:
    import torch

    from runtime.chain import load
    from runtime.host.devices import resolve_device

    device: dict[str, torch.device] = {}

    def find_device() -> str:
        device["device"] = resolve_device(found.device)
        return _describe(device["device"])

    if not found.tried(find_device):
        return
    artifact = load(job.artifact, allow_version_skew=True, trust_remote_code=found.trust_remote_code)
    dtype = getattr(torch, artifact.manifest.model.dtype if found.dtype == "auto" else found.dtype)
    state: dict[str, Any] = {}
    if not found.tried(lambda: _checkpoint(artifact, job, dtype, state)):
        return
    if job.data is not None:
        found.tried(lambda: _data(artifact, job, state))
    _memory(found, artifact, job, device["device"], dtype, state.get("tokens"))
    found.tried(lambda: _disk(job, state["least_bytes"]))


def _describe(device: torch.device) -> str:
    import torch

    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"device {device}: {properties.name}, {human_bytes(properties.total_memory)}"
    accelerator = "no GPU was found, so it runs on the CPU" if device.type == "cpu" else f"device {device}"
    return accelerator


def _checkpoint(artifact: Artifact, job: Job, dtype: torch.dtype, state: dict[str, Any]) -> str:
    from runtime.checkpoint.dequantize import open_checkpoint
    from runtime.quantize.assignments import least_bytes
    from runtime.quantize.needs import RecipeNeeds
    from runtime.quantize.preparation import prepare
    from runtime.recipe.recipe import Recipe

    recipe = Recipe.from_file(job.recipe)
    checkpoint = open_checkpoint(job.weights)
    prepared = prepare(artifact, checkpoint, recipe, dtype)
    source, jobs = prepared.weights, prepared.jobs
    state["least_bytes"] = least_bytes(source, jobs)
    needs = RecipeNeeds(prepared.artifact, source, recipe, jobs)
    if job.data is None and (needs.measures(list(jobs)) or needs.key_values is not None):
        raise UsageError(f"{recipe.source} needs calibration data", hint="pass --data")
    return f"weights of {human_bytes(source.checkpoint.total_bytes)} fit the artifact; {len(jobs)} modules to quantize"


def _data(artifact: Artifact, job: Job, state: dict[str, Any]) -> str:
    from runtime.data.inputs import require_decoder, require_length
    from runtime.data.samples import load_tokens
    from runtime.model.config import text_limits

    assert job.data is not None
    if job.data.suffix != ".safetensors":
        return f"{job.data} is text, which is tokenized when the run begins"
    vocab_size, longest = text_limits(artifact)
    tokens = load_tokens(job.data, vocab_size=vocab_size)
    require_length((*tokens.samples, *(tokens.targets or ())), longest)
    require_decoder(artifact.manifest, tokens.targets)
    state["tokens"] = tokens
    return f"{len(tokens.samples)} samples of data"


def _memory(
    found: Examination, artifact: Artifact, job: Job, device: torch.device, dtype: torch.dtype, tokens: TokenData | None
) -> None:
    """What the plan says that the run takes, by the sizes of its data, or the usual ones where that is still text."""
    from runtime.planning.request import memory_here, plan_artifact
    from runtime.recipe.recipe import Recipe

    num_samples, seq_len = (len(tokens.samples), max(map(len, tokens.samples))) if tokens is not None else _USUAL_SIZES
    limits = memory_here(device)
    try:
        plan, missing, mended = plan_artifact(
            artifact,
            num_samples=num_samples,
            seq_len=seq_len,
            batch_size=_USUAL_BATCH,
            recipe=Recipe.from_file(job.recipe),
            dtype=dtype,
            device_type=device.type,
            limits=limits,
        )
    except UsageError as error:
        found.say("note", f"memory was not looked at: {error}")
        return
    where = f"{human_bytes(plan.host_bytes)} of memory"
    if device.type == "cuda":
        where += f" and {human_bytes(plan.device_bytes)} on {device}"
    text = f"the plan for {num_samples} samples of {seq_len} tokens takes {where}"
    if not missing:
        found.say("ok", text)
        return
    advice = f"; what would help: {'; '.join(mended)}" if mended else ""
    found.say("problem", f"{text}, and it does not fit: {'; '.join(missing)}{advice}")


def _disk(job: Job, least_bytes: int) -> str:
    from runtime.checkpoint.writer import require_space
    from runtime.host.publish import require_free, require_outside

    require_free(job.out)
    require_outside(job.out, job.artifact, job.weights)
    require_space(job.out, least_bytes)
    place = next(folder for folder in (job.out, *job.out.absolute().parents) if folder.is_dir())
    free = human_bytes(shutil.disk_usage(place).free)
    return f"disk: the result takes {human_bytes(least_bytes)} at least, {free} are free at {place}"
