from __future__ import annotations

import json
from pathlib import Path

import pytest

import seqbuild.build
import seqbuild.cli.app
from tests.runtime.place import Place, Run, assert_refused
from tests.runtime.small import nameless_bytes, read_tensors


def test_seqbuild_compile_inspect_and_data(place: Place, run: Run) -> None:
    command = ["compile", str(place.weights), "-o", str(place.folder / "artifacts"), "--json"]
    code, printed, complaint = run(command, seqbuild.cli.app.main)
    assert (code, complaint) == (0, "")
    facts = json.loads(printed)
    assert (facts["cached"], facts["targets"], facts["subgraphs"]) == (False, 3, 4)
    assert facts["parameters"] == sum(tensor.numel() for tensor in read_tensors(place.weights).values())
    assert json.loads(run(command, seqbuild.cli.app.main)[1])["cached"] is True
    code, printed, complaint = run(command[:-1], seqbuild.cli.app.main)
    assert (code, complaint) == (0, "")
    assert printed.splitlines()[0] == (
        f"LlamaForCausalLM: 3 layers by LlamaDecoderLayer, 4 subgraphs, {facts['parameters']:,} parameters"
    )
    assert "already exists, nothing was traced" in printed

    code, printed, complaint = run(["inspect", facts["path"], "--json"], seqbuild.cli.app.main)
    assert (code, complaint) == (0, "")
    assert json.loads(printed)["input_key"] == facts["input_key"]
    code, printed, complaint = run(["inspect", facts["path"], "--code", "1"], seqbuild.cli.app.main)
    assert printed == (Path(facts["path"]) / "subgraphs" / "001.py").read_text()
    code, printed, complaint = run(["inspect", facts["path"]], seqbuild.cli.app.main)
    assert (code, complaint) == (0, "")
    assert "model.layers.2" in printed
    assert_refused(
        run(["inspect", facts["path"], "--code", "4"], seqbuild.cli.app.main),
        "no subgraph 4",
        "0 to 3",
        program="seqbuild",
    )

    text = place.write("text.txt", "to be or not to be " * 30)
    tokens = place.folder / "made.safetensors"
    command = ["data", str(place.weights), str(text), "-o", str(tokens), "--seq-len", "32"]
    code, printed, complaint = run(command, seqbuild.cli.app.main)
    assert (code, complaint) == (0, "")
    assert printed == f"{tokens}: 17 samples, 544 tokens; 32 tokens each; 27 tokens at the end dropped\n"
    assert run(place.calibrate("--data", tokens))[0] == 0
    one = nameless_bytes(place.out)
    place.out = place.folder / "from-text"
    assert run(place.calibrate("--data", text, "--seq-len", "32"))[0] == 0
    assert nameless_bytes(place.out) == one, "tokens made in advance change nothing but the name of the data"


@pytest.mark.parametrize(
    ("source", "content", "part"),
    [
        ("nowhere/model", None, "the model 'nowhere/model' is not in the local cache"),
        ("./nowhere", None, "there is no model at ./nowhere"),
        ("nowhere.json", None, "there is no model at nowhere.json"),
        ("a b", None, "there is no model at a b"),
        ("x" * 300, None, "xxx"),
        ("{}/notes.txt", "text", "notes.txt is a file, but the model must be a directory, a config.json or a hub id"),
        ("{}/config.json", "", "config.json cannot be read"),
        ("{}/config.json", "[" * 100_000, "config.json cannot be read"),
        ("{}/config.json", "[1]", "is not a model config"),
        ("{}/config.json", "{}", "is not a config that transformers supports"),
        ("{}/config.json", '{"model_type": "unheard_of"}', "is not a config that transformers supports"),
        ("{}/config.json", '{"model_type": "llama", "hidden_size": "wide"}', "config.json"),
        ("{}/config.json", '{"model_type": "llama", "num_attention_heads": 0}', "config.json"),
    ],
)
def test_compile_refuses_sources(
    run: Run, tmp_path: Path, source: str, content: str | None, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = source.format(tmp_path)
    if content is not None:
        Path(source).write_text(content)
    before = sorted(tmp_path.rglob("*"))
    assert_refused(run(["compile", source, "-o", "artifacts"], seqbuild.cli.app.main), part, program="seqbuild")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("model.safetensors.index.json", "[", "is not an index of a checkpoint"),
        ("model.safetensors.index.json", '{"weight_map": [1]}', "is not an index of a checkpoint"),
        ("model.safetensors", "text", "is not a safetensors file"),
        ("model.safetensors", b"\x02\0\0\0\0\0\0\0[]", "is not a safetensors file"),
        ("model.safetensors", b"\xff" * 16, "is not a safetensors file"),
    ],
)
def test_compile_refuses_checkpoints(place: Place, run: Run, name: str, content: str | bytes, part: str) -> None:
    (place.weights / name).write_bytes(content.encode() if isinstance(content, str) else content)
    command = ["compile", str(place.weights), "-o", str(place.folder / "artifacts")]
    assert_refused(run(command, seqbuild.cli.app.main), name, part, program="seqbuild")
    assert not list((place.folder / "artifacts").glob("*/"))


@pytest.mark.parametrize("out", ["recipe.yaml", "recipe.yaml/below", "recipe.yaml/far/below"])
def test_compile_refuses_outputs(place: Place, run: Run, out: str) -> None:
    before = place.tree()
    command = ["compile", str(place.weights), "-o", str(place.folder / out)]
    assert_refused(run(command, seqbuild.cli.app.main), out, "not a directory", program="seqbuild")
    assert place.tree() == before
