"""The host's command line: `python -m runtime calibrate|plan|evaluate|recipes|check|doctor`.

Only typer is imported at the top; torch and transformers are imported by the commands that need them.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import runtime.cli.options as given
from runtime.cli.batches import DEFAULT_BATCH_SIZE, DEFAULT_SAMPLES, BatchOptions, make_batches
from runtime.cli.plan import plan
from runtime.cli.run import require_output, run_app
from runtime.console import optional_bytes, parse_bytes, say
from runtime.data.options import DataOptions

if TYPE_CHECKING:
    import torch

    from runtime.artifact.bundle import Job
    from runtime.chain import Artifact
    from runtime.recipe.recipe import Recipe
    from runtime.streaming.events import Watcher
    from runtime.streaming.report import Calibration

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Calibrate and evaluate compiled models. Nothing is traced, and no network is used.",
    epilog="--debug, at any position, shows the traceback of an error.",
)

app.command()(plan)


@app.command()
@given.takes_data_options
def calibrate(
    artifact: given.ArtifactPath,
    data_options: DataOptions,
    weights: given.BundledWeights = None,
    recipe: given.BundledRecipe = None,
    out: given.Out = None,
    data: given.BundledData = None,
    device: given.Device = "auto",
    dtype: given.Dtype = "auto",
    batch_size: given.BatchSize = DEFAULT_BATCH_SIZE,
    tokenizer: given.Tokenizer = None,
    max_shard_size: given.MaxShardSize = "2GB",
    resume: given.Resume = False,
    checkpoint_activations: given.CheckpointActivations = "replay",
    activation_memory: given.ActivationMemory = None,
    propagate_error: given.PropagateError = True,
    moe_calibrate_all_experts: given.AllExperts = True,
    statistics_memory: given.StatisticsMemory = None,
    log: given.Log = None,
    force: given.Force = False,
    allow_version_skew: given.Skew = False,
    trust_remote_code: given.Trust = False,
    require_signature: given.Signature = None,
    as_json: given.SummaryAsJson = False,
) -> None:
    """Quantize a model with a recipe; one subgraph is in memory at a time."""
    from runtime.artifact.bundle import find_job

    options: dict[str, Any] = {
        "max_shard_bytes": parse_bytes(max_shard_size, option="--max-shard-size"),
        "resume": resume,
        "propagate_error": propagate_error,
        "moe_calibrate_all_experts": moe_calibrate_all_experts,
        "force": force,
    }
    job = find_job(artifact, weights=weights, recipe=recipe, data=tuple(data or ()), out=out)
    parsed = _recipe_of(job, resume)
    loaded, options["device"], options["dtype"] = _loaded(
        job.artifact, device, dtype, allow_version_skew, trust_remote_code, require_signature
    )
    batch_options = BatchOptions(
        data=replace(data_options, sources=job.data, default_samples=DEFAULT_SAMPLES),
        tokenizer=tokenizer,
        weights=job.weights,
        batch_size=batch_size,
        has_masks=True,
    )
    batches = make_batches(loaded, batch_options, None if as_json else say) if job.data else []
    options |= _memory_options(checkpoint_activations, activation_memory, statistics_memory)
    _calibrate(loaded, job, parsed, batches, options, log, as_json)


def _recipe_of(job: Job, resume: bool) -> Recipe:
    """Check the output directory, which takes no time, and read the recipe."""
    from runtime.cli.imports import prepare
    from runtime.host.publish import require_free
    from runtime.recipe.recipe import Recipe
    from runtime.streaming.workplace import require_unfinished

    if resume:
        require_unfinished(job.out)
    require_free(job.out)
    prepare(job.artifact)
    return Recipe.from_file(job.recipe)


def _memory_options(interval: str, activations: str | None, statistics: str | None) -> dict[str, Any]:
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
            progress=(lambda line: None) if as_json else say,
            watchers=_watchers(stack, log, as_json),
            **options,
        )
    _report(result, as_json)


def _watchers(stack: ExitStack, log: Path | None, as_json: bool) -> list[Watcher]:
    """Create the progress display, if the output is a terminal, and the event log."""
    import sys

    watchers: list[Watcher] = []
    if sys.stdout.isatty() and not as_json:
        from rich.console import Console

        from runtime.streaming.display import Display

        watchers.append(stack.enter_context(Display(Console())))
    if log is not None:
        from runtime.streaming.events import EventLog

        watchers.append(stack.enter_context(EventLog(log)))
    return watchers


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

        for line in summary_lines(result):
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
    say(json.dumps(facts))


@app.command()
@given.takes_data_options
def evaluate(
    artifact: given.ArtifactPath,
    weights: given.WeightsPath,
    data: given.DataSources,
    data_options: DataOptions,
    device: given.Device = "auto",
    dtype: given.Dtype = "auto",
    batch_size: given.BatchSize = DEFAULT_BATCH_SIZE,
    tokenizer: given.Tokenizer = None,
    allow_version_skew: given.Skew = False,
    trust_remote_code: given.Trust = False,
    require_signature: given.Signature = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Compute the perplexity of the original or a quantized checkpoint; one subgraph is in memory at a time."""
    require_output()
    loaded, run_device, run_dtype = _loaded(
        artifact, device, dtype, allow_version_skew, trust_remote_code, require_signature
    )
    options = BatchOptions(
        data=replace(data_options, sources=tuple(data)), tokenizer=tokenizer, weights=weights, batch_size=batch_size
    )
    batches = make_batches(loaded, options, None if as_json else say)
    from runtime.evaluation import evaluate as run

    result = run(loaded, weights=weights, batches=batches, device=run_device, dtype=run_dtype)
    if as_json:
        say(
            json.dumps(
                {
                    "perplexity": result.perplexity,
                    "tokens": result.num_tokens,
                    "bytes": result.num_bytes,
                    "seconds": result.seconds,
                }
            )
        )
    else:
        say(f"perplexity {result.perplexity:.4f} over {result.num_tokens} tokens, {result.seconds:.1f} s")


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Name of a preset or an algorithm.")] = None,
) -> None:
    """List presets and algorithms, or print a commented recipe for one."""
    from runtime.recipe.examples import example, listing

    require_output()
    say((listing() if name is None else example(name)).rstrip("\n"))


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


def _loaded(
    path: Path, device: str, dtype: str, allow_version_skew: bool, trust_remote_code: bool, public_key: Path | None
) -> tuple[Artifact, torch.device, torch.dtype | None]:
    """Load the artifact and resolve the names of device and dtype."""
    from runtime.chain import load
    from runtime.host.devices import resolve_device, resolve_dtype

    run_dtype, run_device = resolve_dtype(dtype), resolve_device(device)
    loaded = load(
        path, allow_version_skew=allow_version_skew, trust_remote_code=trust_remote_code, public_key=public_key
    )
    return loaded, run_device, run_dtype


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_app(app, "runtime", argv)
