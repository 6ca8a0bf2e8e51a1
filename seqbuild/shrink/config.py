"""Shrink a model's config, so that a model of the same architecture can be built with random weights and run.

Architectures are not listed here: configs use few names for widths, depths and counts, and a config is processed as a
nested table. Lists with one entry per layer keep the entries of the layers that remain, which are chosen so that every
kind of layer remains. The geometry of images and sounds (sizes of images and patches, numbers of mel bands) is kept.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from seqbuild.shrink.agree import agree
from seqbuild.shrink.laws import LAWS, LAYER_LAWS, enforce, fit_key_heads, fit_rotary, rotary_head_dim
from seqbuild.shrink.layers import BY_LAYER, Layers, is_index_list

WIDTH, HEADS, HEAD_WIDTH, INNER, VOCABULARY = 64, 4, 16, 96, 384
EXPERTS, CHOSEN, POSITIONS, WINDOW = 4, 2, 512, 16

_PERIOD = re.compile(
    r".*(_interval|_period|_pattern|_every_n_layers|_sparse_step|_layer_step|_group_size|_frequency|_freq)"
    r"|n_layers_per_.*"
)
_OFFSET = re.compile(r".*_layer_offset")
_TOKEN = re.compile(r".*(token_ids?|token_index|token_indices|_id|tokens_ids)")
_HEADS = re.compile(r"(.*_)?(num_(attention|attn)_heads|n_heads?|num_heads|attention_heads)(_.*)?|attn_heads")
_HEAD_DIMS = (HEAD_WIDTH, 24, 32, 48, 64)

# The geometry of sounds and images, which is kept.
_GEOMETRY = re.compile(
    r"(.*_)?input_dim|(.*_)?num_mel_bins|feature_size|input_feat_(size|per_channel)"
    r"|patch_embed_hidden_size|(video_)?patch_dim"
)
_DERIVED = ("stage_names", "out_features", "out_indices", "_out_features", "_out_indices")

# (names, limit): the first pattern that matches the complete key applies.
_LIMITS: tuple[tuple[re.Pattern[str], int], ...] = tuple(
    (re.compile(pattern), limit)
    for pattern, limit in (
        (r"codebook_size", 256),
        (r"(.*_)?(vocab_size|n_vocab)(_.*)?|n_tokens|.*_vocab", VOCABULARY),
        (
            r"max_position_embeddings|n_positions|n_ctx|max_target_positions|max_seq_len|seq_length"
            r"|max_sequence_length|model_max_length|original_max_position_embeddings",
            POSITIONS,
        ),
        (
            r"sliding_window(_size)?|attention_chunk_size|local_attention_window_len|keep_window_size|attention_window"
            r"|.*_window_size_tokens|local_attention",
            WINDOW,
        ),
        (r"(.*_)?num_key_value_heads(_.*)?|(.*_)?n_?(um_)?kv_heads|kv_n_heads|multi_query_group_num", HEADS),
        (r"linear_num_(key|value)_heads", 2),
        (
            r"(.*_)?(head_dim|headdim|d_head)(_.*)?|d_kv|attention_head_(dim|size)|kv_channels|rotary_dim|dim_head",
            HEAD_WIDTH,
        ),
        (r"(mamba_)?(d_state|dt_rank)|(ssm_)?state_size|time_step_rank", 16),
        (r"mamba_d_ssm", 2 * WIDTH),
        (
            r"(.*_)?(intermediate_size|ffn_dim|ffn_hidden_size|ff_dim|d_ff|d_inner|n_inner|dim_ff|dff|mlp_dim"
            r"|mlp_hidden_size|ffn_hidden_dim|feed_forward_size)(_.*)?",
            INNER,
        ),
        (
            r"(.*_)?(hidden_size|d_model|n_embd|embed_dim|embedding_size|d_embed|emb_dim|hidden_dim|model_dim|width|dim"
            r"|projection_dim|word_embed_proj_dim|output_dim|output_size)|embedding_dim",
            WIDTH,
        ),
        (
            r"intra_bottleneck_size|d_latents|(.*_)?conv_channels|ext_pw_out_channel|depthwise_separable_out_channel",
            WIDTH,
        ),
        (r"num_filters|n_filters", 4),
        (r"conv_dim|base_channels", 32),
        (r"(.*_)?(lora_rank|lowrank|adapter_rank)", 32),
        (r"(.*_)?(num_experts_per_tok(en)?|moe_top_?k|top_k_experts|moe_k|experts_per_tok(en)?)", CHOSEN),
        (r"(.*_)?(num_experts|num_local_experts|n_routed_experts|num_moe_experts)", EXPERTS),
        (r"zero_expert_num", EXPERTS),
        (r"n_group|num_expert_group|n_groups|mamba_n_?groups", 2),
        (r"topk_group", 1),
        (r"index_topk(_blocks)?|index_block_size|heavily_compressed_attention", 8),
        (r"index_kpool", 4),
        (r"(mamba_)?chunk_size|block_size|l(ocal|sh)_attn_chunk_length", 16),
        (r"floor_scale|log_scaling_n_floor", 8),
    )
)


def shrink_table(table: Mapping[str, Any]) -> dict[str, Any]:
    """Shrink a config, given and returned as the nested plain values of a config.json."""
    return _Shrinker().table(table)


@dataclass
class _Shrinker:
    tokens: dict[int, int] = field(default_factory=dict)

    def table(self, table: Mapping[str, Any]) -> dict[str, Any]:
        table = {str(key): list(value) if isinstance(value, tuple) else value for key, value in table.items()}
        layers = Layers.of(table)
        small = {key: self._entry(key, value, table, layers) for key, value in table.items() if key not in _DERIVED}
        small |= layers.parts(table)
        if type(table.get("head_dim")) is int:
            small["head_dim"] = min(table["head_dim"], rotary_head_dim(table, _HEAD_DIMS))
        enforce(LAWS, table, small)
        fit_key_heads(table, small)
        fit_rotary(table, small)
        agree(table, small)
        for name in BY_LAYER:
            if isinstance(table.get(name), Mapping):
                small[name] = self._by_layer(name, table, small, layers)
        return small

    def _entry(self, key: str, value: Any, table: Mapping[str, Any], layers: Layers) -> Any:
        if isinstance(value, Mapping):
            return value if key in BY_LAYER else self.table(value)
        if _TOKEN.fullmatch(key):
            return self._token(value)
        changed = layers.entry(key, value)
        if isinstance(changed, list):
            if layers.is_by_layer(value) and not is_index_list(key, value, layers.main):
                return [
                    self._number(key, item, max(map(int, value))) if type(item) is int else item for item in changed
                ]
            return [self.table(item) if isinstance(item, Mapping) else item for item in changed]
        return self._number(key, value) if changed is value or changed == value else changed

    def _number(self, key: str, value: Any, largest: int = 0) -> Any:
        if type(value) is not int or value <= 0 or _GEOMETRY.fullmatch(key):
            return value
        if _PERIOD.fullmatch(key) or _OFFSET.fullmatch(key):
            return min(value, 2 if _PERIOD.fullmatch(key) else 1)
        if _HEADS.fullmatch(key):
            return min(_power_of_two(value), HEADS // 2 if value < largest else HEADS)
        limit = next((limit for pattern, limit in _LIMITS if pattern.fullmatch(key)), None)
        return value if limit is None else min(value, limit)

    def _by_layer(
        self, name: str, table: Mapping[str, Any], small: Mapping[str, Any], layers: Layers
    ) -> dict[str, dict[str, Any]]:
        """Shrink a table of single layers' entries, under the new layer numbers."""
        result = {}
        outer = {key: value for key, value in table.items() if key not in BY_LAYER}
        for index, entry in layers.by_layer(table[name]).items():
            whole = {**small, **self.table(entry)}
            for laws in (LAWS, LAYER_LAWS):
                enforce(laws, {**outer, **entry}, whole)
            fit_key_heads({**outer, **entry}, whole)
            result[index] = {key: whole[key] for key in entry}
        return result

    def _token(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._token(item) for item in value]
        if type(value) is not int or value < VOCABULARY:
            return value
        return self.tokens.setdefault(value, VOCABULARY - 1 - len(self.tokens))


def _power_of_two(value: int) -> int:
    """Return the largest power of two up to `value`: a number of heads that divides every width."""
    return 1 << (value.bit_length() - 1)
