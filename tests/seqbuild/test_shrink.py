"""Small configs of real ones: kinds of layers, lists by layer, token ids, and what must hold between numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from seqbuild.sample.inputs import default_sample
from seqbuild.shrink.config import VOCABULARY, shrink_table

SLIDING, FULL = "sliding_attention", "full_attention"

# What the published configs say, without what is of no account here.
CONFIGS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "model_type": "gemma3_text",
        "vocab_size": 262208,
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 1024,
        "query_pre_attn_scalar": 256,
        "max_position_embeddings": 131072,
        "layer_types": [FULL if index % 6 == 5 else SLIDING for index in range(34)],
        "eos_token_id": [1, 106],
        "pad_token_id": 0,
    },
    "deepseek_v3": {
        "model_type": "deepseek_v3",
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "first_k_dense_replace": 3,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "max_position_embeddings": 163840,
        "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32},
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [3, 7],
        "eos_token_id": 151645,
        "bos_token_id": 151643,
    },
    "jamba": {
        "model_type": "jamba",
        "vocab_size": 65536,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "attn_layer_period": 8,
        "attn_layer_offset": 4,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_dt_rank": 256,
        "use_mamba_kernels": False,
    },
    "llama4": {
        "model_type": "llama4_text",
        "vocab_size": 202048,
        "hidden_size": 5120,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "attention_chunk_size": 8192,
        "interleave_moe_layer_step": 2,
        "num_local_experts": 128,
        "num_experts_per_tok": 1,
        "moe_layers": list(range(1, 48, 2)),
        "no_rope_layers": [int((index + 1) % 4 != 0) for index in range(48)],
        "layer_types": [FULL if index % 4 == 3 else "chunked_attention" for index in range(48)],
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_small_model_runs(name: str) -> None:
    small = shrink_table(CONFIGS[name])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**small)).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) < 2_000_000
    with torch.no_grad():
        logits = model(**default_sample(model), use_cache=False).logits
    assert logits.shape == (3, 37, VOCABULARY)
    assert bool(torch.isfinite(logits).all())


def test_every_kind_of_layer_stays() -> None:
    small = shrink_table(CONFIGS["gemma3"])
    assert small["layer_types"] == [SLIDING, SLIDING, FULL, FULL]
    assert small["num_hidden_layers"] == 4
    small = shrink_table(CONFIGS["llama4"])
    kinds = zip(small["layer_types"], small["no_rope_layers"], strict=True)
    assert [(kind[:4], rope, index in small["moe_layers"]) for index, (kind, rope) in enumerate(kinds)] == [
        ("chun", 1, False),
        ("chun", 1, True),
        ("chun", 1, False),
        ("full", 0, True),
    ]


def test_lists_of_indices_follow_their_layers() -> None:
    small = shrink_table(CONFIGS["qwen3_moe"])
    assert (small["num_hidden_layers"], small["mlp_only_layers"]) == (4, [2, 3])  # of layers 0, 1, 3, 7


def test_boundaries_follow_their_layers() -> None:
    small = shrink_table(CONFIGS["deepseek_v3"])
    assert (small["num_hidden_layers"], small["first_k_dense_replace"]) == (4, 2)
    shared = shrink_table({"num_hidden_layers": 30, "num_kv_shared_layers": 10, "layer_types": [SLIDING, FULL] * 15})
    assert shared == {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": [SLIDING, FULL, SLIDING, FULL]}


def test_entries_by_layer_follow_their_layers() -> None:
    table = {
        "num_hidden_layers": 12,
        "head_dim": 256,
        "per_layer_config": {"05": {"head_dim": 8}, "11": {"head_dim": 8}},
    }
    assert shrink_table(table) == {
        "num_hidden_layers": 4,
        "head_dim": 16,
        "per_layer_config": {"2": {"head_dim": 8}, "3": {"head_dim": 8}},
    }


def test_a_layer_of_two_halves_stays_whole() -> None:
    blocks = [block for index in range(12) for block in (FULL if index % 4 == 3 else SLIDING, "mlp")]
    small = shrink_table({"num_hidden_layers": 24, "layer_types": blocks})
    assert small["layer_types"] == [SLIDING, "mlp", SLIDING, "mlp", FULL, "mlp", FULL, "mlp"]


def test_sources_of_keys_and_values_stay_before_their_users() -> None:
    table = {"num_hidden_layers": 8, "kv_source_layers": [0, 0, 2, 2, 4, 4, 6, 6]}
    assert shrink_table(table) == {"num_hidden_layers": 4, "kv_source_layers": [0, 0, 2, 2]}


def test_token_ids_stay_different_and_within_the_vocabulary() -> None:
    table = {"vocab_size": 150000, "eos_token_id": [149999, 2], "pad_token_id": 149999, "image_token_id": 149000}
    small = shrink_table(table)
    assert small == {
        "vocab_size": VOCABULARY,
        "eos_token_id": [VOCABULARY - 1, 2],
        "pad_token_id": VOCABULARY - 1,
        "image_token_id": VOCABULARY - 2,
    }


@pytest.mark.parametrize(("shared", "expected"), [(32, 4), (8, 2), (1, 1)])
def test_heads_share_keys_as_before(shared: int, expected: int) -> None:
    small = shrink_table({"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": shared})
    assert small == {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": expected}


def test_what_mamba_demands() -> None:
    bamba = {"hidden_size": 4096, "mamba_expand": 2, "mamba_n_heads": 128, "mamba_d_head": 64, "mamba_n_groups": 1}
    small = shrink_table(bamba)
    assert small["mamba_n_heads"] * small["mamba_d_head"] == small["mamba_expand"] * small["hidden_size"]
    free = {"hidden_size": 4480, "expand": 2, "mamba_num_heads": 128, "mamba_head_dim": 80, "n_groups": 8}
    small = shrink_table(free)
    assert (small["mamba_num_heads"], small["n_groups"]) == (4, 2)


@pytest.mark.parametrize(
    ("head_dim", "factor", "sections"),
    [(128, 1.0, [16, 24, 24]), (128, 0.5, [8, 12, 12]), (256, 0.25, [11, 11, 10]), (128, 1.0, [24, 20, 20])],
)
def test_sections_of_rotated_channels_fill_the_small_head(head_dim: int, factor: float, sections: list[int]) -> None:
    rope = {"rope_type": "default", "mrope_section": sections, "partial_rotary_factor": factor}
    small = shrink_table(
        {"hidden_size": 4096, "num_attention_heads": 32, "head_dim": head_dim, "rope_parameters": rope}
    )
    rotated = int(small["head_dim"] * factor)
    assert rotated % 2 == 0
    assert sum(small["rope_parameters"]["mrope_section"]) == rotated // 2
    assert min(small["rope_parameters"]["mrope_section"]) >= 1


def test_factors_by_channel_are_cut_with_the_head() -> None:
    rope = {"rope_type": "longrope", "long_factor": [1.5] * 48, "short_factor": [1.0] * 48}
    small = shrink_table({"hidden_size": 3072, "num_attention_heads": 32, "rope_scaling": rope})
    assert small["rope_scaling"] == {"rope_type": "longrope", "long_factor": [1.5] * 8, "short_factor": [1.0] * 8}


def test_experts_in_groups() -> None:
    small = shrink_table(CONFIGS["deepseek_v3"])
    names = ("n_routed_experts", "n_group", "topk_group", "num_experts_per_tok")
    assert [small[name] for name in names] == [4, 2, 1, 2]
    assert shrink_table({"n_group": 1, "topk_group": 1}) == {"n_group": 1, "topk_group": 1}


def test_what_a_sound_looks_like_stays() -> None:
    table = {"audio_config": {"num_mel_bins": 128, "max_source_positions": 1500, "d_model": 1280, "encoder_layers": 32}}
    small = {"num_mel_bins": 128, "max_source_positions": 1500, "d_model": 64, "encoder_layers": 3}
    assert shrink_table(table) == {"audio_config": small}


def test_a_small_config_stays_as_it_is() -> None:
    for table in CONFIGS.values():
        small = shrink_table(table)
        assert shrink_table(small) == small
