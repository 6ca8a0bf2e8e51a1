"""The schemes whose checkpoints other programs are given, as recipes."""

from __future__ import annotations

from collections.abc import Sequence

_MIXED = """\
    GPTQModifier:
      ignore: {ignore}
      config_groups:
        attention:
          targets: ['re:.*(self_attn|linear_attn)[.].*']
          weights: {{num_bits: 8, type: int, symmetric: true, strategy: channel}}
          input_activations: {{num_bits: 8, type: int, symmetric: true, strategy: token, dynamic: true}}
        others:
          targets: ['re:.*(mlp|fc1|fc2|feed_forward|block_sparse_moe).*']
          weights: {{num_bits: 4, type: int, symmetric: true, strategy: group, group_size: 128}}
"""
_CACHE = "kv_cache_scheme: {num_bits: 8, type: float, strategy: tensor, symmetric: true, dynamic: false}"
PRESETS = (
    *("W4A16", "W4A16_ASYM", "W3A16", "W2A16", "W8A16", "W8A8", "W4A8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK"),
    *("NVFP4", "NVFP4A16", "MXFP4", "MXFP4A16", "MXFP8"),
)
MIXED, CACHE = "mixed W8A8 and W4A16", "FP8 cache"
SCHEMES = (*PRESETS, MIXED, CACHE)


def recipe_text(scheme: str, ignore: Sequence[str]) -> str:
    """A recipe in YAML."""
    listed = "[" + ", ".join(f"'{name}'" for name in ignore) + "]"
    if scheme == MIXED:
        return "quant_stage:\n  quant_modifiers:\n" + _MIXED.format(ignore=listed)
    preset, cache = ("W4A16", f", {_CACHE}") if scheme == CACHE else (scheme, "")
    return f"QuantizationModifier: {{targets: Linear, scheme: {preset}, ignore: {listed}{cache}}}\n"
