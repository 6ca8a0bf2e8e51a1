"""What `python -m runtime recipes` shows: every preset in a line, and a commented recipe for each algorithm."""

from __future__ import annotations

import re

from runtime.errors import UsageError

_NUMBERS = re.compile(r"W(\d)A(\d+)")

EXAMPLES: dict[str, str] = {
    "rtn": """\
# Round to nearest: needs no data. The baseline.
QuantizationModifier:
  targets: Linear        # a class, a module's name, or re: with a regular expression
  scheme: {preset}
  ignore: [lm_head]      # patterns of modules that stay as they are
  # weight_observer: mse # search each group's range: minmax, mse, imatrix_mse (weighed by the inputs), percentile
""",
    "gptq": """\
# GPTQ: later columns make up for what earlier ones lose. Needs data; the best default at 4 bits and below.
GPTQModifier:
  targets: Linear
  scheme: {preset}
  ignore: [lm_head]
  dampening_frac: 0.01   # added to the Hessian's diagonal; raised tenfold, up to 1, when it does not factor
  block_size: 128        # a matter of speed
  actorder: static       # solve important columns first; null for left to right
  # refine: 2            # go over columns and scales again; may pay at 2 bits, measure it
  # fallback: rtn        # round to nearest, and say so, what cannot be solved; without it that is an error
  # min_tokens: 256      # refuse modules that saw fewer tokens, unless fallback is rtn,
                         # or all_tokens: measure experts that saw too few of their own on all
""",
    "awq": """\
# AWQ: scale up the columns that matter before they are rounded. Without mappings those that the compiler found.
AWQModifier:
  duo_scaling: true      # true, false or both
  n_grid: 20
  clip: true             # search each group's range, where QuantizationModifier rounds
  # mappings:            # where the compiler finds none: what makes the channels, and what takes them
  #   - smooth_layer: re:.*input_layernorm
  #     balance_layers: ['re:.*q_proj', 're:.*k_proj', 're:.*v_proj']
QuantizationModifier:    # or GPTQModifier
  targets: Linear
  scheme: {preset}
  ignore: [lm_head]
""",
    "smoothquant": """\
# SmoothQuant: move outliers of activations into the weights, so that inputs can be rounded, too.
SmoothQuantModifier:
  smoothing_strength: 0.8
GPTQModifier:            # or QuantizationModifier
  targets: Linear
  scheme: {preset}
  ignore: [lm_head]
""",
    "mixed": """\
# Several schemes: a name or regular expression goes before a class.
GPTQModifier:
  config_groups:
    rest:
      targets: [Linear]
      weights: {{num_bits: 4, type: int, symmetric: true, strategy: group, group_size: 128}}
    sensitive:
      targets: ['re:.*down_proj$']
      weights: {{num_bits: 8, type: int, symmetric: true, strategy: channel}}
  ignore: [lm_head]
""",
    "cache": """\
# A key-value cache in 8 bits, and weights as they are. Needs data. Stands beside any scheme for weights, too.
QuantizationModifier:
  kv_cache_scheme: {{num_bits: 8, type: float, strategy: tensor, symmetric: true, dynamic: false}}
  # strategy: attn_head  # a scale for each head
  # or queries as well, where the reader computes attention in FP8:
  # config_groups:
  #   attention:
  #     targets: ['re:.*self_attn$']
  #     input_activations: {{num_bits: 8, type: float, strategy: tensor, symmetric: true, dynamic: false}}
""",
}
_USUAL = {"mixed": "W4A16", "smoothquant": "W8A8", "awq": "W4A16_ASYM"}


def preset_line(name: str) -> str:
    """A preset in words."""
    bits = _NUMBERS.match(name)
    if name in ("W8A8", "INT8"):
        return "8 bit int weights by channel, 8 bit int inputs by token"
    if bits is not None:
        kind = "asymmetric " if name.endswith("ASYM") else ""
        inputs = "" if bits[2] == "16" else f", {bits[2]} bit int inputs by token"
        return f"{bits[1]} bit {kind}int weights in groups of 128{inputs}"
    return {
        "W4AFP8": "4 bit int weights in groups of 128, 8 bit float inputs by token",
        "FP8": "8 bit float weights by tensor, 8 bit float inputs with one measured scale",
        "FP8_DYNAMIC": "8 bit float weights by channel, 8 bit float inputs by token",
        "FP8_BLOCK": "8 bit float weights in blocks of 128x128, 8 bit float inputs in groups of 128",
        "NVFP4": "4 bit float weights and inputs in groups of 16 with 8 bit float scales",
        "NVFP4A16": "4 bit float weights in groups of 16 with 8 bit float scales",
        "MXFP4": "4 bit float weights and inputs in groups of 32 with scales of powers of two",
        "MXFP4A16": "4 bit float weights in groups of 32 with scales of powers of two",
        "MXFP4XFP8": "as MXFP4A16, 8 bit float inputs in groups of 128",
        "MXFP6A16": "6 bit float weights in groups of 32 with scales of powers of two",
        "MXFP6A8": "as MXFP6A16, 8 bit float inputs in groups of 32",
        "MXFP8": "8 bit float weights and inputs in groups of 32 with scales of powers of two",
        "MXFP8A16": "8 bit float weights in groups of 32 with scales of powers of two",
    }[name]


def example(name: str) -> str:
    """A commented recipe for a preset or an algorithm.

    Raises:
        UsageError: for a name that is neither.
    """
    from runtime.formats.presets import PRESETS

    algorithm, preset = name.lower(), name.upper()
    if algorithm in EXAMPLES:
        return EXAMPLES[algorithm].format(preset=_USUAL.get(algorithm, "W4A16"))
    if preset in PRESETS:
        needs_data = preset[:1] == "W" and preset not in ("W8A16",)
        return EXAMPLES["gptq" if needs_data else "rtn"].format(preset=preset)
    raise UsageError(f"there is no recipe for {name!r}", hint=f"there are {', '.join((*EXAMPLES, *PRESETS))}")


def listing() -> str:
    """All presets and algorithms, a line each."""
    from runtime.formats.presets import PRESETS

    width = max(map(len, PRESETS))
    lines = [f"{name:<{width}}  {preset_line(name)}" for name in PRESETS]
    return "\n".join(["presets", *lines, "", f"algorithms  {', '.join(EXAMPLES)}", "", "recipes NAME shows an example"])
