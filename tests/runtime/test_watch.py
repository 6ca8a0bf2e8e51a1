"""What those who watch a run are told, and how it looks."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from runtime.host.event_log import EventLog
from runtime.streaming.display import Display
from runtime.streaming.events import Watchers
from runtime.streaming.lines import Lines
from runtime.streaming.report import Calibration, ModuleReport, summary_lines
from runtime.workers.group import Alone
from tests.runtime.small import NARROW_W4, Small, calibrate, recipe

FACTS: dict[str, Any] = {"index": 1, "label": "layers.1", "num_modules": 7, "seconds": 2.0, "tokens": 4000}
FACTS |= {"peak_host_bytes": 5 * 10**8, "peak_device_bytes": 0}


# The last one takes no time.
PLANNED = [
    {"phases": dict.fromkeys(("read weights", "measure", "quantize", "propagate", "write"), seconds)}
    for seconds in (1.0, 1.0, 1.0, 0.0)
]


def begin(**changes: Any) -> dict[str, Any]:
    facts = {"subgraphs": 4, "batches": 3, "total_tokens": 8000, "resumed_at": 0, "device": "cpu"}
    return facts | changes


def test_a_line_for_each_subgraph(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    said: list[str] = []
    lines = Watchers([Lines(said.append)])
    lines.tell("begin", **begin(resumed_at=1))
    lines.tell("plan", subgraphs=PLANNED)
    lines.tell("phase", index=1, label="layers.1", phase="measure")
    lines.tell("batch", index=1, tokens=4000)
    clock[0] = 106.0
    lines.tell("subgraph", **FACTS)
    lines.tell("subgraph", **FACTS | {"index": 3, "tokens": 0, "num_modules": 0, "peak_device_bytes": 3 * 10**9})
    lines.tell("warning", text="warning: something")
    assert said == [
        "resuming after 1 of 4 subgraphs",
        "[2/4] layers.1: 7 modules, 2.0 s, 3 batches, 2,000 tokens/s, 6 s left, 500.0 MB",
        "[4/4] layers.1: 0 modules, 2.0 s, 500.0 MB, 3.0 GB on the device",
        "warning: something",
    ]


def test_warnings_are_remembered() -> None:
    said: list[str] = []
    watch = Watchers([Lines(said.append)])
    watch.tell("warning", text="one")
    watch.tell("unknown to all", fact=1)
    assert (watch.warnings, said) == (["one"], ["one"])


class OneOfTwo(Alone):
    """A worker whose messages a test delivers: `sent` has the last one, and the other worker's is `received`."""

    size = 2

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.sent: Any = None
        self.received: Any = None

    def exchange(self, facts: Any) -> list[Any]:
        self.sent = json.loads(json.dumps(facts))
        return [self.sent, self.received] if self.rank == 0 else [self.received, self.sent]


def test_the_first_worker_tells_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    said: list[str] = []
    first, second = OneOfTwo(0), OneOfTwo(1)
    with EventLog(tmp_path / "log") as log:
        hosts = iter(("node-b", "node-a"))
        monkeypatch.setattr("socket.gethostname", lambda: next(hosts))
        own, other = Watchers([Lines(said.append), log], first), Watchers([], second)
        own.tell("begin", **begin(total_tokens=16000))
        own.tell("plan", subgraphs=PLANNED)
        for watch, seconds in ((other, 8.0), (own, 2.0)):
            watch.tell("phase", index=1, label="layers.1", phase="measure")
            for _ in range(2):
                clock[0] += seconds
                watch.tell("batch", index=1, tokens=2000)
            watch.tell("warning", text="warning: of both")
            watch.tell("subgraph", **FACTS)
        assert not any("layers.1" in line for line in said)  # not before the tokens of all workers are known
        other.tell("warning", text="warning: of one")
        other.share()
        first.received = second.sent
        own.share()
    assert said == [
        "warning: of both",
        "warning: of one",
        "[2/4] layers.1: 7 modules, 2.0 s, 3 batches, 4,000 tokens/s, 4 s left, 500.0 MB, slowest: worker 1 on node-b",
    ]
    events = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [(event["event"], event["rank"]) for event in events[1:-1]] == [
        ("begin", 0),
        ("plan", 0),
        ("warning", 0),
        ("workers", 0),
        ("subgraph", 1),
        ("warning", 1),
        ("subgraph", 0),
    ]
    assert (events[-2]["tokens"], events[-2]["all_tokens"], events[-2]["slowest"]) == (4000, 8000, 1)


def test_the_summary_has_the_worst_modules_first_and_all_warnings() -> None:
    reports = tuple(
        ModuleReport(name=f"m{number}", algorithm="gptq", loss=1.5, damping=0.01, num_tokens=9, error=number / 100)
        for number in (3, 9, 1, 7, 5, 8)
    )
    result = Calibration(
        path=Path("out"),
        num_bytes=2_000_000,
        modules=reports,
        unreached=(),
        remarks=("warning: a", "warning: b"),
        seconds=3.0,
        resumed_at=2,
    )
    lines = list(summary_lines(result))
    assert lines[1] == "Largest relative output error (‖WX−QX‖/‖WX‖):"
    assert lines[0] == "6 modules quantized in 3.0 s, after 2 subgraphs of an earlier process; 2.0 MB in out"
    assert [line.split()[:2] for line in lines[2:8]] == [
        ["module", "error"],
        ["m9", "0.0900"],
        ["m8", "0.0800"],
        ["m7", "0.0700"],
        ["m5", "0.0500"],
        ["m3", "0.0300"],
    ]
    assert lines[8:] == ["warning: a", "warning: b"]


@pytest.mark.parametrize("modifier", ["GPTQModifier", "QuantizationModifier"])
def test_a_terminal_shows_where_the_run_is(narrow_llama: Small, tmp_path: Path, modifier: str) -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=140)
    with Display(console) as display:
        calibrate(narrow_llama, recipe(NARROW_W4, modifier=modifier), tmp_path / "out", watchers=[display])
    shown = output.getvalue()
    assert "[4/4] lm_head, model.norm" in shown
    assert " MB" in shown or " GB" in shown
