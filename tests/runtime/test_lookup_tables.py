"""Tables of embeddings stay on disk on the CPU, unless somebody needs them as a whole."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

import runtime
import runtime.checkpoint.reader
import seqbuild.build
from runtime.checkpoint.reader import Checkpoint
from runtime.weights.parameters import Weights
from runtime.weights.row_lookups import lookup_tables
from runtime.weights.stream import WeightStream
from tests.runtime.small import NARROW, NARROW_W4, Small, calibrate, read_tensors, recipe, save_model

EMBEDDING = "model.embed_tokens.weight"
LOOKUP = 'torch.ops.aten.embedding.default(self.get_parameter("table"), ids)'


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
    assert lookup_tables(narrow_llama.load()) == {EMBEDDING}


def test_an_embedding_that_is_scaled_is_one(tmp_path: Path) -> None:
    assert lookup_tables(tied(tmp_path).load()) == {EMBEDDING}


def test_of_models_own_modules_nothing_is_known(tmp_path: Path) -> None:
    assert not lookup_tables(tied(tmp_path, leaves="target").load())


@pytest.mark.parametrize(
    "body",
    [
        'a = self.get_parameter("table")\n    x = torch.ops.aten.embedding.default(a, ids)\n    y = a + 1',
        'a = self.get_parameter("table")\n    x = torch.ops.aten.embedding.default(b, a)',
        'a = ids\n    x = torch.ops.aten.embedding.default(a, ids)\n    a = self.get_parameter("table")',
        f'x = {LOOKUP}\n    y = torch.ops.aten.neg.default(self.get_parameter("table"))',
        'x = torch.ops.aten.linear.default(ids, self.get_parameter("table"))',
    ],
)
def test_what_is_used_otherwise_is_none(body: str) -> None:
    source = f"def forward(self, ids, *, run):\n    {body}\n"
    entry, manifest = (
        SimpleNamespace(scope="inner"),
        SimpleNamespace(leaves={"inner": 0}, leaf_kinds=[SimpleNamespace(kind="Embedding")]),
    )
    artifact: Any = SimpleNamespace(manifest=manifest, subgraphs=[SimpleNamespace(source=source, entry=entry)])
    assert lookup_tables(artifact) == {"inner.weight"}
    looked_up = f"def forward(self, ids, *, run):\n    x = {LOOKUP}\n"
    artifact.subgraphs = [SimpleNamespace(source=looked_up, entry=entry)]
    assert lookup_tables(artifact) == {"inner.weight", "inner.table"}


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
