"""Model directories whose weights are not what their names and config.json say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import seqbuild.cli.app
from tests.runtime.place import RTN, Place, Run, assert_refused
from tests.runtime.small import Small, calibrate, read_tensors, recipe

Spoil = Callable[[Path], list[str]]
UP = "model.layers.0.mlp.up_proj"


def set_entry(directory: Path, **entries: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | entries))


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = read_tensors(directory)
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def adapter(directory: Path) -> list[str]:
    (directory / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"base_model.model.x.lora_A.weight": torch.ones(2)}, directory / "adapter_model.safetensors")
    return ["contains a PEFT adapter (adapter_config.json)", "merge_and_unload"]


def adapter_without_config(directory: Path) -> list[str]:
    (directory / "adapter_model.bin").write_bytes(b"x")
    return ["contains a PEFT adapter (adapter_model.bin)"]


def float8_without_scales(directory: Path) -> list[str]:
    rewrite(directory, lambda t: t.update({f"{UP}.weight": t[f"{UP}.weight"].to(torch.float8_e4m3fn)}))
    return [f"'{UP}.weight' in F8_E4M3", "its config.json has no quantization_config"]


def gptq_files(directory: Path) -> list[str]:
    rewrite(directory, lambda t: t.update({f"{UP}.qweight": t.pop(f"{UP}.weight").to(torch.int32)}))
    (directory / "quantize_config.json").write_text('{"bits": 4, "group_size": 128}')
    return [f"missing tensor '{UP}.qzeros'", "copy or export the checkpoint again"]


def bitsandbytes(directory: Path) -> list[str]:
    rewrite(directory, lambda t: t.update({f"{UP}.weight.absmax": torch.ones(3)}))
    return ["bitsandbytes", "has no quantization_config"]


def stale_fp8(directory: Path) -> list[str]:
    set_entry(directory, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    return [
        "has a quantization_config (fp8), but the weights are not quantized",
        "remove the entry 'quantization_config'",
    ]


def stale_part(directory: Path) -> list[str]:
    set_entry(directory, text_config={"quantization_config": {"quant_method": "awq", "bits": 4}})
    return ["(awq 4 bits)", "remove the entry 'text_config.quantization_config'"]


def stale_compressed_tensors(directory: Path) -> list[str]:
    group = {"targets": ["Linear"], "weights": {"num_bits": 4}}
    set_entry(directory, quantization_config={"quant_method": "compressed-tensors", "config_groups": {"g": group}})
    return ["compressed-tensors", "remove the entry 'quantization_config'"]


def stale_old_entry(directory: Path) -> list[str]:
    group = {"targets": ["Linear"], "weights": {"num_bits": 4}}
    set_entry(directory, compression_config={"quant_method": "compressed-tensors", "config_groups": {"g": group}})
    return ["has a compression_config (compressed-tensors)", "remove the entry 'compression_config'"]


def no_groups(directory: Path) -> list[str]:
    set_entry(directory, quantization_config={"quant_method": "compressed-tensors", "config_groups": {}})
    return ["has a quantization_config (compressed-tensors), but the weights are not quantized"]


def rounds_while_running(directory: Path) -> list[str]:
    entry = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
    set_entry(directory, quantization_config=entry)
    return ["(bitnet): layers of this model quantize weights and inputs in the forward pass"]


def fp8_without_scales(directory: Path) -> list[str]:
    float8_without_scales(directory)
    set_entry(directory, quantization_config={"quant_method": "fp8"})
    return [f"'{UP}.weight' is in float8 and has no scale ({UP}.weight_scale_inv)"]


def torchao(directory: Path) -> list[str]:
    rewrite(directory, lambda t: t.update({f"{UP}._weight_qdata": t.pop(f"{UP}.weight").to(torch.int8)}))
    return [f"'{UP}._weight_qdata' in I8, torchao"]


def sharded(directory: Path) -> list[str]:
    tensors = read_tensors(directory)
    (directory / "model.safetensors").unlink()
    tensors[f"{UP}.weight"] = tensors[f"{UP}.weight"].to(torch.float8_e5m2)
    parts = [dict(list(tensors.items())[start::2]) for start in (0, 1)]
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for name, part in zip(names, parts, strict=True):
        save_file(part, directory / name, metadata={"format": "pt"})
    index = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return [f"'{UP}.weight' in F8_E5M2"]


SPOILS = [
    stale_old_entry,
    no_groups,
    rounds_while_running,
    fp8_without_scales,
    torchao,
    sharded,
    adapter,
    adapter_without_config,
    float8_without_scales,
    gptq_files,
    bitsandbytes,
    stale_fp8,
    stale_part,
    stale_compressed_tensors,
]


@pytest.mark.parametrize("spoil", SPOILS)
def test_what_would_be_read_wrongly_is_rejected(place: Place, run: Run, spoil: Spoil) -> None:
    place.recipe.write_text(RTN)
    expected = spoil(place.weights)
    before = place.tree()
    assert_refused(run(place.calibrate()), *expected)
    assert_refused(run(place.evaluate()), *expected)
    compiled = run(["compile", str(place.weights), "--out", str(place.folder / "other")], seqbuild.cli.app.main)
    assert_refused(compiled, *expected, program="seqbuild")
    assert [name for name in place.tree() if not name.startswith("other")] == before


def test_an_adapter_alone_is_named(tmp_path: Path, run: Run) -> None:
    expected = adapter(tmp_path)
    result = run(["compile", str(tmp_path), "--out", str(tmp_path / "out")], seqbuild.cli.app.main)
    assert_refused(result, *expected, program="seqbuild")


def test_files_of_other_tools_are_not_copied(narrow_llama: Small, tmp_path: Path) -> None:
    """VLLM reads hf_quant_config.json before it looks at the quantization_config of config.json."""
    weights = Path(shutil.copytree(narrow_llama.weights, tmp_path / "weights"))
    for name in ("hf_quant_config.json", "quantize_config.json", "quant_config.json"):
        (weights / name).write_text('{"quantization": {"quant_algo": "FP8"}}')
    plan = recipe("targets: Linear, scheme: FP8_DYNAMIC, ignore: [lm_head]")
    calibrate(narrow_llama, plan, tmp_path / "out", weights=weights)
    assert not list((tmp_path / "out").glob("*quant*"))
