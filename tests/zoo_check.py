"""Compile an architecture of the zoo as a user would, run what was saved, and compare with the model itself."""

from __future__ import annotations

import copy
import re
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import runtime
from runtime.artifact import Artifact
from runtime.errors import SeqbuildError
from seqbuild.build import Compiled, build
from seqbuild.sample.inputs import SampleShape, default_sample
from seqbuild.verify.difference import difference
from seqbuild.verify.running import EAGER_EXPERTS, SEED, SHAPES, configured, run_model, with_weights
from tests.tiny_models import run_chain
from tests.zoo import Case, small_model, unusable

# SDPA may choose another kernel for another mask, so it is looked at on fewer shapes and only up to this.
SDPA_SHAPES, SDPA_TOLERANCE = (SHAPES[0], SHAPES[2]), 1e-5


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """What became of one case; `equal` is empty when it never ran, `problem` when all is well. `sdpa` is the same with
    that attention: `equal`, the largest relative difference, or `-` for a model that does without.
    """

    case: Case
    nodes: int = 0
    subgraphs: int = 0
    equal: str = ""
    sdpa: str = ""
    rung: str = ""
    seconds: float = 0.0
    problem: str = ""


def check(case: Case, *, attention: str = "eager") -> Row:
    """Compile, load, run and compare one case."""
    reason = unusable(case)
    if reason:
        return Row(case=case, problem=f"unusable: {reason}")
    try:
        model = small_model(case, attention)
        samples, expected = reference(model, SHAPES)
    except Exception as error:
        return Row(case=case, problem=f"unusable: {_line(error)}")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        try:
            built = compiled(model, Path(directory), attention)
            seconds = time.perf_counter() - start
            artifact = runtime.load(built.path)
        except SeqbuildError as error:
            return Row(case=case, problem=f"not traced: {_line(error)}")
        facts: dict[str, Any] = {
            "case": case,
            "nodes": sum(subgraph.source.count(" = ") for subgraph in artifact.subgraphs),
            "subgraphs": len(artifact.subgraphs),
            "rung": ", ".join(artifact.manifest.opaque_steps),
            "seconds": seconds,
        }
        problem = misplaced_targets(artifact)
        worst = 0.0
        try:
            for index, found in enumerate(differences(artifact, model, samples, expected)):
                worst = max(worst, found)
                if found and not problem:
                    problem = f"shape {index} differs by {found:.3g}"
        except Exception as error:
            return Row(**facts, equal="fails", problem=f"chain: {type(error).__name__}: {_line(error)}")
    return Row(**facts, equal="bit for bit" if worst == 0 else f"to {worst:.1e}", problem=problem)


def check_sdpa(case: Case) -> tuple[str, str]:
    """A usable case with SDPA: how equal, and what is wrong with that, if anything."""
    try:
        model = small_model(case, "sdpa")
        samples, expected = reference(model, SDPA_SHAPES)
    except Exception:
        return "-", ""  # transformers refuses: this model has no such attention
    with tempfile.TemporaryDirectory() as directory:
        try:
            artifact = runtime.load(compiled(model, Path(directory), "sdpa").path)
            worst = max(differences(artifact, model, samples, expected))
        except Exception as error:
            return "fails", f"sdpa: {type(error).__name__}: {_line(error)}"
    problem = f"sdpa differs by {worst:.3g}" if worst > SDPA_TOLERANCE else ""
    return "equal" if worst == 0 else f"{worst:.1e}", problem


def reference(model: PreTrainedModel, shapes: Sequence[SampleShape]) -> tuple[list[dict[str, torch.Tensor]], list[Any]]:
    """Samples of these shapes, and what the model itself makes of them."""
    samples = [default_sample(model, shape) for shape in shapes]
    return samples, [run_model(model, sample) for sample in samples]


def compiled(model: PreTrainedModel, directory: Path, attention: str) -> Compiled:
    """The model, compiled from its config."""
    model.config.save_pretrained(directory)
    return build(directory, out=directory / "artifacts", attn_implementation=attention)


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


def misplaced_targets(artifact: Artifact) -> str:
    """A target that lies in no subgraph or in several, as a sentence; empty when there is none."""
    places = Counter(name for subgraph in artifact.subgraphs for name in subgraph.entry.targets)
    wrong = [name for name in artifact.manifest.targets if places[name] != 1]
    return f"target {wrong[0]} lies in {places[wrong[0]]} subgraphs" if wrong else ""


def _line(error: BaseException) -> str:
    """What an error says, on one line, files without the folder in which libraries are installed."""
    return re.sub(r"\S*/site-packages/", "", " ".join(str(error).split()))[:300]
