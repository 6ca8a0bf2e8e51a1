"""The command `plan`, the same on both command lines.

Only typer is imported up here; torch waits until the command runs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from runtime.cli.options import ActivationMemory, Skew, StatisticsMemory, Trust
from runtime.cli.run import require_output
from runtime.console import say

if TYPE_CHECKING:
    from runtime.planning.forecast import Forecast
    from runtime.streaming.activations import Budget

_HELP = {
    "device": "cpu, cuda, xpu, or auto for an accelerator if there is one here or --device-memory is given.",
    "sizes": "NAME=N, for sizes that are neither samples nor tokens, such as numbers of images; may be repeated.",
}


def plan(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Directory written by seqbuild compile.")],
    samples: Annotated[int, typer.Option("--samples", min=1, help="Samples of calibration data.")] = 128,
    seq_len: Annotated[int, typer.Option("--seq-len", min=2, help="Tokens of a sample.")] = 2048,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Samples that run at a time.")] = 8,
    recipe: Annotated[Path | None, typer.Option("--recipe", help="YAML; by default GPTQ W4A16.")] = None,
    device: Annotated[str, typer.Option("--device", help=_HELP["device"])] = "auto",
    device_memory: Annotated[str | None, typer.Option("--device-memory", help="What the device has: 24GiB.")] = None,
    host_memory: Annotated[str | None, typer.Option("--host-memory", help="What the process may have: 64GiB.")] = None,
    disk: Annotated[str | None, typer.Option("--disk", help="Free room for the output: 500GB.")] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16, float16, or auto.")] = "auto",
    activation_memory: ActivationMemory = None,
    statistics_memory: StatisticsMemory = None,
    sizes: Annotated[list[str] | None, typer.Option("--size", help=_HELP["sizes"])] = None,
    allow_version_skew: Skew = False,
    trust_remote_code: Trust = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Say what a calibration takes in memory, traffic and disk, without weights and without running it.

    Exit code 1 says that it does not fit.
    """
    from runtime.console import optional_bytes
    from runtime.planning.fit import Limits
    from runtime.recipe.recipe import Recipe

    require_output()
    limits = Limits(
        device=optional_bytes(device_memory, option="--device-memory"),
        host=optional_bytes(host_memory, option="--host-memory"),
        disk=optional_bytes(disk, option="--disk"),
    )
    given = _sizes(sizes or [])
    parsed = None if recipe is None else Recipe.from_file(recipe)
    device_type = _device_type(device, device_memory is not None)
    from runtime.chain import load
    from runtime.host.devices import resolve_dtype
    from runtime.planning.request import plan_artifact

    made, missing, mended = plan_artifact(
        load(artifact, allow_version_skew=allow_version_skew, trust_remote_code=trust_remote_code),
        num_samples=samples,
        seq_len=seq_len,
        batch_size=batch_size,
        recipe=parsed,
        dtype=resolve_dtype(dtype),
        device_type=device_type,
        budget=_budget(activation_memory, device_type, limits.device),
        statistics_bytes=optional_bytes(statistics_memory, option="--statistics-memory"),
        sizes=given,
        limits=limits,
    )
    _print(made, missing, mended, as_json)
    if missing:
        raise typer.Exit(1)


def _print(made: Forecast, missing: list[str], mended: list[str], as_json: bool) -> None:
    from runtime.planning.report import plan_facts, plan_lines

    if as_json:
        say(json.dumps(plan_facts(made) | {"fits": not missing, "shortages": missing, "advice": mended}))
        return
    for line in plan_lines(made):
        say(line)
    say("it fits" if not missing else f"it does not fit: {'; '.join(missing)}")
    for option in mended:
        say(f"  what would: {option}")


def _budget(stated: str | None, device_type: str, device_bytes: int | None) -> Budget:
    """What is stated, or what a run takes by itself: a quarter of a device's memory, then the host's."""
    from runtime.streaming.activations import Budget

    if stated is not None:
        return Budget.parse(stated)
    return Budget(device_bytes=0 if device_type == "cpu" or device_bytes is None else device_bytes // 4)


def _device_type(device: str, has_memory: bool) -> str:
    """The kind of device to plan for; it need not be here."""
    from runtime.errors import UsageError

    kind = device.partition(":")[0]
    if kind not in ("auto", "cpu", "cuda", "xpu"):
        raise UsageError(f"--device is {device!r}", hint="it can be cpu, cuda, xpu or auto")
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
            raise UsageError(f"--size is {text!r}", hint="write it as NAME=N")
        found[name] = int(size)
    return found
