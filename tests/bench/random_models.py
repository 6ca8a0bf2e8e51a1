"""Checkpoints of random weights, made on the spot, shard by shard, so that a large one needs no memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "demo" / "model"  # any will do: samples are tokens by then

_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}
# The shape of TinyLlama, of Llama 3 8B, and of something that a test can wait for.
LLAMA_1B = _LLAMA | {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}
LLAMA_8B = _LLAMA | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rope_theta": 500000.0,
}
TINY = _LLAMA | {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
}


def make_llama(
    directory: Path, config: Mapping[str, Any], *, layers_per_shard: int = 4, seed: int = 0, device: str = "cpu"
) -> Path:
    """Write a Llama with random bf16 weights, made on `device`, config, and a tokenizer; returns the directory."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    for path in sorted(TOKENIZER.glob("token*.json")):
        shutil.copy(path, directory)
    generator = torch.Generator(device).manual_seed(seed)
    weight_map: dict[str, str] = {}
    total = 0
    shards = list(_shards(config, layers_per_shard))
    for number, shapes in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {key: _random(shape, generator) for key, shape in shapes.items()}
        save_file(tensors, directory / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return directory


def _random(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    numbers = torch.randn(shape, generator=generator, device=generator.device)
    return (numbers * shape[1] ** -0.5).to(torch.bfloat16).cpu()


def _shards(config: Mapping[str, Any], layers_per_shard: int) -> Iterator[dict[str, tuple[int, ...]]]:
    hidden, vocab_size = config["hidden_size"], config["vocab_size"]
    yield {"model.embed_tokens.weight": (vocab_size, hidden)}
    layers = range(config["num_hidden_layers"])
    for start in layers[::layers_per_shard]:
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in layers[start : start + layers_per_shard]:
            shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in _layer(config).items()}
        yield shapes
    yield {"model.norm.weight": (hidden,), "lm_head.weight": (vocab_size, hidden)}


def _layer(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    return {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
