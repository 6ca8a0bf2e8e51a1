"""Quantize a model with another program, and write the weights that this program computes of its checkpoint.

    python make_inputs.py NAME MODEL OUT

It runs in the environment of `exporters.txt`. OUT/checkpoint is the checkpoint, and OUT/truth.safetensors has its
weights.
"""

from __future__ import annotations

import copy
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

GPTQ, AWQ, MODELOPT = "GPTQModel", "AutoRound", "ModelOpt"
_MIXED = {"+:.*down_proj.*": {"bits": 8, "group_size": 32}, "-:.*k_proj.*": {}}
# By name: the program that quantizes, and its options.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gptq act order": (GPTQ, {"bits": 4, "group_size": 128, "desc_act": True}),
    "gptq_v2 dynamic": (GPTQ, {"bits": 4, "group_size": 64, "sym": False, "format": "gptq_v2", "dynamic": _MIXED}),
    "gptq 4 bits": (AWQ, {"format": "auto_gptq", "bits": 4, "group_size": 128, "sym": True}),
    "gptq 4 bits asymmetric": (AWQ, {"format": "auto_gptq", "bits": 4, "group_size": 32, "sym": False}),
    "gptq 3 bits": (AWQ, {"format": "auto_gptq", "bits": 3, "group_size": 64, "sym": True}),
    "gptq 8 bits": (AWQ, {"format": "auto_gptq", "bits": 8, "group_size": 128, "sym": True}),
    "gptq 2 bits asymmetric": (AWQ, {"format": "auto_gptq", "bits": 2, "group_size": 32, "sym": False}),
    "auto-round": (AWQ, {"format": "auto_round", "bits": 4, "group_size": 128, "sym": True}),
    "awq": (AWQ, {"format": "auto_awq", "bits": 4, "group_size": 128, "sym": False}),
    "awq symmetric": (AWQ, {"format": "auto_awq", "bits": 4, "group_size": 64, "sym": True}),
    "modelopt fp8": (MODELOPT, {"config": "FP8_DEFAULT_CFG"}),
    "modelopt nvfp4": (MODELOPT, {"config": "NVFP4_DEFAULT_CFG"}),
}


def main() -> int:
    name, model, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    program, options = CASES[name]
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    checkpoint = {GPTQ: by_gptqmodel, AWQ: by_autoround, MODELOPT: by_modelopt}[program](model, out, dict(options))
    checkpoint.rename(out / "checkpoint")
    truth = of_modelopt if program == MODELOPT else of_autoround if is_of_autoround(options) else of_gptqmodel
    save_file(dict(truth(out / "checkpoint")), out / "truth.safetensors")
    return 0


def is_of_autoround(options: dict[str, Any]) -> bool:
    """Whether only AutoRound itself loads it: GPTQModel takes its asymmetric weights for those of an old program."""
    return options.get("format") == "auto_round" or (options.get("format") == "auto_gptq" and not options["sym"])


def ids() -> torch.Tensor:
    return torch.randint(3, 500, (16, 128), generator=torch.Generator().manual_seed(0))


def by_gptqmodel(model: Path, out: Path, options: dict[str, Any]) -> Path:
    from gptqmodel import GPTQModel, QuantizeConfig

    loaded = GPTQModel.load(str(model), QuantizeConfig(**options))
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids().tolist()]
    loaded.quantize(rows, batch_size=4)
    loaded.save(str(out / "saved"))
    return out / "saved"


def by_autoround(model: Path, out: Path, options: dict[str, Any]) -> Path:
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float16)
    tokenizer = AutoTokenizer.from_pretrained(model)
    form = options.pop("format")
    rounding = AutoRound(loaded, tokenizer, iters=0, disable_opt_rtn=True, device_map="cpu", **options)
    rounding.quantize_and_save(str(out / "saved"), format=form)
    return next(path.parent for path in (out / "saved").rglob("config.json"))


def by_modelopt(model: Path, out: Path, options: dict[str, Any]) -> Path:
    import modelopt.torch.quantization as quantization
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    config = copy.deepcopy(getattr(quantization, options["config"]))
    quantization.quantize(loaded, config, forward_loop=lambda module: module(ids()))
    export_hf_checkpoint(loaded, export_dir=out / "saved")
    return out / "saved"


def of_gptqmodel(checkpoint: Path) -> Iterator[tuple[str, torch.Tensor]]:
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    is_awq = entry_of(checkpoint)["quant_method"] == "awq"
    backend = BACKEND.TORCH_AWQ if is_awq else BACKEND.TORCH
    loaded = GPTQModel.load(str(checkpoint), device="cpu", backend=backend, dtype=torch.float16)
    for name, module in loaded.model.named_modules():
        if is_awq and hasattr(module, "qweight"):
            parts = (module.qweight, module.qzeros, module.scales)
            yield f"{name}.weight", dequantize_gemm(*parts, module.bits, module.group_size).T.contiguous()
        elif hasattr(module, "qweight"):
            yield f"{name}.weight", module.dequantize_weight().T.contiguous()


def of_autoround(checkpoint: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """What its layers return for the rows of the unit matrix, in which each sum has one term."""
    from auto_round_extension.torch.qlinear_torch_zp import QuantLinear

    entry, tensors = entry_of(checkpoint), tensors_of(checkpoint)
    for key in [key for key in tensors if key.endswith(".qweight")]:
        name = key.removesuffix(".qweight")
        num_in, num_out = tensors[key].shape[0] * 32 // entry["bits"], tensors[key].shape[1]
        module = QuantLinear(entry["bits"], entry["group_size"], num_in, num_out, False)
        for part in ("qweight", "qzeros", "scales"):
            setattr(module, part, tensors[f"{name}.{part}"])
        yield f"{name}.weight", module(torch.eye(num_in, dtype=torch.float16)).T.contiguous()


def of_modelopt(checkpoint: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """In the dtype of the model. A weight in FP8 is computed in float32: in bfloat16, its scale would be rounded."""
    from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor

    tensors = tensors_of(checkpoint)
    for key in [key for key in tensors if key.endswith(".weight_scale")]:
        name, scale = key.removesuffix("_scale"), tensors[key]
        numbers, second = tensors[name], tensors.get(f"{key}_2")
        if second is None:
            made = FP8QTensor(numbers.shape, torch.float32, numbers).dequantize(torch.float32, scale=scale)
        else:
            shape = torch.Size((numbers.shape[0], 2 * numbers.shape[1]))
            packed = NVFP4QTensor(shape, torch.bfloat16, numbers)
            made = packed.dequantize(torch.bfloat16, scale=scale, double_scale=second, block_sizes={-1: 16})
        yield name, made.bfloat16().contiguous()


def entry_of(checkpoint: Path) -> dict[str, Any]:
    entry: dict[str, Any] = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    return entry


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    with safe_open(checkpoint / "model.safetensors", framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dict


if __name__ == "__main__":
    sys.exit(main())
