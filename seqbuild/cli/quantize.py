"""The command `seqbuild quantize`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

import runtime.cli.options as given
from runtime.cli.app import memory_options, run_watchers
from runtime.cli.batches import DEFAULT_BATCH_SIZE
from runtime.cli.plan import print_plan
from runtime.console import parse_bytes, say
from runtime.recipe.named import ALGORITHMS
from seqbuild.onecall.options import BUILTIN, QuantizeOptions

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Hub id in the local cache, or directory with weights.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Directory for the quantized checkpoint.")]
Scheme = Annotated[
    str | None, typer.Option("--scheme", "-s", help="W4A16, W8A8, FP8_DYNAMIC, NVFP4, ...; see seqbuild recipes.")
]
Algorithm = Annotated[
    str | None, typer.Option("--algorithm", help=f"{', '.join(ALGORITHMS)}; default: gptq for integers, else rtn.")
]
Recipe = Annotated[
    str | None, typer.Option("--recipe", help="YAML recipe, or the name of a preset or algorithm, instead of --scheme.")
]
Targets = Annotated[
    list[str] | None,
    typer.Option("--targets", help="Modules to quantize: class, name or re:pattern; repeatable; default: Linear."),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option("--ignore", help="Modules not to quantize, besides lm_head and routers; repeatable."),
]
Data = Annotated[
    list[str] | None,
    typer.Option("--data", help=f"Calibration data: .txt, .jsonl, .parquet, a token file, or {BUILTIN} (default)."),
]
EvalData = Annotated[
    list[str] | None,
    typer.Option("--eval-data", help="Text for the perplexity; default: built-in text that --data does not contain."),
]
Evaluate = Annotated[bool, typer.Option(help="Measure the perplexity of the model and of the result.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
TextOnly = Annotated[bool, typer.Option("--text-only", help="Use a model of images or sounds for text only.")]
Leaves = Annotated[str, typer.Option(help="Tracing depth, as for compile.")]
Artifacts = Annotated[
    Path | None, typer.Option(help="Directory of compiled models; default: ~/.cache/seqbuild/artifacts.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything and print the plan; quantize nothing.")]


def quantize(
    model: Model,
    out: Out,
    scheme: Scheme = None,
    algorithm: Algorithm = None,
    recipe: Recipe = None,
    targets: Targets = None,
    ignore: Ignore = None,
    data: Data = None,
    eval_data: EvalData = None,
    evaluate: Evaluate = True,
    samples: given.Samples = None,
    seq_len: given.SeqLen = None,
    batch_size: given.BatchSize = DEFAULT_BATCH_SIZE,
    pack: given.Pack = True,
    loss_mask: given.LossMask = False,
    tokenizer: given.Tokenizer = None,
    device: given.Device = "auto",
    dtype: given.Dtype = "auto",
    resume: given.Resume = False,
    dry_run: DryRun = False,
    revision: Revision = None,
    text_only: TextOnly = False,
    leaves: Leaves = "auto",
    artifacts: Artifacts = None,
    max_shard_size: given.MaxShardSize = "2GB",
    checkpoint_activations: given.CheckpointActivations = "replay",
    activation_memory: given.ActivationMemory = None,
    statistics_memory: given.StatisticsMemory = None,
    propagate_error: given.PropagateError = True,
    moe_calibrate_all_experts: given.AllExperts = True,
    log: given.Log = None,
    force: given.Force = False,
    allow_version_skew: given.Skew = False,
    trust_remote_code: given.Trust = False,
    as_json: given.SummaryAsJson = False,
) -> None:
    """Quantize a model: compile it, calibrate, compare it with the result, and write a checkpoint."""
    values = dict(locals())
    tell = _ignore if as_json else say
    tell(f"quantizing {model} to {out}")
    options = _options({name: value for name, value in values.items() if name not in ("dry_run", "log", "as_json")})
    if dry_run:
        _plan(options, tell, as_json)
        return
    from seqbuild.onecall.given import Show
    from seqbuild.onecall.result import facts, summary
    from seqbuild.onecall.run import quantize_model

    show = Show(line=tell, watchers=lambda stack: run_watchers(stack, log, as_json))
    result = quantize_model(options, show=show)
    for line in [json.dumps(facts(result))] if as_json else summary(result):
        say(line)


def _ignore(line: str) -> None:
    pass


def _options(values: dict[str, Any]) -> QuantizeOptions:
    """Make the options from the values of the command line."""
    for name in ("targets", "ignore"):
        values[name] = tuple(values[name] or ())
    for name in ("data", "eval_data"):
        values[name] = tuple(values[name] or (BUILTIN,))
    values["max_shard_bytes"] = parse_bytes(values.pop("max_shard_size"), option="--max-shard-size")
    names = ("checkpoint_activations", "activation_memory", "statistics_memory")
    memory = memory_options(*(values.pop(name) for name in names))
    return QuantizeOptions(**values, **memory)


def _plan(options: QuantizeOptions, tell: Callable[[str], None], as_json: bool) -> None:
    from seqbuild.onecall.given import Show
    from seqbuild.onecall.run import plan_quantization

    forecast, shortages, advice = plan_quantization(options, show=Show(line=tell))
    print_plan(forecast, shortages, advice, as_json)
    if shortages:
        raise typer.Exit(1)
