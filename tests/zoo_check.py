"""Compile an architecture of the zoo as a user would, run what was saved, and compare with the model itself."""

from __future__ import annotations

import copy
import dataclasses
import re
import tempfile
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import runtime
from runtime.chain import Artifact
from runtime.checkpoint.dequantize import open_checkpoint
from runtime.errors import SeqbuildError
from runtime.weights.parameters import Weights
from seqbuild.build import Compiled, build
from seqbuild.sample.inputs import default_sample
from seqbuild.sample.shape import SampleShape
from seqbuild.verify.difference import difference
from seqbuild.verify.running import EAGER_EXPERTS, SEED, SHAPES, configured, run_model, with_weights
from tests.tiny_models import run_chain
from tests.zoo import Case, small_model, unusable

# SDPA may choose another kernel for another mask, so it is looked at on fewer shapes and only up to this.
SDPA_SHAPES, SDPA_TOLERANCE = (SHAPES[0], SHAPES[2]), 1e-5
WAYS = ("target", "linear", "sdpa")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """What became of one case.

    Attributes:
        case: which.
        nodes: statements of the code that stops at the targets.
        subgraphs: how many there are.
        equal: how near that code comes to the model; empty when it never ran.
        deep: the same for the code that goes down to what a host builds by itself.
        foreign: classes of modules and functions that it calls whole all the same; none when it is portable.
        sdpa: the default code with that attention: `equal`, the largest relative difference, or `-` for a model that
            does without.
        opaque: functions that the code which stops at the targets calls whole.
        seconds: to compile that.
        problem: what is wrong, if anything.
    """

    case: Case
    nodes: int = 0
    subgraphs: int = 0
    equal: str = ""
    deep: str = ""
    foreign: str = ""
    sdpa: str = ""
    opaque: str = ""
    seconds: float = 0.0
    problem: str = ""

    @property
    def is_portable(self) -> bool:
        """Whether nothing of the model's code is left to call."""
        return self.deep == "bit for bit" and not self.foreign


def check(case: Case, ways: Collection[str] = WAYS) -> Row:
    """Compile, load, run and compare one case: down to its targets, down to Linear, with SDPA."""
    reason = unusable(case)
    if reason:
        return Row(case=case, problem=f"unusable: {reason}")
    try:
        model = small_model(case)
        samples, expected = reference(model, SHAPES)
    except Exception as error:
        return Row(case=case, problem=f"unusable: {_line(error)}")
    row = Row(case=case)
    for leaves in ("target", "linear"):
        if leaves not in ways:
            continue
        with tempfile.TemporaryDirectory() as directory:
            start = time.perf_counter()
            try:
                built = compiled(model, Path(directory), "eager", leaves)
                seconds = time.perf_counter() - start
                artifact = runtime.load(built.path)
            except SeqbuildError as error:
                return dataclasses.replace(row, problem=f"not traced down to {leaves}: {_line(error)}")
            equal, problem = _equality(artifact, model, samples, expected)
            if leaves == "target":
                row = dataclasses.replace(
                    row,
                    nodes=sum(subgraph.source.count(" = ") for subgraph in artifact.subgraphs),
                    subgraphs=len(artifact.subgraphs),
                    equal=equal,
                    opaque=_last_names(artifact.manifest.opaque_steps),
                    seconds=seconds,
                    problem=problem,
                )
            else:
                whole = (*artifact.manifest.foreign.values(), *artifact.manifest.opaque_steps)
                deep = problem and f"down to linear: {problem}"
                row = dataclasses.replace(row, deep=equal, foreign=_last_names(whole), problem=row.problem or deep)
    if "sdpa" not in ways:
        return row
    sdpa, problem = check_sdpa(case)
    return dataclasses.replace(row, sdpa=sdpa, problem=row.problem or problem)


def _equality(
    artifact: Artifact, model: PreTrainedModel, samples: Sequence[Mapping[str, Any]], expected: Sequence[Any]
) -> tuple[str, str]:
    """How equal, and what is wrong with that, if anything."""
    try:
        found = differences(artifact, model, samples, expected)
    except Exception as error:
        return "fails", f"chain: {type(error).__name__}: {_line(error)}"
    worst = max(found)
    apart = next((index for index, value in enumerate(found) if value), None)
    differs = f"shape {apart} differs by {found[apart]:.3g}" if apart is not None else ""
    problem = misplaced_targets(artifact) or differs
    return "bit for bit" if worst == 0 else f"to {worst:.1e}", problem


def _last_names(paths: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(path.rpartition(":")[2] for path in paths))


def check_sdpa(case: Case) -> tuple[str, str]:
    """A usable case with SDPA: how equal, and what is wrong with that, if anything."""
    try:
        model = small_model(case, "sdpa")
        samples, expected = reference(model, SDPA_SHAPES)
    except Exception:
        return "-", ""  # transformers refuses: this model has no such attention
    with tempfile.TemporaryDirectory() as directory:
        try:
            artifact = runtime.load(compiled(model, Path(directory), "sdpa", "auto").path)
            worst = max(differences(artifact, model, samples, expected))
        except Exception as error:
            return "fails", f"sdpa: {type(error).__name__}: {_line(error)}"
    problem = f"sdpa differs by {worst:.3g}" if worst > SDPA_TOLERANCE else ""
    return "equal" if worst == 0 else f"{worst:.1e}", problem


def reference(model: PreTrainedModel, shapes: Sequence[SampleShape]) -> tuple[list[dict[str, torch.Tensor]], list[Any]]:
    """Samples of these shapes, and what the model itself makes of them."""
    samples = [default_sample(model, shape) for shape in shapes]
    return samples, [run_model(model, sample) for sample in samples]


def compiled(model: PreTrainedModel, directory: Path, attention: str, leaves: str) -> Compiled:
    """The model, compiled from its config."""
    model.config.save_pretrained(directory)
    return build(directory, out=directory / "artifacts", attn_implementation=attention, leaves=leaves)


def differences(
    artifact: Artifact, model: PreTrainedModel, samples: Sequence[Mapping[str, Any]], expected: Sequence[Any]
) -> list[float]:
    """How far the chain is from the model on each sample."""
    twin = with_weights(artifact, model)
    found = []
    for sample, wanted in zip(samples, expected, strict=True):
        torch.manual_seed(SEED)
        with configured(twin, EAGER_EXPERTS):
            got = run_chain(artifact.subgraphs, twin, copy.deepcopy(dict(sample)))
        found.append(difference(got, wanted).relative)
    return found


def misread_parameters(case: Case, directory: Path) -> list[str]:
    """Names of parameters that are not what transformers loads, of a checkpoint that it has saved; with the attention
    that it takes by itself.
    """
    model = small_model(case, attention=None)
    model.save_pretrained(directory / "model")
    artifact = runtime.load(build(directory / "model", out=directory / "artifacts", leaves="target").path)
    source = Weights(artifact, open_checkpoint(directory / "model"), torch.float32, artifact.empty_model(torch.float32))
    loaded = type(model).from_pretrained(directory / "model", dtype=torch.float32).state_dict()
    parameters = artifact.manifest.parameters
    return [
        *(name for name in loaded if name not in parameters),
        *(name for name in parameters if not torch.equal(source.read(name, torch.device("cpu")), loaded[name])),
    ]


def misplaced_targets(artifact: Artifact) -> str:
    """A target that lies in no subgraph or in several, as a sentence; empty when there is none."""
    places = Counter(name for subgraph in artifact.subgraphs for name in subgraph.entry.targets)
    wrong = [name for name in artifact.manifest.targets if places[name] != 1]
    return f"target {wrong[0]} lies in {places[wrong[0]]} subgraphs" if wrong else ""


def _line(error: BaseException) -> str:
    """What an error says, on one line, files without the folder in which libraries are installed."""
    return re.sub(r"\S*/site-packages/", "", " ".join(str(error).split()))[:300]
