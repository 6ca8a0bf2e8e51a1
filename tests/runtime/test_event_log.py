"""The event log: its heartbeat, its last event, and that docs/operate.md lists everything that it contains."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from runtime.console import warn
from runtime.errors import OutputError
from runtime.host import event_log
from runtime.host.event_log import FORMAT, EventLog
from runtime.status import doing
from tests.runtime.place import ROOT, RTN, Place, Run

OPERATE = (ROOT / "docs/operate.md").read_text(encoding="utf-8")
EVERY = {"event", "time", "run_id", "rank"}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().rpartition("\n")[0].splitlines()]


def documented() -> dict[str, set[str]]:
    """The fields of each event in the table; those in parentheses belong to values of others."""
    found = {}
    for name, fields in re.findall(r"(?m)^\| `(\w+)` \| [^|]+ \| ([^|]*) \|$", OPERATE.partition("## Event log")[2]):
        found[name] = set(re.findall(r"`(\w+)`", fields))
    found["earlier"] = found["subgraph"]
    return found


def beats_until(path: Path, place: tuple[int | None, str | None, str, int]) -> list[dict[str, Any]]:
    """Compute, and never wait, until there is a heartbeat with this index, label, phase and number of tokens."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        sum(number for number in range(20_000))
        beats = [event for event in read(path) if event["event"] == "heartbeat"]
        if any((beat["index"], beat["label"], beat["phase"], beat["tokens"]) == place for beat in beats):
            return beats
    pytest.fail(f"no heartbeat says {place}")


def test_a_heartbeat_while_something_takes_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_log, "HEARTBEAT_S", 0.02)
    with EventLog(tmp_path / "log") as log:
        doing("tracing")
        beats_until(tmp_path / "log", (None, None, "tracing", 0))
        log.tell("phase", index=3, label="layers.3", phase="quantize")
        log.tell("batch", tokens=40)
        log.tell("batch", tokens=2)
        beats_until(tmp_path / "log", (3, "layers.3", "quantize", 42))
        doing("evaluating")
        beats = beats_until(tmp_path / "log", (None, None, "evaluating", 0))
    assert all(beat["host_bytes"] > 10**6 and beat["elapsed"] >= 0 for beat in beats)


@pytest.mark.parametrize(
    ("error", "facts"),
    [
        (None, {"event": "end", "exit_code": 0}),
        (OutputError("disk", hint="free it"), {"event": "failed", "error": "disk (free it)"}),
        (KeyboardInterrupt(), {"event": "interrupted", "signal": "SIGINT", "exit_code": 130}),
        (SystemExit(129), {"event": "interrupted", "signal": "SIGHUP", "exit_code": 129}),
        (SystemExit(3), {"event": "failed", "error": "3"}),
    ],
)
def test_a_program_that_writes_a_log(tmp_path: Path, error: BaseException | None, facts: dict[str, Any]) -> None:
    try:
        with EventLog(tmp_path / "log") as log:
            log.tell("module", loss=float("nan"), error=[float("inf"), 1.5])
            warn("an odd file")
            if error is not None:
                raise error
    except BaseException as raised:
        assert raised is error
    warn("after the end")
    log.tell("warning", text="after the end")
    first, module, warning, last = read(tmp_path / "log")
    assert (first["event"], first["format"], first["command"]) == ("run", FORMAT, None)
    assert (module["loss"], module["error"]) == (None, [None, 1.5])
    assert warning["text"] == "warning: an odd file"
    assert {name: last[name] for name in facts} == facts
    assert len({event["run_id"] for event in (first, module, last)}) == 1


@pytest.fixture
def logged(place: Place, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A log of an error, a calibration, and an evaluation."""
    monkeypatch.setattr(event_log, "HEARTBEAT_S", 0.02)
    log = tmp_path / "log.jsonl"
    place.recipe.write_text("QuantizationModifier: [")
    assert run(place.calibrate("--log", log))[0] == 2
    place.recipe.write_text(RTN)
    code, _, complaint = run(place.calibrate("--log", log))
    assert code == 0, complaint
    code, _, complaint = run(place.evaluate("--log", log))
    assert code == 0, complaint
    return log


def test_every_event_and_field_is_documented_and_every_question_is_answered(logged: Path) -> None:
    found, table = read(logged), documented()
    events: dict[str, set[str]] = {}
    for event in found:
        events.setdefault(event["event"], set()).update(event.keys() - EVERY)
    for name, fields in events.items():
        assert fields <= table.get(name, set()), f"{name} has fields that docs/operate.md does not list"
    usual = {"run", "inputs", "begin", "plan", "heartbeat", "module", "subgraph", "published", "evaluation", "end"}
    assert usual | {"failed"} <= events.keys() <= table.keys()
    assert f"This is format {FORMAT}:" in OPERATE
    starts = [index for index, event in enumerate(found) if event["event"] == "run"]
    lasts = [found[index - 1]["event"] for index in (*starts[1:], len(found))]
    assert (len(starts), lasts) == (3, ["failed", "end", "end"])
    assert f"every {event_log.HEARTBEAT_S:.0f} s" in OPERATE or event_log.HEARTBEAT_S < 1
    plan = next(event for event in found if event["event"] == "plan")
    assert {"index", "label", "host", "device", "read", "written", "seconds"} <= plan["subgraphs"][0].keys()
    assert [step["label"] for step in plan["subgraphs"]] == [
        event["label"] for event in found if event["event"] == "subgraph"
    ][: len(plan["subgraphs"])]
    if shutil.which("jq"):
        _answer(logged)


def _answer(log: Path) -> None:
    """Run the questions of the document."""
    block = OPERATE.partition("Questions to a log")[2].partition("\n## ")[0]
    questions = [line.strip() for line in block.splitlines() if re.match(r" {4}(jq|tail) ", line)]
    assert len(questions) == 7
    script = "set -o pipefail; " + "; echo ===; ".join(
        question.replace("run.jsonl", str(log)) for question in questions
    )
    done = subprocess.run(["bash", "-ec", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    state, now, count, worst, speed, processes, _ = done.stdout.split("===\n")
    assert state == "finished\n" and now.count("\n") == 1
    assert json.loads(count) == [4, 4]
    assert len(worst.splitlines()) == 10 and "model.layers.0: " not in speed
    assert [line.split()[-2:] for line in processes.splitlines()].count(["failed", "2"]) == 1


def test_the_health_check_of_the_container(tmp_path: Path) -> None:
    text = (ROOT / "examples/Dockerfile").read_text(encoding="utf-8")
    (check,) = re.findall(r"HEALTHCHECK .*?CMD (.*)", text, re.DOTALL)
    check = check.partition("\n")[0]
    minutes = int(re.findall(r"-mmin -(\d+)", check)[0])
    log = tmp_path / "a log"
    for age_s, code in ((0, 0), (60 * minutes + 60, 1), (None, 1)):
        if age_s is None:
            log.unlink()
        else:
            log.touch()
            subprocess.run(["touch", "-d", f"@{time.time() - age_s}", str(log)], check=True)
        done = subprocess.run(["sh", "-c", check], env={"SEQBUILD_LOG": str(log), "PATH": "/usr/bin:/bin"}, check=False)
        assert done.returncode == code
    assert 'ENTRYPOINT ["seqbuild"]' in text and re.search(r"(?m)^USER \d+$", text)
    assert text.index("torch==") < text.index("seqbuild-llm")
