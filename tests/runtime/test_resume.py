"""A run that is stopped and gone on with gives the bytes of one that was never stopped."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import runtime
from runtime.chain import LoadedSubgraph
from runtime.console import left_behind
from runtime.streaming import journal
from runtime.streaming.journal import Journal
from runtime.streaming.lines import Lines
from runtime.streaming.output_place import require_unfinished
from runtime.streaming.workplace import Workplace
from tests.runtime.place import GPTQ, ROOT, Place, Run, assert_refused
from tests.runtime.small import (
    NARROW_W4,
    RECIPES,
    Small,
    Stop,
    calibrate,
    directory_bytes,
    read_tensors,
    recipe,
    stop_at,
    token_batches,
    write_token_file,
)

GPTQ_W4 = recipe(NARROW_W4, modifier="GPTQModifier")


@pytest.fixture(name="stop_at")
def stopping(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    return partial(stop_at, monkeypatch)


# Three batches, three layers: 6 passes of a batch for the first and the second layer, 3 for the last.
@pytest.mark.parametrize(
    ("every", "number", "finished", "passes_after"),
    [(0, 4, 0, 15), (0, 8, 1, 3 + 9), (0, 15, 2, 6 + 3), (1, 8, 1, 9), (1, 15, 2, 3), (2, 11, 1, 3 + 9), (2, 14, 2, 3)],
)
def test_what_is_finished_is_not_done_again(
    narrow_llama: Small,
    tmp_path: Path,
    stop_at: Callable[[int], list[int]],
    every: int,
    number: int,
    finished: int,
    passes_after: int,
) -> None:
    options = {"max_shard_bytes": 30_000, "checkpoint_activations": every}
    expected = calibrate(narrow_llama, GPTQ_W4, tmp_path / "expected", **options)
    stop_at(number)
    with pytest.raises(Stop):
        calibrate(narrow_llama, GPTQ_W4, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    calls = stop_at(0)
    result = calibrate(narrow_llama, GPTQ_W4, tmp_path / "out", **options, resume=True)
    assert (result.resumed_at, calls[0]) == (finished, passes_after)
    assert result.modules == expected.modules
    assert directory_bytes(tmp_path / "out") == directory_bytes(tmp_path / "expected")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "out"]


def test_values_that_another_version_has_saved_are_computed_again(
    narrow_llama: Small, tmp_path: Path, stop_at: Callable[[int], list[int]]
) -> None:
    calibrate(narrow_llama, GPTQ_W4, tmp_path / "expected", checkpoint_activations=1)
    stop_at(15)
    with pytest.raises(Stop):
        calibrate(narrow_llama, GPTQ_W4, tmp_path / "out", checkpoint_activations=1)
    values = tmp_path / ".out.run.partial" / "values"
    saved = list(values.glob("boundary-1-*.safetensors"))
    assert len(saved) == 3
    for path in saved:
        path.unlink()
    (values / "boundary-1.bin").write_bytes(b"another format")
    calls = stop_at(0)
    result = calibrate(narrow_llama, GPTQ_W4, tmp_path / "out", checkpoint_activations=1, resume=True)
    assert (result.resumed_at, calls[0]) == (2, 6 + 3)
    assert directory_bytes(tmp_path / "out") == directory_bytes(tmp_path / "expected")


def test_another_processor_is_a_warning(
    narrow_llama: Small, tmp_path: Path, stop_at: Callable[[int], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that multiplies halves, and another that does not; and so is another number of threads."""
    monkeypatch.setattr("runtime.host.half_precision.slow_halves", lambda: (torch.float16,))
    stop_at(8)
    with pytest.raises(Stop):
        calibrate(narrow_llama, GPTQ_W4, tmp_path / "out")
    monkeypatch.setattr("runtime.host.half_precision.slow_halves", lambda: ())
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    stop_at(0)
    lines: list[str] = []
    calibrate(narrow_llama, GPTQ_W4, tmp_path / "out", resume=True, watchers=[Lines(lines.append)])
    assert [line for line in lines if "another kind of processor" in line]
    assert [line for line in lines if "resumed with 77" in line]


def test_a_run_can_be_stopped_again_and_again(
    sharded_llama: Small, tmp_path: Path, stop_at: Callable[[int], list[int]]
) -> None:
    plan, options = recipe(RECIPES["W4A16_ASYM"], modifier="GPTQModifier"), {"dtype": torch.float32}
    calibrate(sharded_llama, plan, tmp_path / "expected", **options)
    for number in (8, 9, 8):  # after the first layer, in its replay's successor, and in the last one
        stop_at(number)
        with pytest.raises(Stop):
            calibrate(sharded_llama, plan, tmp_path / "out", **options, resume=True)
    stop_at(0)
    calibrate(sharded_llama, plan, tmp_path / "out", **options, resume=True)
    assert directory_bytes(tmp_path / "out") == directory_bytes(tmp_path / "expected")


def test_without_propagated_errors_the_original_weights_run_again(
    narrow_llama: Small, tmp_path: Path, stop_at: Callable[[int], list[int]]
) -> None:
    calls = stop_at(0)
    calibrate(narrow_llama, GPTQ_W4, tmp_path / "expected", propagate_error=False)
    assert calls == [9]  # three batches through three layers, once each
    stop_at(5)
    with pytest.raises(Stop):
        calibrate(narrow_llama, GPTQ_W4, tmp_path / "out", propagate_error=False)
    stop_at(0)
    calibrate(narrow_llama, GPTQ_W4, tmp_path / "out", propagate_error=False, resume=True)
    assert directory_bytes(tmp_path / "out") == directory_bytes(tmp_path / "expected")
    first = "model.layers.0."
    propagated = calibrate(narrow_llama, GPTQ_W4, tmp_path / "propagated")
    tensors, others = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "propagated")
    same = [name for name in tensors if torch.equal(tensors[name], others[name])]
    assert [name for name in tensors if name.startswith(first) and name not in same] == []
    assert [name for name in tensors if name not in same] != []
    assert len(propagated.modules) == 21


def test_an_interrupted_run_is_not_lost_by_beginning_anew(
    narrow_llama: Small, tmp_path: Path, stop_at: Callable[[int], list[int]]
) -> None:
    stop_at(8)
    with pytest.raises(Stop):
        calibrate(narrow_llama, GPTQ_W4, tmp_path / "out")
    with pytest.raises(runtime.OutputError, match=r"left 1 finished subgraph of .*continue it with --resume, or"):
        calibrate(narrow_llama, GPTQ_W4, tmp_path / "out")
    shutil.rmtree(tmp_path / ".out.run.partial")
    calibrate(narrow_llama, GPTQ_W4, tmp_path / "out")


def test_resume_begins_where_there_is_nothing_to_go_on_with(narrow_llama: Small, tmp_path: Path) -> None:
    result = calibrate(narrow_llama, GPTQ_W4, tmp_path / "out", resume=True)
    assert result.resumed_at == 0


def test_what_is_whole_is_not_resumed(narrow_llama: Small, tmp_path: Path, place: Place, run: Run) -> None:
    calibrate(narrow_llama, GPTQ_W4, tmp_path / "out")
    with pytest.raises(runtime.OutputError, match="is already complete"):
        calibrate(narrow_llama, GPTQ_W4, tmp_path / "out", resume=True)
    shutil.copytree(tmp_path / "out", place.out)
    assert_refused(run(place.calibrate("--resume")), f"{place.out} is already complete", "nothing to resume")


def test_memory_that_runs_out_while_finished_subgraphs_run_again(
    narrow_llama: Small, tmp_path: Path, stop_at: Callable[[int], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(8)
    with pytest.raises(Stop):
        calibrate(narrow_llama, GPTQ_W4, tmp_path / "out")
    stop_at(0)
    inner, failed = LoadedSubgraph.forward, []

    def forward(self: LoadedSubgraph, model: nn.Module, **inputs: Any) -> dict[str, Any]:
        if not failed:
            failed.append(self)
            raise torch.OutOfMemoryError("no more")
        return inner(self, model, **inputs)

    monkeypatch.setattr(LoadedSubgraph, "forward", forward)
    result = calibrate(narrow_llama, GPTQ_W4, tmp_path / "out", resume=True)
    assert (result.resumed_at, len(result.modules), len(result.remarks)) == (1, 21, 1)


def change_weights(small: Small, tmp_path: Path) -> dict[str, Any]:
    folder = tmp_path / "other"
    shutil.copytree(small.weights, folder)
    tensors = read_tensors(folder)
    tensors["model.layers.2.mlp.up_proj.weight"][0, 0] += 1
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return {"weights": folder}


def change_config(small: Small, tmp_path: Path) -> dict[str, Any]:
    folder = tmp_path / "other"
    shutil.copytree(small.weights, folder)
    tokenizer = folder / "tokenizer_config.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    return {"weights": folder}


def change_data(small: Small, tmp_path: Path) -> dict[str, Any]:
    batches = token_batches()
    batches[2]["input_ids"][1, 22] += 1
    return {"batches": batches}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (change_weights, "the checkpoint "),
        (change_config, "the checkpoint "),
        (change_data, "the data "),
        (lambda *_: {"recipe": recipe(NARROW_W4 + ", dampening_frac: 0.02", modifier="GPTQModifier")}, "the recipe "),
        (lambda *_: {"dtype": torch.bfloat16}, r"the dtype \(torch.float32 then, torch.bfloat16 now\)"),
        (lambda *_: {"max_shard_bytes": 7000}, r"the shard size \(2000000000 then, 7000 now\)"),
        (lambda *_: {"propagate_error": False}, r"the propagate_error \(True then, False now\)"),
        (lambda *_: {"solve_products": "bfloat16"}, r"the solve products \(float32 then, bfloat16 now\)"),
    ],
)
def test_another_run_is_refused_and_the_first_one_can_still_be_resumed(
    narrow_llama: Small,
    tmp_path: Path,
    stop_at: Callable[[int], list[int]],
    change: Callable[[Small, Path], dict[str, Any]],
    named: str,
) -> None:
    options = {"weights": narrow_llama.weights, "recipe": GPTQ_W4, "batches": token_batches(), "out": tmp_path / "out"}
    stop_at(8)
    with pytest.raises(Stop):
        runtime.calibrate(narrow_llama.load(), **options)
    stop_at(0)
    other = options | change(narrow_llama, tmp_path) | {"resume": True}
    with pytest.raises(runtime.OutputError, match=rf"differs from the interrupted one in {named.rstrip()}[ (]"):
        runtime.calibrate(narrow_llama.load(), **other)
    assert runtime.calibrate(narrow_llama.load(), **options, resume=True).resumed_at == 1


def test_another_artifact_is_refused(
    llama: Small, narrow_llama: Small, tmp_path: Path, stop_at: Callable[[int], list[int]]
) -> None:
    plan = recipe(RECIPES["W4A16"], modifier="GPTQModifier")
    stop_at(8)
    with pytest.raises(Stop):
        calibrate(llama, plan, tmp_path / "out")
    with pytest.raises(
        runtime.OutputError,
        match="one in the artifact, the checkpoint, the recipe",
    ):
        calibrate(narrow_llama, GPTQ_W4, tmp_path / "out", resume=True)


def test_two_runs_of_one_output_at_once_are_refused(
    narrow_llama: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, complaints = LoadedSubgraph.forward, []

    def forward(self: LoadedSubgraph, model: nn.Module, **inputs: Any) -> dict[str, Any]:
        monkeypatch.setattr(LoadedSubgraph, "forward", real)
        for resume in (False, True):
            with pytest.raises(runtime.OutputError) as caught:
                calibrate(narrow_llama, GPTQ_W4, tmp_path / "out", resume=resume)
            complaints.append(str(caught.value))
        return real(self, model, **inputs)

    monkeypatch.setattr(LoadedSubgraph, "forward", forward)
    calibrate(narrow_llama, GPTQ_W4, tmp_path / "out")
    assert len(complaints) == 2
    assert all("another run is writing" in text for text in complaints)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# Libraries are imported once; each run is a process of its own.
KILLED = """
import os, random, signal, sys, time
import compressed_tensors, transformers, runtime.calibration
from runtime.cli.app import main
out = sys.argv[sys.argv.index("-o") + 1]
def timed(wait):
    start = time.monotonic()
    child = os.fork()
    if not child:
        os._exit(main())
    if wait is not None:
        time.sleep(wait)
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return time.monotonic() - start
whole = timed(None)
os.rename(out, out + "-expected")
moments = random.Random(5)
for _ in range(3):
    if not os.path.exists(out):
        timed(moments.uniform(0.1, 1.0) * whole)
"""


def test_killed_at_random_moments_a_run_comes_to_the_same_bytes(place: Place, run: Run) -> None:
    place.recipe.write_text(GPTQ)
    options = ("--batch-size", "1", "--max-shard-size", "1MB", "--resume", "--checkpoint-activations", "2")
    command = place.calibrate(*options, "--no-report")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", KILLED, *command], env=environment, check=True, capture_output=True)
    was_published = place.out.exists()  # it was faster this time
    code, _, complaint = run(command)
    assert code == 2 and "already complete" in complaint if was_published else (code, complaint) == (0, "")
    assert directory_bytes(place.out) == directory_bytes(place.folder / "out-expected")
    assert not list(place.folder.glob(".out*"))


def test_interrupted_on_the_command_line(place: Place, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at(monkeypatch, 4, KeyboardInterrupt)
    code, _, complaint = run(place.calibrate())
    assert (code, complaint) == (130, "runtime: interrupted; 1 finished subgraph is kept, continue with --resume\n")
    assert_refused(run(place.calibrate()), "an interrupted run has left 1 finished subgraph of", "--resume")
    place.write("tokens.safetensors", write_token_file(place.folder / "others.safetensors", num_samples=5).read_bytes())
    assert_refused(run(place.calibrate("--resume")), "differs from the interrupted one in the data")
    place.data = write_token_file(place.folder / "tokens.safetensors")
    code, printed, _ = run(place.calibrate("--resume"))
    assert code == 0
    assert printed.startswith("resuming after 1 of 4 subgraphs\n")
    assert "\n[2/4] " in printed
    assert "\n[1/4] " not in printed
    assert "after 1 subgraphs of an earlier process" in printed


# The journal alone.


def test_a_last_line_that_is_cut_short_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    log = Journal(path)
    log.append("run", identity={"a": "1"})
    log.append("step", index=0, loss=0.1 + 0.2)
    log.close()
    whole = path.read_bytes()
    (first, second) = whole.splitlines(keepends=True)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        found = [entry["kind"] for entry in journal.read(path)]
        assert found == (["run"] if length >= len(first) else [])
    for place in range(len(first), len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        assert len(journal.read(path)) == 1
    log = Journal(path)  # goes on where the last whole line ends
    log.append("step", index=0, loss=0.1 + 0.2)
    log.close()
    assert path.read_bytes() == whole
    assert json.loads(second[9:])["loss"] == 0.1 + 0.2


def test_a_fact_counts_when_the_disk_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = Journal(tmp_path / "journal")
    log.append("run")
    before = (tmp_path / "journal").read_bytes()

    def fsync(descriptor: int) -> None:
        raise OSError(errno.EIO, "the disk is gone")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="the disk is gone"):
        log.append("step", index=0)
    monkeypatch.undo()
    assert (tmp_path / "journal").read_bytes() == before
    assert [entry["kind"] for entry in log.entries] == ["run"]


def test_what_a_run_killed_after_publishing_left_is_removed(narrow_llama: Small, tmp_path: Path) -> None:
    calibrate(narrow_llama, GPTQ_W4, tmp_path / "out")
    left = tmp_path / ".out.run.partial"
    (left / "values").mkdir(parents=True)
    with pytest.raises(runtime.OutputError, match="already complete"):
        require_unfinished(tmp_path / "out")
    assert not left.exists()


def test_a_run_stopped_after_publishing_leaves_only_the_output(
    narrow_llama: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Workplace.publish

    def publish(place: Workplace) -> None:
        real(place)
        raise KeyboardInterrupt

    monkeypatch.setattr(Workplace, "publish", publish)
    with pytest.raises(KeyboardInterrupt):
        calibrate(narrow_llama, GPTQ_W4, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert left_behind == [f"output directory {tmp_path / 'out'} is complete"]
