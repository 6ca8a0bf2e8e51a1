"""The command `seqbuild quantize`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

import runtime.cli.options as given
from runtime.cli.app import memory_options
from runtime.cli.batches import DEFAULT_BATCH_SIZE
from runtime.cli.plan import print_plan
from runtime.cli.report import RunPage, run_page
from runtime.cli.reproduction import repeating_command
from runtime.cli.watching import GivenLog, watching
from runtime.console import parse_bytes, put, say, silent
from runtime.data.options import DataOptions
from runtime.errors import UsageError
from runtime.recipe.named import ALGORITHMS
from seqbuild.onecall.options import BUILTIN, QuantizeOptions

if TYPE_CHECKING:
    from seqbuild.onecall.result import Quantized

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
    typer.Option("--data", metavar="SOURCE", help=f"{given.DATA}. Default: {BUILTIN}, the built-in text."),
]
EvalData = Annotated[
    list[str] | None,
    typer.Option("--eval-data", help="Text for the perplexity; default: built-in text that --data does not contain."),
]
Evaluate = Annotated[bool, typer.Option(help="Measure the perplexity of the model and of the result.")]
TextOnly = Annotated[bool, typer.Option("--text-only", help="Use a model of images or sounds for text only.")]
Leaves = Annotated[str, typer.Option(help="Tracing depth, as for compile.")]
Artifacts = Annotated[
    Path | None, typer.Option(help="Directory of compiled models; default: ~/.cache/seqbuild/artifacts.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything and print the plan; quantize nothing.")]


_OWN = ("dry_run", "log", "report", "no_report", "as_json")  # options that concern the command line alone
# Options of other programs, and what to use instead.
_ELSEWHERE = {
    **dict.fromkeys(("model", "model-id", "model-path", "model-name-or-path", "pretrained"), "pass MODEL first"),
    **dict.fromkeys(("output", "output-dir", "output-path", "save-dir", "save-path", "out-dir"), "use --out"),
    **dict.fromkeys(("bits", "w-bits", "wbits", "num-bits", "group-size", "format", "sym", "asym"), "use --scheme"),
    **dict.fromkeys(("method", "modifier", "quant-method"), "use --algorithm"),
    **dict.fromkeys(("dataset", "dataset-id", "calib-data", "calibration-dataset"), "use --data"),
    **dict.fromkeys(("nsamples", "num-samples", "num-calibration-samples", "calib-size"), "use --samples"),
    **dict.fromkeys(("seqlen", "max-seq-length", "max-length", "max-seq-len"), "use --seq-len"),
}


class QuantizeCommand(TyperCommand):
    """The command `quantize`, with hints for options of similar programs."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Say which option or argument replaces one of another program."""
        known = {option for parameter in self.params for option in parameter.opts}
        for given_option in (argument.partition("=")[0] for argument in args):
            name = given_option.lstrip("-").replace("_", "-")
            if given_option.startswith("--") and given_option not in known and name in _ELSEWHERE:
                raise UsageError(
                    f"seqbuild quantize has no option {given_option}",
                    hint=f"{_ELSEWHERE[name]}, as in seqbuild quantize MODEL --scheme W4A16 -o OUT",
                )
        return super().parse_args(ctx, args)


@given.takes_data_options
def quantize(
    context: typer.Context,
    model: Model,
    out: Out,
    data_options: DataOptions,
    scheme: Scheme = None,
    algorithm: Algorithm = None,
    recipe: Recipe = None,
    targets: Targets = None,
    ignore: Ignore = None,
    data: Data = None,
    eval_data: EvalData = None,
    evaluate: Evaluate = True,
    batch_size: given.BatchSize = DEFAULT_BATCH_SIZE,
    tokenizer: given.Tokenizer = None,
    device: given.Device = "auto",
    dtype: given.Dtype = "auto",
    resume: given.Resume = False,
    dry_run: DryRun = False,
    revision: given.Revision = None,
    text_only: TextOnly = False,
    leaves: Leaves = "auto",
    artifacts: Artifacts = None,
    max_shard_size: given.MaxShardSize = "2GB",
    checkpoint_activations: given.CheckpointActivations = "replay",
    activation_memory: given.ActivationMemory = None,
    statistics_memory: given.StatisticsMemory = None,
    propagate_error: given.PropagateError = True,
    moe_calibrate_all_experts: given.AllExperts = True,
    solve_products: given.SolveProducts = "float32",
    hash_weights: given.HashWeights = True,
    keep_statistics: given.KeepStatistics = None,
    statistics: given.SavedStatistics = None,
    log: given.Log = None,
    force: given.Force = False,
    allow_version_skew: given.Skew = False,
    trust_remote_code: given.Trust = False,
    report: given.ReportPath = None,
    no_report: given.NoReport = False,
    as_json: given.SummaryAsJson = False,
) -> None:
    """Quantize a model: compile it, calibrate, compare it with the result, and write a checkpoint."""
    values = dict(locals()) | {"command": partial(repeating_command, context)}
    values.pop("context")
    events = GivenLog(log, weights=model, recipe=recipe or scheme, data=data, out=out)
    events.require()
    tell = silent if as_json else say
    tell(f"quantizing {model} to {out}")
    options = _options({name: value for name, value in values.items() if name not in _OWN})
    if dry_run:
        _plan(options, tell, events, as_json)
        return
    from seqbuild.onecall.run import quantize_model
    from seqbuild.onecall.show import Show

    page = run_page(report, no_report, out, *([Path(model)] if Path(model).is_dir() else []))
    line = _telling(tell, events)
    show = Show(line=line, tell=events.tell, watching=lambda stack: watching(stack, events, page, as_json=as_json))
    result = quantize_model(options, show=show)
    _print(result, events, _written(page, result), as_json)


def _written(page: RunPage, result: Quantized) -> Path | None:
    """Write the report page, with what the calibration alone does not know."""
    before, after = (None if one is None else one.perplexity for one in (result.before, result.after))
    tokens = 0 if result.after is None else result.after.num_tokens
    return page.write(
        result.calibration,
        recipe_name=Path(result.recipe).name,
        bytes_before=result.original_bytes,
        perplexity=None if after is None else {"before": before, "after": after, "tokens": tokens},
        reason=result.not_measured,
        seconds=dict(result.seconds),
        peak_host_bytes=result.peak_host_bytes,
        peak_device_bytes=result.peak_device_bytes,
    )


def _print(result: Quantized, events: GivenLog, page: Path | None, as_json: bool) -> None:
    """Print the summary, or write it to the log."""
    from seqbuild.onecall.result import facts, summary

    if as_json:
        found = facts(result) | {"report": None if page is None else str(page)}
        if not events.takes_summary(found):
            put(json.dumps(found))
        return
    for line in summary(result):
        say(line)
    if page is not None:
        say(f"report       {page}")
    for line in result.serving:
        put(f"load it      {line}")


def _telling(tell: Callable[[str], None], log: GivenLog) -> Callable[[str], None]:
    """Return a function that shows a line, and also writes it to the log if it is a warning."""

    def show(line: str) -> None:
        tell(line)
        if line.startswith("warning: "):
            log.tell("warning", text=line)

    return show


def _options(values: dict[str, Any]) -> QuantizeOptions:
    """Make the options from the values of the command line."""
    for name in ("targets", "ignore"):
        values[name] = tuple(values[name] or ())
    if values["statistics"] is not None and values["data"]:
        raise UsageError("--statistics replaces the calibration data", hint="pass --data or --statistics")
    values["data"] = replace(values.pop("data_options"), sources=tuple(values["data"] or (BUILTIN,)))
    values["tokenizer"] = given.directory_of(values["tokenizer"], None, "tokenizer")
    values["eval_data"] = tuple(values["eval_data"] or (BUILTIN,))
    values["max_shard_bytes"] = parse_bytes(values.pop("max_shard_size"), option="--max-shard-size")
    names = ("checkpoint_activations", "activation_memory", "statistics_memory")
    memory = memory_options(*(values.pop(name) for name in names))
    return QuantizeOptions(**values, **memory)


def _plan(options: QuantizeOptions, tell: Callable[[str], None], events: GivenLog, as_json: bool) -> None:
    from seqbuild.onecall.run import plan_quantization
    from seqbuild.onecall.show import Show

    forecast, shortages, advice = plan_quantization(options, show=Show(line=tell))
    print_plan(forecast, shortages, advice, as_json, events.takes_summary)
    for text in shortages:
        events.tell("warning", text=text)
    if shortages:
        raise typer.Exit(1)
