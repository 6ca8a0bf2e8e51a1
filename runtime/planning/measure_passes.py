"""Measure the operators of a model's own code: products, attention, and all others by the bytes that they move."""

from __future__ import annotations

import functools

import torch
from torch import nn
from torch.nn import functional

from runtime.formats.presets import scheme_from_preset
from runtime.formats.rounded_inputs import quantize_activation
from runtime.host.half_precision import quick_halves
from runtime.planning.operations import Operations
from runtime.planning.rates import Kinds, PassRates
from runtime.planning.step_work import grid_kind
from runtime.planning.stopwatch import Stopwatch

_CALLS, _LAYERS = 100, 4


def pass_rates(watch: Stopwatch, dtype: torch.dtype) -> PassRates:
    """Measure the rates of a model's operators in `dtype`."""
    rows, width = watch.wide // 2, watch.wide
    inputs_TI = watch.random(rows, width).to(dtype)
    # As in a run, each product has weights that are not in the cache.
    weights = [watch.random(width, width).to(dtype) for _ in range(_LAYERS)]
    with quick_halves(watch.device.type):
        product_s = watch.best(lambda: [functional.linear(inputs_TI, weight_OI) for weight_OI in weights]) / _LAYERS
        attention_s, operations = _attention(watch, dtype)
    # On the CPU, parts that stay in the cache pass through several operators (`runtime.language.tiles`).
    values = inputs_TI if watch.device.type != "cpu" else inputs_TI[:64]
    with Operations() as counted:
        _norm_and_gate(values)
    moving_s = watch.best(lambda: _norm_and_gate(values))
    return PassRates(
        products=2 * rows * width * width / product_s,
        attention=operations / attention_s,
        moving=counted.routed.moved / moving_s,
    )


def _attention(watch: Stopwatch, dtype: torch.dtype) -> tuple[float, float]:
    """The seconds, and the operations, of attention with a causal mask."""
    batch, heads, length, size = (4, 8, 256, 64) if watch.device.type == "cpu" else (8, 32, 2048, 128)
    shape = (batch, heads, length, size)
    query = watch.random(batch * heads * length, size).view(shape).to(dtype)
    mask = torch.ones(batch, 1, length, length, dtype=torch.bool, device=watch.device).tril()
    seconds = watch.best(lambda: functional.scaled_dot_product_attention(query, query, query, attn_mask=mask))
    return seconds, 4 * batch * heads * length * length * size


def _norm_and_gate(values_TI: torch.Tensor) -> torch.Tensor:
    """Compute what surrounds the products of a layer."""
    wide_TI = values_TI.float()
    normed_TI = wide_TI * torch.rsqrt(wide_TI.pow(2).mean(-1, keepdim=True) + 1e-6)
    return functional.silu(normed_TI.to(values_TI.dtype)) * values_TI + values_TI


def call_seconds(watch: Stopwatch) -> float:
    """The seconds of an operator of few numbers, with the code around it."""
    values = watch.random(8, 64).bfloat16()
    linear = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16, device=watch.device)
    with Operations() as counted:
        _norm_and_gate(linear(values))

    def layers() -> None:
        for _ in range(_CALLS):
            _norm_and_gate(linear(values))

    with quick_halves(watch.device.type):
        seconds = watch.best(layers)
    return seconds / _CALLS / float(counted.routed.calls)


def input_rates(watch: Stopwatch) -> Kinds:
    """The numbers of a quantized module's inputs that are rounded in a second, by kind of grid."""
    inputs = watch.random(4, 128, watch.wide).bfloat16()
    parts = {"input_global_scale": torch.ones(1, device=watch.device)}
    found = []
    for name in ("W8A8", "FP8_DYNAMIC", "NVFP4"):
        args = scheme_from_preset(name, ["Linear"]).input_activations
        assert args is not None, "the preset rounds inputs"
        seconds = watch.best(functools.partial(quantize_activation, inputs, args, parts))
        found.append((grid_kind(args), inputs.numel() / seconds))
    return tuple(found)
