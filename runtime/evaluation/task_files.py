"""Find the tasks of lm-eval that the user names, before anything of them is loaded or executed.

The tasks that come with lm-eval are trusted like its code. A task file of the user is data: what it could execute is
rejected without consent. These are functions (`!function`), metrics and readers of data that lm-eval would look for
outside of itself, and expressions in templates that reach Python's internals, which a sandbox stops.
"""

from __future__ import annotations

import difflib
import glob
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from runtime.errors import UsageError
from runtime.host.regular_files import read_text, reason_of

SUPPORTED = ("loglikelihood", "loglikelihood_rolling", "multiple_choice")
_PLAIN_READERS = ("arrow", "csv", "json", "parquet", "text")
_DEPTH = 32  # of groups in groups, and of files that include files
_PATTERN = "*?["


class TaskFunction(str):
    """The name of a function in a task file."""

    __slots__ = ()


class _TaskLoader(yaml.SafeLoader):
    pass


def _function(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> TaskFunction:
    return TaskFunction(loader.construct_scalar(node))


_TaskLoader.add_constructor("!function", _function)


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundTask:
    """One task.

    Attributes:
        name: in lm-eval's index, or the one in its file.
        config: the entries of its file, with those of included files, and of the group that changes them.
        path: its file; None for a task inside a group's file.
    """

    name: str
    config: Mapping[str, Any]
    path: Path | None


class TaskFinder:
    """Finds tasks by name, pattern, group, tag or file.

    Args:
        index: of lm-eval's task manager: entries with kind, path, config and tags by name.
        home: the directory of lm-eval, whose files are trusted.
    """

    def __init__(self, index: Mapping[str, Any], home: Path) -> None:
        self._index = index
        self._home = home.resolve()
        self._files: dict[Path, dict[str, Any]] = {}

    def specs(self, names: Sequence[str]) -> list[str]:
        """Return what lm-eval loads: names of its index, or paths of files.

        Raises:
            UsageError: when a name or file does not exist.
        """
        found: list[str] = []
        for name in names:
            matching = [name] if name in self._index else []
            if not matching and name.endswith((".yaml", ".yml")):
                matching = sorted(glob.glob(name)) or [name]
                for path in matching:
                    self._read(Path(path), 0)
            elif not matching and any(letter in name for letter in _PATTERN):
                matching = sorted(known for known in self._index if Path(known).match(name))
            if not matching:
                near = difflib.get_close_matches(name, self._index, 3)
                hint = f"did you mean {', '.join(near)}?" if near else "lm_eval ls tasks lists all"
                raise UsageError(f"there is no task {name!r} in lm-eval or in --include-path", hint=hint)
            found += matching
        return list(dict.fromkeys(found))

    def tasks(self, specs: Sequence[str]) -> list[FoundTask]:
        """Return all tasks of these, each once."""
        found = [task for spec in specs for task in self._of_spec(spec, {}, 0)]
        return list({task.name: task for task in found}.values())

    def require_harmless(self) -> None:
        """Require that the user's files which were read execute nothing.

        Raises:
            UsageError: naming the first one that does.
        """
        for path, content in self._files.items():
            for what in _executed(content):
                raise UsageError(
                    f"the task file {path} executes code: {what}",
                    hint="pass --confirm-run-unsafe-code if you trust the file and everything that it names",
                )

    def _of_spec(self, spec: str, changes: Mapping[str, Any], depth: int) -> Iterator[FoundTask]:
        entry = self._index.get(spec)
        if depth > _DEPTH or (entry is None and not Path(spec).is_file()):
            return  # lm-eval says what is wrong
        if entry is None:
            config = self._read(Path(spec), 0)
            path: Path | None = Path(spec)
        else:
            path = entry.yaml_path
            config = self._read(path, 0) if self._is_users(path) else entry.cfg or {}
        if entry is not None and entry.kind.name == "TAG":
            for name in sorted(entry.tags):
                yield from self._of_spec(name, changes, depth + 1)
        elif isinstance(config.get("task"), list):
            yield from self._members(config, changes, depth)
        else:
            name = spec if entry is not None else str(config.get("task", spec))
            yield FoundTask(name=name, config={**config, **changes}, path=path)

    def _members(self, group: Mapping[str, Any], changes: Mapping[str, Any], depth: int) -> Iterator[FoundTask]:
        for item in group["task"]:
            own = dict(item) if isinstance(item, dict) else {}
            name = item if isinstance(item, str) else own.get("group", own.get("task"))
            own.pop("group", None)
            if isinstance(name, str) and name in self._index:
                own.pop("task", None)
                yield from self._of_spec(name, {**changes, **own}, depth + 1)
            elif isinstance(own.get("task"), list) and depth < _DEPTH:
                yield from self._members(own, changes, depth + 1)
            elif isinstance(name, str):
                yield FoundTask(name=name, config={**changes, **own}, path=None)

    def _is_users(self, path: Path | None) -> bool:
        return path is not None and not path.resolve().is_relative_to(self._home)

    def _read(self, path: Path, depth: int) -> dict[str, Any]:
        """Read a file and those that it includes, without executing anything.

        Raises:
            UsageError: when it is not a task file.
        """
        try:
            content = yaml.load(read_text(path), Loader=_TaskLoader)
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise UsageError(f"the task file {path} cannot be read: {reason_of(error)}") from error
        if not isinstance(content, dict) or depth > _DEPTH:
            raise UsageError(f"{path} is not a task file: it has no entries", hint="see lm-eval's guide to new tasks")
        if self._is_users(path):
            self._files[path] = content
        included = content.get("include", [])
        merged: dict[str, Any] = {}
        for name in included if isinstance(included, list) else [included]:
            merged |= self._read(path.parent / str(name), depth + 1)
        return merged | content


def require_supported(tasks: Sequence[FoundTask]) -> None:
    """Require that all tasks are about log-likelihoods.

    Raises:
        UsageError: naming those that are not.
    """
    others: dict[str, list[str]] = {}
    for task in tasks:
        kind = task.config.get("output_type", "generate_until")  # lm-eval's default
        if kind not in SUPPORTED and "class" not in task.config:
            others.setdefault(str(kind), []).append(task.name)
    if "generate_until" in others:
        raise unsupported(others["generate_until"])
    for kind, names in others.items():
        raise UsageError(f"tasks of the output type {kind!r} are not supported: {', '.join(names)}")


def unsupported(names: Sequence[str]) -> UsageError:
    """Return the error for tasks that generate text."""
    shown = ", ".join(names[:10]) + (f" and {len(names) - 10} others" if len(names) > 10 else "")
    return UsageError(
        f"these tasks generate text, which is not supported: {shown}; the layers would have to be read again for "
        "each generated token",
        hint=f"use tasks with the output types {', '.join(SUPPORTED)}, or serve the checkpoint and run lm-eval there",
    )


def _executed(value: Any, depth: int = 0) -> Iterator[str]:
    """Yield what a file would execute."""
    if isinstance(value, TaskFunction):
        yield f"!function {value}"
    elif isinstance(value, list) and depth < _DEPTH:
        for item in value:
            yield from _executed(item, depth + 1)
    elif isinstance(value, dict) and depth < _DEPTH:
        if "class" in value:
            yield f"class {value['class']}"
        metric, reader = value.get("metric"), value.get("dataset_path")
        if value.get("hf_evaluate") or (type(metric) is str and not _is_own_metric(metric)):
            yield f"the metric {metric}, which is not one of lm-eval's"
        if isinstance(reader, str) and not _is_plain(reader):
            yield f"the reader {reader} of the library datasets"
        for item in value.values():
            yield from _executed(item, depth + 1)
    elif depth >= _DEPTH:
        yield "entries that are nested too deeply to check"


def _is_own_metric(name: str) -> bool:
    import lm_eval.api.metrics  # noqa: F401 - registers them
    from lm_eval.api.registry import metric_registry

    return name in metric_registry


def _is_plain(reader: str) -> bool:
    """Whether a data set is not read by a program of `datasets` that may execute what it reads, such as pickles."""
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    return reader in _PLAIN_READERS or reader not in _PACKAGED_DATASETS_MODULES
