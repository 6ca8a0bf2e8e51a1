"""Each value of a manifest changed, with right digests: `check` refuses it, or a plan and a run end as they should."""

from __future__ import annotations

import contextlib
import json
import math
import random
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch

import runtime
from runtime.artifact.manifest import MANIFEST_NAME, Manifest
from runtime.chain import check, read_manifest
from runtime.errors import ArtifactError, ModelError, SeqbuildError
from runtime.formats.compressed import stored_shapes
from runtime.planning.fit import Limits
from runtime.planning.request import plan_artifact
from runtime.recipe.recipe import Recipe
from seqbuild.build import build
from seqbuild.model.source import resolve_source
from tests.attacks.mutations import mutated, places
from tests.runtime.conftest import mixtral, narrow_llama, small
from tests.runtime.small import NARROW_W4, Small, calibrate, recipe, token_batches

__all__ = ["mixtral", "narrow_llama", "small"]

RTN = recipe(NARROW_W4)
GPTQ = recipe(NARROW_W4, modifier="GPTQModifier")
NO_LIMITS = Limits(device=None, host=None, disk=None)
ROOM_BYTES = 4 * 2**30  # more than any of these small models needs


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """A mutation that asks for all memory there is fails, and leaves the machine alone."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    own = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    wanted = own + ROOM_BYTES
    with contextlib.suppress(ValueError):  # where a lower limit holds already
        resource.setrlimit(resource.RLIMIT_AS, (wanted if soft == resource.RLIM_INFINITY else min(soft, wanted), hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture(scope="session")
def llama_by_layers(narrow_llama: Small, tmp_path_factory: pytest.TempPathFactory) -> Small:
    """An artifact that calls layers whole: its modules are built from config.json."""
    out = tmp_path_factory.mktemp("by layers")
    return replace(narrow_llama, artifact=build(narrow_llama.weights, out=out, leaves="target").path)


def survives(small: Small, root: Path, data: bytes, *, runs: bool) -> None:
    """Check, plan and maybe run a mutated artifact; only errors that are ours may come out."""
    (root / MANIFEST_NAME).write_bytes(data)
    try:
        check(root)
    except ArtifactError:
        return
    try:
        artifact = runtime.load(root)
        plan_artifact(artifact, num_samples=4, seq_len=40, batch_size=2, recipe=GPTQ, dtype=None, limits=NO_LIMITS)
        if runs:
            batches = token_batches([(2, 10)])
            calibrate(replace(small, artifact=root), RTN, root.parent / "out", batches=batches)
            shutil.rmtree(root.parent / "out")
    except (SeqbuildError, MemoryError, torch.OutOfMemoryError):
        return


def fuzz(small: Small, folder: Path, seed: int, count: int) -> None:
    rng = random.Random(seed)
    root = Path(shutil.copytree(small.artifact, folder / "artifact"))
    data = (root / MANIFEST_NAME).read_bytes()
    of_entry: dict[str, list[tuple[Any, ...]]] = {}
    for path in places(msgpack.unpackb(data)):
        if path and path[0] not in ("digest", "format", "format_version"):
            of_entry.setdefault(path[0], []).append(path)
    for number in range(count):
        path = rng.choice(of_entry[rng.choice(sorted(of_entry))])
        changed = mutated(data, path, rng)
        try:
            survives(small, root, changed, runs=number % 5 == 0)
        except Exception as error:
            error.add_note(f"seed {seed}, mutation {number} at {path}")
            raise


@pytest.mark.parametrize("name", ["narrow_llama", "mixtral", "llama_by_layers"])
def test_no_change_of_a_value_ends_unexpectedly(request: pytest.FixtureRequest, tmp_path: Path, name: str) -> None:
    fuzz(request.getfixturevalue(name), tmp_path, seed=1, count=15)


@pytest.mark.wide
@pytest.mark.parametrize("seed", range(2, 6))
@pytest.mark.parametrize("name", ["narrow_llama", "mixtral", "llama_by_layers"])
def test_none_of_many_does(request: pytest.FixtureRequest, tmp_path: Path, name: str, seed: int) -> None:
    fuzz(request.getfixturevalue(name), tmp_path, seed=seed, count=500)


def in_another_order(manifest: Manifest) -> dict[str, Any]:
    return {"subgraphs": (*manifest.subgraphs[1:], manifest.subgraphs[0])}


def consumed_too_early(manifest: Manifest) -> dict[str, Any]:
    first, second, *others = manifest.subgraphs
    lasting = next(name for name in second.input_names if name not in second.consumed_names)
    return {"subgraphs": (first, replace(second, consumed_names=(*second.consumed_names, lasting)), *others)}


def no_such_input(manifest: Manifest) -> dict[str, Any]:
    return {"inputs": manifest.inputs[:1]}


def no_dtype(manifest: Manifest) -> dict[str, Any]:
    return {"inputs": (replace(manifest.inputs[0], dtype=""), *manifest.inputs[1:])}


def returned_twice(manifest: Manifest) -> dict[str, Any]:
    return {"subgraphs": (*manifest.subgraphs[:2], manifest.subgraphs[1], *manifest.subgraphs[2:])}


def far_too_many(manifest: Manifest) -> dict[str, Any]:
    return {"subgraphs": (*manifest.subgraphs[:1], *manifest.subgraphs[1:2] * 8_192, *manifest.subgraphs[1:])}


def no_value(manifest: Manifest) -> dict[str, Any]:
    name = manifest.subgraphs[0].output_names[0]
    return {"values": {key: value for key, value in manifest.values.items() if key != name}}


def none_at_all(manifest: Manifest) -> dict[str, Any]:
    return {"subgraphs": ()}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (in_another_order, "which is neither an input of the model nor an available output"),
        (consumed_too_early, "which is neither an input of the model nor an available output"),
        (no_such_input, "subgraph 1 of 4 takes 'attention_mask'"),
        (no_dtype, "has the unsupported dtype ''"),
        (returned_twice, "neither an input"),
        (far_too_many, "1 to 8192 are supported"),
        (no_value, "whose dtype and shape the manifest does not state"),
        (none_at_all, "has 0 subgraphs|does not list as a program"),
    ],
)
def test_subgraphs_that_are_no_chain(
    narrow_llama: Small, tmp_path: Path, change: Callable[[Manifest], dict[str, Any]], reason: str
) -> None:
    root = Path(shutil.copytree(narrow_llama.artifact, tmp_path / "artifact"))
    manifest = read_manifest(root)
    (root / MANIFEST_NAME).write_bytes(replace(manifest, **change(manifest)).to_bytes())
    with pytest.raises(ArtifactError, match=reason):
        check(root)


@pytest.mark.parametrize("entry", ["num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size"])
def test_the_compiler_names_an_entry_that_no_model_has(narrow_llama: Small, tmp_path: Path, entry: str) -> None:
    table = json.loads((narrow_llama.weights / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(table | {entry: 10**12}))
    with pytest.raises(ModelError, match=rf"{entry} = 1000000000000, and no model has more than"):
        resolve_source(str(tmp_path))


def of_shape(small: Small, root: Path, name: str, shape: tuple[int, ...]) -> Path:
    shutil.copytree(small.artifact, root)
    manifest = read_manifest(root)
    entry = replace(manifest.parameters[name], shape=shape)
    (root / MANIFEST_NAME).write_bytes(replace(manifest, parameters={**manifest.parameters, name: entry}).to_bytes())
    return root


Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
SHAPES: list[tuple[int, ...]] = [(), (4,), (32, 32, 3), (32, 2**31), (0, 0), (16, 32)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_are_those_of_the_modules(llama_by_layers: Small, tmp_path: Path, shape: tuple[int, ...]) -> None:
    root = of_shape(llama_by_layers, tmp_path / "artifact", Q_PROJ, shape)
    with pytest.raises(ArtifactError, match="q_proj"):
        plan_artifact(runtime.load(root), num_samples=4, seq_len=40, batch_size=2, recipe=GPTQ, limits=NO_LIMITS)


def test_a_tensor_that_the_model_lacks_is_named(llama_by_layers: Small, tmp_path: Path) -> None:
    root = Path(shutil.copytree(llama_by_layers.artifact, tmp_path / "artifact"))
    manifest = read_manifest(root)
    more = {**manifest.parameters, "model.layers.9.mlp.up_proj.weight": manifest.parameters[Q_PROJ]}
    (root / MANIFEST_NAME).write_bytes(replace(manifest, parameters=more).to_bytes())
    with pytest.raises(ArtifactError, match=r"lists 'model.layers.9.mlp.up_proj.weight', but the model"):
        runtime.load(root).empty_model()


@pytest.mark.parametrize("name", ["model.layers.0.input_layernorm.weight", Q_PROJ, "model.norm.weight"])
@pytest.mark.parametrize("shape", [(), (2**45,)], ids=str)
def test_check_refuses_shapes_that_do_not_fit(
    narrow_llama: Small, tmp_path: Path, name: str, shape: tuple[int, ...]
) -> None:
    """A norm without axes ended the check of the scale groups that it is the producer of."""
    rank = "has a producer of shape" if "norm" in name else "has no weight with 2 axes"
    with pytest.raises(ArtifactError, match=re.escape(f"'{name}'") if shape else rank):
        check(of_shape(narrow_llama, tmp_path / "artifact", name, shape))


@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM", "W8A8", "FP8_BLOCK", "NVFP4"])
def test_long_rows_take_no_memory_to_be_planned(scheme: str) -> None:
    """The size is 16 GiB in float32, four times what the test may take."""
    (group,) = Recipe.from_text(f"QuantizationModifier: {{targets: Linear, scheme: {scheme}}}", "a recipe").groups
    shapes = [stored_shapes((64, width), group.scheme) for width in (2**16, 2**32)]
    names = [name for name in shapes[0] if not name.endswith("_shape")]
    assert [list(found) for found in shapes] == [list(shapes[0])] * 2
    for name in names:
        counts = [math.prod(found[name]) for found in shapes]
        assert counts[1] in (counts[0], 2**16 * counts[0])
