"""Every documented exit code, of real processes, and the last event in their logs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from runtime.cli.run import USER_ERROR
from runtime.host.event_log import SIGNALS
from tests.runtime.place import ROOT, RTN, Place

OPERATE = (ROOT / "docs/operate.md").read_text(encoding="utf-8")
# A calibration whose first slow step is replaced by the code of a test; torch is never imported.
STARTED = """
import signal, sys, time
import runtime.cli.imports, runtime.cli.stopping
from runtime.errors import UsageError
from runtime.host import own_process
folder = {folder!r}
def mark(name):
    open(folder + "/" + name, "w").close()
def prepare(artifact):
{body}
runtime.cli.imports.prepare = prepare
from runtime.cli.app import main
own_process.claim()
sys.exit(main())
"""
SLEEP = """
mark("begun")
time.sleep(30)
"""
EXECUTING = """
exec("mark('begun'); time.sleep(30)", {"mark": mark, "time": time})
"""
IMPORTING = """
import importlib.abc, os, runpy, signal, sys
package, number = sys.argv[1], int(sys.argv[2])
signal.signal(signal.SIGINT, signal.default_int_handler)

class Sender(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == package + ".cli.app":
            os.kill(os.getpid(), number)

sys.meta_path.insert(0, Sender())
runpy.run_module(package, run_name="__main__")
"""
CLEANUP = """
try:
    mark("begun")
    time.sleep(30)
finally:
    mark("cleaning")
    time.sleep(0.5)
    mark("cleaned")
"""
HANGING = """
runtime.cli.stopping._PATIENCE_S = 0.1
try:
    mark("begun")
    time.sleep(30)
finally:
    time.sleep(0.3)
    mark("cleaning")
    time.sleep(30)
"""
SUPPRESSING = """
try:
    mark("begun")
    time.sleep(30)
except BaseException:
    pass
time.sleep(30)
"""
GOING_ON = """
mark("begun")
time.sleep(0.4)
raise UsageError("the run went on")
"""
FAILING_IMPORT = """
try:
    mark("begun")
    time.sleep(30)
except BaseException:
    raise ImportError("cannot import name") from None
"""


def events(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


class Started:
    """A calibration that runs the code of a test, in a process of its own."""

    def __init__(self, folder: Path, body: str, ignored: int = 0) -> None:
        indented = "\n".join(f"    {line}" for line in body.splitlines())
        code = STARTED.format(folder=str(folder), body=indented)
        arguments = ["calibrate", folder, "--weights", folder, "--recipe", "W4A16", "-o", folder / "out"]

        def handlers() -> None:
            # A test run in the background may have been told to ignore interruptions.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if ignored:
                signal.signal(ignored, signal.SIG_IGN)

        self.folder, self.log = folder, folder / "log"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments), "--log", str(self.log)],
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
            preexec_fn=handlers,
        )

    def signal(self, number: int, *, after: str) -> None:
        """Send a signal when the process has made a mark."""
        while not (self.folder / after).exists():
            assert self.process.poll() is None, self.process.communicate()[1]
            time.sleep(0.01)
        self.process.send_signal(number)

    def finish(self) -> tuple[int, str, dict[str, Any]]:
        """Return its exit code, what it complained about, and the last event."""
        complaint = self.process.communicate(timeout=20)[1]
        return self.process.returncode, complaint, events(self.log)[-1]


WORDS = {"SIGHUP": "terminated by SIGHUP", "SIGINT": "interrupted", "SIGTERM": "terminated"}


@pytest.mark.parametrize(("code", "name"), SIGNALS.items())
def test_signals(tmp_path: Path, code: int, name: str) -> None:
    started = Started(tmp_path, SLEEP)
    started.signal(getattr(signal, name), after="begun")
    found, complaint, last = started.finish()
    text = f"{WORDS[name]}; no partial output was left behind"
    assert (found, complaint) == (code, f"runtime: {text}\n")
    assert [last[field] for field in ("event", "signal", "exit_code", "text")] == ["interrupted", name, code, text]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["begun", "log"]


@pytest.mark.parametrize(
    ("package", "code", "name"), [("seqbuild", 130, "SIGINT"), *(("runtime", *pair) for pair in SIGNALS.items())]
)
def test_a_signal_while_the_command_line_is_imported(package: str, code: int, name: str) -> None:
    number = int(getattr(signal, name))
    command = [sys.executable, "-c", IMPORTING, package, str(number)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=20)
    assert (done.returncode, done.stderr) == (code, f"{package}: {WORDS[name]}; nothing was written\n")


def test_an_interruption_of_code_that_is_executed(tmp_path: Path) -> None:
    """Python itself would end with the signal."""
    started = Started(tmp_path, EXECUTING)
    started.signal(signal.SIGINT, after="begun")
    assert started.finish()[0] == 130


def test_a_second_signal_does_not_disturb_the_cleanup(tmp_path: Path) -> None:
    started = Started(tmp_path, CLEANUP)
    started.signal(signal.SIGINT, after="begun")
    started.signal(signal.SIGINT, after="cleaning")
    started.signal(signal.SIGTERM, after="cleaning")
    code, _, last = started.finish()
    assert (code, last["signal"]) == (130, "SIGINT") and (tmp_path / "cleaned").exists()


def test_a_second_signal_ends_a_cleanup_that_hangs(tmp_path: Path) -> None:
    started = Started(tmp_path, HANGING)
    started.signal(signal.SIGTERM, after="begun")
    started.signal(signal.SIGINT, after="cleaning")
    code, complaint, last = started.finish()
    text = "terminated, and ended while it cleaned up; partial files may be left behind"
    assert (code, complaint, last["text"]) == (143, f"runtime: {text}\n", text)


@pytest.mark.parametrize("body", [SUPPRESSING, FAILING_IMPORT])
def test_a_signal_that_other_code_suppresses(tmp_path: Path, body: str) -> None:
    started = Started(tmp_path, body)
    started.signal(signal.SIGTERM, after="begun")
    code, complaint, last = started.finish()
    assert (code, last["event"], last["signal"]) == (143, "interrupted", "SIGTERM")
    assert complaint == "runtime: terminated; no partial output was left behind\n"


def test_a_signal_that_nohup_ignores(tmp_path: Path) -> None:
    started = Started(tmp_path, GOING_ON, ignored=signal.SIGHUP)
    started.signal(signal.SIGHUP, after="begun")
    code, complaint, last = started.finish()
    assert (code, complaint) == (2, "runtime: error: the run went on\n")
    assert (last["event"], last["error"], last["exit_code"]) == ("failed", "the run went on", 2)


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("raise MemoryError", "out of memory: an allocation failed (lower --batch-size or --seq-len)"),
        ("raise ValueError('odd\\x1b value')", "internal error: ValueError at <string>"),
        ("raise EOFError('no more input')", "internal error: EOFError"),
        ("raise BrokenPipeError(32, 'Broken pipe')", "[Errno 32] Broken pipe"),
        ("sys.exit('a library gave up')", "the command printed why"),
        ("raise ImportError('libtorch.so: failed to map segment from shared object')", "a library cannot be loaded: "),
    ],
)
def test_errors_of_every_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, error: str) -> None:
    """In this process, which is quicker; `test_a_signal_that_nohup_ignores` has an error of a real one."""
    import runtime.cli.app

    def prepare(_: Path) -> None:
        exec(compile(body, "<string>", "exec"), {"sys": sys})

    monkeypatch.setattr("runtime.cli.imports.prepare", prepare)
    arguments = ["calibrate", tmp_path, "--weights", tmp_path, "--recipe", "W4A16", "-o", tmp_path / "out"]
    code = runtime.cli.app.main([*map(str, arguments), "--log", str(tmp_path / "log")])
    last = events(tmp_path / "log")[-1]
    assert (last["event"], last["exit_code"]) == ("failed", code)
    assert code == (1 if body.startswith("sys.exit") else 2)
    assert last["error"].startswith(error) and last["error"].isprintable()


def test_an_error_while_the_result_is_published(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    import runtime.cli.app

    def put(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    place.recipe.write_text(RTN)
    monkeypatch.setattr("runtime.streaming.workplace.put_in_place", put)
    assert runtime.cli.app.main(place.calibrate("--log", str(place.folder / "log"))) == 2
    found = events(place.folder / "log")
    assert (
        found[-1]["error"]
        == f"cannot write {place.out}: the disk is full (4 finished subgraphs are kept, continue with --resume)"
    )
    assert "published" not in {event["event"] for event in found} and not place.out.exists()


def test_success_with_the_log_on_standard_output(place: Place) -> None:
    place.recipe.write_text(RTN)
    command = [sys.executable, "-m", "runtime", *place.calibrate("--log", "-", "--json")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    found = [json.loads(line) for line in done.stdout.splitlines()]
    kinds = [event["event"] for event in found]
    assert (kinds[0], kinds[-3:]) == ("run", ["published", "summary", "end"])
    assert len({event["run_id"] for event in found}) == 1
    assert found[0]["command"] == ["runtime", *place.calibrate("--log", "-", "--json")]
    assert found[-2]["path"] == str(place.out) and len(found[-2]["modules"]) == 21
    assert (found[-1]["exit_code"], found[-1]["path"]) == (0, str(place.out))


def test_a_negative_answer(place: Place) -> None:
    """`plan` of a run that does not fit; `verify` and `doctor` are tested with what they answer."""
    command = [sys.executable, "-m", "runtime", "plan", str(place.artifact), "--host-memory", "1MB"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=60)
    assert done.returncode == 1, done.stderr
    assert "does not fit" in done.stdout


def test_the_documented_codes_are_those_of_the_code() -> None:
    (table,) = re.findall(r"(?ms)^## Exit codes$.*?\n(\| code .*?)\n\n", OPERATE)
    documented = [int(code) for code in re.findall(r"(?m)^\| (\d+) \|", table)]
    assert documented == [0, 1, USER_ERROR, *SIGNALS]
    for code, name in SIGNALS.items():
        assert code == 128 + getattr(signal, name)
        assert re.search(rf"(?m)^\| {code} \| {name}\b", table)
