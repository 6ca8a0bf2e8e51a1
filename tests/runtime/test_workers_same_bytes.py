"""Workers write the same bytes as a single process, also after faults.

A start of torchrun takes seconds, so a few starts execute everything, and the tests read what they left.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import runtime.cli.app
from tests.runtime.small import Small
from tests.runtime.worker_runs import Call, Fault, Outcome, happening, run_workers
from tests.runtime.workshop import DENSE, GPTQ, MIXTURE, ROUTED, Workshop, copy_unfinished, files_of

# One worker is a single process under another launcher, so few recipes are enough.
NAMES = {1: [GPTQ, ROUTED], 2: [*DENSE, *MIXTURE], 3: [*DENSE, *MIXTURE]}
KILLED, RESTARTED, SMALLER = "killed", "restarted", "smaller batches"
TORCHRUN_SIZE = 2  # the other sizes are started without torchrun, which takes seconds, too
KILL = Fault(rank=1, kind="kill", target="model.layers.2", at=2)


@dataclass
class Runs:
    """What the starts of this file left.

    Attributes:
        files: the digest of each file of a checkpoint, by the name of the run and the number of workers; 0 is the
            single process.
        starts: the ends of the starts.
    """

    files: dict[tuple[str, int], Mapping[str, str]] = field(default_factory=dict)
    starts: dict[tuple[str, int], Outcome] = field(default_factory=dict)


def summaries(outcome: Outcome) -> list[dict[str, Any]]:
    """The JSON objects that the runs of a start printed."""
    return [json.loads(line) for text in outcome.outputs for line in text.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Compute the expected bytes as workers do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, sharded_llama: Small, qwen3_moe: Small) -> Runs:
    shop, found = Workshop(tmp_path_factory.mktemp("workers"), sharded_llama, qwen3_moe), Runs()
    for name in shop.models:
        assert runtime.cli.app.main(shop.command(name, shop.out(name, 0))) == 0, name
    with happening(Fault(rank=0, kind="memory", samples=2)):
        assert runtime.cli.app.main(shop.command(GPTQ, shop.out(SMALLER, 0))) == 0
    killed = Call(shop.command(GPTQ, shop.out(KILLED, 2)), KILL)
    found.starts[KILLED, 2] = run_workers([killed], 2, shop.folder, torchrun=None)
    for size, names in NAMES.items():
        calls = [Call(shop.command(name, shop.out(name, size))) for name in names]
        if size != TORCHRUN_SIZE:
            again = copy_unfinished(shop.out(KILLED, 2), shop.out(KILLED, size))
            calls.append(Call(shop.command(GPTQ, again, "--resume")))
            found.starts["all", size] = run_workers(calls, size, shop.folder, torchrun=None)
            continue
        # torchrun restarts the workers in the first call, and they execute all of them.
        fault = Fault(rank=1, kind="memory", samples=2, is_repeated=True)
        calls = [
            Call(shop.command(GPTQ, shop.out(RESTARTED, size)), KILL),
            *calls,
            Call(shop.command(GPTQ, shop.out(SMALLER, size)), fault),
        ]
        found.starts["all", size] = run_workers(calls, size, shop.folder, torchrun=["--max-restarts", "1"])
    for path in shop.folder.iterdir():
        name, _, size = path.name.rpartition("-")
        if path.is_dir() and not name.startswith("."):
            found.files[name, int(size)] = files_of(path)
    return found


@pytest.mark.parametrize(("size", "name"), [(size, name) for size, names in NAMES.items() for name in names])
def test_every_file_has_the_same_bytes(runs: Runs, size: int, name: str) -> None:
    outcome = runs.starts["all", size]
    assert set(outcome.codes) == {0}, outcome.errors
    assert runs.files[name, size] == runs.files[name, 0]
    assert len([file for file in runs.files[name, 0] if file.endswith(".safetensors")]) > (name in DENSE)


@pytest.mark.parametrize("size", [1, 3])
def test_a_killed_run_is_resumed_with_another_number_of_workers(runs: Runs, size: int) -> None:
    assert runs.files[KILLED, size] == runs.files[GPTQ, 0]
    assert summaries(runs.starts["all", size])[-1]["resumed_at"] > 0


def test_the_others_end_when_a_worker_is_killed(runs: Runs) -> None:
    outcome = runs.starts[KILLED, 2]
    assert outcome.codes == (2, -9)
    [line] = outcome.errors[0].splitlines()
    assert line.startswith(f"runtime: error: worker 1 on {socket.gethostname()} died in model.layers.2 ")
    assert outcome.seconds < 60
    assert (KILLED, 2) not in runs.files


def test_torchrun_restarts_the_workers_and_they_resume(runs: Runs) -> None:
    outcome = runs.starts["all", TORCHRUN_SIZE]
    assert outcome.codes == (0,), outcome.errors
    assert runs.files[RESTARTED, TORCHRUN_SIZE] == runs.files[GPTQ, 0]
    assert summaries(outcome)[0]["resumed_at"] > 0


def test_memory_that_runs_out_on_one_worker_makes_the_batches_of_all_smaller(runs: Runs) -> None:
    assert runs.files[SMALLER, 2] == runs.files[SMALLER, 0]
    assert runs.files[SMALLER, 2] != runs.files[GPTQ, 0]  # sums of other batches
    remarks = summaries(runs.starts["all", 2])[-1]["remarks"]
    assert [remark for remark in remarks if "out of memory in model.layers.0: from here on 2 samples" in remark]


def test_one_worker_prints(runs: Runs) -> None:
    for size, names in NAMES.items():
        outputs = runs.starts["all", size].outputs
        assert len(summaries(runs.starts["all", size])) == len(names) + (2 if size == TORCHRUN_SIZE else 1)
        assert not any(outputs[1:])
