from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from torch import nn

import runtime
import seqbuild.build
from runtime.chain import LoadedSubgraph
from tests.runtime.small import (
    NARROW,
    NARROW_W4,
    RECIPES,
    Small,
    calibrate,
    directory_bytes,
    load_transformers,
    read_tensors,
    recipe,
    save_model,
    token_batches,
)

# What is refused before anything runs, and what is left behind then: nothing.


@pytest.fixture
def no_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: LoadedSubgraph, model: nn.Module, **inputs: Any) -> dict[str, Any]:
        raise AssertionError("ran before everything was checked")

    monkeypatch.setattr(LoadedSubgraph, "forward", forward)


@pytest.mark.usefixtures("no_forward")
@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("targets: Linear, scheme: W4A16", runtime.RecipeError, "lm_head shares its weight with model.embed_tokens"),
        ("targets: lm_head, scheme: W4A16", runtime.RecipeError, "lm_head shares its weight with model.embed_tokens"),
        (
            "config_groups: {a: {targets: [Linear], weights: {num_bits: 4, type: int, symmetric: true, "
            "strategy: group, group_size: 96}}}, ignore: [lm_head]",
            runtime.RecipeError,
            "model.layers.0.self_attn.q_proj has 128 input features, which is not a multiple of group_size 96; "
            "the same applies to model.layers.0.self_attn.k_proj, ",
        ),
    ],
)
def test_recipes_that_the_model_cannot_follow(
    sharded_llama: Small, tmp_path: Path, text: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        calibrate(sharded_llama, recipe(text, modifier="GPTQModifier"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_head_that_is_tied_by_config_is_refused_even_if_the_checkpoint_holds_both(tmp_path: Path) -> None:
    """Transformers then cannot load it: it ties by the config, and there is no weight to tie to."""
    config = transformers.LlamaConfig(**NARROW, tie_word_embeddings=True)
    weights = save_model(transformers.LlamaForCausalLM(config), tmp_path / "model")
    tensors = read_tensors(weights)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    safetensors.torch.save_file(tensors, weights / "model.safetensors", metadata={"format": "pt"})
    small = Small(weights=weights, artifact=seqbuild.build.build(weights, out=tmp_path).path)
    with pytest.raises(runtime.RecipeError, match="lm_head shares its weight"):
        calibrate(small, recipe(NARROW_W4.replace("ignore: [lm_head]", "ignore: []")), tmp_path / "out")


@pytest.mark.usefixtures("no_forward")
def test_gptq_without_data_is_refused(llama: Small, tmp_path: Path) -> None:
    with pytest.raises(runtime.DataError, match="needs calibration data"):
        calibrate(llama, recipe(RECIPES["W4A16"], modifier="GPTQModifier"), tmp_path / "out", batches=[])
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_are_not_finite_name_the_module_and_leave_nothing(narrow_llama: Small, tmp_path: Path) -> None:
    model = load_transformers(narrow_llama.weights)
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.up_proj").get_parameter("weight")[3, 4] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    with pytest.raises(runtime.WeightsError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' of .* contains NaN"):
        runtime.calibrate(
            narrow_llama.load(),
            weights=tmp_path / "broken",
            recipe=recipe(NARROW_W4, modifier="GPTQModifier"),
            batches=token_batches(),
            out=tmp_path / "out",
        )
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def fill_the_disk(monkeypatch: pytest.MonkeyPatch, after: int) -> list[int]:
    """Let the disk be full for what is written after so many writes into shards."""
    real, sizes = os.pwrite, []

    def pwrite(descriptor: int, data: Any, offset: int) -> int:
        sizes.append(len(data))
        if len(sizes) > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    return sizes


def test_a_disk_that_is_full_before_a_subgraph_is_finished(
    narrow_llama: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = fill_the_disk(monkeypatch, after=5)
    with pytest.raises(runtime.OutputError, match=r"cannot write .*out: the disk is full \(nothing was left behind\)"):
        calibrate(narrow_llama, recipe(NARROW_W4), tmp_path / "out", max_shard_bytes=10_000)
    assert len(sizes) == 6
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_later_keeps_what_is_finished(
    narrow_llama: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = recipe(NARROW_W4, modifier="GPTQModifier")
    calibrate(narrow_llama, plan, tmp_path / "expected", max_shard_bytes=10_000)
    fill_the_disk(monkeypatch, after=60)
    with pytest.raises(runtime.OutputError, match=r"the disk is full \(\d finished subgraphs are kept, continue"):
        calibrate(narrow_llama, plan, tmp_path / "out", max_shard_bytes=10_000)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.run.partial", "expected"]
    monkeypatch.undo()
    result = calibrate(narrow_llama, plan, tmp_path / "out", max_shard_bytes=10_000, resume=True)
    assert result.resumed_at > 0
    assert directory_bytes(tmp_path / "out") == directory_bytes(tmp_path / "expected")


def test_a_module_that_is_loaded_but_never_called_cannot_be_measured(
    narrow_llama: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = narrow_llama.load()
    model = artifact.empty_model()
    # The code calls a look-alike, so that no hook of the real one ever sees anything.
    layer: Any = model.get_submodule("model.layers.1")
    find = layer.get_submodule
    down_proj = find("mlp.down_proj")

    def other(name: str) -> Any:
        is_called = name == "mlp.down_proj"
        return (lambda hidden: hidden @ down_proj.weight.T) if is_called else find(name)

    monkeypatch.setattr(layer, "get_submodule", other)
    monkeypatch.setattr(artifact, "empty_model", lambda dtype: model)
    with pytest.raises(runtime.DataError, match=r"no calibration token reached model\.layers\.1\.mlp\.down_proj"):
        runtime.calibrate(
            artifact,
            weights=narrow_llama.weights,
            recipe=recipe(NARROW_W4, modifier="GPTQModifier"),
            batches=token_batches(),
            out=tmp_path / "out",
        )
    assert [path.name for path in tmp_path.iterdir()] == [".out.run.partial"]  # the layer before it is kept


@pytest.mark.usefixtures("no_forward")
def test_other_sequential_targets_than_the_artifact_was_cut_at_are_refused(llama: Small, tmp_path: Path) -> None:
    text = f"{NARROW_W4}, sequential_targets: [LlamaMLP]"
    with pytest.raises(runtime.RecipeError, match=r"has the sequential targets LlamaMLP, .* with LlamaDecoderLayer"):
        calibrate(llama, recipe(text), tmp_path / "out")
    calibrate(llama, recipe(f"{NARROW_W4}, sequential_targets: [LlamaDecoderLayer]"), tmp_path / "out")


@pytest.mark.usefixtures("no_forward")
def test_an_output_inside_what_is_read_is_refused(llama: Small) -> None:
    for source in (llama.weights, llama.artifact):
        before = sorted(source.rglob("*"))
        with pytest.raises(runtime.OutputError, match=r"is inside the input directory"):
            calibrate(llama, recipe(NARROW_W4), source / "out")
        assert sorted(source.rglob("*")) == before
