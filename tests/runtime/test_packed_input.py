"""Checkpoints that are quantized before they come here: made plain while they are read, or refused at once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import runtime
import seqbuild.cli.app
from runtime.checkpoint.dequantize import open_checkpoint
from runtime.checkpoint.reader import Checkpoint
from runtime.checkpoint.source_formats import SourceHeaders
from runtime.checkpoint.source_tensors import packed_tensors
from runtime.checkpoint.stored import Stored
from runtime.errors import WeightsError
from runtime.evaluation import evaluate
from seqbuild.build import build
from tests.runtime.place import Run
from tests.runtime.small import (
    DEEPSEEK,
    EXPERTS,
    NARROW_W4,
    Small,
    StopError,
    Stopping,
    calibrate,
    directory_bytes,
    make_small,
    read_tensors,
    recipe,
    token_batches,
)

BLOCK = 128
# Neither 160 nor 144 is a multiple of 128.
UNEVEN_DEEPSEEK = {
    **DEEPSEEK,
    "hidden_size": 160,
    "intermediate_size": 144,
    "num_hidden_layers": 2,
    "moe_intermediate_size": 144,
}
PLAIN = ("lm_head", "model.layers.0.self_attn.kv_b_proj")  # the second as `modules_to_not_convert` would have it
FP8_CONFIG = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "weight_block_size": [BLOCK, BLOCK],
    "modules_to_not_convert": list(PLAIN),
}


def gptq(extra: str = "") -> Any:
    return recipe(f"{NARROW_W4}{extra}", modifier="GPTQModifier")


def made_bytes(directory: Path) -> dict[str, bytes]:
    """Every file of an output, except those that state the digests of its source."""
    return {
        name: data for name, data in directory_bytes(directory).items() if name not in ("seqbuild.json", "README.md")
    }


def packed_fp8(weight_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numbers, scales by blocks, and the weight that they stand for, block by block in plain arithmetic."""
    num_out, num_in = weight_OI.shape
    numbers = torch.empty(num_out, num_in, dtype=torch.float8_e4m3fn)
    dense = torch.empty(num_out, num_in, dtype=torch.bfloat16)
    scale = torch.empty(-(-num_out // BLOCK), -(-num_in // BLOCK))
    for row in range(scale.shape[0]):
        for column in range(scale.shape[1]):
            place = (slice(row * BLOCK, (row + 1) * BLOCK), slice(column * BLOCK, (column + 1) * BLOCK))
            scale[row, column] = weight_OI[place].abs().max().float() / 448
            numbers[place] = (weight_OI[place].float() / scale[row, column]).to(torch.float8_e4m3fn)
            dense[place] = (numbers[place].float() * scale[row, column]).bfloat16()
    return numbers, scale, dense


def with_config(source: Path, target: Path, entry: dict[str, Any] | None) -> None:
    """The files of a model besides its tensors, with another quantization config."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((source / "config.json").read_text())
    config.update({"quantization_config": entry} if entry is not None else {})
    (target / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Small, Small]:
    """A model in FP8, and the same dequantized."""
    root = tmp_path_factory.mktemp("fp8")
    made = make_small(root, "DeepseekV3ForCausalLM", "DeepseekV3Config", UNEVEN_DEEPSEEK, dtype=torch.bfloat16)
    plain, packed = root / "plain" / "deepseek", root / "packed" / "deepseek"
    with_config(made.weights, plain, None)
    with_config(made.weights, packed, FP8_CONFIG)
    stored, dense = {}, {}
    for key, tensor in read_tensors(made.weights).items():
        stored[key] = dense[key] = tensor
        is_linear = tensor.dim() == 2 and "embed" not in key and "gate.weight" not in key
        if is_linear and key.removesuffix(".weight") not in PLAIN:
            stored[key], stored[f"{key}_scale_inv"], dense[key] = packed_fp8(tensor)
    save_file(stored, packed / "model.safetensors", metadata={"format": "pt"})
    save_file(dense, plain / "model.safetensors", metadata={"format": "pt"})
    artifacts = [build(path, out=root / "artifacts" / path.parent.name).path for path in (packed, plain)]
    return Small(weights=packed, artifact=artifacts[0]), Small(weights=plain, artifact=artifacts[1])


def test_a_packed_checkpoint_is_seen_as_the_plain_one(pair: tuple[Small, Small]) -> None:
    seen, plain = open_checkpoint(pair[0].weights), Checkpoint(pair[1].weights)
    assert list(seen) == list(plain)
    assert "quantization_config" not in seen.config
    for key in plain:
        assert seen.stored(key) == plain.stored(key)
        assert torch.equal(seen.read(key), plain.read(key))
        one, other = (b"".join(map(bytes, checkpoint.pieces(key))) for checkpoint in (seen, plain))
        assert one == other


def test_both_compile_to_the_same_tables(pair: tuple[Small, Small]) -> None:
    one, other = (small.load().manifest for small in pair)
    assert one.parameters == other.parameters
    assert one.subgraphs == other.subgraphs


@pytest.mark.parametrize(
    "plan",
    [gptq(), recipe("targets: Linear, scheme: NVFP4A16, ignore: [lm_head]")],
    ids=["gptq", "nvfp4"],
)
def test_what_is_made_of_either_is_the_same_to_the_byte(
    pair: tuple[Small, Small], tmp_path: Path, plan: runtime.Recipe
) -> None:
    found = []
    for number, small in enumerate(pair):
        calibrate(small, plan, tmp_path / str(number))
        found.append(made_bytes(tmp_path / str(number)))
    assert found[0] == found[1]
    config = json.loads(found[0]["config.json"])
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    tensors = read_tensors(tmp_path / "0")
    assert not any(tensor.dtype == torch.float8_e4m3fn and "scale" not in key for key, tensor in tensors.items())
    assert not any("scale_inv" in key for key in tensors)


def test_what_the_recipe_leaves_is_written_plain(pair: tuple[Small, Small], tmp_path: Path) -> None:
    plan = recipe(NARROW_W4.replace("lm_head", 'lm_head, "re:.*self_attn.*"'), modifier="GPTQModifier")
    calibrate(pair[0], plan, tmp_path / "out")
    found, plain = read_tensors(tmp_path / "out"), read_tensors(pair[1].weights)
    kept = [key for key in plain if key in found]
    assert any("self_attn" in key for key in kept)
    for key in kept:
        assert torch.equal(found[key], plain[key])


def test_layers_besides_the_model_are_plain_and_said_to_be(pair: tuple[Small, Small], tmp_path: Path) -> None:
    model = tmp_path / "model"
    with_config(pair[0].weights, model, None)
    tensors = read_tensors(pair[0].weights)
    weight = torch.randn(144, 160).bfloat16()
    for name in ("eh_proj", "mlp.experts.0.up_proj", "mlp.experts.1.up_proj"):
        key = f"model.layers.61.{name}.weight"  # transformers does not load DeepSeek-V3's last layer
        tensors[key], tensors[f"{key}_scale_inv"], dense = packed_fp8(weight)
    save_file(tensors, model / "model.safetensors")
    calibrate(pair[0], gptq(), tmp_path / "out", weights=model)
    assert torch.equal(read_tensors(tmp_path / "out")["model.layers.61.eh_proj.weight"], dense)
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert ignored[-2:] == ["model.layers.61.eh_proj", r"re:model\.layers\.61\.mlp\.experts\.\d+\."]


def test_perplexity_is_that_of_the_plain_one(pair: tuple[Small, Small]) -> None:
    one, other = (evaluate(small.load(), weights=small.weights, batches=token_batches()).perplexity for small in pair)
    assert one == other


def test_the_chain_is_the_model_with_plain_weights(
    pair: tuple[Small, Small], gpt_oss: tuple[Small, Path], run: Run
) -> None:
    for small in (pair[0], gpt_oss[0]):
        options = ["verify", str(small.artifact), "--weights", str(small.weights), "--dtype", "float32"]
        code, printed, complaint = run(options, seqbuild.cli.app.main)
        assert (code, complaint) == (0, "")
        assert "equal bit for bit" in printed


def test_an_interrupted_run_goes_on(pair: tuple[Small, Small], tmp_path: Path) -> None:
    calibrate(pair[0], gptq(), tmp_path / "whole")
    with pytest.raises(StopError):
        calibrate(pair[0], gptq(), tmp_path / "out", watchers=[Stopping()])
    result = calibrate(pair[0], gptq(), tmp_path / "out", resume=True)
    assert result.resumed_at > 0
    assert directory_bytes(tmp_path / "out") == directory_bytes(tmp_path / "whole")


# MXFP4


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> tuple[Small, Path]:
    """A model in MXFP4, and the directory of the same dequantized by transformers."""
    root = tmp_path_factory.mktemp("mxfp4")
    sizes = {**EXPERTS, "num_hidden_layers": 2, "num_local_experts": 4, "head_dim": 8, "intermediate_size": 32}
    made = make_small(root, "GptOssForCausalLM", "GptOssConfig", sizes, dtype=torch.bfloat16)
    plain, packed = root / "plain" / "oss", root / "packed" / "oss"
    with_config(made.weights, plain, None)
    with_config(made.weights, packed, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    generator = torch.Generator().manual_seed(0)
    stored, dense = {}, {}
    for key, tensor in read_tensors(made.weights).items():
        stored[key] = dense[key] = tensor
        if tensor.dim() == 3:
            num_experts, num_in, num_out = tensor.shape
            blocks = torch.randint(0, 256, (num_experts, num_out, num_in // 32, 16), generator=generator)
            scales = torch.randint(118, 124, (num_experts, num_out, num_in // 32), generator=generator)
            del stored[key]
            stored[f"{key}_blocks"], stored[f"{key}_scales"] = blocks.to(torch.uint8), scales.to(torch.uint8)
            dense[key] = convert_moe_packed_tensors(stored[f"{key}_blocks"], stored[f"{key}_scales"]).contiguous()
    save_file(stored, packed / "model.safetensors", metadata={"format": "pt"})
    save_file(dense, plain / "model.safetensors", metadata={"format": "pt"})
    return Small(weights=packed, artifact=build(packed, out=root / "artifacts").path), plain


def test_experts_in_mxfp4_are_what_transformers_makes_of_them(gpt_oss: tuple[Small, Path]) -> None:
    seen, plain = open_checkpoint(gpt_oss[0].weights), Checkpoint(gpt_oss[1])
    assert list(seen) == list(plain)
    for key in plain:
        assert seen.stored(key) == plain.stored(key)
        assert torch.equal(seen.read(key), plain.read(key))
        if len(plain.shape(key)) == 3:
            assert torch.equal(seen.read_part(key, 2), plain.read(key)[2])


def test_a_model_in_mxfp4_is_calibrated_as_the_plain_one(gpt_oss: tuple[Small, Path], tmp_path: Path) -> None:
    for name, weights in (("packed", gpt_oss[0].weights), ("plain", gpt_oss[1])):
        calibrate(gpt_oss[0], gptq(), tmp_path / name, weights=weights)
    assert made_bytes(tmp_path / "packed") == made_bytes(tmp_path / "plain")


def test_separate_experts_of_an_output_are_a_source_of_the_stacked_model(
    gpt_oss: tuple[Small, Path], tmp_path: Path
) -> None:
    plan = recipe("targets: Linear, scheme: FP8_DYNAMIC, ignore: [lm_head, 're:.*router.*']")
    calibrate(gpt_oss[0], plan, tmp_path / "first")
    calibrate(gpt_oss[0], plan, tmp_path / "second", weights=tmp_path / "first")
    first, second = (read_tensors(tmp_path / name) for name in ("first", "second"))
    assert list(first) == list(second) and any("experts.3.up_proj.weight_scale" in key for key in first)
    assert all(first[key].dtype == second[key].dtype for key in first)
    result = runtime.dequantize(tmp_path / "first", out=tmp_path / "plain")
    assert "does not join those of gpt_oss" in result.remarks[0]


# What cannot be taken


@pytest.mark.parametrize("method", ["aqlm", "bitsandbytes", "hqq", None])
def test_other_forms_are_refused_before_anything_runs(
    pair: tuple[Small, Small], tmp_path: Path, run: Run, method: str | None
) -> None:
    model = tmp_path / "model"
    shutil.copytree(pair[1].weights, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": method, "bits": 4}})
    )
    tensors = read_tensors(model)
    tensors["model.layers.0.mlp.up_proj.qweight"] = tensors.pop("model.layers.0.mlp.up_proj.weight")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    code, _, complaint = run(["compile", str(model), "--out", str(tmp_path / "artifacts")], seqbuild.cli.app.main)
    assert code != 0
    assert f"is quantized by '{method or 'no quant_method'} 4 bits', a format that is not supported" in complaint
    with pytest.raises(WeightsError, match="is quantized by"):
        calibrate(pair[1], gptq(), tmp_path / "out", weights=model)
    with pytest.raises(WeightsError, match="is quantized by"):
        evaluate(pair[1].load(), weights=model, batches=token_batches())
    assert sorted(path.name for path in tmp_path.iterdir()) in (["model"], ["artifacts", "model"])


_WEIGHT, _SCALE = "a.weight", "a.weight_scale_inv"


def headers(shapes: dict[str, tuple[int, ...]]) -> SourceHeaders:
    kinds = {key: "F8_E4M3" if key == _WEIGHT else "U8" for key in shapes}
    tensors = {key: Stored(key, kinds[key], shape) for key, shape in shapes.items()}
    return SourceHeaders(tensors=tensors, origin="here", integers=lambda _: ())


@pytest.mark.parametrize(
    ("entry", "shapes", "complaint"),
    [
        ({}, {_SCALE: (2, 2)}, "without its weight 'a.weight'"),
        ({}, {_WEIGHT: (200, 300), _SCALE: (2, 2)}, "blocks of 128x128"),
        ({"weight_block_size": [0, 128]}, {}, "weight_block_size"),
        ({"weight_block_size": "128"}, {}, "weight_block_size"),
        ({"weight_block_size": None}, {_WEIGHT: (0, 300), _SCALE: (1,)}, "needs a matrix"),
        ({"quant_method": "mxfp4"}, {"x_blocks": (0, 8, 1, 16), "x_scales": (0, 8, 1)}, "are not valid MXFP4 experts"),
        ({"quant_method": "mxfp4"}, {"x_blocks": (2, 8, 1, 16)}, "are not valid MXFP4 experts"),
        ({"quant_method": "mxfp4"}, {"x_blocks": (2, 8, 1, 8), "x_scales": (2, 8, 1)}, "are not valid MXFP4 experts"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    entry: dict[str, Any], shapes: dict[str, tuple[int, ...]], complaint: str
) -> None:
    with pytest.raises(WeightsError, match=complaint):
        packed_tensors({"quantization_config": {"quant_method": "fp8", **entry}}, headers(shapes))


def test_scales_of_whole_tensors_and_of_inputs() -> None:
    shapes = {_WEIGHT: (200, 300), _SCALE: (), "a.activation_scale": ()}
    config = {"text_config": {"quantization_config": {"quant_method": "fp8", "weight_block_size": None}}}
    found = packed_tensors(config, headers(shapes))
    assert found.tensors[_WEIGHT].shape == (200, 300)
    numbers = torch.randn(200, 300).to(torch.float8_e4m3fn)
    made = found.tensors[_WEIGHT].compute({"weight": numbers, "scale": torch.tensor(0.25)}, torch.float32)
    assert torch.equal(made, numbers.float() / 4)
    assert found.unused == ("a.activation_scale",)


def test_float8_without_a_scale_is_refused(pair: tuple[Small, Small], tmp_path: Path) -> None:
    model = tmp_path / "model"
    with_config(pair[0].weights, model, None)
    tensors = read_tensors(pair[0].weights)
    lost = next(key for key in tensors if key.endswith("_scale_inv"))
    save_file({key: tensor for key, tensor in tensors.items() if key != lost}, model / "model.safetensors")
    with pytest.raises(WeightsError, match="has no scale"):
        open_checkpoint(model)


def test_a_view_reads_what_lies_on_disk(pair: tuple[Small, Small], small_bytes: Callable[[Path], int]) -> None:
    seen = open_checkpoint(pair[0].weights)
    for key in seen:
        seen.read(key)
    assert seen.bytes_read == small_bytes(pair[0].weights)


@pytest.fixture
def small_bytes() -> Callable[[Path], int]:
    def count(directory: Path) -> int:
        return sum(tensor.nbytes for tensor in read_tensors(directory).values())

    return count
