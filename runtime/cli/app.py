"""The host's command line: `python -m runtime calibrate|plan|evaluate|recipes|check|doctor`.

Only typer is imported up here; torch and transformers wait until a command needs them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from runtime.cli.options import ActivationMemory, Skew, StatisticsMemory, Trust
from runtime.cli.plan import plan
from runtime.cli.run import require_output, run_app
from runtime.console import say

if TYPE_CHECKING:
    import torch

    from runtime.chain import Artifact
    from runtime.streaming.events import Watcher
    from runtime.streaming.report import Calibration

DEFAULT_SAMPLES, DEFAULT_SEQ_LEN, DEFAULT_BATCH_SIZE = 128, 2048, 8

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Run, calibrate and evaluate compiled models. It never traces, and needs no network.",
    epilog="--debug anywhere shows the traceback of an error.",
)

app.command()(plan)

ArtifactPath = Annotated[
    Path, typer.Argument(metavar="ARTIFACT", help="Directory written by seqbuild compile, or by seqbuild pack.")
]
WeightsPath = Annotated[Path, typer.Option("--weights", help="Model directory with safetensors weights.")]
DataPath = Annotated[Path, typer.Option("--data", help=".txt, .jsonl, .parquet, or .safetensors from seqbuild data.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:N, xpu or auto.")]
Dtype = Annotated[str, typer.Option("--dtype", help="float32, bfloat16, float16, or auto for the model's own.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Samples that run at a time.")]
SeqLen = Annotated[int | None, typer.Option("--seq-len", min=2, help="Tokens of a sample.")]
Samples = Annotated[int | None, typer.Option("--samples", min=1, help="How many samples to use.")]
Pack = Annotated[bool, typer.Option("--pack/--no-pack", help="Join texts into full samples, or one sample a text.")]
Tokenizer = Annotated[Path | None, typer.Option("--tokenizer", help="Directory; by default that of the weights.")]
Signature = Annotated[Path | None, typer.Option("--require-signature", help="Public key that must have signed it.")]


@app.command()
def calibrate(
    artifact: ArtifactPath,
    weights: Annotated[
        Path | None, typer.Option("--weights", help="Model directory with safetensors weights; a bundle may hold it.")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="YAML, in llm-compressor's dialect; a bundle holds one.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Directory for the quantized checkpoint.")] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="As for evaluate; not needed by a recipe without statistics.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    samples: Samples = None,
    seq_len: SeqLen = None,
    batch_size: BatchSize = DEFAULT_BATCH_SIZE,
    pack: Pack = True,
    loss_mask: Annotated[
        bool, typer.Option("--loss-mask", help="Of conversations, count only what the assistant says.")
    ] = False,
    tokenizer: Tokenizer = None,
    max_shard_size: Annotated[str, typer.Option("--max-shard-size", help="Of a file of weights: 5GB, 500MB.")] = "2GB",
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")] = False,
    checkpoint_activations: Annotated[
        str,
        typer.Option(
            help="For a resume: replay finished subgraphs (costs nothing now), save the values between them "
            "(costs their bytes on disk), or a number N to save after every N subgraphs."
        ),
    ] = "replay",
    activation_memory: ActivationMemory = None,
    propagate_error: Annotated[
        bool, typer.Option(help="Later layers see what quantized ones return, or (faster) what the original ones do.")
    ] = True,
    moe_calibrate_all_experts: Annotated[
        bool, typer.Option(help="Measure every expert on all tokens, or each on those that are sent to it.")
    ] = True,
    statistics_memory: StatisticsMemory = None,
    log: Annotated[Path | None, typer.Option("--log", help="Append events to this file, a JSON object a line.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Go on where the plan says that it does not fit.")] = False,
    allow_version_skew: Skew = False,
    trust_remote_code: Trust = False,
    require_signature: Signature = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Quantize a model by a recipe, one subgraph in memory at a time."""
    from runtime.artifact.bundle import find_job
    from runtime.cli.imports import prepare
    from runtime.console import optional_bytes, parse_bytes
    from runtime.host.publish import require_free
    from runtime.recipe.recipe import Recipe
    from runtime.streaming.workplace import require_unfinished

    shard_bytes = parse_bytes(max_shard_size, option="--max-shard-size")
    job = find_job(artifact, weights=weights, recipe=recipe, data=data, out=out)
    artifact, weights, recipe, data, out = job.artifact, job.weights, job.recipe, job.data, job.out
    if resume:
        require_unfinished(out)
    require_free(out)
    prepare(artifact)
    parsed = Recipe.from_file(recipe)
    loaded, run_device, run_dtype = _prepare(
        artifact, device, dtype, allow_version_skew, trust_remote_code, require_signature
    )
    batches: list[dict[str, torch.Tensor]] = []
    if data is not None:
        batches = _batches(
            loaded,
            data,
            tokenizer,
            weights,
            samples,
            DEFAULT_SAMPLES,
            seq_len,
            batch_size=batch_size,
            pack=pack,
            loss_mask=loss_mask,
            has_masks=True,
        )
    from runtime.calibration import calibrate as run
    from runtime.streaming.activations import Budget

    with ExitStack() as stack:
        watchers = _watchers(stack, log, as_json)
        result = run(
            loaded,
            weights=weights,
            recipe=parsed,
            batches=batches,
            out=out,
            device=run_device,
            dtype=run_dtype,
            max_shard_bytes=shard_bytes,
            progress=(lambda line: None) if as_json else say,
            resume=resume,
            checkpoint_activations=_interval(checkpoint_activations),
            activation_memory=None if activation_memory is None else Budget.parse(activation_memory),
            propagate_error=propagate_error,
            moe_calibrate_all_experts=moe_calibrate_all_experts,
            statistics_memory=optional_bytes(statistics_memory, option="--statistics-memory"),
            watchers=watchers,
            force=force,
        )
    _report(result, as_json)


def _watchers(stack: ExitStack, log: Path | None, as_json: bool) -> list[Watcher]:
    """A display if there is a terminal to show it on, and the event log."""
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
    """After how many subgraphs activations are saved; 0 for never."""
    from runtime.errors import UsageError

    known = {"replay": 0, "save": 1}
    if text not in known and not text.isdecimal():
        raise UsageError(f"--checkpoint-activations is {text!r}", hint="it can be replay, save, or a number")
    return known[text] if text in known else int(text)


def _report(result: Calibration, as_json: bool) -> None:
    """The summary of a calibration: the worst modules first, and every warning again."""
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
def evaluate(
    artifact: ArtifactPath,
    weights: WeightsPath,
    data: DataPath,
    device: Device = "auto",
    dtype: Dtype = "auto",
    samples: Samples = None,
    seq_len: SeqLen = None,
    batch_size: BatchSize = DEFAULT_BATCH_SIZE,
    pack: Pack = True,
    tokenizer: Tokenizer = None,
    allow_version_skew: Skew = False,
    trust_remote_code: Trust = False,
    require_signature: Signature = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Perplexity of the original or a quantized checkpoint, one subgraph in memory at a time."""
    require_output()
    loaded, run_device, run_dtype = _prepare(
        artifact, device, dtype, allow_version_skew, trust_remote_code, require_signature
    )
    batches = _batches(loaded, data, tokenizer, weights, samples, None, seq_len, batch_size=batch_size, pack=pack)
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
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="A preset or an algorithm.")] = None,
) -> None:
    """List presets and algorithms, or show a commented recipe for one."""
    from runtime.recipe.examples import example, listing

    require_output()
    say((listing() if name is None else example(name)).rstrip("\n"))


@app.command()
def check(
    artifact: ArtifactPath,
    public_key: Annotated[
        Path | None, typer.Option("--public-key", help="Refuse an artifact that its owner has not signed.")
    ] = None,
    allow_version_skew: Skew = False,
) -> None:
    """Check an artifact without executing anything of it."""
    from runtime.artifact.bundle import artifact_of
    from runtime.artifact.check import check_artifact, check_versions

    require_output()
    found = check_artifact(artifact_of(artifact), [public_key] if public_key is not None else [])
    manifest = found.manifest
    check_versions(manifest, allow_version_skew=allow_version_skew)
    say(f"{artifact}: {len(manifest.files)} files and {len(found.sources)} programs are as the manifest states")
    if found.signed:
        say("signature: by the owner of the key")
    say(f"model {manifest.model.class_name} of {manifest.model.module}, {len(manifest.subgraphs)} subgraphs")
    say(f"input key {manifest.input_key}")
    say(f"opaque steps: {', '.join(manifest.opaque_steps) or 'none'}")
    if manifest.model.code:
        say(f"the model's own code, which was not executed: {', '.join(manifest.model.code)}")


@app.command()
def doctor(
    artifact: ArtifactPath,
    weights: Annotated[Path | None, typer.Option("--weights", help="As for calibrate.")] = None,
    recipe: Annotated[Path | None, typer.Option("--recipe", help="As for calibrate.")] = None,
    data: Annotated[Path | None, typer.Option("--data", help="As for calibrate.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="As for calibrate.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
    public_key: Annotated[Path | None, typer.Option("--public-key", help="As for check.")] = None,
) -> int:
    """Say what is missing on this host, or does not match. Exit code 1 says that something does not."""
    from runtime.cli.doctor import Examination, examine

    require_output()
    examination = Examination(
        path=artifact,
        weights=weights,
        recipe=recipe,
        data=data,
        out=out,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        public_key=public_key,
    )
    for finding in examine(examination):
        say(f"{finding.kind:8} {finding.text}")
    say("this host can calibrate it" if examination.is_well else "this host cannot calibrate it as it is")
    return 0 if examination.is_well else 1


def _prepare(
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


def _batches(
    artifact: Artifact,
    data: Path,
    tokenizer: Path | None,
    weights: Path,
    samples: int | None,
    default_samples: int | None,
    seq_len: int | None,
    *,
    batch_size: int,
    pack: bool,
    loss_mask: bool = False,
    has_masks: bool = False,
) -> list[dict[str, torch.Tensor]]:
    """The model's inputs for a data file, refused where the artifact does not hold for them.

    `loss_mask` asks for a mask, and `has_masks` says whether one makes a difference: to perplexity it makes none.
    """
    from runtime.data.inputs import model_inputs, require_decoder, require_in_range, require_length
    from runtime.data.samples import batches, load_tokens
    from runtime.model.config import text_limits

    vocab_size, longest = text_limits(artifact)
    if seq_len is None and data.suffix != ".safetensors":
        seq_len = min(DEFAULT_SEQ_LEN, longest or DEFAULT_SEQ_LEN)
    tokens = load_tokens(
        data,
        tokenizer_dir=tokenizer or _tokenizer_directory(weights, artifact),
        num_samples=samples,
        seq_len=seq_len,
        pack=pack,
        loss_mask=loss_mask,
        vocab_size=vocab_size,
    )
    places: Sequence[int] = range(len(tokens.samples))
    if samples is None and default_samples is not None and len(places) > default_samples:
        places = [index * len(places) // default_samples for index in range(default_samples)]
    chosen = [tokens.samples[place] for place in places]
    masks = [tokens.masks[place] for place in places] if has_masks and tokens.masks is not None else None
    targets = None if tokens.targets is None else [tokens.targets[place] for place in places]
    require_length((*chosen, *(targets or ())), longest)
    require_decoder(artifact.manifest, targets)
    made = [model_inputs(artifact.manifest, batch) for batch in batches(chosen, batch_size, masks, targets)]
    require_in_range(artifact.manifest, made)
    return made


def _tokenizer_directory(weights: Path, artifact: Artifact) -> Path:
    """The weights' own tokenizer, else the one that travels with the artifact."""
    return weights if (weights / "tokenizer_config.json").is_file() else artifact.companions_path


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_app(app, "runtime", argv)
