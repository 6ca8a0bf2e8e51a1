"""What is around a run: inputs that are no files, output that nobody takes, threads that there are not."""

from __future__ import annotations

import errno
import io
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import runtime.cli.app
import seqbuild.cli.app
from runtime.host.memory import require_threads
from runtime.host.regular_files import NotRegularError, open_regular, require_regular_entries
from runtime.standard_output import Output
from tests.runtime.place import ROOT, RTN, Place, Run, assert_refused
from tests.sweep import sweep

LIMIT_S = 60


def make_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket may not be long
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


KINDS = {
    "pipe": os.mkfifo,
    "socket": make_socket,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "directory": Path.mkdir,
}


@pytest.fixture(autouse=True)
def _no_hanging() -> Any:
    """A test that waits for a pipe's other end is stopped, not the suite."""
    import signal

    def stop(*_: object) -> None:
        pytest.fail("it waits for something that never comes")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("kind", KINDS)
class TestInputs:
    def test_of_calibrate(self, place: Place, run: Run, kind: str) -> None:
        inputs = [
            *(place.folder / name for name in ("recipe.yaml", "tokens.safetensors")),
            *(place.weights / name for name in ("model.safetensors", "config.json", "tokenizer.json")),
        ]
        for path in inputs:
            content = path.read_bytes()
            path.unlink()
            KINDS[kind](path)
            result = run(place.calibrate())
            assert_refused(result, path.name, "a regular file is required" if kind != "directory" else "irectory")
            assert not place.out.exists()
            path.rmdir() if kind == "directory" else path.unlink()
            path.write_bytes(content)

    def test_of_the_compiler(self, place: Place, run: Run, tmp_path: Path, kind: str) -> None:
        command = ["compile", str(place.weights), "-o", str(tmp_path / "out")]
        for name in ("config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json"):
            path = place.weights / name
            content = path.read_bytes()
            path.unlink()
            KINDS[kind](path)
            assert_refused(run(command, seqbuild.cli.app.main), name, program="seqbuild")
            path.rmdir() if kind == "directory" else path.unlink()
            path.write_bytes(content)
        odd = tmp_path / "odd.safetensors"
        KINDS[kind](odd)
        assert_refused(run([*command, "--sample", str(odd)], seqbuild.cli.app.main), str(odd), program="seqbuild")
        texts = tmp_path / "text.txt"
        KINDS[kind](texts)
        data = ["data", str(place.weights), str(texts), "-o", str(tmp_path / "t.safetensors")]
        assert_refused(run(data, seqbuild.cli.app.main), "text.txt", program="seqbuild")

    def test_opened(self, tmp_path: Path, kind: str) -> None:
        KINDS[kind](tmp_path / "a.json")
        with pytest.raises(NotRegularError, match=rf"(?i)is a {kind}"):
            open_regular(tmp_path / "a.json")
        with pytest.raises(NotRegularError, match=rf"(?i)is a {kind}"):
            require_regular_entries(tmp_path)


def test_a_log_that_is_a_pipe(place: Place, run: Run) -> None:
    os.mkfifo(place.folder / "log")
    assert_refused(run(place.calibrate("--log", place.folder / "log")), "the log", "it is a pipe")


@pytest.mark.parametrize("size", ["1e999GiB", "nan", "-5GiB", "inf", "device=1e400GiB", "9e99999999TB"])
def test_sizes_that_are_none(place: Place, run: Run, size: str) -> None:
    assert_refused(run(place.calibrate(f"--activation-memory={size}")), "--activation-memory", size.rpartition("=")[2])
    assert not place.out.exists()


class Failing(io.StringIO):
    """A stream that takes no text."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def write(self, text: str) -> int:
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC, errno.EIO])
def test_output_that_nobody_takes_ends_no_run(place: Place, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    place.recipe.write_text(RTN)
    complaints = io.StringIO()
    monkeypatch.setattr(sys, "stdout", Failing(number))
    monkeypatch.setattr(sys, "stderr", complaints)
    assert runtime.cli.app.main(place.calibrate()) == 0
    assert (place.out / "model.safetensors").exists()
    lines = complaints.getvalue().splitlines()
    assert len(lines) == (number != errno.EPIPE)
    assert all(line.startswith("runtime: warning: standard output cannot be written: ") for line in lines)
    # A command whose only result is what it prints has failed then.
    assert runtime.cli.app.main(["check", str(place.artifact)]) == (0 if number == errno.EPIPE else 2)


@pytest.mark.parametrize("closed", sweep([">&-", "2>&-", ">&- 2>&- <&-", ">/dev/null | true"], ">&- 2>&- <&-"))
def test_closed_streams(place: Place, closed: str) -> None:
    command = f"{sys.executable} -m runtime check {place.artifact} {closed}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_path_that_the_encoding_has_not(place: Place) -> None:
    odd = place.artifact.rename(place.folder / "größe-日本")
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    command = [sys.executable, "-m", "runtime", "check", str(odd)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, env=environment, timeout=LIMIT_S)
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"\u65e5\u672c: " in done.stdout


@pytest.mark.parametrize(("encoding", "expected"), [("latin-1", "größe \\u65e5"), ("ascii", r"gr\xf6\xdfe \u65e5")])
def test_what_cannot_be_encoded_is_escaped(encoding: str, expected: str) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    output = Output(stream)
    output.write("größe 日")
    output.flush()
    assert stream.buffer.getvalue() == expected.encode(encoding)  # type: ignore[attr-defined]
    assert not output.failure


def test_threads_that_there_are_not(place: Place, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    require_threads(3)
    monkeypatch.setattr(threading.Thread, "start", start)
    assert_refused(run(place.calibrate()), "this process can start only 0 of the", "ulimit -u")
    assert not place.out.exists()
