"""Calibrating and evaluating a model that brings its own code, and what happens where nobody has allowed that."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import runtime
import runtime.cli.app
from runtime.chain import check
from runtime.checkpoint.companions import write_companions
from runtime.checkpoint.reader import Checkpoint
from runtime.errors import ArtifactError, ModelError, WeightsError
from runtime.formats.rounded_inputs import input_quantization
from runtime.model.config import require_same_model
from runtime.weights.parameters import Weights
from seqbuild.build import build
from tests.own_code_model import FILES, write_own_code_model
from tests.runtime.place import GPTQ, Run, assert_refused
from tests.runtime.small import directory_bytes, nameless_bytes, token_batches, write_token_file

ROOT = Path(__file__).parents[2]
# What anybody would do with the quantized checkpoint, in a process that knows nothing of this project.
AS_ANYBODY = """
import sys, torch, transformers
from safetensors.torch import load_file, save_file
for weights in sys.argv[2:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(weights, trust_remote_code=True, dtype="auto").eval()
    with torch.no_grad():
        logits = model(**load_file(sys.argv[1])).logits
    save_file({"logits": logits.contiguous()}, weights + "-logits")
"""


class Toy:
    """A model with its own code, its artifact and all that a calibration takes; executing the code leaves a mark."""

    def __init__(self, folder: Path, tokenizer: Path) -> None:
        self.folder, self.mark = folder, folder / "mark"
        files = {
            name: f"__import__('pathlib').Path({str(self.mark)!r}).touch()\n{text}" for name, text in FILES.items()
        }
        self.weights = write_own_code_model(folder / "toy", files, tokenizer=tokenizer, with_weights=True)
        self.artifact = build(self.weights, out=folder / "artifacts", trust_remote_code=True, leaves="target").path
        self.portable = build(self.weights, out=folder / "artifacts", trust_remote_code=True).path
        self.mark.unlink()
        self.data = write_token_file(folder / "tokens.safetensors")
        (folder / "recipe.yaml").write_text(GPTQ)

    def calibrate(self, out: Path, *more: str | Path) -> list[str]:
        command = ["calibrate", self.artifact, "--weights", self.weights, "--data", self.data]
        return [str(part) for part in (*command, "--recipe", self.folder / "recipe.yaml", "-o", out, *more)]

    def evaluate(self, weights: Path, *more: str | Path) -> list[str]:
        command = ["evaluate", self.artifact, "--weights", weights, "--data", self.data, *more]
        return [str(part) for part in command]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer_dir: Path) -> Toy:
    return Toy(tmp_path_factory.mktemp("own-code"), byte_tokenizer_dir)


@pytest.fixture(autouse=True)
def _no_mark(toy: Toy) -> None:
    toy.mark.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def quantized(toy: Toy) -> Path:
    out = toy.folder / "quantized"
    assert runtime.cli.app.main(toy.calibrate(out, "--trust-remote-code")) == 0
    return out


def test_check_executes_nothing_and_says_what_is_there(toy: Toy, run: Run) -> None:
    check(toy.artifact)
    code, said, complaint = run(["check", str(toy.artifact)])
    assert (code, complaint) == (0, "")
    listed = ", ".join(f"modeling/{name}" for name in sorted(FILES))
    assert f"the model's own code (not executed): {listed}" in said
    assert not toy.mark.exists()


def test_without_consent_nothing_is_executed(toy: Toy, tmp_path: Path, run: Run) -> None:
    with pytest.raises(ModelError, match=r"brings its own code.* --trust-remote-code"):
        runtime.load(toy.artifact)
    for command in (toy.calibrate(tmp_path / "out"), toy.evaluate(toy.weights)):
        assert_refused(
            run(command),
            "brings its own code, for ToyConfig, ToyForCausalLM",
            "this would execute configuration_toy.py, modeling_toy.py, toy_activation.py, toy_layers.py",
            "--trust-remote-code",
        )
    assert not toy.mark.exists()
    assert not (tmp_path / "out").exists()


def test_a_portable_artifact_needs_no_consent_for_it_executes_nothing(
    toy: Toy, quantized: Path, tmp_path: Path, run: Run
) -> None:
    assert check(toy.portable)[0].is_portable
    command = toy.calibrate(tmp_path / "out")
    command[command.index(str(toy.artifact))] = str(toy.portable)
    code, _, complaint = run(command)
    assert (code, complaint) == (0, "")
    assert not toy.mark.exists()
    # The records name two artifacts.
    assert nameless_bytes(tmp_path / "out", artifact=None) == nameless_bytes(quantized, artifact=None)
    found = [
        runtime.evaluate(runtime.load(path, trust_remote_code=trust), weights=toy.weights, batches=token_batches())
        for path, trust in ((toy.artifact, True), (toy.portable, False))
    ]
    assert found[0].perplexity == found[1].perplexity


def test_damaged_code_is_not_executed_even_with_consent(toy: Toy, tmp_path: Path) -> None:
    artifact = shutil.copytree(toy.artifact, tmp_path / "artifact")
    with (artifact / "modeling" / "toy_layers.py").open("a") as file:
        file.write("\n")
    with pytest.raises(ArtifactError, match=r"toy_layers\.py is damaged"):
        runtime.load(artifact, trust_remote_code=True)
    assert not toy.mark.exists()


def test_the_bytes_that_were_checked_are_those_that_run(toy: Toy, tmp_path: Path) -> None:
    artifact = shutil.copytree(toy.artifact, tmp_path / "artifact")
    loaded = runtime.load(artifact, trust_remote_code=True)
    for path in (artifact / "modeling").iterdir():
        path.write_text("raise AssertionError('this was never checked')\n")
    assert type(loaded.empty_model()).__name__ == "ToyForCausalLM"


def test_the_code_is_gone_with_the_last_who_uses_it(toy: Toy) -> None:
    model = runtime.load(toy.artifact, trust_remote_code=True).empty_model()
    gc.collect()
    assert type(model).__module__ in sys.modules
    del model
    gc.collect()
    assert [name for name in sys.modules if name.startswith("seqbuild_modeling_")] == []


def test_evaluation_equals_the_model_itself(toy: Toy, run: Run, as_anybody: Callable[[Path], torch.Tensor]) -> None:
    code, said, complaint = run([*toy.evaluate(toy.weights), "--trust-remote-code", "--json"])
    assert (code, complaint) == (0, "")
    samples = runtime.load_tokens(toy.data).samples
    logits_BSV = as_anybody(toy.weights)
    losses = [
        torch.nn.functional.cross_entropy(logits_SV[:-1], tokens_S[1:], reduction="none")
        for logits_SV, tokens_S in zip(logits_BSV, samples, strict=True)
    ]
    expected = torch.cat(losses).double().mean().exp().item()
    assert json.loads(said)["perplexity"] == pytest.approx(expected, rel=1e-6)


@pytest.fixture(scope="module")
def as_anybody(toy: Toy, quantized: Path) -> Callable[[Path], torch.Tensor]:
    """The logits that transformers computes with a checkpoint in a process of its own, [B, S, V]."""
    tokens_BS = torch.stack(list(runtime.load_tokens(toy.data).samples))
    save_file({"input_ids": tokens_BS, "attention_mask": torch.ones_like(tokens_BS)}, toy.folder / "inputs")
    environment = {**os.environ, "HF_MODULES_CACHE": str(toy.folder / "modules")}
    command = [sys.executable, "-c", AS_ANYBODY, toy.folder / "inputs", toy.weights, quantized]
    done = subprocess.run(list(map(str, command)), env=environment, cwd=toy.folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return lambda weights: load_file(f"{weights}-logits")["logits"]


def test_a_quantized_checkpoint_loads_anywhere_with_the_same_logits(
    toy: Toy, quantized: Path, as_anybody: Callable[[Path], torch.Tensor]
) -> None:
    tokens_BS = torch.stack(list(runtime.load_tokens(toy.data).samples))
    artifact = runtime.load(toy.artifact, trust_remote_code=True)
    model = artifact.empty_model()
    source = Weights(artifact, Checkpoint(quantized), torch.float32, model)
    source.load(model, artifact.manifest.parameters, torch.device("cpu"))
    values = {"input_ids": tokens_BS, "attention_mask": torch.ones_like(tokens_BS)}
    with torch.no_grad(), input_quantization(model, source.schemes):
        for subgraph in artifact.subgraphs:
            values |= subgraph.forward(model, **{name: values[name] for name in subgraph.input_names})
    assert torch.equal(values["logits"], as_anybody(quantized))


def test_a_quantized_checkpoint_carries_code_and_auto_map(toy: Toy, quantized: Path, run: Run) -> None:
    stated = json.loads((quantized / "config.json").read_text())
    assert stated["auto_map"] == json.loads((toy.weights / "config.json").read_text())["auto_map"]
    for name in FILES:
        assert (quantized / name).read_bytes() == (toy.weights / name).read_bytes()
    tensors = load_file(quantized / "model.safetensors")
    assert "model.layers.0.qkv_proj.weight_packed" in tensors
    assert "lm_head.weight" in tensors
    code, said, complaint = run([*toy.evaluate(quantized), "--trust-remote-code", "--json"])
    assert (code, complaint) == (0, "")
    assert json.loads(said)["perplexity"] > 1


def test_code_of_another_repository_becomes_the_checkpoints_own(toy: Toy, tmp_path: Path) -> None:
    """The auto_map names a repository; the artifact has its files, so the checkpoint need not."""
    artifact = runtime.load(toy.artifact, trust_remote_code=True)
    auto_map = {"AutoConfig": "some-org/toy--configuration_toy.ToyConfig", "AutoTokenizer": ["a/b--t.T", None]}
    artifact.companions = {"config.json": json.dumps({"auto_map": auto_map}).encode()}
    (tmp_path / "out").mkdir()
    write_companions(tmp_path / "out", artifact, Checkpoint(toy.weights), {})
    written = json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"]
    assert written == {"AutoConfig": "configuration_toy.ToyConfig", "AutoTokenizer": ["t.T", None]}


def test_text_needs_no_consent_of_its_own(toy: Toy, tmp_path: Path, run: Run, caplog: pytest.LogCaptureFixture) -> None:
    """The tokenizer of such a model is transformers' own, found beside the weights."""
    (tmp_path / "text.txt").write_text("some text to read\n" * 40)
    command = ["evaluate", toy.artifact, "--weights", toy.weights, "--data", tmp_path / "text.txt", "--seq-len", "32"]
    with caplog.at_level("WARNING"):
        code, said, complaint = run([*map(str, command), "--trust-remote-code"])
    assert (code, complaint, caplog.messages) == (0, "", [])
    assert "perplexity" in said


def test_the_same_run_gives_the_same_bytes(toy: Toy, quantized: Path, tmp_path: Path) -> None:
    assert runtime.cli.app.main(toy.calibrate(tmp_path / "again", "--trust-remote-code")) == 0
    assert directory_bytes(tmp_path / "again") == directory_bytes(quantized)


@pytest.mark.parametrize(
    ("file", "old", "new", "why"),
    [
        (
            "toy_layers.py",
            "chunk(2",
            "chunk( 2",
            "toy_layers.py differs from the code that the artifact",
        ),
        ("config.json", '"epsilon": 1e-05', '"epsilon": 1e-06', "has epsilon = 1e-06, the artifact was compiled with"),
        (
            "config.json",
            '"toy_llama"',
            '"llama"',
            "has model_type = 'llama', the artifact was compiled with 'toy_llama'",
        ),
    ],
)
def test_weights_of_another_model(toy: Toy, tmp_path: Path, file: str, old: str, new: str, why: str) -> None:
    weights = shutil.copytree(toy.weights, tmp_path / "weights")
    text = (weights / file).read_text()
    assert old in text
    (weights / file).write_text(text.replace(old, new))
    with pytest.raises(WeightsError) as caught:
        require_same_model(runtime.load(toy.artifact, trust_remote_code=True), weights)
    assert why in str(caught.value)


def test_a_function_of_the_code_as_an_opaque_step(toy: Toy, tmp_path: Path) -> None:
    done = build(toy.weights, out=tmp_path, trust_remote_code=True, ignore=["causal_mask"])
    with pytest.raises(ModelError, match="trust-remote-code"):
        runtime.load(done.path)
    artifact = runtime.load(done.path, trust_remote_code=True)
    (path,) = artifact.manifest.subgraphs[0].opaque
    assert path.endswith(".modeling_toy:causal_mask")
    tokens = runtime.load_tokens(toy.data).samples
    batches = runtime.batches(tokens, 4)
    found, expected = (
        runtime.evaluate(runtime.load(place, trust_remote_code=True), weights=toy.weights, batches=batches).perplexity
        for place in (done.path, toy.artifact)
    )
    assert found == expected
