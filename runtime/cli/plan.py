"""The command `plan`, which both command lines have. torch is imported only when the command runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from runtime.cli.batches import DEFAULT_BATCH_SIZE, DEFAULT_SAMPLES, BatchOptions, make_batches
from runtime.cli.options import (
    ActivationMemory,
    BatchSize,
    Dtype,
    MachineFile,
    SavedStatistics,
    Skew,
    StatisticsMemory,
    Trust,
)
from runtime.cli.run import require_output
from runtime.console import optional_bytes, put, say
from runtime.data.options import DEFAULT_SEQ_LEN, DataOptions
from runtime.terminal import width_of

if TYPE_CHECKING:
    import torch

    from runtime.chain import Artifact
    from runtime.planning.fit import Limits
    from runtime.planning.forecast import Forecast
    from runtime.planning.machine import Machine
    from runtime.streaming.activations import Budget

RecipePath = Annotated[
    Path | None, typer.Option("--recipe", help="YAML recipe, or a preset such as FP8; default: GPTQ W4A16.")
]
DeviceMemory = Annotated[str | None, typer.Option("--device-memory", help="Memory of the device, such as 24GiB.")]
HostMemory = Annotated[str | None, typer.Option("--host-memory", help="Memory for the process, such as 64GiB.")]
Disk = Annotated[str | None, typer.Option("--disk", help="Free disk space for the output, such as 500GB.")]
Samples = Annotated[int | None, typer.Option("--samples", min=1, help="Calibration samples; default: 128.")]
SeqLen = Annotated[int | None, typer.Option("--seq-len", min=2, help="Tokens per sample; default: 2048.")]
TokenFile = Annotated[Path | None, typer.Option("--data", help="Token file from seqbuild data, instead of sizes.")]
Workers = Annotated[
    int,
    typer.Option(
        "--workers", min=1, max=1024, help="Processes that share the run, see docs/distributed.md; limits are of each."
    ),
]
Bandwidth = Annotated[
    str | None,
    typer.Option(
        "--bandwidth", help="Link between workers, such as 25GB/s; default: 2GB/s, with --device cuda 450GB/s."
    ),
]
Measure = Annotated[bool, typer.Option("--measure", help="Time this machine for some seconds, to predict seconds.")]
SaveMachine = Annotated[
    Path | None, typer.Option("--save-machine", metavar="FILE", help="Write the measured rates, for --machine.")
]
Weights = Annotated[
    str | None, typer.Option("--weights", help="Checkpoint, to count the bytes that are read; default: as compiled.")
]
_HELP = {
    "device": "cpu, cuda, xpu, or auto: an accelerator if this host has one or --device-memory is given, else cpu.",
    "sizes": "NAME=N, for sizes other than samples and tokens, such as the number of images; can be repeated.",
}


KeepStatistics = Annotated[
    bool, typer.Option("--keep-statistics", help="Count the statistics that calibrate --keep-statistics saves.")
]


def plan(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Directory written by seqbuild compile.")],
    samples: Samples = None,
    seq_len: SeqLen = None,
    data: TokenFile = None,
    batch_size: BatchSize = DEFAULT_BATCH_SIZE,
    recipe: RecipePath = None,
    device: Annotated[str, typer.Option("--device", help=_HELP["device"])] = "auto",
    device_memory: DeviceMemory = None,
    host_memory: HostMemory = None,
    disk: Disk = None,
    dtype: Dtype = "auto",
    activation_memory: ActivationMemory = None,
    statistics_memory: StatisticsMemory = None,
    sizes: Annotated[list[str] | None, typer.Option("--size", help=_HELP["sizes"])] = None,
    workers: Workers = 1,
    bandwidth: Bandwidth = None,
    measure: Measure = False,
    machine: MachineFile = None,
    save_machine: SaveMachine = None,
    weights: Weights = None,
    keep_statistics: KeepStatistics = False,
    statistics: SavedStatistics = None,
    allow_version_skew: Skew = False,
    trust_remote_code: Trust = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Predict memory, traffic, disk space and seconds of a calibration without running it; exit code 1: no fit."""
    from runtime.cli.imports import prepare
    from runtime.recipe.named import recipe_of

    require_output()
    limits = _limits(device_memory, host_memory, disk)
    prepare(artifact)  # so that this process has the resident memory that the run will have
    parsed = None if recipe is None else recipe_of(recipe)
    device_type = _device_type(device, device_memory is not None)
    from runtime.chain import load
    from runtime.host.devices import resolve_dtype
    from runtime.planning.request import plan_artifact

    sources = _sources(measure, machine, save_machine, device_type, weights, bandwidth)
    loaded = load(artifact, allow_version_skew=allow_version_skew, trust_remote_code=trust_remote_code)
    forecast, shortages, advice = plan_artifact(
        loaded,
        **_amounts(loaded, data, samples, seq_len, batch_size),
        recipe=parsed,
        dtype=resolve_dtype(dtype),
        device_type=device_type,
        budget=_budget(activation_memory, device_type, limits.device),
        statistics_bytes=optional_bytes(statistics_memory, option="--statistics-memory"),
        sizes=_sizes(sizes or []),
        limits=limits,
        workers=workers,
        keep_statistics=keep_statistics,
        statistics=statistics,
        **sources,
    )
    print_plan(forecast, shortages, advice, as_json)
    if shortages:
        raise typer.Exit(1)


def _sources(
    measure: bool,
    machine: Path | None,
    save_machine: Path | None,
    device_type: str,
    weights: str | None,
    bandwidth: str | None,
) -> dict[str, Any]:
    """Find out what a plan does not have to assume: rates, the checkpoint's bytes, and the link between workers."""
    from runtime.checkpoint.dequantize import as_weights, open_checkpoint
    from runtime.planning.rates import optional_bandwidth

    return {
        "bandwidth": optional_bandwidth(bandwidth, option="--bandwidth"),
        "weights": None if weights is None else open_checkpoint(as_weights(weights)),
        "machine": _machine(measure, machine, save_machine, device_type),
    }


def _machine(measure: bool, path: Path | None, target: Path | None, device_type: str) -> Machine | None:
    """Measure this machine, or read the rates of one; None to assume them."""
    from runtime.errors import UsageError

    if measure and path is not None:
        raise UsageError("--measure and --machine are both sources of rates", hint="pass one of them")
    if target is not None and not measure:
        raise UsageError("--save-machine needs rates to write", hint="pass --measure as well")
    if path is not None:
        from runtime.planning.machine import read_machine

        return read_machine(path, device_type)
    if not measure:
        return None
    from runtime.host.devices import resolve_device
    from runtime.host.memory import give_memory_back
    from runtime.planning.measure import measure as measured

    device = resolve_device(device_type)
    found = measured(device)
    give_memory_back(device)  # the plan counts the memory that this process has
    if target is not None:
        found.write(target)
    return found


def _limits(device: str | None, host: str | None, disk: str | None) -> Limits:
    from runtime.planning.fit import Limits

    return Limits(
        device=optional_bytes(device, option="--device-memory"),
        host=optional_bytes(host, option="--host-memory"),
        disk=optional_bytes(disk, option="--disk"),
    )


def _amounts(
    artifact: Artifact, data: Path | None, samples: int | None, seq_len: int | None, batch_size: int
) -> dict[str, Any]:
    """Return the sizes of the data: those of the batches of a token file, or the stated ones."""
    from runtime.planning.request import num_rows

    batches = [] if data is None else _batches(artifact, data, samples, seq_len, batch_size)
    return {
        "num_samples": sum(map(num_rows, batches)) or samples or DEFAULT_SAMPLES,
        "seq_len": seq_len or DEFAULT_SEQ_LEN,
        "batch_size": max(map(num_rows, batches), default=batch_size),
        "batches": batches,
    }


def _batches(
    artifact: Artifact, data: Path, samples: int | None, seq_len: int | None, batch_size: int
) -> list[dict[str, torch.Tensor]]:
    """Make the batches of a token file, as a run would."""
    from runtime.data.token_file import require_place

    require_place(data)
    options = DataOptions(sources=(data,), num_samples=samples, default_samples=DEFAULT_SAMPLES, seq_len=seq_len)
    chosen = BatchOptions(data=options, tokenizer=None, weights=artifact.companions_path, batch_size=batch_size)
    return make_batches(artifact, chosen)


def print_plan(
    forecast: Forecast,
    shortages: list[str],
    advice: list[str],
    as_json: bool,
    takes_summary: Callable[[dict[str, Any]], bool] = lambda facts: False,
) -> None:
    """Print a forecast, shortages, and options with which the run fits; JSON only if the event log does not take it."""
    from runtime.planning.report import plan_facts, plan_lines

    if as_json:
        facts = plan_facts(forecast) | {"fits": not shortages, "shortages": shortages, "advice": advice}
        if not takes_summary(facts):
            put(json.dumps(facts))
        return
    for line in plan_lines(forecast, width_of(sys.stdout)):
        say(line)
    say(f"does not fit: {'; '.join(shortages)}" if shortages else "fits")
    for option in advice:
        say(f"  advice: {option}")


def _budget(stated: str | None, device_type: str, device_bytes: int | None) -> Budget:
    """Parse --activation-memory; the default is that of a run: a quarter of the device's memory, then the host's."""
    from runtime.streaming.activations import Budget

    if stated is not None:
        return Budget.parse(stated)
    return Budget(device_bytes=0 if device_type == "cpu" or device_bytes is None else device_bytes // 4)


def _device_type(device: str, has_memory: bool) -> str:
    """Return the kind of device to plan for; this host need not have one."""
    from runtime.errors import UsageError

    kind = device.partition(":")[0]
    if kind not in ("auto", "cpu", "cuda", "xpu"):
        raise UsageError(f"--device must be one of cpu, cuda, xpu, auto; got {device!r}")
    if kind != "auto":
        return kind
    from runtime.host.devices import resolve_device

    here = resolve_device("auto").type
    return "cuda" if has_memory and here == "cpu" else here


def _sizes(texts: list[str]) -> dict[str, int]:
    from runtime.errors import UsageError

    found = {}
    for text in texts:
        name, _, size = text.partition("=")
        if not name or not size.isdecimal() or int(size) < 1:
            raise UsageError(f"--size must be NAME=N with N >= 1; got {text!r}")
        found[name] = int(size)
    return found
