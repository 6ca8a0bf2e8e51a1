"""The command that writes plain checkpoints, and quantized checkpoints as the input of a run."""

from __future__ import annotations

import json
import shutil
import warnings
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

import runtime
import seqbuild.cli.app
from runtime.checkpoint.companions import may_be_copied
from runtime.errors import OutputError, UsageError, WeightsError
from runtime.provenance.record import read_record
from tests.runtime.checkpoint.packing import gptq_module, plain, write
from tests.runtime.place import Run
from tests.runtime.small import NARROW, Small, calibrate, load_transformers, make_small, read_tensors, recipe

ENTRY = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False}
FP8 = recipe("targets: Linear, scheme: FP8_DYNAMIC, ignore: [lm_head]")
Pair = tuple[Small, Small]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A model in GPTQ with artifact, and the same with the weights that the numbers stand for, in float16."""
    root = tmp_path_factory.mktemp("gptq")
    made = make_small(root, "LlamaForCausalLM", "LlamaConfig", {**NARROW, "num_hidden_layers": 2}, dtype=torch.float16)
    quantized = Path(shutil.copytree(made.weights, root / "quantized"))
    tensors = read_tensors(made.weights)
    for key, weight in list(tensors.items()):
        num_out, num_in = weight.shape if "proj" in key else (0, 0)
        if num_out % 16 == 0 and num_out:
            module = key.removesuffix(".weight")
            parts, dense = gptq_module(4, [i // 16 for i in range(num_in)], num_out=num_out)
            tensors[key] = dense.half()
            save_file(tensors, made.weights / "model.safetensors", metadata={"format": "pt"})
            tensors |= {f"{module}.{name}": part for name, part in parts.items()}
    packed = {key: tensor for key, tensor in tensors.items() if f"{key.removesuffix('.weight')}.qweight" not in tensors}
    save_file(packed, quantized / "model.safetensors", metadata={"format": "pt"})
    dense = {
        key: tensor for key, tensor in tensors.items() if not key.endswith(("qweight", "qzeros", "scales", "g_idx"))
    }
    save_file(dense, made.weights / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((quantized / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps({**config, "quantization_config": ENTRY}))
    (quantized / "quantize_config.json").write_text(json.dumps(ENTRY))
    return Small(weights=quantized, artifact=made.artifact), made


def test_the_plain_checkpoint_is_that_of_the_model(pair: Pair, tmp_path: Path, run: Run) -> None:
    quantized, model = pair
    out = tmp_path / "out"
    code, said, complaint = run(["dequantize", str(quantized.weights), "-o", str(out), "--max-shard-size", "20kB"])
    assert (code, complaint) == (0, "")
    assert "14 of 21 tensors dequantized from gptq 4 bits" in said and "in float16" in said
    found, expected = read_tensors(out), read_tensors(model.weights)
    assert list(found) and {key: raw.dtype for key, raw in found.items()} == {k: t.dtype for k, t in expected.items()}
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    assert json.loads((out / "config.json").read_text()) == json.loads((model.weights / "config.json").read_text())
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert sorted(index) == sorted(expected) and len(set(index.values())) > 2
    others = {path.name for path in quantized.weights.iterdir() if may_be_copied(path.name)}
    assert {path.name for path in out.iterdir()} == {*others, *index.values(), "model.safetensors.index.json"}
    one, other = (load_transformers(directory).state_dict() for directory in (out, model.weights))
    assert all(torch.equal(one[key], tensor) for key, tensor in other.items())


def test_a_run_from_the_quantized_checkpoint_equals_one_from_the_plain_one(pair: Pair, tmp_path: Path) -> None:
    for name, small in zip(("quantized", "plain"), pair, strict=True):
        calibrate(small, FP8, tmp_path / name)
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("quantized", "plain"))
    assert one == other


def test_one_call_quantizes_a_quantized_model(pair: Pair, tmp_path: Path, run: Run) -> None:
    command = ["quantize", str(pair[0].weights), "--scheme", "FP8_DYNAMIC", "--no-evaluate"]
    command += ["--artifacts", str(tmp_path / "artifacts"), "-o", str(tmp_path / "out")]
    code, _, complaint = run(command, seqbuild.cli.app.main)
    assert (code, complaint) == (0, "")
    calibrate(pair[1], FP8, tmp_path / "plain")
    assert "the weights of the source are quantized (gptq 4 bits)" in (tmp_path / "out/README.md").read_text()
    assert read_record(tmp_path / "plain").warnings == ()
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "plain/model.safetensors").read_bytes()
    # Its own output is a source, too: what compressed-tensors computes of it is what is written.
    runtime.dequantize(tmp_path / "out", out=tmp_path / "again")
    config = transformers.CompressedTensorsConfig(dequantize=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load = transformers.AutoModelForCausalLM.from_pretrained
        model = load(tmp_path / "out", dtype="auto", quantization_config=config)
    written = load_transformers(tmp_path / "again").state_dict()
    assert all(torch.equal(written[key], tensor) for key, tensor in model.state_dict().items() if key in written)


@pytest.mark.parametrize(("dtype", "expected"), [("bfloat16", torch.bfloat16), ("float32", torch.float32)])
def test_another_dtype_applies_to_all_weights(pair: Pair, tmp_path: Path, dtype: str, expected: torch.dtype) -> None:
    bias = {"model.layers.0.mlp.gate.e_score_correction_bias": torch.randn(4), "count": torch.tensor([3])}
    tensors, _ = gptq_module()
    source = write(tmp_path / "in", ENTRY, {"a": tensors}, {**bias, "norm.weight": torch.ones(4).half()})
    config = {"dtype": "float16", "vision_config": {"torch_dtype": "float16"}, "quantization_config": ENTRY}
    (source / "config.json").write_text(json.dumps(config))
    result = runtime.dequantize(source, out=tmp_path / "out", dtype=dtype)
    found = read_tensors(tmp_path / "out")
    assert {found["a.weight"].dtype, found["norm.weight"].dtype} == {expected}
    assert all(torch.equal(found[key], tensor) for key, tensor in bias.items())
    assert torch.equal(found["a.weight"], plain(source).read("a.weight").to(expected))
    assert json.loads((tmp_path / "out/config.json").read_text()) == {
        "dtype": dtype,
        "vision_config": {"torch_dtype": dtype},
    }
    assert (result.num_dequantized, result.num_tensors, result.dtype) == (1, 4, dtype)


def test_an_interrupted_run_is_resumed(pair: Pair, tmp_path: Path) -> None:
    out, seen = tmp_path / "out", []

    def stop(line: str) -> None:
        seen.append(line)
        if line.startswith("shard 3"):
            raise KeyboardInterrupt

    options: dict[str, Any] = {"out": out, "max_shard_bytes": 20_000}
    runtime.dequantize(pair[0].weights, **{**options, "out": tmp_path / "whole"})
    with pytest.raises(KeyboardInterrupt):
        runtime.dequantize(pair[0].weights, **options, progress=stop)
    assert not out.exists()
    with pytest.raises(OutputError, match="2 finished shards") as failed:
        runtime.dequantize(pair[0].weights, **options)
    assert "--resume" in str(failed.value.hint)
    with pytest.raises(OutputError, match="differs from the interrupted one in the dtype"):
        runtime.dequantize(pair[0].weights, **options, dtype="float32", resume=True)
    again: list[str] = []
    result = runtime.dequantize(pair[0].weights, **options, resume=True, progress=again.append)
    assert result.num_resumed == 2 and again[0].startswith("shard 3")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()
    }
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_outputs_that_cannot_be_written(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(OutputError, match="is not empty"):
        runtime.dequantize(pair[0].weights, out=tmp_path / "full")
    with pytest.raises(OutputError, match="is inside the input directory"):
        runtime.dequantize(pair[0].weights, out=pair[0].weights / "out")
    with pytest.raises(UsageError, match="dtype must be one of"):
        runtime.dequantize(pair[0].weights, out=tmp_path / "out", dtype="int8")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(100, 99, 1))
    with pytest.raises(OutputError, match="but its disk has 1 B left"):
        runtime.dequantize(pair[0].weights, out=tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_sources_that_cannot_be_dequantized(pair: Pair, tmp_path: Path, run: Run) -> None:
    code, _, complaint = run(["dequantize", str(pair[1].weights), "-o", str(tmp_path / "out")])
    assert code == 2 and "is not quantized, so there is nothing to dequantize" in complaint
    tensors, _ = gptq_module()
    large = {"norm.weight": torch.full((4,), 1e6).bfloat16()}
    source = write(tmp_path / "large", ENTRY, {"a": tensors}, large)
    with pytest.raises(WeightsError, match="has numbers that are not finite in float16") as failed:
        runtime.dequantize(source, out=tmp_path / "out")
    assert "bfloat16" in str(failed.value.hint)
    stray = write(tmp_path / "stray", ENTRY, {"a": tensors}, {"b.weight": torch.ones(4).to(torch.float8_e4m3fn)})
    with pytest.raises(WeightsError, match="belongs to no weight that its quantization"):
        runtime.dequantize(stray, out=tmp_path / "out")
    data = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(WeightsError, match="is damaged or not a safetensors file"):
        runtime.dequantize(source, out=tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large", "stray"]
    (source / "model.safetensors").rename(source / "model.gguf")
    with pytest.raises(WeightsError, match="GGUF file, which is not supported"):
        runtime.dequantize(source, out=tmp_path / "out")


def test_code_of_the_model_is_copied_and_not_executed(tmp_path: Path) -> None:
    source = write(tmp_path / "in", ENTRY, {"a": gptq_module()[0]}, auto_map={"AutoConfig": "own.Config"})
    (source / "own.py").write_text("raise SystemExit('executed')")
    (source / "link.py").symlink_to("/etc/hostname")
    runtime.dequantize(source, out=tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors", "own.py"]


def test_stacked_experts_are_computed_one_at_a_time(tmp_path: Path) -> None:
    blocks = torch.randint(0, 256, (3, 8, 1, 16), dtype=torch.uint8)
    scales = torch.full((3, 8, 1), 127, dtype=torch.uint8)
    parts = {"mlp.experts.down_proj_blocks": blocks, "mlp.experts.down_proj_scales": scales}
    source = write(tmp_path / "in", {"quant_method": "mxfp4"}, {}, parts)
    checkpoint = plain(source, "bfloat16")
    sizes = [len(piece) for piece in checkpoint.pieces("mlp.experts.down_proj")]
    assert sizes == [32 * 8 * 2] * 3
    runtime.dequantize(source, out=tmp_path / "out", dtype="bfloat16")
    assert torch.equal(
        read_tensors(tmp_path / "out")["mlp.experts.down_proj"], checkpoint.read("mlp.experts.down_proj")
    )
