"""Evaluate tasks of lm-eval: all requests of all tasks pass through the subgraphs together, once.

find        the tasks, and reject those that generate text or execute code of the user's files
load        their data from the local cache, without a network
build       all requests, as lm-eval does
score       all requests with one pass
results     the metrics of lm-eval
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import math
import os
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch

from runtime.console import quiet
from runtime.data.tokenizer import load_tokenizer
from runtime.errors import DataError, SeqbuildError, UsageError
from runtime.evaluation.encoding import TextEncoder, resolved_max_length
from runtime.evaluation.scoring import ScoringOptions, require_scoring, scoring
from runtime.evaluation.task_files import FoundTask, TaskFinder, require_supported, unsupported
from runtime.experts.split import require_artifact
from runtime.host.offline import offline
from runtime.model.config import text_limits
from runtime.status import doing

if TYPE_CHECKING:
    from runtime.chain import Artifact
    from runtime.evaluation.options import PassOptions
    from runtime.evaluation.requests import TokenRequest
    from runtime.evaluation.scoring import Score
    from runtime.evaluation.sides import Results

INSTALL = "pip install 'seqbuild-llm[eval]'"
_LOGGERS = ("lm_eval", "lm_eval.api.task", "lm_eval.tasks", "datasets", "evaluate", "huggingface_hub", "transformers")
_SEEDS = (0, 1234, 1234, 1234)  # lm-eval's own, of random, numpy, torch and the choice of examples


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskOptions:
    """Which tasks are evaluated, and how. The defaults are those of lm-eval.

    Attributes:
        names: of tasks, groups and tags, patterns of names, or paths of YAML files.
        include_paths: directories with more task files.
        num_fewshot: examples before each question; None for each task's own number.
        limit: documents of each task, or less than 1 for a part of them; None for all.
        apply_chat_template: put prompts into the tokenizer's chat template.
        fewshot_as_multiturn: with it, make each example a turn of its own.
        system_instruction: a text before each prompt.
        max_length: the most tokens that the model reads at once; None for the model's own.
        add_bos_token: begin texts with BOS; None for what the tokenizer does.
        prefix_token_id: the token in place of a missing context; None for BOS, or EOS.
        batch_size: sequences of a batch; None for as many as suit their length.
        seed: for everything random; None for lm-eval's seeds.
        log_samples: keep the requests and answers of each document.
        runs_code: whether task files of the user may execute code.
    """

    names: Sequence[str]
    include_paths: Sequence[Path] = ()
    num_fewshot: int | None = None
    limit: float | None = None
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = True
    system_instruction: str | None = None
    max_length: int | None = None
    add_bos_token: bool | None = None
    prefix_token_id: int | None = None
    batch_size: int | None = None
    seed: int | None = None
    log_samples: bool = False
    runs_code: bool = False

    def __post_init__(self) -> None:
        """Reject a limit that selects no documents.

        Raises:
            UsageError: naming it.
        """
        if self.limit is not None and not 0 < self.limit < math.inf:
            raise UsageError(f"--limit {self.limit:g} is not a positive number", hint="remove it to use all documents")

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of random, numpy, torch and the choice of examples."""
        return _SEEDS if self.seed is None else (self.seed,) * len(_SEEDS)


def evaluate_tasks(
    artifact: Artifact, *, weights: Path, tokenizer: Path, tasks: TaskOptions, options: PassOptions
) -> dict[str, Any]:
    """Evaluate tasks, and return the results in lm-eval's format.

    Args:
        artifact: the compiled model.
        weights: directory of the original or a quantized checkpoint.
        tokenizer: its directory.
        tasks: which tasks, and how.
        options: of the evaluation.

    Raises:
        UsageError: when a task does not exist, is not supported, or executes code without consent.
        DataError: when lm-eval is missing, or the data of a task is not in the local cache.
        SeqbuildError: as `runtime.evaluation.scoring.scoring`.
    """
    artifact = require_artifact(artifact)
    require_scoring(artifact.manifest)
    encoder = encoder_of(artifact, tokenizer, tasks)
    if tasks.apply_chat_template and not encoder.tokenizer.chat_template:
        raise DataError(f"the tokenizer in {tokenizer} has no chat template", hint="remove --apply-chat-template")
    with _lm_eval(), ExitStack() as stack:
        import lm_eval.evaluator

        from runtime.evaluation.streamed_model import StreamedLM

        loaded = load_tasks(tasks)
        taken: list[Results] = []

        def answers(requests: list[TokenRequest]) -> list[Score]:
            scoring_options = ScoringOptions(max_length=encoder.max_length, batch_size=tasks.batch_size)
            run = scoring(artifact, weights, requests, scoring_options, options, {"tasks": ", ".join(loaded["tasks"])})
            scores, results = stack.enter_context(run)
            taken.append(results)
            return scores

        model = StreamedLM(encoder, answers)
        model.tasks = list(loaded["tasks"].values())
        doing("building the requests")
        try:
            found = lm_eval.evaluator.evaluate(
                model,
                loaded,
                limit=tasks.limit,
                log_samples=tasks.log_samples,
                system_instruction=tasks.system_instruction,
                apply_chat_template=tasks.apply_chat_template,
                fewshot_as_multiturn=tasks.fewshot_as_multiturn,
                confirm_run_unsafe_code=tasks.runs_code,
            )
        except (SeqbuildError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise _failed("the tasks cannot be evaluated", error) from error
        if not taken:
            raise DataError(f"the tasks {', '.join(loaded['tasks'])} have no documents", hint="check their data")
        results = _with_settings(dict(found), tasks, weights, encoder)
        _write(taken[0], results)
    return results


def _write(to: Results, results: dict[str, Any]) -> None:
    """Write the results, and the samples that are taken out of them."""
    samples = results.pop("samples", None) or {}
    doing("writing the results")
    to.write(_plain(results), {_sample_file(name): _lines(samples[name]) for name in samples})


def encoder_of(artifact: Artifact, tokenizer: Path, tasks: TaskOptions) -> TextEncoder:
    """Make the encoder of the texts of tasks."""
    loaded = load_tokenizer(tokenizer, add_bos_token=tasks.add_bos_token)
    return TextEncoder(
        tokenizer=loaded,
        max_length=resolved_max_length(loaded, text_limits(artifact)[1], tasks.max_length),
        add_bos_token=tasks.add_bos_token,
        stated_prefix=tasks.prefix_token_id,
    )


def load_tasks(options: TaskOptions) -> dict[str, Any]:
    """Load tasks and their data, without a network.

    Returns:
        `tasks`, `groups` and `group_map`, as lm-eval's task manager.

    Raises:
        UsageError: when a task does not exist, is not supported, or executes code without consent.
        DataError: when the data of a task is not in the local cache.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    doing("finding the tasks")
    for path in options.include_paths:
        if not path.is_dir():
            raise UsageError(f"--include-path {path} is not a directory", hint="pass a directory with task files")
    manager = TaskManager(include_path=[str(path) for path in options.include_paths] or None)
    finder = TaskFinder(manager.task_index, Path(lm_eval.__file__).parent)
    specs = finder.specs(options.names)
    sources = finder.tasks(specs)
    if not options.runs_code:
        finder.require_harmless()
        _use_sandbox()
    require_supported(sources)
    random.seed(options.seeds[0])
    numpy.random.seed(options.seeds[1])
    torch.manual_seed(options.seeds[2])
    doing("reading the data of the tasks")
    try:
        loaded: dict[str, Any] = dict(manager.load(specs))
    except MemoryError:
        raise
    except Exception as error:  # of the readers of many formats, and of templates
        raise _not_loaded(sources, error) from error
    generating = [name for name, task in loaded["tasks"].items() if task.OUTPUT_TYPE == "generate_until"]
    if generating:  # written in Python
        raise unsupported(generating)
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        if options.num_fewshot is not None and own != 0:  # a task that states 0 takes none
            task.set_config(key="num_fewshot", value=options.num_fewshot)
        elif own is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=options.seeds[3])
    return loaded


@contextlib.contextmanager
def _lm_eval() -> Iterator[None]:
    """Make lm-eval importable, silent, and offline while the block runs.

    Raises:
        DataError: when it is not installed.
    """
    switches = ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE", "HF_EVALUATE_OFFLINE")
    before = {name: os.environ.get(name) for name in switches}
    os.environ.update(dict.fromkeys(switches, "1"))  # read when these libraries are imported
    try:
        try:
            import datasets
            import lm_eval.evaluator  # noqa: F401 - the whole program can be imported
        except ImportError as error:
            raise DataError(f"tasks require lm-eval, which cannot be imported: {error}", hint=INSTALL) from error
        settings, was_silent = datasets.config, datasets.are_progress_bars_disabled()
        was_offline, settings.HF_HUB_OFFLINE = settings.HF_HUB_OFFLINE, True
        datasets.disable_progress_bars()
        try:
            with offline(), quiet(*_LOGGERS, level=logging.CRITICAL), _without_bars():
                yield
        finally:
            settings.HF_HUB_OFFLINE = was_offline
            if not was_silent:
                datasets.enable_progress_bars()
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Hide what lm-eval prints while it builds requests and computes metrics."""
    import lm_eval.api.metrics
    import lm_eval.api.task

    bars = importlib.import_module("tqdm")
    modules, before = (bars, lm_eval.api.task), bars.tqdm
    for module in modules:
        setattr(module, "tqdm", lambda items, *_, **__: items)  # noqa: B010 - mypy
    setattr(lm_eval.api.metrics, "print", lambda *_, **__: None)  # noqa: B010
    try:
        yield
    finally:
        for module in modules:
            setattr(module, "tqdm", before)  # noqa: B010
        delattr(lm_eval.api.metrics, "print")


def _use_sandbox() -> None:
    """Keep the templates of task files from reaching Python's internals."""
    import lm_eval.utils
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    usual = lm_eval.utils.env
    if not isinstance(usual, ImmutableSandboxedEnvironment):
        sandbox = ImmutableSandboxedEnvironment(
            loader=usual.loader, undefined=usual.undefined, keep_trailing_newline=usual.keep_trailing_newline
        )
        sandbox.filters.update(usual.filters)
        lm_eval.utils.env = sandbox


def _not_loaded(sources: Sequence[FoundTask], error: Exception) -> DataError:
    """Say which data set of which task is missing, and how to get it."""
    text = str(error)
    for task in sources:
        data_set = task.config.get("dataset_path")
        if isinstance(data_set, str) and data_set in text and isinstance(error, (OSError, ValueError)):
            name = task.config.get("dataset_name")
            arguments = ", ".join(repr(one) for one in (data_set, name) if one is not None)
            if data_set in ("json", "csv", "text", "parquet", "arrow"):
                break
            return DataError(
                f"the data set {data_set} of the task {task.name} is not in the local cache",
                hint="on a machine with a network, run: python -c "
                f'"import datasets; datasets.load_dataset({arguments})", and copy its cache (HF_HOME)',
            )
    names = ", ".join(task.name for task in sources[:5]) + (", ..." if len(sources) > 5 else "")
    if isinstance(error, StopIteration):  # of lm-eval, which looks at the first document
        return DataError(f"one of the tasks {names} has no documents", hint="check its data")
    return _failed(f"the tasks {names} cannot be loaded", error)


def _failed(what: str, error: Exception) -> DataError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return DataError(f"{what}: {type(error).__name__}: {' '.join(lines[:3])[:500]}", hint="--debug shows where")


def _with_settings(found: dict[str, Any], tasks: TaskOptions, weights: Path, encoder: TextEncoder) -> dict[str, Any]:
    """Add the settings of the evaluation, as lm-eval does; no times, so that equal runs have equal results."""
    import importlib.metadata

    names = ("random_seed", "numpy_seed", "torch_seed", "fewshot_seed")
    found["config"] = {
        "model": "seqbuild",
        "model_args": {"weights": str(weights), "add_bos_token": tasks.add_bos_token},
        "batch_size": tasks.batch_size or "auto",
        "limit": tasks.limit,
        "bootstrap_iters": 100000,
        **dict(zip(names, tasks.seeds, strict=True)),
    }
    tokenizer: Any = encoder.tokenizer
    found |= {
        "lm_eval_version": importlib.metadata.version("lm_eval"),
        "transformers_version": importlib.metadata.version("transformers"),
        "max_length": encoder.max_length,
        "tokenizer_bos_token": [tokenizer.bos_token, str(tokenizer.bos_token_id)],
        "tokenizer_eos_token": [tokenizer.eos_token, str(tokenizer.eos_token_id)],
        "system_instruction": tasks.system_instruction,
        "fewshot_as_multiturn": tasks.fewshot_as_multiturn,
        "chat_template": tokenizer.chat_template if tasks.apply_chat_template else None,
    }
    return found


def table_lines(results: Mapping[str, Any]) -> list[str]:
    """The results as a table, a line each."""
    from lm_eval.utils import make_table

    tables = [make_table(results), *([make_table(results, "groups")] if "groups" in results else [])]
    return [line for table in tables for line in table.splitlines()]


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return results with values that JSON has."""
    from lm_eval.utils import handle_non_serializable

    plain: dict[str, Any] = json.loads(json.dumps(value, default=handle_non_serializable))
    return plain


def _lines(samples: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(_plain(sample), ensure_ascii=False) + "\n" for sample in samples)


def _sample_file(name: str) -> str:
    return f"samples_{re.sub(r'[^A-Za-z0-9._-]', '_', name)}.jsonl"
