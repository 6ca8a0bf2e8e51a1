"""Several processes that torchrun starts: their messages, and how all end when one of them fails."""

from __future__ import annotations

import json
import shutil
import signal
import socket
from pathlib import Path

import pytest

import runtime
import runtime.errors
from runtime.cli.group import require_readable_by
from runtime.errors import UsageError
from runtime.workers.agreement import agreed
from runtime.workers.comparison import require_same_options
from runtime.workers.group import Alone, Workers
from runtime.workers.start import current
from tests.runtime.place import Run, assert_refused
from tests.runtime.small import Small, write_token_file
from tests.runtime.torchrun import Torchrun
from tests.runtime.worker_threads import outcomes

HOST = socket.gethostname()


@pytest.fixture(scope="module")
def command(narrow_llama: Small, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """An evaluation of six batches."""
    folder = tmp_path_factory.mktemp("evaluation")
    weights, other = folder / "model", folder / "model-other"
    shutil.copytree(narrow_llama.weights, weights)
    shutil.copytree(narrow_llama.weights, other)
    data = bytearray((other / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (other / "model.safetensors").write_bytes(data)
    tokens = write_token_file(folder / "tokens.safetensors", num_samples=5)
    arguments = ["evaluate", narrow_llama.artifact, "--weights", weights, "--data", tokens, "--batch-size", 1]
    return [str(part) for part in (*arguments, "--device", "cpu", "--json")]


def test_messages(tmp_path: Path) -> None:
    with Torchrun(tmp_path, 3, ["messages"]) as started:
        done = started.finish()
    assert done.complaints == ["", "", ""]
    assert done.out == ["done\n"] * 3


def test_the_perplexity_has_the_same_bits_for_any_number_of_workers(
    command: list[str], tmp_path: Path, run: Run
) -> None:
    code, expected, _ = run(command)
    assert code == 0
    with Torchrun(tmp_path, 2, command) as started:
        done = started.finish()
    assert (done.codes, done.complaints) == ([0, 0], ["", ""])
    assert done.out[1:] == [""]
    for name in ("perplexity", "tokens", "bytes"):
        assert json.loads(done.out[0])[name] == json.loads(expected)[name]


@pytest.mark.wide  # in a calibration: test_workers_same_bytes.py
def test_a_worker_that_is_killed_ends_the_others(command: list[str], tmp_path: Path) -> None:
    with Torchrun(tmp_path, 2, [*command, "--log-file", tmp_path / "events"], "1:kill") as started:
        done = started.finish()
    assert done.codes == [2, None]
    error = f"worker 1 on {HOST} died in model.layers.1"
    assert (done.out, done.complaints) == (["", ""], [f"runtime: error: {error}\n", ""])
    events = [json.loads(line) for line in (tmp_path / "events").read_text().splitlines()]
    assert (events[0]["event"], events[-1]["event"], events[-1]["error"]) == ("run", "failed", error)


@pytest.mark.wide
def test_a_worker_that_does_not_respond_ends_the_others(command: list[str], tmp_path: Path) -> None:
    with Torchrun(tmp_path, 2, [*command, "--worker-timeout", "5s"], "1:stop") as started:
        started.wait_for(lambda: started.code(0) is not None)
        started.signal(signal.SIGKILL, rank=1)  # torchrun does that after half a minute
        done = started.finish()
    line = f"runtime: error: worker 1 on {HOST} has not responded for 5 s in model.layers.1\n"
    assert (done.codes[0], done.out, done.complaints) == (2, ["", ""], [line, ""])


@pytest.mark.parametrize(
    ("behavior", "own", "of_the_other"),
    [
        pytest.param(
            *(
                "1:bug",
                "internal error: ValueError at worker.py",
                "worker 1 on HOST stopped in model.layers.1: ValueError",
            ),
            marks=pytest.mark.wide,
        ),
        ("1:other weights", "worker 1 on HOST has other weights than worker 0", "worker 1 on HOST has other weights"),
    ],
)
def test_an_error_of_one_worker_is_an_error_of_all(
    command: list[str], tmp_path: Path, behavior: str, own: str, of_the_other: str
) -> None:
    with Torchrun(tmp_path, 2, command, behavior) as started:
        done = started.finish()
    assert (done.codes, done.out) == ([2, 2], ["", ""])
    for complaint, text in zip(done.complaints, (of_the_other, own), strict=True):
        assert_refused((2, "", complaint), text.replace("HOST", HOST))


@pytest.mark.wide
def test_an_interruption_ends_all(command: list[str], tmp_path: Path) -> None:
    with Torchrun(tmp_path, 2, command, "1:wait") as started:
        started.wait_for(lambda: started.has_mark(1))
        started.signal(signal.SIGINT)
        done = started.finish(timeout_s=20)
    assert (done.codes, done.out) == ([130, 130], ["", ""])
    assert done.complaints == ["runtime: interrupted; no partial output was left behind\n", "runtime: interrupted\n"]


@pytest.mark.parametrize(
    ("environment", "arguments", "parts"),
    [
        ({}, ["--worker-timeout", "soon"], ["--worker-timeout must be a time; got 'soon'", "10min"]),
        ({}, ["--worker-timeout", "1s"], ["--worker-timeout must be between 5 s and 7 days; got '1s'"]),
        ({"WORLD_SIZE": "2"}, [], ["WORLD_SIZE is 2, but RANK is not set", "torchrun"]),
        ({"WORLD_SIZE": "two"}, [], ["WORLD_SIZE is 'two' in the environment"]),
        ({"WORLD_SIZE": "2", "RANK": "3", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, [], ["RANK is 3"]),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "x"}, [], ["MASTER_PORT is 'x'"]),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "65536"}, [], ["from 1 to 65535"]),
        (
            {
                "WORLD_SIZE": "2",
                "RANK": "0",
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": "1",
                "GLOO_SOCKET_IFNAME": "lo,none0",
            },
            [],
            ["GLOO_SOCKET_IFNAME is 'lo,none0'", "no network interface 'none0'", "use one of lo"],
        ),
    ],
)
def test_an_environment_that_torchrun_does_not_make(
    command: list[str],
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    environment: dict[str, str],
    arguments: list[str],
    parts: list[str],
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    code, out, complaint = run([*command, *arguments])
    assert_refused((code, out, complaint), *parts)
    for_torchrun = json.loads((tmp_path / "error.json").read_text())["message"]
    assert f"{for_torchrun['message']}\n" == complaint


def test_calls_that_compile_are_for_one_process(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import seqbuild
    import seqbuild.cli.app

    for name, value in {"WORLD_SIZE": "4", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    parts = ("torchrun has started 4", "seqbuild compile", "-m runtime calibrate")
    refused = run(["quantize", str(tmp_path), "-s", "W4A16", "-o", str(tmp_path / "out")], main=seqbuild.cli.app.main)
    assert_refused(refused, "seqbuild quantize runs in one process", *parts, program="seqbuild")
    with pytest.raises(runtime.UsageError, match=r"seqbuild\.oneshot runs in one process") as raised:
        seqbuild.oneshot(str(tmp_path), recipe="W4A16", output_dir=str(tmp_path / "out"))
    assert all(part in str(raised.value) for part in parts)


def test_processes_of_torchrun_without_a_group_are_not_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them would do the whole work."""
    assert current().size == 1
    for name, value in {"WORLD_SIZE": "4", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    assert current().size == 1  # some clusters set these for other purposes
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(UsageError, match=r"started 4 processes.*init_process_group"):
        current()


def test_standard_input_has_one_reader() -> None:
    two = Alone()
    two.size = 2
    require_readable_by(Alone(), ["-"])
    require_readable_by(two, ["a-file", "data::weight=0.5"])
    for source in ("-", "-::weight=0.5"):
        with pytest.raises(runtime.UsageError, match="2 workers cannot read standard input"):
            require_readable_by(two, ["a-file", source])


def test_workers_with_different_options_end_alike() -> None:
    def compared(workers: Workers) -> None:
        require_same_options(workers, {"command": "calibrate", "--resume": workers.rank == 1})

    found = outcomes(3, compared)
    text = "worker 1 on HOST has other --resume (True instead of False) than worker 0 on HOST"
    assert {str(one) for one in found} == {f"{text} (start all workers with the same command)".replace("HOST", HOST)}
    assert outcomes(2, lambda workers: require_same_options(workers, {"command": "evaluate"})) == [None, None]


def test_a_worker_in_another_part_of_the_program_is_no_bug_of_this_one() -> None:
    def leave(workers: Workers) -> None:
        if workers.rank:
            workers.exchange(True)
        else:
            with agreed(workers):
                pass

    error, _ = outcomes(2, leave)
    assert isinstance(error, runtime.errors.WorkerError)
    assert str(error).startswith("worker 1 does something else than worker 0 (")
