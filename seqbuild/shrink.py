"""Make a model's config small, so that a model of the same architecture can be built with random weights and run.

Architectures are not listed here: the names under which configs state widths, depths and counts are few, and a config
is walked as the nested table that it is. Lists that say something of each layer keep the entries of the layers that
stay, and those are chosen so that every kind of layer stays. What an image or a sound must look like (sizes of images
and patches, numbers of mel bands) is left alone, unless `geometry` says what it shall be.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from seqbuild.shrink_agree import agree

WIDTH, HEADS, HEAD_WIDTH, INNER, VOCABULARY = 64, 4, 16, 96, 384
EXPERTS, CHOSEN, POSITIONS, WINDOW = 4, 2, 512, 16
_FEWEST_LAYERS, _MOST_LAYERS = 2, 6

_DEPTH = re.compile(
    r"(.*_)?(num_hidden_layers|n_layers?|num_layers|depth|(en|de)coder_layers|num_(en|de)coder_layers|layers"
    r"|num_blocks|conf_num_hidden_layers)"
)
_PERIOD = re.compile(
    r".*(_interval|_period|_pattern|_every_n_layers|_sparse_step|_group_size|_frequency|_freq)|n_layers_per_.*"
)
_OFFSET = re.compile(
    r".*_layer_offset|first_k_dense_replace|num_kv_shared_layers|moe_layer_start_index|.*num_dense_layers"
)
_TOKEN = re.compile(r".*(token_ids?|token_index|token_indices|_id|tokens_ids)")
_KEPT = re.compile(r"patch_embed_hidden_size|patch_dim|video_patch_dim")  # widths of what is put in

_BY_LAYER = ("per_layer_config",)
_DERIVED = ("stage_names", "out_features", "out_indices", "_out_features", "_out_indices")

# (names, limit): the first row that fits a key whole decides.
_LIMITS: tuple[tuple[re.Pattern[str], int], ...] = tuple(
    (re.compile(pattern), limit)
    for pattern, limit in (
        (r"(.*_)?(vocab_size|n_vocab)(_.*)?|n_tokens|codebook_size", VOCABULARY),
        (
            r"max_position_embeddings|n_positions|n_ctx|max_(source|target)_positions|max_seq_len|seq_length"
            r"|max_sequence_length|model_max_length|original_max_position_embeddings",
            POSITIONS,
        ),
        (
            r"sliding_window(_size)?|attention_chunk_size|local_attention_window_len|keep_window_size|attention_window"
            r"|.*_window_size_tokens|local_attention",
            WINDOW,
        ),
        (r"(.*_)?num_key_value_heads(_.*)?|(.*_)?n_?(um_)?kv_heads|multi_query_group_num", HEADS),
        (r"(.*_)?(num_(attention|attn)_heads|n_heads?|num_heads|attention_heads)(_.*)?|attn_heads", HEADS),
        (
            r"(.*_)?head_dim(_.*)?|d_kv|d_head|attention_head_(dim|size)|kv_channels|rotary_dim|dim_head|qk_rope_head_dim",
            HEAD_WIDTH,
        ),
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
        (r"(.*_)?lora_rank", 32),
        (r"(.*_)?(num_experts_per_tok(en)?|moe_top_?k|top_k_experts|moe_k|experts_per_tok(en)?)", CHOSEN),
        (r"(.*_)?(num_experts|num_local_experts|n_routed_experts|num_moe_experts)", EXPERTS),
        (r"n_group|topk_group|num_expert_group", 1),
        (r"index_topk(_blocks)?", 8),
        (r"(mamba_)?chunk_size", 16),
        (r"base_channels", 32),
    )
)


def shrink_table(table: Mapping[str, Any]) -> dict[str, Any]:
    """A small config like `table`, both as nested plain values (a config.json)."""
    return _Shrinker().table(table)


@dataclass
class _Shrinker:
    tokens: dict[int, int] = field(default_factory=dict)

    def table(self, table: Mapping[str, Any]) -> dict[str, Any]:
        table = {str(key): value for key, value in table.items()}
        depths = {
            value: _chosen_layers(table, value)
            for key, value in table.items()
            if _DEPTH.fullmatch(key) and type(value) is int and value > 0
        }
        small = {key: self._entry(key, value, depths) for key, value in table.items() if key not in _DERIVED}
        agree(table, small)
        return small

    def _entry(self, key: str, value: Any, depths: Mapping[int, Sequence[int]]) -> Any:
        if isinstance(value, Mapping):
            return self._by_layer(value, depths) if key in _BY_LAYER else self.table(value)
        if _KEPT.fullmatch(key):
            return value
        if _TOKEN.fullmatch(key):
            return self._token(value)
        if isinstance(value, (list, tuple)):
            return self._list(key, list(value), depths)
        if type(value) is not int or value <= 0:
            return value
        if _DEPTH.fullmatch(key):
            return len(depths[value])
        if _PERIOD.fullmatch(key) or _OFFSET.fullmatch(key):
            return min(value, 2 if _PERIOD.fullmatch(key) else 1)
        limit = next((limit for pattern, limit in _LIMITS if pattern.fullmatch(key)), None)
        return value if limit is None else min(value, limit)

    def _by_layer(self, value: Mapping[str, Any], depths: Mapping[int, Sequence[int]]) -> dict[str, Any]:
        """What a table says of single layers, under their new numbers."""
        kept = next(iter(depths.values()), ())
        entries = {int(index): entry for index, entry in value.items()}  # numbers may be written with zeros in front
        return {str(new): self.table(entries[old]) for new, old in enumerate(kept) if old in entries}

    def _list(self, key: str, items: list[Any], depths: Mapping[int, Sequence[int]]) -> list[Any]:
        for depth, kept in depths.items():
            if len(items) == depth and depth > len(kept):
                return [items[index] for index in kept]
        return [self.table(item) if isinstance(item, Mapping) else item for item in items]

    def _token(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [self._token(item) for item in value]
        if type(value) is not int or value < VOCABULARY:
            return value
        return self.tokens.setdefault(value, VOCABULARY - 1 - len(self.tokens))


def _chosen_layers(table: Mapping[str, Any], depth: int) -> list[int]:
    """Which of `depth` layers stay: the first of each kind, and enough others to make a chain."""
    lists = [
        value
        for value in table.values()
        if isinstance(value, (list, tuple)) and len(value) == depth and not any(isinstance(v, Mapping) for v in value)
    ]
    first: dict[tuple[str, ...], int] = {}
    for index in range(depth):
        first.setdefault(tuple(str(items[index]) for items in lists), index)
    for name in _BY_LAYER:
        for index in sorted(map(int, table.get(name) or ()))[:1]:
            first.setdefault((name,), index)
    kept = sorted(dict.fromkeys(first.values()))[:_MOST_LAYERS]
    for index in range(depth):
        if len(kept) >= min(_FEWEST_LAYERS if lists else 4, depth):
            break
        if index not in kept:
            kept = sorted([*kept, index])
    return kept
