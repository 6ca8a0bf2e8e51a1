"""Find tasks of lm-eval, and reject some, without lm-eval: its index is a table of names."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import runtime
from runtime.evaluation.task_files import TaskFinder, require_supported


def entry(kind: str, path: Path | None = None, tags: tuple[str, ...] = (), **config: Any) -> SimpleNamespace:
    return SimpleNamespace(kind=SimpleNamespace(name=kind), yaml_path=path, cfg=config, tags=set(tags))


@pytest.fixture
def finder(tmp_path: Path) -> TaskFinder:
    home = tmp_path / "lm_eval"
    home.mkdir()
    (home / "base.yaml").write_text("process_docs: !function utils.docs\noutput_type: multiple_choice\n")
    index = {
        "choice": entry("TASK", home / "choice.yaml", task="choice", output_type="multiple_choice"),
        "pages": entry("TASK", home / "pages.yaml", task="pages", output_type="loglikelihood_rolling"),
        "story": entry("TASK", home / "story.yaml", task="story", output_type="generate_until"),
        "python": entry("PY_TASK", home / "python.yaml", task="python", **{"class": "utils.Task"}),
        "suite": entry("GROUP", home / "suite.yaml", group="suite", task=["choice", {"task": "pages", "limit": 3}]),
        "nested": entry("GROUP", home / "nested.yaml", task=["suite", {"group": "own", "task": ["story"]}]),
        "tag": entry("TAG", tags=("pages", "choice")),
    }
    return TaskFinder(index, home)


def test_names_patterns_groups_tags_and_files(finder: TaskFinder, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("task: mine\noutput_type: loglikelihood\n")
    assert finder.specs(["suite", "c*", str(tmp_path / "*.yaml"), "suite"]) == ["suite", "choice", str(mine)]
    found = finder.tasks(["suite", "tag", str(mine)])
    assert [task.name for task in found] == ["choice", "pages", "mine"]
    assert found[2].config["output_type"] == "loglikelihood"
    require_supported(found)
    finder.require_harmless()
    with pytest.raises(runtime.UsageError, match=r"there is no task 'chioce'.*did you mean choice"):
        finder.specs(["chioce"])
    with pytest.raises(runtime.UsageError, match=r"missing\.yaml cannot be read"):
        finder.specs([str(tmp_path / "missing.yaml")])


@pytest.mark.parametrize("name", ["story", "nested", "FILE"])
def test_tasks_that_generate_are_named(finder: TaskFinder, tmp_path: Path, name: str) -> None:
    file = tmp_path / "story.yaml"
    file.write_text("task: story\n")  # lm-eval's default is to generate
    spec = str(file) if name == "FILE" else name
    with pytest.raises(runtime.UsageError, match="these tasks generate text, which is not supported: story;"):
        require_supported(finder.tasks(finder.specs([spec])))


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("process_docs: !function utils.docs", "!function utils.docs"),
        ("metric_list: [{metric: !function utils.score}]", "!function utils.score"),
        ("class: !function utils.Task", "class utils.Task"),
        ("include: other.yml", "!function utils.inner"),
        ("metric_list: [{metric: acc, hf_evaluate: true}]", "the metric acc"),
    ],
)
def test_files_that_execute_code(
    finder: TaskFinder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, what: str
) -> None:
    monkeypatch.setattr("runtime.evaluation.task_files._is_own_metric", lambda name: name == "acc")
    (tmp_path / "other.yml").write_text("process_docs: !function utils.inner\n")
    file = tmp_path / "mine.yaml"
    file.write_text(f"task: mine\noutput_type: multiple_choice\n{text}\n")
    finder.tasks(finder.specs([str(file)]))
    with pytest.raises(runtime.UsageError, match="executes code: ") as caught:
        finder.require_harmless()
    assert what in str(caught.value)
    assert "--confirm-run-unsafe-code" in str(caught.value)


def test_functions_of_lm_eval_are_trusted(finder: TaskFinder, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"include: {tmp_path / 'lm_eval' / 'base.yaml'}\ntask: mine\n")
    require_supported(finder.tasks(finder.specs([str(file)])))
    finder.require_harmless()


@pytest.mark.parametrize(
    "text", ["- a list", "a: !!python/object:os.system x", "a: [", "include: mine.yaml\ntask: x", ""]
)
def test_files_that_are_no_task_files(finder: TaskFinder, tmp_path: Path, text: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(runtime.UsageError, match=r"mine\.yaml"):
        finder.tasks(finder.specs([str(file)]))
