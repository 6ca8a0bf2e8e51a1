"""Relations between the numbers of a config that must also hold after shrinking."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# `target = a * b / c`, evaluated from left to right; a dotted name refers to a nested table. A law that the large
# config satisfies is enforced on the small one by setting its target. The order matters: a law may read the target of
# an earlier one.
LAWS = (
    "num_attention_heads = hidden_size / head_dim",
    "hidden_size_global = hidden_size * cross_attn_k",
    "encoder_config.hidden_size_global = global_config.hidden_size",
    "decoder_config.hidden_size_global = global_config.hidden_size",
    "attention_hidden_size = hidden_size * 2",
    "attention_head_dim = attention_hidden_size / num_attention_heads",
    "kv_channels = hidden_size / num_attention_heads",
    "num_query_groups = num_attention_heads",
    "qk_rope_head_dim = head_dim * partial_rotary_factor",
    "qk_rope_head_dim = head_dim * rope_parameters.partial_rotary_factor",
    "qk_rope_head_dim = head_dim * rope_parameters.sliding_attention.partial_rotary_factor",
    "qk_head_dim = qk_nope_head_dim + qk_rope_head_dim",
    "mamba_d_ssm = mamba_expand * hidden_size",
    "mamba_n_heads = mamba_d_ssm / mamba_d_head",
    "mamba_n_heads = mamba_expand * hidden_size / mamba_d_head",
    "mamba_num_heads = expand * hidden_size / mamba_head_dim",
    "mamba_headdim = mamba_expand * hidden_size / n_mamba_heads",
    "num_heads = expand * hidden_size / head_dim",
    "linear_num_value_heads = linear_num_key_heads * 2",
    "linear_num_value_heads = linear_num_key_heads * 4",
    "topk_group = n_group",
    "topk_group = num_expert_group",
    "audio_config.intermediate_size = audio_config.hidden_size * 4",
    "adaptor_config.intermediate_size = text_config.hidden_size / 4",
    "depth_decoder_config.input_size = hidden_size",
    "upsample_groups = hidden_size",
    "num_hidden_layers = L_cycles + 1 * H_cycles * num_layers_per_stack",
    "codebook_vocab_size = codec_config.codebook_size + 1",
    "audio_bos_token_id = codebook_vocab_size - 1",
    "audio_pad_token_id = num_codebooks * codebook_vocab_size + vocab_size",
    "pad_token_id = vocab_size",
    "bos_token_id = vocab_size",
)
# The same for the entries of a single layer, which take precedence over those of all layers.
LAYER_LAWS = ("qk_nope_head_dim = head_dim - qk_rope_head_dim",)

_OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
_FACTOR = re.compile(r"partial_rotary_factor|rotary_pct|rope_pct")
_SECTIONS = re.compile(r"mrope_section|xdrope_section")
_FACTORS_BY_DIM = ("long_factor", "short_factor")
_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
_KEY_HEADS = re.compile(r"(.*_)?num_key_value_heads|(.*_)?n_?(um_)?kv_heads|kv_n_heads|multi_query_group_num")


def enforce(laws: Sequence[str], large: Mapping[str, Any], small: dict[str, Any]) -> None:
    """Set in `small` the targets of the relations that hold in `large`."""
    for law in laws:
        target, terms = law.split(" = ")
        *owners, name = target.split(".")
        place: Any = small
        for owner in owners:
            place = place.get(owner) if isinstance(place, dict) else None
        old, expected = _lookup(large, target), _value(large, terms)
        if old is None or expected is None or old != int(expected) or not isinstance(place, dict):
            continue
        new = _value(small, terms)
        if new is not None and new >= 1:
            place[name] = int(new)


def _value(table: Mapping[str, Any], terms: str) -> float | None:
    words = terms.split()
    total = _lookup(table, words[0])
    for sign, word in zip(words[1::2], words[2::2], strict=True):
        operand = int(word) if word.isdigit() else _lookup(table, word)
        if total is None or not operand:
            return None
        total = _OPERATORS[sign](total, operand)
    return total


def _lookup(table: Mapping[str, Any], path: str) -> float | None:
    value: Any = table
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def rotary_head_dim(large: Mapping[str, Any], candidates: Sequence[int]) -> int:
    """Return the first candidate for a head's width that supports the rotary embedding of the large config.

    The rotated part must remain an even number of channels, and large enough for three sections if positions have
    three parts.
    """
    dim = head_dim(large)
    factors = [
        value for key, value in _rotary_entries(large) if _FACTOR.fullmatch(key) and isinstance(value, (int, float))
    ]
    fewest = 8 if any(_SECTIONS.fullmatch(key) for key, _ in _rotary_entries(large)) else 4
    for candidate in candidates:
        parts = [int(candidate * factor) for factor in factors if dim and int(dim * factor) % 2 == 0] or [candidate]
        if all(part % 2 == 0 and part >= fewest for part in parts):
            return candidate
    return candidates[0]


def fit_key_heads(large: Mapping[str, Any], small: dict[str, Any]) -> None:
    """Let heads share keys and values as in the large config: all of them, pairs, or none."""
    for key, value in small.items():
        if not _KEY_HEADS.fullmatch(key) or type(value) is not int or type(large.get(key)) is not int:
            continue
        own = re.sub("key_value", "attention", key)
        name = next((name for name in (own, *_HEADS) if type(small.get(name)) is int and name != key), None)
        if name is not None and type(large.get(name)) is int and small[name] > 0:
            small[key] = (
                small[name] if large[key] == large[name] else 1 if large[key] == 1 else max(1, small[name] // 2)
            )


def head_dim(table: Mapping[str, Any]) -> int:
    """Return the width of an attention head; 0 if the table does not state it."""
    stated = table.get("head_dim")
    if type(stated) is int and stated > 0:
        return stated
    width = table.get("hidden_size") or table.get("n_embd") or table.get("d_model")
    heads = next((table[name] for name in _HEADS if table.get(name)), None)
    return width // heads if type(width) is int and type(heads) is int else 0


def fit_rotary(large: Mapping[str, Any], small: dict[str, Any]) -> None:
    """Fit sections and factors of single rotated channels to the small heads."""
    old_dim, new_dim = head_dim(large), head_dim(small)
    if not old_dim or not new_dim:
        return
    outer = next((value for key, value in small.items() if _FACTOR.fullmatch(key) and value), 1.0)
    _fit_table(small, old_dim, new_dim, outer)


def _fit_table(table: dict[str, Any], old_dim: int, new_dim: int, outer: float) -> None:
    factor = next((value for key, value in table.items() if _FACTOR.fullmatch(key) and value), outer)
    old, new = int(old_dim * factor) // 2, int(new_dim * factor) // 2
    for key, value in table.items():
        if isinstance(value, dict) and key not in ("text_config", "vision_config", "audio_config"):
            _fit_table(value, old_dim, new_dim, factor)
        elif isinstance(value, list) and _SECTIONS.fullmatch(key) and value:
            table[key] = _sections(value, max(len(value), sum(value) * new // max(1, old)))
        elif isinstance(value, list) and key in _FACTORS_BY_DIM and len(value) == old:
            table[key] = value[:new]


def _sections(sections: Sequence[int], total: int) -> list[int]:
    """Return positive integers with the given sum and approximately the old proportions."""
    shares = [max(1, section * total // sum(sections)) for section in sections]
    while sum(shares) != total:
        place = max(range(len(shares)), key=lambda i: sections[i] * total / sum(sections) - shares[i])
        if sum(shares) > total:
            place = max(range(len(shares)), key=lambda i: (shares[i], -i))
            shares[place] -= 1
        else:
            shares[place] += 1
    return shares


def _rotary_entries(table: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield all entries of a table and of its nested tables about rotary embeddings."""
    for key, value in table.items():
        yield key, value
        if isinstance(value, Mapping) and ("rope" in key or key.endswith("attention") or key in ("main", "compress")):
            yield from _rotary_entries(value)
