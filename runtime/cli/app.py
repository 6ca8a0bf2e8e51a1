"""The host's command line: `seqbuild-runtime calibrate|join|plan|evaluate|dequantize|...`.

Only typer is imported at the top; torch and transformers are imported by the commands that need them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

import runtime.cli.options as given
from runtime.cli.batches import (
    DEFAULT_BATCH_SIZE,
    DEFAULT_SAMPLES,
    BatchOptions,
    DescribedBatches,
    described_batches,
)
from runtime.cli.check import check
from runtime.cli.commands import CommandList
from runtime.cli.dequantize import dequantize
from runtime.cli.evaluate import evaluate
from runtime.cli.group import is_resumed, join_group, require_readable_by
from runtime.cli.join import join
from runtime.cli.plan import plan
from runtime.cli.report import RunPage, report, run_page
from runtime.cli.reproduction import repeating_command
from runtime.cli.run import EPILOG, require_output, run_app
from runtime.cli.search import search
from runtime.cli.sweep import sweep
from runtime.cli.watching import GivenLog, watching
from runtime.console import optional_bytes, parse_bytes, put, say, tell_when_stopped
from runtime.data.options import DataOptions
from runtime.provenance.origin import RunOrigin
from runtime.terminal import width_of
from runtime.workers.agreement import agreed

if TYPE_CHECKING:
    import torch

    from runtime.artifact.bundle import Job
    from runtime.chain import Artifact
    from runtime.planning.machine import Machine
    from runtime.recipe.recipe import Recipe
    from runtime.streaming.report import Calibration
    from runtime.workers.group import Workers


class HostCommands(CommandList):
    """The commands of the host."""

    sections: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "Commands": (
            "calibrate",
            "sweep",
            "join",
            "report",
            "evaluate",
            "dequantize",
            "plan",
            "search",
            "recipes",
            "check",
            "doctor",
        )
    }
    example = "calibrate ARTIFACT --weights DIR --recipe W4A16 --data FILE -o OUT"
    others: ClassVar[Mapping[str, str]] = {
        name: f"it is a command of the compiler: seqbuild {name}"
        for name in ("quantize", "compile", "inspect", "verify", "data", "cache", "pack", "sign")
    }


app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    cls=HostCommands,
    help="Calibrate and evaluate compiled models. Nothing is traced, and no network is used.",
    epilog=EPILOG,
)

_OF_THE_RUN = (  # options of a calibration that it takes as they are
    *("parts", "propagate_error", "moe_calibrate_all_experts", "solve_products", "force", "cuda_graphs"),
    *("hash_weights", "keep_statistics", "statistics"),
)

app.command()(plan)
app.command()(search)
app.command()(join)
app.command()(evaluate)
app.command()(check)
app.command()(report)
app.command()(dequantize)
app.command()(sweep)


@app.command()
@given.takes_data_options
def calibrate(
    context: typer.Context,
    artifact: given.ArtifactPath,
    data_options: DataOptions,
    weights: given.BundledWeights = None,
    revision: given.Revision = None,
    recipe: given.BundledRecipe = None,
    out: given.Out = None,
    data: given.BundledData = None,
    device: given.Device = "auto",
    dtype: given.Dtype = "auto",
    batch_size: given.BatchSize = DEFAULT_BATCH_SIZE,
    tokenizer: given.Tokenizer = None,
    max_shard_size: given.MaxShardSize = "2GB",
    resume: given.Resume = False,
    parts: given.Parts = False,
    checkpoint_activations: given.CheckpointActivations = "replay",
    activation_memory: given.ActivationMemory = None,
    propagate_error: given.PropagateError = True,
    moe_calibrate_all_experts: given.AllExperts = True,
    statistics_memory: given.StatisticsMemory = None,
    solve_products: given.SolveProducts = "float32",
    log: given.Log = None,
    worker_timeout: given.WorkerTimeout = "10min",
    force: given.Force = False,
    cuda_graphs: given.CudaGraphs = False,
    hash_weights: given.HashWeights = True,
    keep_statistics: given.KeepStatistics = None,
    statistics: given.SavedStatistics = None,
    machine: given.MachineFile = None,
    allow_version_skew: given.Skew = False,
    trust_remote_code: given.Trust = False,
    require_signature: given.Signature = None,
    report: given.ReportPath = None,
    no_report: given.NoReport = False,
    as_json: given.SummaryAsJson = False,
) -> None:
    """Quantize a model with a recipe; one subgraph is in memory at a time."""
    events = GivenLog(log, artifact=artifact, weights=weights, recipe=recipe, data=data, out=out)
    options: dict[str, Any] = {name: value for name, value in locals().items() if name in _OF_THE_RUN}
    options["max_shard_bytes"] = parse_bytes(max_shard_size, option="--max-shard-size")
    with ExitStack() as stack:
        shared = {"command": "calibrate", "--resume": resume, "--parts": parts}
        workers, device = join_group(stack, device, worker_timeout, shared)
        with agreed(workers):
            events.require()
        options["resume"] = is_resumed(workers, resume)
        job = _job_of(artifact, weights, revision, recipe, tuple(data or ()), out, statistics)
        require_readable_by(workers, job.data)
        parsed = _recipe_of(job, workers, options["resume"], parts)
        with agreed(workers):
            page = run_page(report, no_report, job.out, job.artifact, job.weights)
        loaded, options["device"], options["dtype"] = given.load_on(
            job.artifact, device, dtype, allow_version_skew, trust_remote_code, require_signature
        )
        found = _described(job, loaded, data_options, tokenizer, batch_size, as_json)
        options |= memory_options(checkpoint_activations, activation_memory, statistics_memory)
        options["machine"] = machine_of(machine, options["device"])
        _calibrate(context, loaded, job, parsed, found, options, events, page, as_json)


def _job_of(
    artifact: Path,
    weights: str | None,
    revision: str | None,
    recipe: Path | None,
    data: tuple[str, ...],
    out: Path | None,
    statistics: Path | None,
) -> Job:
    """Find the inputs and the output; with statistics, the data of a bundle is not used."""
    from runtime.artifact.bundle import find_job

    job = find_job(artifact, weights=weights, revision=revision, recipe=recipe, data=data, out=out)
    return job if statistics is None or data else replace(job, data=())


def _recipe_of(job: Job, workers: Workers, resume: bool, parts: bool) -> Recipe:
    """Check the output directory, which takes no time, and read the recipe."""
    from runtime.cli.imports import prepare
    from runtime.recipe.named import recipe_of
    from runtime.streaming.output_place import require_startable

    require_startable(job.out, resume=resume, workers=workers, parts=parts)
    prepare(job.artifact)
    return recipe_of(job.recipe)


def _described(
    job: Job, artifact: Artifact, data: DataOptions, tokenizer: str | None, batch_size: int, as_json: bool
) -> DescribedBatches:
    """Read the calibration data, if there is any."""
    options = BatchOptions(
        data=replace(data, sources=job.data, default_samples=DEFAULT_SAMPLES),
        tokenizer=given.directory_of(tokenizer, None, "tokenizer"),
        weights=job.weights,
        batch_size=batch_size,
        is_calibration=True,
    )
    return described_batches(artifact, options, None if as_json else say) if job.data else DescribedBatches()


def memory_options(interval: str, activations: str | None, statistics: str | None) -> dict[str, Any]:
    """Parse --checkpoint-activations, --activation-memory and --statistics-memory."""
    from runtime.streaming.activations import Budget

    return {
        "checkpoint_activations": _interval(interval),
        "activation_memory": None if activations is None else Budget.parse(activations),
        "statistics_memory": optional_bytes(statistics, option="--statistics-memory"),
    }


def machine_of(path: Path | None, device: torch.device) -> Machine | None:
    """Read the rates of --machine."""
    from runtime.planning.machine import read_machine

    return None if path is None else read_machine(path, device.type)


def _calibrate(
    context: typer.Context,
    artifact: Artifact,
    job: Job,
    recipe: Recipe,
    data: DescribedBatches,
    options: dict[str, Any],
    log: GivenLog,
    page: RunPage,
    as_json: bool,
) -> None:
    from runtime.calibration import calibrate as run

    with ExitStack() as stack:
        result = run(
            artifact,
            weights=job.weights,
            recipe=recipe,
            batches=data.batches,
            out=job.out,
            origin=RunOrigin(data=data.description, command=repeating_command(context, job.weights)),
            **watching(stack, log, page, as_json=as_json),
            **options,
        )
    tell_when_stopped(f"output directory {result.path} is complete")
    _report(result, log, page.write(result), as_json)


def _interval(text: str) -> int:
    """Parse --checkpoint-activations: activations are saved after every N subgraphs; 0 for never."""
    from runtime.errors import UsageError

    known = {"replay": 0, "save": 1}
    if text not in known and not text.isdecimal():
        raise UsageError(f"--checkpoint-activations must be replay, save or a number; got {text!r}")
    return known[text] if text in known else int(text)


def _report(result: Calibration, log: GivenLog, page: Path | None, as_json: bool) -> None:
    """Print the summary of a calibration."""
    if not as_json:
        from runtime.streaming.report import summary_lines

        for line in summary_lines(result, width_of(sys.stdout)):
            say(line)
        if page is not None:
            say(f"report: {page}")
        return
    fields = [
        *("name", "algorithm", "scheme", "loss", "error", "damping", "num_tokens", "num_dead", "fallback"),
        *("seconds", "num_bytes"),
    ]
    facts = {
        "path": str(result.path),
        "bytes": result.num_bytes,
        "seconds": result.seconds,
        "modules": [{field: getattr(module, field) for field in fields} for module in result.modules],
        "unreached": list(result.unreached),
        "remarks": list(result.remarks),
        "resumed_at": result.resumed_at,
        "report": None if page is None else str(page),
    }
    if not log.takes_summary(facts):
        put(json.dumps(facts))


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Name of a preset or an algorithm.")] = None,
) -> None:
    """List presets and algorithms, or print a commented recipe for one."""
    from runtime.recipe.examples import example, listing

    require_output()
    if name is None:
        say(listing().rstrip("\n"))
    else:
        put(example(name).rstrip("\n"))


@app.command()
def doctor(
    artifact: given.ArtifactPath,
    weights: given.BundledWeights = None,
    revision: given.Revision = None,
    recipe: given.BundledRecipe = None,
    data: given.BundledData = None,
    out: given.Out = None,
    device: given.Device = "auto",
    dtype: given.Dtype = "auto",
    trust_remote_code: given.Trust = False,
    public_key: given.PublicKey = None,
) -> int:
    """Check whether this host can run a calibration, and list what is missing; exit code 1 if it cannot."""
    from runtime.cli.doctor import Examination, examine

    require_output()
    examination = Examination(
        path=artifact,
        weights=weights,
        revision=revision,
        recipe=recipe,
        data=tuple(data or ()),
        out=out,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        public_key=public_key,
    )
    for finding in examine(examination):
        say(f"{finding.kind:8} {finding.text}")
    say("ready: this host can run the calibration" if examination.is_ready else "not ready: fix the problems above")
    return 0 if examination.is_ready else 1


def main(argv: list[str] | None = None, *, program: str = "runtime") -> int:
    """Entry point; returns the exit code."""
    return run_app(app, program, argv)
