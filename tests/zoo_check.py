"""Compile an architecture of the zoo as a user would, run what was saved, and compare with the model itself."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import runtime
from runtime.artifact import Artifact
from runtime.errors import SeqbuildError
from runtime.weights import assign
from seqbuild.build import build
from seqbuild.sample.inputs import SampleShape, default_sample
from tests.tiny_models import run_chain
from tests.zoo import Case, small_model, unusable

# The sample's own shape, other values, and other sizes, paddings, images and grids.
SHAPES = (
    SampleShape(),
    SampleShape(seed=1),
    SampleShape(batch=2, sequence=19, padding="left", images=2, scale=1, seed=5),
    SampleShape(batch=1, sequence=24, padding="right", scale=2, seed=6),
    SampleShape(batch=5, sequence=41, padding="left", seed=7),
)

_SEED = 3  # before each run: some models draw random numbers, and their chains draw the same


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """What became of one case; `equal` is empty when it never ran, `problem` when all is well."""

    case: Case
    nodes: int = 0
    subgraphs: int = 0
    equal: str = ""
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
        samples = [default_sample(model, shape) for shape in SHAPES]
        expected = [run_model(model, sample) for sample in samples]
    except Exception as error:
        return Row(case=case, problem=f"unusable: {_line(error)}")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        try:
            model.config.save_pretrained(directory)
            built = build(directory, out=Path(directory) / "artifacts", attn_implementation=attention)
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
            twin = with_weights(artifact, model)
            for index, (sample, wanted) in enumerate(zip(samples, expected, strict=True)):
                torch.manual_seed(_SEED)
                difference = largest_difference(run_chain(artifact.subgraphs, twin, copy.deepcopy(sample)), wanted)
                worst = max(worst, difference)
                if difference and not problem:
                    problem = f"shape {index} differs by {difference:.3g}"
        except Exception as error:
            return Row(**facts, equal="fails", problem=f"chain, shape {index}: {type(error).__name__}: {_line(error)}")
    return Row(**facts, equal="bit for bit" if worst == 0 else f"to {worst:.1e}", problem=problem)


def run_model(model: PreTrainedModel, sample: Mapping[str, Any]) -> dict[str, Any]:
    """The model's own output without a cache, field by field, from a known state of random numbers."""
    extra = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    wanted = {"use_cache": False, "_experts_implementation": "eager"}
    found = [(config, name) for config in _configs(model) for name in wanted if hasattr(config, name)]
    was = [(config, name, getattr(config, name)) for config, name in found]
    for config, name in found:
        setattr(config, name, wanted[name])
    try:
        torch.manual_seed(_SEED)
        with torch.no_grad():
            output = model(**copy.deepcopy(dict(sample)), **extra)
    finally:
        for config, name, value in was:
            setattr(config, name, value)
    return named(output)


def named(output: Any) -> dict[str, Any]:
    """A model's output by the names that the last subgraph gives its fields."""
    if isinstance(output, Mapping):
        return {name: value for name, value in output.items() if value is not None}
    if isinstance(output, (tuple, list)):
        return {f"output_{index}": value for index, value in enumerate(output) if value is not None}
    return {"output": output}


def with_weights(artifact: Artifact, model: PreTrainedModel) -> torch.nn.Module:
    """The host's module tree with the weights of `model`."""
    twin = artifact.empty_model(torch.float32)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in artifact.manifest.parameters:
            assign(twin, name, tensor.detach())
    return twin


def misplaced_targets(artifact: Artifact) -> str:
    """A target that lies in no subgraph or in several, as a sentence; empty when there is none."""
    places = Counter(name for subgraph in artifact.subgraphs for name in subgraph.entry.targets)
    wrong = [name for name in artifact.manifest.targets if places[name] != 1]
    return f"target {wrong[0]} lies in {places[wrong[0]]} subgraphs" if wrong else ""


def largest_difference(got: Mapping[str, Any], wanted: Mapping[str, Any]) -> float:
    """The largest difference of any number, relative to the largest magnitude of its tensor (at least 1); infinite
    where structure, shape or dtype differ.
    """
    if list(got) != list(wanted):
        return float("inf")
    ours, theirs = _tensors(got), _tensors(wanted)
    if len(ours) != len(theirs):
        return float("inf")
    return max((_difference(a, b) for a, b in zip(ours, theirs, strict=True)), default=0.0)


def _difference(got: torch.Tensor, wanted: torch.Tensor) -> float:
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return float("inf")
    if torch.equal(got, wanted) or (got.is_floating_point() and torch.allclose(got, wanted, 0, 0, equal_nan=True)):
        return 0.0
    difference = (got.double() - wanted.double()).abs().max().item()
    return float(difference / max(1.0, wanted.double().abs().max().item()))


def _tensors(output: Any) -> list[torch.Tensor]:
    """All tensors of a nested output, fields in the order of their names: a chain returns plain dictionaries."""
    if isinstance(output, torch.Tensor):
        return [output]
    parts: Iterable[Any] = ()
    if isinstance(output, Mapping):
        parts = [output[key] for key in sorted(output, key=str)]
    elif isinstance(output, (tuple, list)):
        parts = output
    elif dataclasses.is_dataclass(output):
        parts = [getattr(output, field.name) for field in dataclasses.fields(output)]
    return [tensor for part in parts for tensor in _tensors(part)]


def _configs(model: PreTrainedModel) -> Iterable[Any]:
    return {id(c): c for module in model.modules() if (c := getattr(module, "config", None)) is not None}.values()


def _line(error: BaseException) -> str:
    """What an error says, on one line, files without the folder in which libraries are installed."""
    return re.sub(r"\S*/site-packages/", "", " ".join(str(error).split()))[:300]
