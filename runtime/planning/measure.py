"""Measure the rates of this machine for a plan, in a few seconds.

Each rate comes from the function that a run calls, timed for matrices of several sizes. The seconds of a call are
fitted as a sum of parts: in proportion to its operations, to its numbers, and so on.

Shapes: O out features, I in features, T tokens.
"""

from __future__ import annotations

import itertools
import platform
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from runtime.algorithms.awq import search_scales
from runtime.algorithms.clipping import quantize_clipped
from runtime.algorithms.gptq import factor_hessian, solve_tiles
from runtime.algorithms.gptq_options import SolveOptions
from runtime.algorithms.gptq_tiles import tiles_of
from runtime.algorithms.grid import shared_global_scale
from runtime.algorithms.hessian import HessianAccumulator
from runtime.algorithms.products import has_quick_bfloat16
from runtime.formats.compressed import compress_rows, decompress_module, join_rows
from runtime.formats.presets import scheme_from_preset
from runtime.planning.machine import Machine
from runtime.planning.measure_passes import call_seconds, input_rates, pass_rates
from runtime.planning.measure_traffic import start_seconds, traffic_rates
from runtime.planning.rates import Kinds
from runtime.planning.step_work import grid_kind
from runtime.planning.stopwatch import Stopwatch, fitted
from runtime.quantize.channel_sums import ChannelSums
from runtime.quantize.nearest import output_size, round_to_nearest
from runtime.recipe.recipe import Assignment
from runtime.status import doing

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_PRESETS = ("W4A16", "W8A8", "FP8_DYNAMIC", "NVFP4A16", "MXFP4A16", "MXFP8A16")  # a kind of grid each
_CANDIDATES = 22  # of AWQ's search
_CPUINFO = Path("/proc/cpuinfo")
# In a run, the phases displace each other's values from the caches; several threads wait for each other at each
# operator, and share memory and cores with the threads that read, hash and write. These are ratios of runs of two
# models with three recipes on one machine to what their functions take alone.
_IN_A_RUN, _IN_A_RUN_THREADS = 1.1, 1.25


def measure(device: torch.device) -> Machine:
    """Measure the rates of a device of this machine, with torch's present number of threads."""
    watch, num_threads = Stopwatch(device), torch.get_num_threads()
    base = watch.assumed
    with torch.no_grad():
        doing("measuring: passes")
        passes = {str(dtype).removeprefix("torch."): pass_rates(watch, dtype) for dtype in _DTYPES}
        doing("measuring: statistics and solves")
        found: dict[str, Any] = {**_statistics(watch), **_solves(watch), **_searches(watch)}
        doing("measuring: rounding")
        nearest, unpacking, module_s = _nearest(watch)
        doing("measuring: reads and writes")
        found |= traffic_rates(watch)
        call_s = call_seconds(watch)
        start_s = start_seconds(device)
    slowness = start_s / base.start_s  # of Python, relative to the machine of the assumed rates
    rates = replace(
        base,
        **found,
        passes=passes["float32"],
        call_s=call_s,
        rounding_inputs=input_rates(watch),
        nearest=nearest,
        unpacking=unpacking,
        start_s=start_s,
        parameter_s=base.parameter_s * slowness,
        step_s=base.step_s * slowness,
        module_s=module_s,
        in_a_run=base.in_a_run if device.type != "cpu" else _IN_A_RUN if num_threads == 1 else _IN_A_RUN_THREADS,
    )
    return Machine(
        device=device.type,
        name=_name(device),
        threads=num_threads,
        torch_version=str(torch.__version__),
        passes=passes,
        base=rates,
    )


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    try:
        found = re.search(r"model name\s*:\s*(.+)", _CPUINFO.read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _statistics(watch: Stopwatch) -> dict[str, float]:
    """Hessians, by operations, by numbers of inputs, and by numbers of their own; and ranges of channels."""
    base, seconds, parts = watch.assumed, [], []
    for num_tokens, width in ((2048, watch.narrow), (1024, watch.wide), (512, 5 * watch.wide // 2)):
        inputs_TI = watch.random(num_tokens, width).bfloat16()

        def measure_once(inputs_TI: torch.Tensor = inputs_TI, width: int = width) -> torch.Tensor:
            accumulator = HessianAccumulator(width, device=watch.device)
            accumulator.add(inputs_TI)
            return accumulator.hessian_II

        seconds.append(watch.best(measure_once))
        parts.append((num_tokens * width**2, num_tokens * width, width**2))
    assumed = (1 / base.sums, 1 / base.gathering, 1 / base.completing)
    sums, gathering, completing = fitted(parts, seconds, assumed)
    channels = ChannelSums(inputs_TI.shape[1], watch.device)
    channel_s = watch.best(lambda: channels.add(inputs_TI)) / inputs_TI.numel()
    return {
        "sums": 1 / sums,
        "gathering": 1 / gathering,
        "completing": 1 / completing,
        "channels": 1 / channel_s,
    }


def _hessian(watch: Stopwatch, width: int) -> torch.Tensor:
    accumulator = HessianAccumulator(width, device=watch.device)
    accumulator.add(watch.random(width + width // 4, width))
    return accumulator.hessian_II.clone()


def _solves(watch: Stopwatch) -> dict[str, float]:
    """Factorizations by operations and numbers, and tiles of GPTQ W4A16 by operations, numbers and blocks."""
    scheme = scheme_from_preset("W4A16", ["Linear"])
    options = SolveOptions(args=scheme.weights, scale_dtype=torch.bfloat16)
    factor_s, factor_parts, tile_s, tile_parts = [], [], [], []
    for width in (watch.narrow, 2 * watch.narrow, watch.wide):
        hessian_II = _hessian(watch, width)

        def factor(hessian_II: torch.Tensor = hessian_II, width: int = width) -> Any:
            return factor_hessian(hessian_II, options, [width, width], torch.float32)

        factor_s.append(watch.best(factor))
        factor_parts.append((width**3 / 3, width**2))
        factors = factor()
        for num_rows in (watch.narrow, watch.wide):
            weight_OI = watch.random(num_rows, width).bfloat16()
            tiles = tiles_of([weight_OI.shape], scheme.weights, watch.device.type)

            def solve(weight_OI: torch.Tensor = weight_OI, tiles: Any = tiles, factors: Any = factors) -> None:
                for piece in solve_tiles([weight_OI], tiles, factors, options):
                    compress_rows("measured", piece.rows, scheme)

            tile_s.append(watch.best(solve))
            tile_parts.append((num_rows * width**2, num_rows * width, -(-width // options.block_size) * len(tiles)))
    base = watch.assumed
    factorization, ordering = fitted(factor_parts, factor_s, (1 / base.factorization, 1 / base.ordering))
    products, columns, block_s = fitted(tile_parts, tile_s, (1 / base.products, 1 / base.columns, base.block_s))
    return {
        "factorization": 1 / factorization,
        "ordering": 1 / ordering,
        "products": 1 / products,
        "columns": 1 / columns,
        "block_s": block_s,
    }


def _searches(watch: Stopwatch) -> dict[str, float]:
    """AWQ's search by operations and numbers, and its clipping."""
    args = scheme_from_preset("W4A16_ASYM", ["Linear"]).weights
    quick = torch.bfloat16 if watch.device.type != "cpu" or has_quick_bfloat16() else torch.float32
    seconds, parts = [], []
    for width in (watch.narrow, watch.wide):
        hessian_II = _hessian(watch, width)
        weight_OI = watch.random(512, width).bfloat16()
        mean_abs_I = watch.random(width).abs() + 0.1

        def search(
            weight_OI: torch.Tensor = weight_OI,
            hessian_II: torch.Tensor = hessian_II,
            mean_abs_I: torch.Tensor = mean_abs_I,
        ) -> None:
            search_scales([weight_OI], hessian_II, mean_abs_I, [args], scale_dtype=torch.bfloat16, race_dtype=quick)

        seconds.append(watch.best(search))
        parts.append((_CANDIDATES * 512 * width**2, _CANDIDATES * 512 * width))
    searching, trying = fitted(parts, seconds, (1 / watch.assumed.searching, 1 / watch.assumed.trying))
    clip_s = watch.best(lambda: quantize_clipped(weight_OI, hessian_II, args, scale_dtype=torch.bfloat16))
    return {"searching": 1 / searching, "trying": 1 / trying, "clipping": weight_OI.numel() / clip_s}


def _nearest(watch: Stopwatch) -> tuple[Kinds, Kinds, float]:
    """Rounding to nearest with packing, and unpacking, by kind of grid; and seconds for a module of a few numbers."""
    schemes = [scheme_from_preset(name, ["Linear"]) for name in _PRESETS]
    searched = schemes[0].model_copy(deep=True)
    searched.weights.observer = "memoryless_mse"
    nearest, unpacking, least = [], [], []
    for scheme, num_rows in (*zip(schemes, itertools.repeat(watch.wide)), (searched, watch.narrow)):
        job = Assignment(scheme=scheme, algorithm="rtn", options=None, group=0)
        calls = [_NearestCall(job, watch.random(rows, width)) for rows, width in ((num_rows, watch.wide), (16, 128))]
        rounding_s, module_s = (watch.best(call) for call in calls)
        kind, count = grid_kind(scheme.weights), calls[0].weight_OI.numel()
        nearest.append((kind, count / max(rounding_s - module_s, rounding_s / 10)))
        unpacking.append((kind, count / watch.best(calls[0].unpack)))
        least.append(module_s)
    return tuple(nearest), tuple(unpacking), 3 * sorted(least)[len(least) // 2]


class _NearestCall:
    """Rounds a weight to nearest and packs it, as `quantize.solves` does, and unpacks it."""

    def __init__(self, job: Assignment, weight_OI: torch.Tensor) -> None:
        self.job, self.weight_OI = job, weight_OI.bfloat16()
        self.packed: list[dict[str, torch.Tensor]] = []

    def __call__(self) -> None:
        args = self.job.scheme.weights
        global_scale = shared_global_scale(args, None, [self.weight_OI])
        output_size(self.weight_OI, None)
        parts = round_to_nearest(self.weight_OI, self.job, None, scale_dtype=torch.bfloat16, global_scale=global_scale)
        self.packed = [compress_rows("measured", rows, self.job.scheme) for rows in parts]

    def unpack(self) -> torch.Tensor:
        whole = join_rows("measured", self.packed, self.weight_OI.shape[1], self.job.scheme, {})
        return decompress_module(whole, self.job.scheme).to(torch.bfloat16)
