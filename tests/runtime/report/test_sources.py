from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

import runtime
from runtime.report.collect import UNFINISHED
from runtime.report.facts import FINISHED, RunFacts
from runtime.report.html import REPORT, embedded
from runtime.report.page import report_page
from runtime.report.sources import read_facts
from tests.runtime.report.hostile import hostile_facts

PAGE = f'<!DOCTYPE html>\n<meta name="generator" content="{REPORT}">'


def module(name: str, index: int, **more: Any) -> dict[str, Any]:
    return {"event": "module", "rank": 0, "index": index, "name": name, "algorithm": "gptq", "error": 0.1, **more}


def subgraph(index: int, **more: Any) -> dict[str, Any]:
    sizes = {"tokens": 10, "bytes_read": 5, "bytes_written": 3, "peak_host_bytes": 100 + index, "peak_device_bytes": 0}
    return {"event": "subgraph", "rank": 0, "index": index, "label": f"l{index}", "seconds": 2.0, **sizes, **more}


def begin(**more: Any) -> dict[str, Any]:
    return {"event": "begin", "subgraphs": 2, "batches": 1, "tokens": 10, "device": "cpu", "resumed_at": 0, **more}


def write_log(path: Path, *events: dict[str, Any] | str) -> Path:
    lines = [event if isinstance(event, str) else json.dumps({"time": 1.5, **event}) for event in events]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_a_log(tmp_path: Path) -> None:
    plan = [{"index": index, "label": f"l{index}", "host": 90, "device": 0, "seconds": 1.5} for index in range(2)]
    log = write_log(
        tmp_path / "log",
        {
            "event": "run",
            "command": ["seqbuild", "quantize", "m o"],
            "weights": "/w/model",
            "data": ["t.txt"],
        },
        {"event": "inputs", "recipe": {"name": "/r/w4.yaml", "text": "a: b"}, "dtype": "bfloat16"},
        begin(),
        {"event": "plan", "subgraphs": plan, "seconds": 3.0, "rates": "assumed"},
        {"event": "heartbeat", "elapsed": 3},
        module("a", 0, error=math.nan, num_dead=3, fallback="why"),
        subgraph(0),
        {"event": "warning", "text": "warning: w"},
        subgraph(1),
        {"event": "published", "path": "o", "bytes": 7, "seconds": 4.0},
        {"event": "evaluation", "which": "before", "perplexity": 9.0, "tokens": 5, "seconds": 1.0},
        {"event": "evaluation", "which": "after", "perplexity": 9.5, "tokens": 5, "seconds": 1.0},
        {"event": "end", "exit_code": 0, "seconds": 8.0},
    )
    facts = read_facts(log)
    assert (facts.outcome, facts.model, facts.recipe_name, facts.recipe) == (FINISHED, "model", "w4.yaml", "a: b")
    assert facts.command == "seqbuild quantize 'm o'"
    assert facts.perplexity is not None and (facts.perplexity.before, facts.perplexity.after) == (9.0, 9.5)
    assert facts.seconds == {"calibrate": 4.0, "evaluate": 2.0, "rest": 2.0}
    assert [(one.name, one.error, one.num_dead, one.fallback) for one in facts.modules] == [("a", None, 3, "why")]
    assert [entry.seconds for entry in facts.subgraphs] == [2.0, 2.0]
    assert [entry.seconds for entry in facts.plan] == [1.5, 1.5]
    assert (facts.bytes_after, facts.peak_host_bytes, facts.warnings) == (7, 101, ["warning: w"])
    page = write_page(tmp_path / "page.html", facts)
    assert read_facts(page) == facts
    assert "the prediction for an assumed host" in page.read_text()


def write_page(path: Path, facts: RunFacts) -> Path:
    path.write_bytes(report_page(facts))
    return path


def test_a_resumed_run_takes_over_what_is_known(tmp_path: Path) -> None:
    killed = '{"event": "subgr' + json.dumps(begin(resumed_at=1))
    first = [begin(), module("a", 0), subgraph(0), module("b", 1)]
    second = [begin(resumed_at=1), subgraph(0, event="earlier", seconds=9.0), module("b", 1, error=0.2), subgraph(1)]
    whole = read_facts(write_log(tmp_path / "log", *first, killed, *second[1:]))
    assert [(one.name, one.error) for one in whole.modules] == [("a", 0.1), ("b", 0.2)]
    assert [entry.seconds for entry in whole.subgraphs] == [2.0, 2.0]
    assert (whole.resumed_at, whole.is_partial, whole.outcome) == (1, False, UNFINISHED)
    half = read_facts(write_log(tmp_path / "log", *second))
    assert [entry.seconds for entry in half.subgraphs] == [9.0, 2.0]
    partial = read_facts(write_log(tmp_path / "log", second[0], *second[2:]))
    assert partial.is_partial
    again = read_facts(write_log(tmp_path / "log", *first[:3], begin(), module("c", 0)))
    assert [one.name for one in again.modules] == ["c"]


@pytest.mark.parametrize(
    ("last", "outcome"),
    [
        ({"event": "failed", "error": "the disk is full", "exit_code": 2}, "failed: the disk is full"),
        ({"event": "interrupted", "signal": "SIGHUP", "exit_code": 129}, "interrupted by SIGHUP"),
        ({"event": "later event"}, UNFINISHED),
    ],
)
def test_how_a_run_ended(tmp_path: Path, last: dict[str, Any], outcome: str) -> None:
    facts = read_facts(write_log(tmp_path / "log", begin(), subgraph(0), last))
    assert facts.outcome == outcome
    assert outcome.partition(":")[0] in report_page(facts).decode()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no events of a run"),
        ("hello\n", "line 1 is not an event: it is not JSON"),
        ("[1]\n", "line 1 is not an event: it has no name"),
        ('{"event": 3}\n', "it has no name"),
        ("[" * 100_000 + "\n", "it is not JSON"),
        ('{"event": "begin", "subgraphs": "two"}\n', "line 1 is damaged: begin"),
        ('{"event": "begin", "subgraphs": -1}\n', "is damaged"),
        ('{"event": "begin", "subgraphs": 1' + "0" * 400 + "}\n", "is damaged"),
        ('{"event": "module", "name": ["a"]}\n', "is damaged"),
        ('{"event": "module", "name": "a", "error": "large"}\n', "is damaged"),
        ('{"event": "module", "name": "a", "rank": 0, "num_tokens": 1e9}\n', "is damaged"),
        ('{"event": "run", "recipe": "W4A16"}\n', "is damaged"),
        ('{"event": "subgraph", "index": 9223372036854775808}\n', "is damaged"),
        ("\x00\xff\n", "it is not JSON"),
        (PAGE, "no facts of one run"),
        (PAGE + '<script type="application/json" id="facts">' * 30_000, "no facts of one run"),
        (f'{PAGE}<script type="application/json" id="facts">{{]</script>', "are damaged"),
        (f'{PAGE}<script type="application/json" id="facts">{{"modules": [3]}}</script>', "are damaged"),
        (f'{PAGE}<script type="application/json" id="facts">{{"format_version": 2}}</script>', "seqbuild-report 2;"),
    ],
)
def test_what_is_no_source_is_one_error(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "source"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(runtime.DataError) as caught:
        read_facts(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_sparse_file_is_not_read_to_its_end(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as file:
        file.truncate(2**42)
    with pytest.raises(runtime.DataError, match=r"log, line 1 is longer than 32 MiB, too long for an event"):
        read_facts(tmp_path / "log")


def test_an_output_without_a_record_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(runtime.WeightsError, match=r"has no seqbuild\.json"):
        read_facts(tmp_path)
    with pytest.raises(runtime.DataError, match=r"cannot read .*missing"):
        read_facts(tmp_path / "missing")


def test_facts_are_the_same_after_a_page(tmp_path: Path) -> None:
    facts = hostile_facts()
    assert read_facts(write_page(tmp_path / "page.html", facts)) == facts


def test_embedded_json_has_no_html() -> None:
    assert embedded(["</script>&\u2028"]) == '["\\u003c/script\\u003e\\u0026\\u2028"]'
