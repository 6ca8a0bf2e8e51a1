"""A small Llama-like model that brings its own code: config class, layers and heads in plain torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

CONFIGURATION = """\
from transformers import PretrainedConfig


class ToyConfig(PretrainedConfig):
    model_type = "toy_llama"

    def __init__(
        self,
        vocab_size=258,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        epsilon=1e-5,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.epsilon = epsilon
        super().__init__(**kwargs)
"""
LAYERS = """\
import torch
from torch import nn


def rotate(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class ToyNorm(nn.Module):
    def __init__(self, size, epsilon):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x):
        scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.epsilon)
        return self.weight * (x.float() * scale).to(x.dtype)


class ToyDecoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        size, self.num_heads = config.hidden_size, config.num_attention_heads
        self.attention_norm = ToyNorm(size, config.epsilon)
        self.qkv_proj = nn.Linear(size, 3 * size, bias=False)
        self.o_proj = nn.Linear(size, size, bias=False)
        self.mlp_norm = ToyNorm(size, config.epsilon)
        self.gate_proj = nn.Linear(size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, size, bias=False)

    def forward(self, x, mask, cos, sin):
        from .toy_activation import gate  # imported when it is called, as some models do

        batch, length, size = x.shape
        q, k, v = self.qkv_proj(self.attention_norm(x)).view(batch, length, 3, self.num_heads, -1).unbind(2)
        q, k, v = rotate(q.transpose(1, 2), cos, sin), rotate(k.transpose(1, 2), cos, sin), v.transpose(1, 2)
        scores = (q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5 + mask
        attended = scores.float().softmax(-1).to(x.dtype) @ v
        x = x + self.o_proj(attended.transpose(1, 2).reshape(batch, length, size))
        y = self.mlp_norm(x)
        return x + self.down_proj(gate(self.gate_proj(y)) * self.up_proj(y))
"""
ACTIVATION = """\
import torch


def gate(x):
    return torch.nn.functional.silu(x)
"""
MODELING = """\
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .configuration_toy import ToyConfig
from .toy_layers import ToyDecoderLayer, ToyNorm


def causal_mask(attention_mask, length, dtype):
    lowest = torch.finfo(dtype).min
    places = torch.arange(length, device=attention_mask.device)
    is_seen = (places[None, :] <= places[:, None])[None, None] & attention_mask[:, None, None, :].bool()
    return torch.where(is_seen, 0.0, lowest).to(dtype)


class ToyPreTrainedModel(PreTrainedModel):
    config_class = ToyConfig
    base_model_prefix = "model"
    _no_split_modules = ["ToyDecoderLayer"]

    def _init_weights(self, module):
        pass


class ToyModel(ToyPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([ToyDecoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = ToyNorm(config.hidden_size, config.epsilon)
        self.head_size = config.hidden_size // config.num_attention_heads
        self.post_init()

    def forward(self, input_ids, attention_mask=None):
        x = self.embed_tokens(input_ids)
        length = input_ids.shape[1]
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        mask = causal_mask(attention_mask, length, x.dtype)
        steps = torch.arange(0, self.head_size, 2, device=x.device).float() / self.head_size
        angles = torch.arange(length, device=x.device).float()[:, None] / 10000.0**steps
        angles = torch.cat((angles, angles), dim=-1)
        for layer in self.layers:
            x = layer(x, mask, angles.cos().to(x.dtype), angles.sin().to(x.dtype))
        return self.norm(x)


class ToyForCausalLM(ToyPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = ToyModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        return CausalLMOutput(logits=self.lm_head(self.model(input_ids, attention_mask)))
"""
FILES = {
    "configuration_toy.py": CONFIGURATION,
    "modeling_toy.py": MODELING,
    "toy_activation.py": ACTIVATION,
    "toy_layers.py": LAYERS,
}
AUTO_MAP = {"AutoConfig": "configuration_toy.ToyConfig", "AutoModelForCausalLM": "modeling_toy.ToyForCausalLM"}
WIDTH, INNER, LAYER_COUNT, VOCABULARY = 128, 256, 2, 258


def write_own_code_model(
    directory: Path,
    files: Mapping[str, str] = FILES,
    auto_map: Mapping[str, Any] = AUTO_MAP,
    tokenizer: Path | None = None,
    *,
    with_weights: bool = False,
    **config: Any,
) -> Path:
    """Write a model directory and return it."""
    directory.mkdir(parents=True)
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)
    stated = {
        "architectures": ["ToyForCausalLM"],
        "auto_map": auto_map,
        "dtype": "float32",
        "epsilon": 1e-5,
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "max_position_embeddings": 256,
        "model_type": "toy_llama",
        "num_attention_heads": 4,
        "num_hidden_layers": LAYER_COUNT,
        "vocab_size": VOCABULARY,
    }
    (directory / "config.json").write_text(json.dumps(stated | config, indent=2))
    if tokenizer is not None:
        shutil.copytree(tokenizer, directory, dirs_exist_ok=True)
    if with_weights:
        save_file(_weights(), directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def _weights() -> dict[str, torch.Tensor]:
    shapes: dict[str, tuple[int, ...]] = {"lm_head.weight": (VOCABULARY, WIDTH), "model.norm.weight": (WIDTH,)}
    shapes["model.embed_tokens.weight"] = (VOCABULARY, WIDTH)
    for layer in range(LAYER_COUNT):
        of_layer: dict[str, tuple[int, ...]] = {
            "attention_norm": (WIDTH,),
            "qkv_proj": (3 * WIDTH, WIDTH),
            "o_proj": (WIDTH, WIDTH),
            "mlp_norm": (WIDTH,),
            "gate_proj": (INNER, WIDTH),
            "up_proj": (INNER, WIDTH),
            "down_proj": (WIDTH, INNER),
        }
        shapes.update({f"model.layers.{layer}.{name}.weight": shape for name, shape in of_layer.items()})
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator) * 0.1 + (1 if len(shape) == 1 else 0)
        for name, shape in shapes.items()
    }
