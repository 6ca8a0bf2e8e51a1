"""The command `evaluate`: perplexity of texts, tasks of lm-eval, and the comparison of two checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import runtime.cli.options as given
from runtime.cli.batches import DEFAULT_BATCH_SIZE, BatchOptions, make_batches, tokenizer_directory
from runtime.cli.group import is_resumed, join_group, require_readable_by
from runtime.cli.run import require_output
from runtime.cli.watching import GivenLog, watching
from runtime.console import parse_seconds, put, say
from runtime.data.options import DataOptions
from runtime.errors import UsageError
from runtime.status import doing
from runtime.workers.agreement import agreed

if TYPE_CHECKING:
    import torch

    from runtime.chain import Artifact
    from runtime.evaluation.options import PassOptions
    from runtime.workers.group import Workers

_Names = Annotated[
    list[str] | None,
    typer.Option(
        "--tasks", metavar="NAME,...", help="Tasks, groups, patterns or YAML files of lm-eval that predict given texts."
    ),
]
_Data = Annotated[list[str] | None, typer.Option("--data", metavar="SOURCE", help=f"{given.DATA}.")]
_Other = Annotated[
    str | None, typer.Option("--compare", metavar="DIR", help="A second checkpoint: KL divergence and agreement.")
]
_Output = Annotated[
    Path | None,
    typer.Option(
        "--output", "--out", "-o", help="New directory for results.json; an interrupted run keeps its state beside it."
    ),
]
_SaveEvery = Annotated[
    str, typer.Option(help="With --output, how often the state is saved that --resume continues from.")
]
_BatchSize = Annotated[
    int | None, typer.Option("--batch-size", min=1, help="Samples per batch; default: 8, or 4096 tokens of tasks.")
]
_FLAGS = ("apply_chat_template", "log_samples", "confirm_run_unsafe_code")


def _task_options(
    tasks: _Names = None,
    include_path: Annotated[
        list[Path] | None, typer.Option("--include-path", help="Directory with more task files. Repeatable.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option("--num-fewshot", min=0, help="Examples before each question; default: the task's.")
    ] = None,
    limit: Annotated[
        float | None, typer.Option("--limit", min=0, help="Documents of each task; below 1, a part of them.")
    ] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Put prompts into the tokenizer's chat template.")
    ] = False,
    fewshot_as_multiturn: Annotated[
        bool | None,
        typer.Option(
            "--fewshot-as-multiturn/--fewshot-as-one-turn", help="In a chat, one turn for each example (default)."
        ),
    ] = None,
    system_instruction: Annotated[
        str | None, typer.Option("--system-instruction", help="Text before each prompt.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option("--max-length", min=2, help="Tokens read at once; default: the model's maximum.")
    ] = None,
    add_bos_token: Annotated[
        bool | None,
        typer.Option("--add-bos-token/--no-add-bos-token", help="Begin texts with BOS; default: the tokenizer's."),
    ] = None,
    prefix_token_id: Annotated[
        int | None, typer.Option("--prefix-token-id", min=0, help="Token before a text without context; default: BOS.")
    ] = None,
    log_samples: Annotated[
        bool, typer.Option("--log-samples", help="With --output, write the answers for each document.")
    ] = False,
    confirm_run_unsafe_code: Annotated[
        bool, typer.Option("--confirm-run-unsafe-code", help="Allow task files to execute code (!function).")
    ] = False,
) -> dict[str, Any]:
    """Collect the options of tasks that were given, by the names of their options."""
    chosen = dict(locals())
    absent = dict.fromkeys(_FLAGS, False)  # of other options, False and 0 are values
    return {name: value for name, value in chosen.items() if name == "tasks" or value is not absent.get(name)}


def _takes_task_options(command: Any) -> Any:
    return given.takes(command, "task_options", _task_options)


@_takes_task_options
@given.takes_data_options
def evaluate(
    artifact: given.ArtifactPath,
    weights: given.WeightsPath,
    task_options: dict[str, Any],
    data_options: DataOptions,
    data: _Data = None,
    compare: _Other = None,
    revision: given.Revision = None,
    output: _Output = None,
    resume: given.Resume = False,
    save_every: _SaveEvery = "5min",
    activation_memory: given.ActivationMemory = None,
    device: given.Device = "auto",
    dtype: given.Dtype = "auto",
    batch_size: _BatchSize = None,
    tokenizer: given.Tokenizer = None,
    log: given.Log = None,
    worker_timeout: given.WorkerTimeout = "10min",
    allow_version_skew: given.Skew = False,
    trust_remote_code: given.Trust = False,
    require_signature: given.Signature = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Measure perplexity or tasks of a checkpoint, or compare two checkpoints; one subgraph is in memory at a time."""
    require_output()
    _require_one_kind(task_options, data_options, data, compare)
    _require_usable(output, resume, "log_samples" in task_options)
    save_every_s = parse_seconds(save_every, option="--save-every", least=0)
    events = GivenLog(log, artifact=artifact, weights=weights, data=data, out=output)
    with ExitStack() as stack:
        shared = {"command": "evaluate", "--tasks": task_options["tasks"], "--compare": compare, "--resume": resume}
        workers, device = join_group(stack, device, worker_timeout, shared)
        with agreed(workers):
            events.require()
        require_readable_by(workers, data or ())
        is_resumption = _startable(output, resume, workers)
        directories = [_directory(weights, revision), *([_directory(compare, None)] if compare is not None else [])]
        loaded, run_device, run_dtype = given.load_on(
            artifact, device, dtype, allow_version_skew, trust_remote_code, require_signature
        )
        shown = watching(stack, events, as_json=as_json) if data is None or compare is not None else {}
        request = _GivenEvaluation(
            artifact=loaded,
            directories=directories,
            tokenizer=given.directory_of(tokenizer, None, "tokenizer"),
            batch_size=batch_size,
            tell=None if as_json else say,
            device=run_device,
            pass_options={
                "dtype": run_dtype,
                "activation_memory": activation_memory,
                "out": output,
                "resume": is_resumption,
                "save_every_s": save_every_s,
                "workers": workers,
            },
            shown=shown,
        )
        facts, lines = request.tasks(task_options, data_options) if data is None else request.texts(data, data_options)
    _show(facts, lines, events, as_json)


def _show(facts: dict[str, Any], lines: Sequence[str], events: GivenLog, as_json: bool) -> None:
    """Log the results, and print them."""
    events.tell("evaluation", **_logged(facts))
    if as_json and not events.takes_summary(facts):
        put(json.dumps(facts))
    for line in () if as_json else lines:
        put(line)


def _logged(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of an evaluation for the event log."""
    if "results" in facts:
        return {"which": "tasks", "results": facts["results"]}
    return {"which": "comparison" if "agreement" in facts else "checkpoint", **facts}


@dataclass(frozen=True, kw_only=True, slots=True)
class _GivenEvaluation:
    """What is evaluated: one checkpoint or two.

    Attributes:
        artifact: the compiled model.
        directories: of the checkpoints.
        tokenizer: the option `--tokenizer`.
        batch_size: the option `--batch-size`.
        tell: takes lines about the data.
        device: where subgraphs run.
        pass_options: of `PassOptions`.
        shown: `progress` and `watchers`; empty for the status line alone.
    """

    artifact: Artifact
    directories: Sequence[Path]
    tokenizer: Path | None
    batch_size: int | None
    tell: Callable[[str], None] | None
    device: torch.device
    pass_options: dict[str, Any]
    shown: Mapping[str, Any]

    def _options(self, is_large: bool) -> PassOptions:
        from runtime.evaluation.options import PassOptions
        from runtime.evaluation.scoring import default_memory
        from runtime.streaming.activations import Budget
        from runtime.streaming.lines import Lines

        text = self.pass_options["activation_memory"]
        memory = (default_memory(self.device) if is_large else None) if text is None else Budget.parse(text)
        watchers = [Lines(self.shown["progress"]), *self.shown["watchers"]] if self.shown else []
        return PassOptions(**{**self.pass_options, "activation_memory": memory}, device=self.device, watchers=watchers)

    def tasks(self, chosen: dict[str, Any], data_options: DataOptions) -> tuple[dict[str, Any], list[str]]:
        """Evaluate tasks; returns the results, and lines that show them."""
        from runtime.evaluation.tasks import TaskOptions, evaluate_tasks, table_lines

        names = _names(chosen.pop("tasks"))
        include, runs_code = chosen.pop("include_path", ()), chosen.pop("confirm_run_unsafe_code", False)
        results = evaluate_tasks(
            self.artifact,
            weights=self.directories[0],
            tokenizer=self.tokenizer or tokenizer_directory(self.directories[0], self.artifact),
            tasks=TaskOptions(
                names=names,
                include_paths=include,
                runs_code=runs_code,
                batch_size=self.batch_size,
                seed=data_options.seed,
                **chosen,
            ),
            options=self._options(is_large=True),
        )
        return results, table_lines(results)

    def texts(self, data: Sequence[str], data_options: DataOptions) -> tuple[dict[str, Any], list[str]]:
        """Measure the perplexity of one checkpoint, or compare two; returns the results, and lines that show them."""
        options = BatchOptions(
            data=replace(data_options, sources=tuple(data)),
            tokenizer=self.tokenizer,
            weights=self.directories[0],
            batch_size=self.batch_size or DEFAULT_BATCH_SIZE,
        )
        batches = make_batches(self.artifact, options, self.tell)
        if len(self.directories) > 1:
            from runtime.evaluation.comparison import compare

            one, other = self.directories
            options_of_pass = self._options(is_large=True)
            found = compare(self.artifact, weights=one, other=other, batches=batches, options=options_of_pass)
            return {**found.facts(), "seconds": found.seconds}, found.lines()
        from runtime.evaluation.perplexity import measure

        result = measure(
            self.artifact,
            self.directories[0],
            batches,
            self._options(is_large=False),
            lambda line: doing(f"evaluating: {line}"),
        )
        facts = {
            "perplexity": result.perplexity,
            "tokens": result.num_tokens,
            "bytes": result.num_bytes,
            "seconds": result.seconds,
        }
        return facts, [f"perplexity {result.perplexity:.4f} over {result.num_tokens} tokens, {result.seconds:.1f} s"]


def _require_one_kind(
    task_options: Mapping[str, Any], data_options: DataOptions, data: Sequence[str] | None, compare: str | None
) -> None:
    """Require either texts or tasks, and no options of the other.

    Raises:
        UsageError: naming the option.
    """
    others = [name for name in task_options if name != "tasks"]
    if task_options["tasks"] is None:
        if data is None:
            raise UsageError("there is nothing to evaluate", hint="pass --data SOURCE or --tasks NAME")
        if others:
            option = f"--{others[0].replace('_', '-')}"
            raise UsageError(f"{option} is an option of tasks", hint="pass --tasks NAME, or remove it")
    elif data is not None or replace(data_options, seed=None) != DataOptions():
        what = "--data" if data is not None else "an option of --data"
        raise UsageError(f"--tasks cannot be combined with {what}: tasks have data of their own", hint="remove one")
    elif compare is not None:
        raise UsageError("--compare measures texts, not tasks", hint="pass --data SOURCE instead of --tasks")
    elif not _names(task_options["tasks"]):
        raise UsageError("--tasks names no task", hint="pass names of tasks, such as hellaswag,mmlu")


def _names(tasks: Sequence[str]) -> list[str]:
    return [name.strip() for text in tasks for name in text.split(",") if name.strip()]


def _require_usable(output: Path | None, resume: bool, logs_samples: bool) -> None:
    if logs_samples and output is None:
        raise UsageError("--log-samples requires --output, where the samples are written", hint="pass it")
    if resume and output is None:
        raise UsageError("--resume requires --output, beside which an interrupted run keeps its state", hint="pass it")
    if output is not None and output.suffix == ".json":
        raise UsageError(f"--output {output} must be a directory", hint="results.json will be in it")


def _startable(output: Path | None, resume: bool, workers: Workers) -> bool:
    """Check the output before anything is loaded; returns whether an interrupted run goes on."""
    from runtime.streaming.output_place import require_startable

    if output is None:
        return False
    is_resumption = is_resumed(workers, resume)
    require_startable(output, resume=is_resumption, workers=workers)
    return is_resumption


def _directory(name: str, revision: str | None) -> Path:
    from runtime.host.hub import resolve_directory

    return resolve_directory(name, revision=revision, what="weights")
