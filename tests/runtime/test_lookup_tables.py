"""Tables of embeddings stay on disk on the CPU, unless somebody needs them as a whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import fx

import runtime
import runtime.checkpoint.reader
import seqbuild.build
from runtime.artifact.manifest import LeafKind, ParameterEntry
from runtime.checkpoint.reader import Checkpoint
from runtime.checkpoint.stored_table import StoredTable
from runtime.weights.parameters import Weights
from runtime.weights.stream import WeightStream
from seqbuild.chain.marks import variable
from seqbuild.chain.subgraph import Subgraph
from seqbuild.manifest.lookups import lookups
from seqbuild.manifest.portable import Parts
from tests.runtime.small import NARROW, NARROW_W4, Small, calibrate, read_tensors, recipe, save_model, token_batches
from tests.tiny_models import run_chain

EMBEDDING = "model.embed_tokens.weight"


def small_of(model: Any, tmp_path: Path, **options: Any) -> Small:
    weights = save_model(model.eval(), tmp_path / "model")
    return Small(weights=weights, artifact=seqbuild.build.build(weights, out=tmp_path / "artifacts", **options).path)


def tied(tmp_path: Path, **options: Any) -> Small:
    """Gemma multiplies what it looks up, so that its table is a parameter of the code, and no leaf."""
    config = transformers.Gemma2Config(**NARROW, head_dim=16, tie_word_embeddings=True)
    return small_of(transformers.Gemma2ForCausalLM(config), tmp_path, **options)


def streamed(small: Small, dtype: torch.dtype, steps: int) -> WeightStream:
    """The weights of the first steps of a run."""
    artifact = small.load()
    source = Weights(artifact, Checkpoint(small.weights), dtype, artifact.empty_model(dtype))
    loads = {index: subgraph.entry.parameters for index, subgraph in enumerate(artifact.subgraphs[:steps])}
    return WeightStream(source, loads, torch.device("cpu"))


def test_an_embedding_is_a_table(narrow_llama: Small) -> None:
    assert narrow_llama.load().manifest.lookups == (EMBEDDING,)


def test_an_embedding_that_is_scaled_is_one(tmp_path: Path) -> None:
    assert tied(tmp_path).load().manifest.lookups == (EMBEDDING,)


def test_of_models_own_modules_nothing_is_known(tmp_path: Path) -> None:
    assert tied(tmp_path, leaves="target").load().manifest.lookups == ()


def used(*statements: Callable[[fx.Graph, fx.Node, fx.Node], object]) -> tuple[str, ...]:
    """The lookup tables of a graph with a matrix [9, 4] and these uses of it, beside an embedding."""
    graph = fx.Graph()
    ids, table = graph.placeholder("ids"), graph.create_node("get_attr", "table")
    for statement in statements:
        statement(graph, table, ids)
    parts = Parts(kinds=[LeafKind(kind="Embedding")], leaves={"inner": 0})
    matrix = ParameterEntry(shape=(9, 4), dtype="model", bytes=144, sources=("x",), conversion=-1, tied_to="")
    parameters = {"inner.weight": matrix, "table": matrix}
    return lookups(parts, [Subgraph(graph=graph, input_names=["ids"])], parameters)


def looked_up(graph: fx.Graph, table: fx.Node, ids: fx.Node) -> object:
    return graph.call_function(torch.ops.aten.embedding.default, (table, ids))


def test_a_parameter_that_is_only_looked_up_is_one() -> None:
    assert used(looked_up, looked_up) == ("inner.weight", "table")


@pytest.mark.parametrize(
    "use",
    [
        lambda graph, table, ids: graph.call_function(torch.ops.aten.add.Tensor, (table, 1)),
        lambda graph, table, ids: graph.call_function(torch.ops.aten.embedding.default, (ids, table)),
        lambda graph, table, ids: graph.call_function(torch.ops.aten.embedding.default, (table, table)),
        lambda graph, table, ids: graph.call_function(variable, (table,)),
        lambda graph, table, ids: graph.output({"table": table}),
    ],
)
def test_one_with_another_use_is_not(use: Callable[[fx.Graph, fx.Node, fx.Node], object]) -> None:
    assert used(looked_up, use) == ("inner.weight",)


def test_a_table_that_is_used_otherwise_all_the_same_is_read_whole(tmp_path: Path) -> None:
    """A manifest that lies costs time: the result is the same."""
    small = tied(tmp_path)
    artifact = small.load()
    projection = "model.layers.0.self_attn.q_proj.weight"
    outputs = []
    for names in ((), (EMBEDDING, projection)):
        artifact.manifest = replace(artifact.manifest, lookups=names)
        model = artifact.empty_model(torch.float32)
        source = Weights(artifact, Checkpoint(small.weights), torch.float32, model)
        with WeightStream(source, {0: list(source.origins)}, torch.device("cpu")) as stream:
            stream.load(model, 0)
        outputs.append(run_chain(artifact.subgraphs, model, token_batches(((2, 9),))[0])["logits"])
        assert isinstance(model.get_parameter(projection), StoredTable) is (projection in names)
    assert torch.equal(*outputs)


def test_it_is_not_read(narrow_llama: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    real = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, key: read.append(key) or real(self, key))
    model = narrow_llama.load().empty_model()
    with streamed(narrow_llama, torch.float32, 1) as stream:
        stream.load(model, 0)
        stream.reload(model, 0)
    assert EMBEDDING not in read
    assert torch.equal(model.get_parameter(EMBEDDING), read_tensors(narrow_llama.weights)[EMBEDDING])


def test_in_another_dtype_it_is(narrow_llama: Small) -> None:
    model = narrow_llama.load().empty_model(torch.bfloat16)
    with streamed(narrow_llama, torch.bfloat16, 1) as stream:
        stream.load(model, 0)
        assert stream.source.checkpoint.bytes_read >= read_tensors(narrow_llama.weights)[EMBEDDING].nbytes
    assert model.get_parameter(EMBEDDING).dtype == torch.bfloat16


def test_one_that_is_tied_is_read_where_both_are_used(tmp_path: Path) -> None:
    small = tied(tmp_path)
    all_steps = len(small.load().subgraphs)
    with streamed(small, torch.float32, all_steps - 1) as stream:
        assert list(stream._tables) == [EMBEDDING]
    with streamed(small, torch.float32, all_steps) as stream:
        assert not stream._tables


def test_what_is_passed_through_has_all_its_bytes(
    narrow_llama: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime.checkpoint.reader, "_PIECE_BYTES", 1000)
    calibrate(narrow_llama, recipe(NARROW_W4, modifier="GPTQModifier"), tmp_path / "out")
    before, found = read_tensors(narrow_llama.weights), read_tensors(tmp_path / "out")
    for key in (EMBEDDING, "lm_head.weight", "model.norm.weight"):
        assert torch.equal(found[key], before[key])


def test_one_at_an_odd_place_is_read(tmp_path: Path) -> None:
    """Torch looks at numbers where the processor likes them to be; other writers of the format do not care."""
    entry = {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}
    header = json.dumps({"odd": entry, "none": {"dtype": "F32", "shape": [0], "data_offsets": [12, 12]}}).encode()
    header += b" " * (1 - len(header) % 2)
    data = torch.tensor([1.0, 2.0, 3.0]).numpy().tobytes()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.table("odd") is None and checkpoint.table("none") is None
    assert checkpoint.read("odd").tolist() == [1.0, 2.0, 3.0]
    assert b"".join(map(bytes, checkpoint.pieces("odd"))) == data
    assert list(checkpoint.pieces("none")) == []
