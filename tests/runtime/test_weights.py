from __future__ import annotations

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
import seqbuild.build
from runtime.checkpoint.reader import Checkpoint
from runtime.weights.parameters import Weights, assign, unload
from tests.runtime.small import (
    Small,
    calibrate,
    load_transformers,
    raw_bytes,
    read_tensors,
    recipe,
    run_transformers,
    run_weights,
    token_batches,
)

CPU = torch.device("cpu")
Change = Callable[[dict[str, torch.Tensor]], object]


def open_weights(small: Small, directory: Path, dtype: torch.dtype = torch.float32) -> tuple[Weights, Any]:
    artifact = small.load()
    model = artifact.empty_model(dtype)
    return Weights(artifact, Checkpoint(directory), dtype, model), model


def rewrite(small: Small, directory: Path, change: Change, source: Path | None = None) -> Path:
    """A copy of a model directory with other tensors in one shard."""
    shutil.copytree(source or small.weights, directory, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = read_tensors(source or small.weights)
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def set_config(directory: Path, **entries: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.mark.parametrize("name", ["llama", "sharded_llama", "gemma2", "qwen3_moe", "mixtral"])
def test_every_parameter_is_what_transformers_loads(request: pytest.FixtureRequest, name: str) -> None:
    small: Small = request.getfixturevalue(name)
    expected = load_transformers(small.weights)
    source, model = open_weights(small, small.weights, expected.dtype)
    source.load(model, source.origins, CPU)
    found = model.state_dict()
    assert sorted(found) == sorted(expected.state_dict())
    for key, tensor in expected.state_dict().items():
        assert (found[key].dtype, raw_bytes(found[key])) == (tensor.dtype, raw_bytes(tensor)), key


def test_loading_and_unloading_a_subgraph(llama: Small) -> None:
    artifact = llama.load()
    source, model = open_weights(llama, llama.weights)
    for subgraph in artifact.subgraphs:
        source.load(model, subgraph.entry.parameters, CPU)
        loaded = [name for name, tensor in model.named_parameters() if not tensor.is_meta]
        assert sorted(loaded) == sorted(subgraph.entry.parameters)
        # As those of a freshly loaded model: torch multiplies otherwise by it, and the last bits differ.
        assert all(parameter.requires_grad for parameter in model.parameters() if not parameter.is_meta)
        unload(model, subgraph.entry.parameters)
        assert all(parameter.is_meta for parameter in model.parameters())
        shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
        assert shapes == {name: entry.shape for name, entry in artifact.manifest.parameters.items()}


def test_dtype_of_the_run(sharded_llama: Small) -> None:
    source, _ = open_weights(sharded_llama, sharded_llama.weights, torch.float32)
    name = "model.layers.0.mlp.up_proj.weight"
    assert source.read(name, CPU).dtype == torch.float32
    assert torch.equal(source.read(name, CPU), read_tensors(sharded_llama.weights)[name].float())


def test_assign_reaches_parameters_and_buffers() -> None:
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(2))
    assign(model, "0.weight", torch.tensor([3.0, 4.0]))
    assign(model, "0.running_mean", torch.tensor([5.0, 6.0]))
    assert model.state_dict()["0.weight"].tolist() == [3.0, 4.0]
    assert model.state_dict()["0.running_mean"].tolist() == [5.0, 6.0]
    unload(model, ["0.weight", "0.running_mean"])
    assert model.get_parameter("0.weight").is_meta
    assert model.get_buffer("0.running_mean").is_meta


# What does not fit is named, the first of it, before anything runs.


def remove(name: str) -> Change:
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            remove("model.layers.1.mlp.up_proj.weight"),
            r"missing tensor '(model.layers.1.mlp.up_proj.weight)' in .*, required by parameter \1",
        ),
        (
            lambda tensors: tensors.update({"model.layers.1.mlp.up_proj.weight": torch.ones(3, 4)}),
            r"tensor 'model.layers.1.mlp.up_proj.weight' of .* has shape \[3, 4\], the artifact expects \[256, 128\]",
        ),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.ones(129)}),
            r"tensor 'model.norm.weight' of .* has shape \[129\], the artifact expects \[128\]",
        ),
    ],
)
def test_tensors_that_do_not_fit(llama: Small, tmp_path: Path, change: Change, message: str) -> None:
    directory = rewrite(llama, tmp_path / "model", change)
    with pytest.raises(runtime.WeightsError, match=message):
        open_weights(llama, directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove("model.layers.1.mlp.experts.2.up_proj.weight"), r"missing tensor '.*experts\.2\.up_proj\.weight'"),
        (
            lambda tensors: tensors.update({"model.layers.1.mlp.experts.2.up_proj.weight": torch.ones(3, 4)}),
            r"of .* the artifact expects \[4, 32, 32\] for parameter model\.layers\.1\.mlp\.experts\.gate_up_proj",
        ),
        (
            lambda tensors: tensors.update({"model.layers.1.mlp.experts.4.up_proj.weight": torch.ones(16, 32)}),
            r"unexpected tensor 'model\.layers\.1\.mlp\.experts\.4\.up_proj\.weight' .* the artifact expects only 4",
        ),
    ],
)
def test_experts_that_do_not_fit(qwen3_moe: Small, tmp_path: Path, change: Change, message: str) -> None:
    directory = rewrite(qwen3_moe, tmp_path / "model", change)
    with pytest.raises(runtime.WeightsError, match=message):
        open_weights(qwen3_moe, directory)


def test_names_with_and_without_the_prefix_of_the_base_model(llama: Small, tmp_path: Path) -> None:
    def strip(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    directory = rewrite(llama, tmp_path / "model", strip)
    inputs = token_batches([(2, 9)])[0]
    got, expected = (run_weights(llama, path, inputs)["logits"] for path in (directory, llama.weights))
    assert torch.equal(got, expected)
    out = tmp_path / "out"
    runtime.calibrate(
        llama.load(),
        weights=directory,
        recipe=recipe("targets: Linear, scheme: W4A16, ignore: [lm_head]"),
        batches=[],
        out=out,
    )
    assert "layers.0.mlp.up_proj.weight_packed" in read_tensors(out)
    assert torch.isfinite(run_weights(llama, out, inputs)["logits"]).all()


def test_computed_tables_that_old_checkpoints_carry_are_passed_over(llama: Small, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    directory = rewrite(llama, tmp_path / "model", lambda tensors: tensors.update({name: torch.ones(16)}))
    open_weights(llama, directory)


def test_a_tied_head_that_was_saved_under_its_own_name_is_used_as_transformers_does(
    sharded_llama: Small, tmp_path: Path
) -> None:
    def add_head(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2

    directory = rewrite(sharded_llama, tmp_path / "model", add_head)
    inputs = token_batches([(2, 9)])[0]
    assert torch.equal(run_weights(sharded_llama, directory, inputs)["logits"], run_transformers(directory, inputs))


def test_one_that_was_saved_as_the_other_that_it_is_tied_to_is_used(sharded_llama: Small, tmp_path: Path) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    directory = rewrite(sharded_llama, tmp_path / "model", rename)
    inputs = token_batches([(2, 9)])[0]
    assert torch.equal(run_weights(sharded_llama, directory, inputs)["logits"], run_transformers(directory, inputs))


@pytest.mark.parametrize("kept", ["encoder", "decoder", "both"])
def test_of_several_that_are_tied_any_will_do(kept: str, tmp_path: Path) -> None:
    """T5's embedding has four names."""
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))
    model.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    shared = tensors.pop("shared.weight")
    names = ["encoder", "decoder"] if kept == "both" else [kept]
    save_file(tensors | {f"{name}.embed_tokens.weight": shared.clone() for name in names}, file, {"format": "pt"})
    artifact = runtime.load(seqbuild.build.build(tmp_path / "model", out=tmp_path / "artifacts").path)
    source = Weights(artifact, Checkpoint(tmp_path / "model"), torch.float32, artifact.empty_model(torch.float32))
    for name in ("shared.weight", "lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
        assert torch.equal(source.read(name, torch.device("cpu")), shared), name


def test_a_config_of_another_model_is_refused(llama: Small, tmp_path: Path) -> None:
    """The tensors fit; what they mean does not."""
    directory = rewrite(llama, tmp_path / "model", lambda tensors: None)
    set_config(directory, rms_norm_eps=1e-3)
    message = r"config\.json has rms_norm_eps = 0\.001, the artifact was compiled with 1e-06 \(compile the model"
    with pytest.raises(runtime.WeightsError, match=message):
        open_weights(llama, directory)
    set_config(directory, rms_norm_eps=1e-6, rope_parameters={"rope_type": "default", "rope_theta": 5.0})
    with pytest.raises(runtime.WeightsError, match=r"has rope_parameters\.rope_theta = 5\.0, .* with 10000\.0"):
        open_weights(llama, directory)
    set_config(directory, model_type="their_own", auto_map={"AutoConfig": "their.Config"})
    with pytest.raises(runtime.WeightsError, match="has model_type = 'their_own', the artifact was compiled with"):
        open_weights(llama, directory)


def test_entries_of_a_config_that_change_nothing_may_differ(llama: Small, tmp_path: Path) -> None:
    directory = rewrite(llama, tmp_path / "model", lambda tensors: None)
    harmless = {"eos_token_id": [3, 4], "transformers_version": "5.0.0", "use_cache": False, "dtype": "bfloat16"}
    set_config(directory, **harmless, _name_or_path="elsewhere", trained_by="somebody", attention_dropout=0.1)
    open_weights(llama, directory)
    (directory / "config.json").unlink()
    open_weights(llama, directory)


# Quantized checkpoints.


@pytest.fixture(scope="module")
def packed(llama: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "out"
    calibrate(llama, recipe("targets: Linear, scheme: W4A16, ignore: [lm_head]"), out)
    return out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove("model.layers.1.mlp.up_proj.weight_scale"), r"model\.layers\.1\.mlp\.up_proj.*weight_scale"),
        (remove("model.layers.1.mlp.up_proj.weight_packed"), r"model\.layers\.1\.mlp\.up_proj.*weight_packed"),
        (remove("model.layers.1.mlp.up_proj.weight_shape"), r"model\.layers\.1\.mlp\.up_proj.*weight_shape"),
        (
            lambda tensors: tensors.update({"model.layers.1.mlp.up_proj.weight_shape": torch.tensor([256, 64])}),
            r"model\.layers\.1\.mlp\.up_proj.*the artifact expects \[256, 128\]",
        ),
        (
            lambda tensors: tensors.update(
                {"model.layers.1.mlp.up_proj.weight_packed": torch.ones(256, 3, dtype=torch.int32)}
            ),
            r"model\.layers\.1\.mlp\.up_proj",
        ),
        (
            lambda tensors: tensors.update({"model.layers.1.mlp.up_proj.weight_scale": torch.ones(255, 1)}),
            r"model\.layers\.1\.mlp\.up_proj",
        ),
        (
            lambda tensors: tensors.update({"model.layers.1.mlp.up_proj.unheard_of": torch.ones(1)}),
            r"unexpected tensor 'model\.layers\.1\.mlp\.up_proj\.unheard_of'",
        ),
    ],
)
def test_damaged_quantized_checkpoints(
    llama: Small, packed: Path, tmp_path: Path, change: Change, message: str
) -> None:
    directory = rewrite(llama, tmp_path / "model", change, source=packed)
    with pytest.raises(runtime.WeightsError, match=message):
        open_weights(llama, directory)


def test_damaged_zero_point(llama: Small, tmp_path: Path) -> None:
    calibrate(llama, recipe("targets: Linear, scheme: W4A16_ASYM, ignore: [lm_head]"), tmp_path / "out")
    name = "model.layers.1.mlp.up_proj.weight_zero_point"
    assert read_tensors(tmp_path / "out")[name].shape == (32, 1)
    change: Change = lambda tensors: tensors.update({name: torch.ones(31, 1, dtype=torch.int32)})  # noqa: E731
    directory = rewrite(llama, tmp_path / "model", change, source=tmp_path / "out")
    with pytest.raises(runtime.WeightsError, match=rf"'{name}' of .* has shape \[31, 1\], .* \[32, 1\]"):
        open_weights(llama, directory)


def test_a_quantized_checkpoint_reads_as_its_dense_weights(llama: Small, packed: Path) -> None:
    source, _ = open_weights(llama, packed)
    assert len(source.schemes) == 21
    assert source.plain_key("model.layers.0.mlp.up_proj.weight") is None
    assert source.plain_key("lm_head.weight") == "lm_head.weight"
    loaded = load_transformers(packed)
    with torch.no_grad():
        loaded(**token_batches([(1, 2)])[0])  # unpacks
    for name in source.origins:
        assert torch.equal(source.read(name, CPU), loaded.get_parameter(name)), name


# The checkpoint's files.


def copy(small: Small, directory: Path) -> Path:
    shutil.copytree(small.weights, directory)
    return directory


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def test_checkpoint_lists_shapes_and_bytes(tmp_path: Path) -> None:
    tensors = {
        "f": torch.ones(3, 5),
        "h": torch.ones(7, dtype=torch.bfloat16),
        "e": torch.ones(9).to(torch.float8_e4m3fn),
        "b": torch.ones(2, dtype=torch.bool),
        "i": torch.ones(2, dtype=torch.int64),
        "s": torch.tensor(1.0),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    assert list(checkpoint) == ["b", "e", "f", "h", "i", "s"]
    assert {name: checkpoint.num_bytes(name) for name in checkpoint} == {
        "b": 2,
        "e": 9,
        "f": 60,
        "h": 14,
        "i": 16,
        "s": 4,
    }
    assert checkpoint.num_bytes("f", bits=4) == 7
    assert checkpoint.shape("f") == (3, 5)
    assert checkpoint.config == {}
    assert checkpoint.total_bytes == (tmp_path / "model.safetensors").stat().st_size


def test_directories_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(runtime.WeightsError, match=r"checkpoint directory .*nowhere"):
        Checkpoint(tmp_path / "nowhere")
    with pytest.raises(
        runtime.WeightsError, match=r"does not contain a safetensors checkpoint \(it has no model.safetensors\)"
    ):
        Checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(runtime.WeightsError, match=r"\(pytorch_model.bin is a pickle: convert it to safetensors\)"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ("[1]", "is not a JSON object"),
        ("[" * 100_000, "is not JSON"),
        ("{}", "it has no weight_map"),
        ('{"weight_map": []}', "it has no weight_map"),
        ('{"weight_map": {}}', "it has no weight_map"),
        ('{"weight_map": {"a": "other.safetensors"}}', "puts a into other.safetensors, which is missing"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "puts a into ../model.safetensors, which is missing"),
        ('{"weight_map": {"a": 3}}', "puts a into 3, which is missing"),
        ('{"weight_map": {"a": "model.safetensors"}}', "puts a into model.safetensors, which does not contain it"),
        ("\udcff", "is not JSON"),
    ],
)
def test_broken_index(tmp_path: Path, text: str, message: str) -> None:
    save_file({"b": torch.ones(2)}, tmp_path / "model.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(runtime.WeightsError) as caught:
        Checkpoint(tmp_path)
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["", "[1]", "[" * 100_000, "\udcff"])
def test_broken_config(llama: Small, tmp_path: Path, text: str) -> None:
    directory = copy(llama, tmp_path / "model")
    (directory / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(runtime.WeightsError, match=r"config\.json (is not JSON|is not a JSON object)"):
        open_weights(llama, directory)


@pytest.mark.parametrize("content", [b"", b"\x00" * 7, b"\xff" * 8, b"\x08\0\0\0\0\0\0\0notjson!", b"PK\x03\x04" * 9])
def test_no_safetensors_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(runtime.WeightsError, match=r"model\.safetensors is damaged or not a safetensors file"):
        Checkpoint(tmp_path)


def test_truncated_shard(sharded_llama: Small, tmp_path: Path) -> None:
    directory = copy(sharded_llama, tmp_path / "model")
    shard = sorted(directory.glob("*.safetensors"))[1]
    truncate(shard)
    with pytest.raises(runtime.WeightsError, match=f"{shard.name} is damaged or not .*copy the checkpoint again"):
        Checkpoint(directory)


def test_links_as_the_hub_cache_has_them(llama: Small, tmp_path: Path) -> None:
    (tmp_path / "snapshot").mkdir()
    for path in sorted(llama.weights.iterdir()):
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    plan = recipe("targets: Linear, scheme: W4A16, ignore: [lm_head]")
    out = tmp_path / "out"
    runtime.calibrate(llama.load(), weights=tmp_path / "snapshot", recipe=plan, batches=[], out=out)
    assert not any(path.is_symlink() for path in out.iterdir())
    assert (out / "tokenizer.json").read_bytes() == (llama.weights / "tokenizer.json").read_bytes()


def test_an_artifact_of_a_bare_config_takes_the_names_that_transformers_saves(qwen3_moe: Small, tmp_path: Path) -> None:
    from seqbuild.build import build

    shutil.copy(qwen3_moe.weights / "config.json", tmp_path)
    small = Small(weights=qwen3_moe.weights, artifact=build(tmp_path / "config.json", out=tmp_path / "art").path)
    inputs = token_batches([(2, 9)])[0]
    logits = run_transformers(small.weights, inputs)
    assert torch.equal(run_weights(small, small.weights, inputs)["logits"], logits)
