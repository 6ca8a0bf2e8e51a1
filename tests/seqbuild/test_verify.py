"""`seqbuild verify`: equal where it must be, unequal where somebody has meddled, and one clear error for bad input."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import runtime
import seqbuild.cli.app
import seqbuild.verify.artifact
import seqbuild.verify.recompile
from runtime.artifact.encoding import sha256
from runtime.artifact.manifest import MANIFEST_NAME
from runtime.chain import read_manifest
from runtime.errors import ArtifactError, DataError, ModelError, TraceError, UsageError, WeightsError
from seqbuild import verify_artifact
from seqbuild.build import compile_model
from seqbuild.sample.shape import SampleShape
from seqbuild.verify.difference import difference
from seqbuild.verify.running import SHAPES, run_model
from tests.own_code_model import write_own_code_model
from tests.sweep import sweep
from tests.tiny_models import save_config, tiny_model

FEW = (SHAPES[0], SHAPES[2])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model directory with weights, and its artifact."""
    folder = tmp_path_factory.mktemp("llama")
    tiny_model("llama").save_pretrained(folder / "model")
    return folder / "model", compile_model(folder / "model", out=folder / "artifacts")


def run(capfd: pytest.CaptureFixture[str], *arguments: Path | str) -> tuple[int, str, str]:
    code = seqbuild.cli.app.main(["verify", *map(str, arguments)])
    return code, *capfd.readouterr()


def tampered(artifact: Path, folder: Path, file: str, before: str, after: str) -> Path:
    """A copy of the artifact in which a program is another one, all digests set right."""
    copy = folder / artifact.name
    shutil.copytree(artifact, copy)
    source = (copy / file).read_text()
    assert source.count(before) == 1
    (copy / file).write_text(source.replace(before, after))
    data = (copy / file).read_bytes()
    manifest = read_manifest(copy)
    files = tuple(
        dataclasses.replace(entry, bytes=len(data), sha256=sha256(data)) if entry.path == file else entry
        for entry in manifest.files
    )
    (copy / MANIFEST_NAME).write_bytes(dataclasses.replace(manifest, files=files).to_bytes())
    return copy


def test_the_chain_of_a_checkpoint_is_its_model(llama: tuple[Path, Path], capfd: pytest.CaptureFixture[str]) -> None:
    weights, artifact = llama
    code, printed, complaint = run(capfd, artifact, "--weights", weights)
    assert (code, complaint) == (0, "")
    assert f"LlamaForCausalLM, {weights}, float32 on the CPU" in printed
    rows = [
        line.split() for line in printed.splitlines() if line.endswith("equal   ") or line.split()[-1:] == ["equal"]
    ]
    assert [row[:3] for row in rows] == [
        ["3", "37", "-"],
        ["3", "37", "-"],
        ["2", "19", "left"],
        ["1", "24", "right"],
        ["5", "41", "left"],
    ]
    assert "equal bit for bit on 5 shapes" in printed


def test_the_architecture_is_verified_without_weights(
    llama: tuple[Path, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    code, printed, complaint = run(capfd, llama[1], "--json")
    assert (code, complaint) == (0, "")
    facts = json.loads(printed)
    assert (facts["equal"], facts["verified"], facts["weights"], facts["changed"]) == (True, "architecture", None, [])
    assert [shape["absolute"] for shape in facts["shapes"]] == [0.0] * 5
    assert "the artifact's own code was not run" in facts["remarks"][0]
    assert "byte for byte" in facts["remarks"][0]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (
            "mixtral",
            {
                "targets": ["model.layers.1", "MixtralAttention"],
                "attn_implementation": "eager",
                "auto_ignore": False,
            },
        ),
        ("t5", {"targets": "T5Block", "targets_per_subgraph": 2}),
    ],
)
def test_the_small_model_is_compiled_as_the_artifact_was(
    compiled: Callable[..., Path], name: str, options: dict[str, Any]
) -> None:
    artifact = compiled(name, **options)
    found = verify_artifact(artifact, shapes=FEW)
    assert found.is_equal
    assert found.changed == ()
    assert [shape.absolute for shape in found.shapes] == [0.0, 0.0]


@pytest.mark.parametrize("leaves", sweep(["auto", "target"], "target"))
def test_a_model_that_sees(leaves: str, compiled: Callable[..., Path]) -> None:
    artifact = compiled("image-text-to-text/llava", attn_implementation="eager", leaves=leaves)
    found = verify_artifact(artifact, shapes=FEW)
    assert found.is_equal
    assert found.changed == ()
    assert [shape.images for shape in found.shapes] == [1, 2]


def test_a_model_that_could_see(compiled: Callable[..., Path]) -> None:
    found = verify_artifact(compiled("image-text-to-text/llava", text_only=True), shapes=FEW[1:])
    assert found.is_equal
    assert found.changed == ()
    assert [shape.images for shape in found.shapes] == [None]


def test_a_model_that_brings_its_own_code(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = write_own_code_model(tmp_path / "toy", with_weights=True)
    artifact = compile_model(model, out=tmp_path, trust_remote_code=True)
    code, _, complaint = run(capfd, artifact)
    assert (code, complaint.count("\n")) == (2, 1)
    assert "--trust-remote-code" in complaint
    for options in ({}, {"weights": model}):
        found = verify_artifact(artifact, trust_remote_code=True, shapes=FEW, **options)  # type: ignore[arg-type]
        assert found.is_equal
        assert found.changed == (None if options else ())


def test_code_that_computes_something_else(
    llama: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    weights, artifact = llama
    file = "subgraphs/001.py"
    more = "    self_attn_q_proj = torch.ops.aten.mul.Tensor(self_attn_q_proj, 1.5)\n    view = "
    copy = tampered(artifact, tmp_path, file, "    view = ", more)
    code, printed, complaint = run(capfd, copy)
    assert (code, complaint) == (1, "")
    assert f"NOT EQUAL: {file} differs from the result of compiling the artifact's config again" in printed
    code, printed, complaint = run(capfd, copy, "--weights", weights, "--json")
    assert (code, complaint) == (1, "")
    facts = json.loads(printed)
    assert facts["equal"] is False
    assert all(shape["relative"] > 1e-6 and shape["output"] == "logits" for shape in facts["shapes"])
    assert run(capfd, copy, "--weights", weights, "--tolerance", "0.5")[0] == 0


def test_where_the_chain_leaves_the_model(llama: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A chain that runs with other weights in one layer."""
    load = seqbuild.verify.artifact.Weights.load

    def spoiled(self: Any, model: Any, *rest: Any) -> None:
        load(self, model, *rest)
        with torch.no_grad():
            model.get_parameter("model.layers.1.mlp.up_proj.weight").mul_(1.01)

    monkeypatch.setattr(seqbuild.verify.artifact.Weights, "load", spoiled)
    found = verify_artifact(llama[1], weights=llama[0], shapes=FEW)
    assert not found.is_equal
    manifest = read_manifest(llama[1])
    for shape in found.shapes:
        assert shape.output == "logits"
        assert shape.subgraph is not None
        assert manifest.subgraphs[shape.subgraph].targets == ("model.layers.1",)
        assert shape.result == f"differs: logits, from subgraph {shape.subgraph} on"
    assert found.verdict.startswith("NOT EQUAL: the results of chain and model differ for 2 of 2 shapes")


def test_a_chain_that_fails_is_not_equal(llama: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise KeyError("freed")

    monkeypatch.setattr(seqbuild.verify.artifact, "run_chain", fails)
    found = verify_artifact(llama[1], weights=llama[0], shapes=FEW)
    assert not found.is_equal
    assert found.shapes[0].result == "fails: KeyError: 'freed'"


def test_bfloat16_and_one_shape(llama: tuple[Path, Path]) -> None:
    found = verify_artifact(llama[1], weights=llama[0], dtype="bfloat16", shapes=[SampleShape(batch=2, sequence=9)])
    assert found.is_equal
    assert (len(found.shapes), found.shapes[0].batch, found.shapes[0].sequence) == (1, 2, 9)


def test_a_sample_of_fewer_inputs(tmp_path: Path) -> None:
    save_file({"input_ids": torch.zeros(2, 9, dtype=torch.int64)}, tmp_path / "sample.safetensors")
    artifact = compile_model(
        save_config("llama", tmp_path / "llama"), out=tmp_path, sample=tmp_path / "sample.safetensors"
    )
    found = verify_artifact(artifact, shapes=FEW)
    assert found.is_equal
    assert "compiled with a different sample" in found.remarks[0]


def test_a_sample_of_an_unsupported_dtype_is_rejected(tmp_path: Path) -> None:
    header = b'{"input_ids":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}'
    (tmp_path / "sample.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"0")
    with pytest.raises(DataError, match=r"sample file .* cannot be read: 'F4'"):
        compile_model(save_config("llama", tmp_path / "llama"), out=tmp_path, sample=tmp_path / "sample.safetensors")


def test_a_sample_that_cannot_be_made_up(tmp_path: Path) -> None:
    save_file({"inputs_embeds": torch.zeros(2, 9, 32)}, tmp_path / "sample.safetensors")
    artifact = compile_model(
        save_config("llama", tmp_path / "llama"), out=tmp_path, sample=tmp_path / "sample.safetensors"
    )
    with pytest.raises(TraceError, match=r"inputs_embeds.*no default sample"):
        verify_artifact(artifact)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda folder: shutil.rmtree(folder / "artifact"), "is not a directory"),
        (lambda folder: (folder / "artifact" / MANIFEST_NAME).unlink(), "is not an artifact"),
        (lambda folder: (folder / "artifact/subgraphs/000.py").write_text("x"), "is damaged"),
        (lambda folder: shutil.rmtree(folder / "weights"), "there are no weights at"),
        (lambda folder: (folder / "weights/model.safetensors").unlink(), "does not contain a safetensors checkpoint"),
        (lambda folder: (folder / "weights/model.safetensors").write_text("x"), "is damaged"),
        (lambda folder: rewrite(folder, without_norm), "missing tensor 'model.norm.weight'"),
        (lambda folder: rewrite(folder, lambda t: t | {"lm_head.weight": torch.zeros(9, 9)}), "has shape [9, 9]"),
        (
            lambda folder: save_bert(folder),
            "config.json has model_type = 'bert', the artifact was compiled with 'llama'",
        ),
    ],
)
def test_what_is_refused(
    llama: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str], change: Any, part: str
) -> None:
    shutil.copytree(llama[0], tmp_path / "weights")
    shutil.copytree(llama[1], tmp_path / "artifact")
    change(tmp_path)
    code, printed, complaint = run(capfd, tmp_path / "artifact", "--weights", tmp_path / "weights")
    assert (code, printed, complaint.count("\n")) == (2, "", 1), complaint
    assert complaint.startswith("seqbuild: error: ")
    assert part in complaint


def rewrite(folder: Path, change: Any) -> None:
    file = folder / "weights" / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def without_norm(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}


def save_bert(folder: Path) -> None:
    shutil.rmtree(folder / "weights")
    tiny_model("bert").save_pretrained(folder / "weights")


def test_tensors_that_the_model_does_not_use_do_not_matter(llama: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(llama[0], tmp_path / "weights")
    rewrite(tmp_path, lambda tensors: tensors | {"mtp.fc.weight": torch.ones(2, 2), "value_head.bias": torch.ones(1)})
    assert verify_artifact(llama[1], weights=tmp_path / "weights", shapes=FEW).is_equal


def test_a_config_that_cannot_be_made_small(llama: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seqbuild.verify.recompile, "shrink_table", lambda table: {**table, "hidden_size": "wide"})
    with pytest.raises(ModelError, match=r"cannot be reduced .* \(verify the artifact itself, with --weights\)"):
        verify_artifact(llama[1])


def test_options_that_cannot_be(llama: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match="--dtype must be one of float32, bfloat16, float16; got 'int8'"):
        verify_artifact(llama[1], dtype="int8")
    for tolerance in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="--tolerance"):
            verify_artifact(llama[1], tolerance=tolerance)


def test_targets_that_a_small_model_lacks(tmp_path: Path) -> None:
    model = save_config("llama", tmp_path / "llama", num_hidden_layers=8)
    artifact = compile_model(model, out=tmp_path, targets=["model.layers.6", "model.layers.7"])
    with pytest.raises(
        seqbuild.verify.recompile.TargetError, match=r"model\.layers\.6, which matches no module in a small model"
    ):
        verify_artifact(artifact)


def test_errors_of_the_checkpoint_and_the_artifact_keep_their_kind(llama: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="nothing is not a directory"):
        verify_artifact(tmp_path / "nothing")
    with pytest.raises(WeightsError, match="nothing"):
        verify_artifact(llama[1], weights=tmp_path / "nothing")


def test_weights_at_odd_places_of_a_file_are_moved(llama: tuple[Path, Path]) -> None:
    """The order in which torch adds numbers up, and so the last bits of a sum, depend on where they begin."""
    weights, root = llama
    loaded = transformers.AutoModelForCausalLM.from_pretrained(weights, dtype="auto")
    assert any(parameter.data_ptr() % 64 for parameter in loaded.parameters())
    pair = seqbuild.verify.artifact._LoadedPair(artifact=runtime.load(root), dtype=loaded.dtype, weights=weights)
    model = pair.model()
    assert not any(parameter.data_ptr() % 64 for parameter in model.parameters())
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), loaded.parameters(), strict=True))


def test_differences() -> None:
    one, nan, inf = torch.tensor([1.0, 2.0]), torch.tensor([float("nan"), 2.0]), torch.tensor([float("inf"), 2.0])
    assert difference({"x": one}, {"x": one.clone()}).absolute == 0
    assert difference({"x": nan}, {"x": nan.clone()}).absolute == 0
    assert difference({"x": inf, "y": one}, {"x": inf.clone(), "y": one + 4}).absolute == 4
    assert difference({"x": nan}, {"x": one}).absolute == float("inf")
    assert difference({"x": inf}, {"x": one}).absolute == float("inf")
    assert difference({"x": one}, {"x": one.double()}).absolute == float("inf")
    assert difference({"x": one}, {"x": one[:1]}).absolute == float("inf")
    assert difference({"x": one}, {"y": one}).absolute == float("inf")
    assert difference({"x": [one]}, {"x": [one, one]}).absolute == float("inf")
    found = difference({"x": one, "y": one * 10}, {"x": one, "y": one * 10 + 5})
    assert (found.absolute, found.relative, found.output) == (5.0, 0.2, "y")


def test_the_model_is_run_without_a_cache() -> None:
    model = tiny_model("llama")
    output = run_model(model, {"input_ids": torch.ones(1, 4, dtype=torch.int64)})
    assert list(output) == ["logits"]
    assert isinstance(model, transformers.LlamaForCausalLM)
    assert model.config.use_cache is True
