"""Example recipes for the command `recipes`: one line for each preset, a commented recipe for each algorithm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.errors import UsageError
from runtime.host.regular_files import read_text

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

EXAMPLES: dict[str, str] = {
    "rtn": """\
# Round to nearest: the baseline. Needs no data.
QuantizationModifier:
  targets: {targets}        # a class, a module's name, or re: with a regular expression
  scheme: {preset}
  ignore: {ignore}      # patterns of modules that are not quantized
  # weight_observer: mse # how each group's range is found: minmax, mse, imatrix_mse (weighted by inputs), percentile
""",
    "gptq": """\
# GPTQ: later columns compensate the errors of earlier ones. Needs data; the best default at 4 bits and below.
GPTQModifier:
  targets: {targets}
  scheme: {preset}
  ignore: {ignore}
  dampening_frac: 0.01   # added to the Hessian's diagonal; multiplied by 10, up to 1, while it cannot be factored
  block_size: 128        # affects speed only
  actorder: static       # important columns first; null for left to right
  # weight_observer: signed_mse # search ranges, with scales of either sign; better at 2 to 4 bits, symmetric only
  # range_passes: 2      # search ranges again for what the first solve has rounded, and solve again
  # target: original     # make up for the errors of earlier layers, too; helps at 2 and 3 bits, for 1.5 times the time
  # strength: 0.5        # of that correction, from 0 to 1
  # refine: 2            # optimize columns and scales again; may help at 2 bits
  # fallback: rtn        # round a module to nearest, with a warning, if it cannot be solved; the default is an error
  # min_tokens: 256      # modules that saw fewer tokens are an error, or use the fallback: rtn,
                         # or all_tokens, which measures an expert on all tokens
""",
    "auto_round": """\
# AutoRound: rounding and ranges are learned by gradients of each layer's output. Needs data, and many times the time of
# GPTQ, from whose solution it starts; for 2 and 3 bits.
AutoRoundModifier:
  targets: {targets}
  scheme: {preset}
  ignore: {ignore}
  iters: 200             # steps for each layer
  batch_size: 8          # samples of a step
  # lr: 0.005            # the first rate; 1 / iters by default
  # seed: 0              # of the order of batches
  # disable_opt_rtn: true  # start from weights rounded to nearest
  # amp: false  # no products in bf16: the same result on all processors
""",
    "awq": """\
# AWQ: scale up important columns before they are rounded. Default mappings are those that the compiler found.
AWQModifier:
  duo_scaling: true      # true, false or both
  n_grid: 20
  clip: true             # search each group's range, if a QuantizationModifier rounds it
  # mappings:            # if the compiler found none: the module that outputs the channels, and those that read them
  #   - smooth_layer: re:.*input_layernorm
  #     balance_layers: ['re:.*q_proj', 're:.*k_proj', 're:.*v_proj']
QuantizationModifier:    # or GPTQModifier
  targets: {targets}
  scheme: {preset}
  ignore: {ignore}
""",
    "smoothquant": """\
# SmoothQuant: move outliers of activations into the weights, so that inputs can be quantized as well.
SmoothQuantModifier:
  smoothing_strength: 0.8
GPTQModifier:            # or QuantizationModifier
  targets: {targets}
  scheme: {preset}
  ignore: {ignore}
""",
    "spinquant": """\
# SpinQuant: rotate the residual stream (R1) and values (R2), so that inputs have no outliers. Fused into weights.
SpinQuantModifier:
  rotations: [R1, R2]        # R3 and R4 stay in the model and cost time in every reader
  transform_type: hadamard   # random-hadamard or random-matrix: other sizes, and a seed
GPTQModifier:                # or QuantizationModifier
  targets: {targets}
  scheme: {preset}
  ignore: {ignore}
""",
    "quip": """\
# QuIP: rotate the inputs of each Linear module while the model runs. transformers ignores it; vLLM needs a GPU.
QuIPModifier:
  rotations: [v]              # u rotates outputs as well, and gains little
  transform_block_size: 128   # leave it out for one matrix over all features
  precision: float32          # of the rotation; the default is float64
GPTQModifier:                 # or QuantizationModifier
  targets: {targets}
  scheme: {preset}
  ignore: {ignore}
""",
    "mixed": """\
# Several schemes: names and regular expressions take precedence over classes.
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
    "autobits": """\
# A scheme for each layer within a budget. A search before the run chooses it; OUT/recipe.yaml states it. Needs data.
AutoBitsModifier:
  targets: {targets}
  budget: {preset}         # its size; or stored bits for each weight (3.5bits), or bytes of the checkpoint (2.1GiB)
  candidates: [W2A16, W3A16, W4A16, W5A16, W6A16, W8A16]  # presets with 16 bit inputs, and unquantized
  ignore: {ignore}
  algorithm: gptq        # or rtn
  # sensitivity: forward # for models that torch cannot differentiate
""",
    "cache": """\
# An 8 bit key-value cache, weights unchanged. Needs data. Can be combined with any scheme for weights.
QuantizationModifier:
  kv_cache_scheme: {{num_bits: 8, type: float, strategy: tensor, symmetric: true, dynamic: false}}
  # strategy: attn_head  # one scale for each head
  # for readers that compute attention in FP8, quantize queries as well:
  # config_groups:
  #   attention:
  #     targets: ['re:.*self_attn$']
  #     input_activations: {{num_bits: 8, type: float, strategy: tensor, symmetric: true, dynamic: false}}
""",
}
RECIPE_FILES = {path.stem: path for path in sorted(Path(__file__).with_name("files").glob("*.yaml"))}
_USUAL = {
    "auto_round": "W2A16",
    "awq": "W4A16_ASYM",
    "mixed": "W4A16",
    "quip": "W2A16",
    "smoothquant": "W8A8",
    "spinquant": "NVFP4",
}


def preset_line(name: str) -> str:
    """Describe a preset in words."""
    from runtime.formats.presets import scheme_from_preset

    return scheme_line(scheme_from_preset(name, ["Linear"]))


def scheme_line(scheme: QuantizationScheme) -> str:
    """Describe a scheme with weights in words."""
    numbers, grouping = _words(scheme.weights)
    if scheme.input_activations is None:
        return f"{numbers} weights {grouping}"
    inputs, input_grouping = _words(scheme.input_activations)
    if scheme.input_activations.dynamic is False:
        input_grouping = "with one measured scale"
    if (inputs, input_grouping) == (numbers, grouping):
        return f"{numbers} weights and inputs {grouping}"
    return f"{numbers} weights {grouping}, {inputs} inputs {input_grouping}"


def arguments_line(args: QuantizationArgs) -> str:
    """Describe the arguments of a scheme in words."""
    return " ".join(_words(args))


def _words(args: QuantizationArgs) -> tuple[str, str]:
    """Describe the type of numbers, and which of them share a scale."""
    from runtime.formats.presets import plain_value

    groups = f"in groups of {args.group_size}"
    blocks = f"in blocks of {'x'.join(map(str, args.block_structure or ()))}"
    strategy = plain_value(args.strategy)
    grouping = {"group": groups, "tensor_group": groups, "block": blocks}.get(str(strategy), f"by {strategy}")
    scales = {"torch.float8_e4m3fn": " with 8 bit float scales", "torch.uint8": " with scales of powers of two"}
    numbers = f"{args.num_bits} bit {'' if args.symmetric else 'asymmetric '}{plain_value(args.type)}"
    return numbers, grouping + scales.get(str(args.scale_dtype), "")


def example(name: str) -> str:
    """Return a commented recipe for a preset or an algorithm, or a recipe file of this package; case does not matter.

    Raises:
        UsageError: no recipe has this name.
    """
    from runtime.formats.presets import PRESETS

    algorithm, preset = name.lower(), name.upper()
    if algorithm in EXAMPLES:
        return recipe_text(_USUAL.get(algorithm, "W4A16"), algorithm)
    if preset in PRESETS:
        return recipe_text(preset, default_algorithm(preset))
    if algorithm in RECIPE_FILES:
        return read_text(RECIPE_FILES[algorithm])
    names = ", ".join((*EXAMPLES, *PRESETS, *RECIPE_FILES))
    raise UsageError(f"no example is named {name!r}", hint=f"names are {names}")


def default_algorithm(preset: str) -> str:
    """Return the algorithm for a preset: GPTQ for integers, except 8 bit weights with 16 bit inputs, which lose next to
    nothing when they are rounded to nearest.
    """
    return "gptq" if preset == "INT8" or (preset.startswith("W") and preset != "W8A16") else "rtn"


def recipe_text(
    preset: str, algorithm: str, *, targets: Sequence[str] = ("Linear",), ignore: Sequence[str] = ("lm_head",)
) -> str:
    """Return the commented recipe of an algorithm for a preset, for these targets except those to ignore."""
    shown_targets = targets[0] if tuple(targets) == ("Linear",) else _flow(targets)
    return EXAMPLES[algorithm].format(preset=preset, targets=shown_targets, ignore=_flow(ignore))


def _flow(names: Sequence[str]) -> str:
    """Write a list of names on one line of YAML."""
    import yaml

    return str(yaml.safe_dump(list(names), default_flow_style=True, width=float("inf"))).strip()


def listing() -> str:
    """List all presets with a description, all algorithms and all recipe files."""
    from runtime.formats.presets import PRESETS

    width = max(map(len, PRESETS))
    lines = [f"{name:<{width}}  {preset_line(name)}" for name in PRESETS]
    others = [f"algorithms  {', '.join(EXAMPLES)}", f"recipes     {', '.join(RECIPE_FILES)}"]
    return "\n".join(["presets", *lines, "", *others, "", "recipes NAME shows an example"])
