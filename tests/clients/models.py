"""The models that other programs are given: the demo's, and small ones from a fixed seed."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "demo" / "model"
_VOCABULARY = 512
_SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": _VOCABULARY,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_HEADS = {**_SIZES, "head_dim": 64}
_SOFT = {**_HEADS, "query_pre_attn_scalar": 64, "sliding_window": 64}
_EXPERTS = {**_HEADS, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "intermediate_size": 256}
_LATENT = {
    **{key: value for key, value in _EXPERTS.items() if key != "head_dim"},
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 128,
    "q_lora_rank": 128,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "topk_method": "noaux_tc",  # as DeepSeek's own config says, and vLLM asks for
}


@dataclass(frozen=True, kw_only=True)
class Model:
    """A causal language model: its classes and sizes, what kind it is for the tables, what recipes leave alone."""

    model_class: str
    config_class: str
    sizes: Mapping[str, Any] = field(default_factory=dict)
    kind: str
    ignore: tuple[str, ...] = ("lm_head",)

    def make(self, directory: Path) -> Path:
        """Save it with weights that make each layer matter, and no rounding error grow much."""
        config = getattr(transformers, self.config_class)(**self.sizes)
        config.dtype = torch.bfloat16
        model = getattr(transformers, self.model_class)(config).to(torch.bfloat16)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if parameter.dim() > 1:
                    parameter.copy_(noise / math.sqrt(parameter.shape[-1]))
                else:
                    is_offset = name.endswith("bias") or "gemma" in config.model_type
                    parameter.copy_(0.1 * noise + (0 if is_offset else 1))
        model.save_pretrained(directory)
        return directory


_GATES = ("lm_head", "re:.*mlp.gate$")
MODELS: dict[str, Model | None] = {
    "llama (demo)": None,
    "qwen2": Model(model_class="Qwen2ForCausalLM", config_class="Qwen2Config", sizes=_SIZES, kind="dense"),
    "qwen3": Model(model_class="Qwen3ForCausalLM", config_class="Qwen3Config", sizes=_HEADS, kind="dense"),
    "gemma2": Model(model_class="Gemma2ForCausalLM", config_class="Gemma2Config", sizes=_SOFT, kind="dense"),
    "gemma3": Model(model_class="Gemma3ForCausalLM", config_class="Gemma3TextConfig", sizes=_SOFT, kind="dense"),
    "phi3": Model(
        model_class="Phi3ForCausalLM",
        config_class="Phi3Config",
        sizes={**_SIZES, "original_max_position_embeddings": 512},
        kind="dense",
    ),
    "opt": Model(
        model_class="OPTForCausalLM",
        config_class="OPTConfig",
        sizes={
            **{key: value for key, value in _SIZES.items() if key not in ("intermediate_size", "num_key_value_heads")},
            "ffn_dim": 512,
            "word_embed_proj_dim": 256,
        },
        kind="dense",
    ),
    "qwen3_moe": Model(
        model_class="Qwen3MoeForCausalLM",
        config_class="Qwen3MoeConfig",
        sizes={**_EXPERTS, "num_experts": 4},
        kind="experts by name",
        ignore=_GATES,
    ),
    "mixtral": Model(
        model_class="MixtralForCausalLM",
        config_class="MixtralConfig",
        sizes={**_EXPERTS, "num_local_experts": 4},
        kind="experts by name",
        ignore=("lm_head", "re:.*gate$"),
    ),
    "deepseek_v3": Model(
        model_class="DeepseekV3ForCausalLM",
        config_class="DeepseekV3Config",
        sizes=_LATENT,
        kind="experts by name, latent attention",
        ignore=("lm_head", "re:.*mlp.gate$", "re:.*kv_b_proj$"),
    ),
    "gpt_oss": Model(
        model_class="GptOssForCausalLM",
        config_class="GptOssConfig",
        sizes={**_EXPERTS, "num_local_experts": 4, "sliding_window": 64},
        kind="experts stacked",
        ignore=("lm_head", "re:.*router$"),
    ),
    "granitemoe": Model(
        model_class="GraniteMoeForCausalLM",
        config_class="GraniteMoeConfig",
        sizes={**_EXPERTS, "num_local_experts": 4},
        kind="experts stacked",
        ignore=("lm_head", "re:.*router.*"),
    ),
    "llama4_text": Model(
        model_class="Llama4ForCausalLM",
        config_class="Llama4TextConfig",
        sizes={**_EXPERTS, "num_local_experts": 4, "intermediate_size_mlp": 256, "interleave_moe_layer_step": 1},
        kind="experts stacked",
        ignore=("lm_head", "re:.*router$"),
    ),
    "qwen3_next": Model(
        model_class="Qwen3NextForCausalLM",
        config_class="Qwen3NextConfig",
        sizes={
            **_EXPERTS,
            "num_experts": 4,
            "shared_expert_intermediate_size": 128,
            "full_attention_interval": 2,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
        },
        kind="experts by name, linear attention",
        ignore=("lm_head", "re:.*mlp.gate$", "re:.*shared_expert_gate$", "re:.*conv1d$"),
    ),
}


def make_model(name: str, directory: Path) -> Path:
    """The model's directory; made if it is not there."""
    model = MODELS[name]
    if model is None:
        return DEMO
    if not (directory / "config.json").is_file():
        shutil.rmtree(directory, ignore_errors=True)
        model.make(directory)
    return directory
