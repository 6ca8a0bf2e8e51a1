"""The host's command line: `seqbuild-runtime calibrate|join|plan|evaluate|recipes|check|doctor`.

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
from runtime.cli.batches import DEFAULT_BATCH_SIZE, DEFAULT_SAMPLES, BatchOptions, make_batches
from runtime.cli.commands import CommandList
from runtime.cli.evaluate import evaluate
from runtime.cli.group import is_resumed, join_group, require_readable_by
from runtime.cli.join import join
from runtime.cli.plan import plan
from runtime.cli.run import EPILOG, require_output, run_app
from runtime.cli.watching import require_log, watching
from runtime.console import optional_bytes, parse_bytes, put, say
from runtime.data.options import DataOptions
from runtime.terminal import width_of

if TYPE_CHECKING:
    import torch

    from runtime.artifact.bundle import Job
    from runtime.chain import Artifact
    from runtime.recipe.recipe import Recipe
    from runtime.streaming.report import Calibration
    from runtime.workers.group import Workers


class HostCommands(CommandList):
    """The commands of the host."""

    sections: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "Commands": ("calibrate", "join", "evaluate", "plan", "recipes", "check", "doctor")
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

app.command()(plan)
app.command()(join)
app.command()(evaluate)


@app.command()
@given.takes_data_options
def calibrate(
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
    allow_version_skew: given.Skew = False,
    trust_remote_code: given.Trust = False,
    require_signature: given.Signature = None,
    as_json: given.SummaryAsJson = False,
) -> None:
    """Quantize a model with a recipe; one subgraph is in memory at a time."""
    from runtime.artifact.bundle import find_job

    options: dict[str, Any] = {"max_shard_bytes": parse_bytes(max_shard_size, option="--max-shard-size")}
    options |= {"propagate_error": propagate_error, "moe_calibrate_all_experts": moe_calibrate_all_experts}
    options |= {"parts": parts, "solve_products": solve_products, "force": force, "cuda_graphs": cuda_graphs}
    with ExitStack() as stack:
        shared = {"command": "calibrate", "--resume": resume, "--parts": parts}
        workers, device = join_group(stack, device, worker_timeout, shared)
        options["resume"] = is_resumed(workers, resume)
        job = find_job(artifact, weights=weights, revision=revision, recipe=recipe, data=tuple(data or ()), out=out)
        require_readable_by(workers, job.data)
        parsed = _recipe_of(job, workers, options["resume"], parts, log)
        loaded, options["device"], options["dtype"] = given.load_on(
            job.artifact, device, dtype, allow_version_skew, trust_remote_code, require_signature
        )
        batch_options = BatchOptions(
            data=replace(data_options, sources=job.data, default_samples=DEFAULT_SAMPLES),
            tokenizer=given.directory_of(tokenizer, None, "tokenizer"),
            weights=job.weights,
            batch_size=batch_size,
            is_calibration=True,
        )
        batches = make_batches(loaded, batch_options, None if as_json else say) if job.data else []
        options |= memory_options(checkpoint_activations, activation_memory, statistics_memory)
        _calibrate(loaded, job, parsed, batches, options, log, as_json)


def _recipe_of(job: Job, workers: Workers, resume: bool, parts: bool, log: Path | None) -> Recipe:
    """Check the output directory and the log, which takes no time, and read the recipe."""
    from runtime.cli.imports import prepare
    from runtime.recipe.named import recipe_of
    from runtime.streaming.output_place import require_startable
    from runtime.workers.agreement import agreed

    require_startable(job.out, resume=resume, workers=workers, parts=parts)
    with agreed(workers):
        if workers.rank == 0:
            require_log(log)
    prepare(job.artifact)
    return recipe_of(job.recipe)


def memory_options(interval: str, activations: str | None, statistics: str | None) -> dict[str, Any]:
    """Parse --checkpoint-activations, --activation-memory and --statistics-memory."""
    from runtime.streaming.activations import Budget

    return {
        "checkpoint_activations": _interval(interval),
        "activation_memory": None if activations is None else Budget.parse(activations),
        "statistics_memory": optional_bytes(statistics, option="--statistics-memory"),
    }


def _calibrate(
    artifact: Artifact,
    job: Job,
    recipe: Recipe,
    batches: list[dict[str, torch.Tensor]],
    options: dict[str, Any],
    log: Path | None,
    as_json: bool,
) -> None:
    from runtime.calibration import calibrate as run

    with ExitStack() as stack:
        result = run(
            artifact,
            weights=job.weights,
            recipe=recipe,
            batches=batches,
            out=job.out,
            **watching(stack, log, as_json=as_json),
            **options,
        )
    _report(result, as_json)


def _interval(text: str) -> int:
    """Parse --checkpoint-activations: activations are saved after every N subgraphs; 0 for never."""
    from runtime.errors import UsageError

    known = {"replay": 0, "save": 1}
    if text not in known and not text.isdecimal():
        raise UsageError(f"--checkpoint-activations must be replay, save or a number; got {text!r}")
    return known[text] if text in known else int(text)


def _report(result: Calibration, as_json: bool) -> None:
    """Print the summary of a calibration."""
    if not as_json:
        from runtime.streaming.report import summary_lines

        for line in summary_lines(result, width_of(sys.stdout)):
            say(line)
        return
    fields = ("name", "algorithm", "loss", "error", "damping", "num_tokens", "seconds", "num_bytes")
    facts = {
        "path": str(result.path),
        "bytes": result.num_bytes,
        "seconds": result.seconds,
        "modules": [{field: getattr(module, field) for field in fields} for module in result.modules],
        "unreached": list(result.unreached),
        "remarks": list(result.remarks),
        "resumed_at": result.resumed_at,
    }
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
def check(
    artifact: given.ArtifactPath,
    public_key: given.PublicKey = None,
    allow_version_skew: given.Skew = False,
) -> None:
    """Check an artifact without executing any of its code."""
    from runtime.artifact.bundle import artifact_of
    from runtime.artifact.check import check_artifact, check_versions

    require_output()
    found = check_artifact(artifact_of(artifact), [public_key] if public_key is not None else [])
    manifest = found.manifest
    check_versions(manifest, allow_version_skew=allow_version_skew)
    say(f"{artifact}: valid; {len(manifest.files)} files and {len(found.sources)} programs match the manifest")
    if found.signed:
        say("signature: valid for every required key")
    say(f"model: {manifest.model.class_name} from {manifest.model.module}, {len(manifest.subgraphs)} subgraphs")
    say(f"input key: {manifest.input_key}")
    say(f"opaque steps: {', '.join(manifest.opaque_steps) or 'none'}")
    if manifest.model.code:
        say(f"the model's own code (not executed): {', '.join(manifest.model.code)}")


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
