"""What a run does when a subgraph does not fit into memory with all samples of a batch."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import local
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import runtime
from runtime.chain import LoadedSubgraph
from runtime.data.batches import largest_batch, split_batches
from runtime.formats.compressed import join_rows
from runtime.host.memory import OutOfMemory
from runtime.streaming.run import StreamingRun
from runtime.workers.agreement import agreed
from tests.runtime.place import Place, Run, assert_refused
from tests.runtime.small import (
    NARROW_W4,
    Small,
    calibrate,
    directory_bytes,
    nameless_bytes,
    read_tensors,
    recipe,
    token_batches,
)
from tests.runtime.worker_threads import ThreadWorkers, outcomes
from tests.sweep import sweep

GPTQ_W4 = recipe(NARROW_W4, modifier="GPTQModifier")
Fit = Callable[[Callable[[int, int], int]], list[tuple[int, int]]]


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> Iterator[None]:
    """Spare what other tests have left: a run collects garbage whenever memory runs out."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Fit:
    """A machine in which at most `limit(layer, call)` samples fit; the list says what ran, [layer, samples]."""
    real = LoadedSubgraph.forward

    def arrange(limit: Callable[[int, int], int]) -> list[tuple[int, int]]:
        ran: list[tuple[int, int]] = []
        calls = [0]

        def forward(self: LoadedSubgraph, model: nn.Module, **inputs: Any) -> dict[str, Any]:
            calls[0] += 1
            layer = int(self.entry.targets[0].rpartition(".")[2])
            samples = next(value for value in inputs.values() if isinstance(value, torch.Tensor)).shape[0]
            if samples > limit(layer, calls[0]):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
            ran.append((layer, samples))
            return real(self, model, **inputs)

        monkeypatch.setattr(LoadedSubgraph, "forward", forward)
        return ran

    return arrange


def halves() -> list[dict[str, Any]]:
    """The usual tokens, two samples at a time."""
    return [
        {name: value[start : start + 2] for name, value in batch.items()}
        for batch in token_batches()
        for start in range(0, len(batch["input_ids"]), 2)
    ]


def test_at_the_first_layer_it_is_as_if_batches_had_been_smaller(
    narrow_llama: Small, tmp_path: Path, memory: Fit
) -> None:
    calibrate(narrow_llama, GPTQ_W4, tmp_path / "expected", batches=halves())
    ran = memory(lambda layer, call: 2)
    result = calibrate(narrow_llama, GPTQ_W4, tmp_path / "out")
    # The record states the warning, and the digest of the batches as they were given.
    out = nameless_bytes(tmp_path / "out", warnings=(), data=None)
    assert out == nameless_bytes(tmp_path / "expected", warnings=(), data=None)
    assert ran == [(0, 2)] * 10 + [(1, 2)] * 10 + [(2, 2)] * 5
    text = "warning: out of memory in model.layers.0: from here on 2 samples at a time"
    assert result.remarks == (text,)


@pytest.mark.parametrize("call", sweep([2, 5, 8, 11, 14], 2, 8, 14))
def test_at_any_moment_the_result_is_the_same_but_for_rounding(
    narrow_llama: Small, tmp_path: Path, memory: Fit, call: int
) -> None:
    """Sums of halves are other sums in the last bits, which GPTQ may turn into another grid point here and there."""
    expected = calibrate(narrow_llama, GPTQ_W4, tmp_path / "expected")
    has_failed = []

    def limit(layer: int, number: int) -> int:
        if number == call:
            has_failed.append(number)
        return 1 if number == call else 4

    ran = memory(limit)
    result = calibrate(narrow_llama, GPTQ_W4, tmp_path / "out")
    assert has_failed == [call]
    assert ran[-1] == (2, 2)
    for got, wanted in zip(result.modules, expected.modules, strict=True):
        assert (got.name, got.num_tokens) == (wanted.name, 366)
        assert got.loss == pytest.approx(wanted.loss, rel=0.02)
    before, after = read_tensors(tmp_path / "expected"), read_tensors(tmp_path / "out")
    assert list(before) == list(after)
    scales = [name for name in before if name.startswith("model.layers.0.") and name.endswith("scale")]
    assert all(torch.equal(before[name], after[name]) for name in scales)


def test_a_resumed_run_goes_on_with_as_many_samples(narrow_llama: Small, tmp_path: Path, memory: Fit) -> None:
    ran = memory(lambda layer, call: 4 if layer == 0 else 1)
    calibrate(narrow_llama, GPTQ_W4, tmp_path / "expected", checkpoint_activations=1)

    class Stop(BaseException):
        pass

    def limit(layer: int, call: int) -> int:
        if layer == 2:
            raise Stop
        return 4 if layer == 0 else 1

    memory(limit)
    with pytest.raises(Stop):
        calibrate(narrow_llama, GPTQ_W4, tmp_path / "out", checkpoint_activations=1)
    ran = memory(lambda layer, call: 1)
    result = calibrate(narrow_llama, GPTQ_W4, tmp_path / "out", checkpoint_activations=1, resume=True)
    assert ran == [(2, 1)] * 10
    assert len(result.remarks) == 2
    assert directory_bytes(tmp_path / "out") == directory_bytes(tmp_path / "expected")


def test_when_one_sample_does_not_fit_the_error_says_so_and_the_journal_stays(
    narrow_llama: Small, tmp_path: Path, memory: Fit
) -> None:
    calibrate(narrow_llama, GPTQ_W4, tmp_path / "expected", batches=halves())
    memory(lambda layer, call: 2 if layer == 0 else 0)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        calibrate(narrow_llama, GPTQ_W4, tmp_path / "out", batches=halves())
    assert isinstance(caught.value, runtime.SeqbuildError)
    assert isinstance(caught.value, OutOfMemory)
    assert str(caught.value) == (
        "out of memory in model.layers.1 with one sample at a time: CUDA out of memory. Tried to allocate 20.00 MiB. "
        "(lower --batch-size or --seq-len, or use a device with more memory)"
    )
    memory(lambda layer, call: 2)
    result = calibrate(narrow_llama, GPTQ_W4, tmp_path / "out", batches=halves(), resume=True)
    assert result.resumed_at == 1
    assert len(result.modules) == 21


def test_on_the_command_line(place: Place, run: Run, memory: Fit) -> None:
    memory(lambda layer, call: 0)
    before = place.tree()
    assert_refused(run(place.calibrate()), "out of memory in model.layers.0 with one sample at a time", "--seq-len")
    assert place.tree() == before


def test_memory_that_runs_out_while_a_weight_is_solved_is_no_matter_of_samples(
    narrow_llama: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("no room for a Hessian")

    monkeypatch.setattr("runtime.quantize.solves.factor_hessian", fail)
    with pytest.raises(torch.OutOfMemoryError, match="with its weights and statistics: no room for a Hessian"):
        calibrate(narrow_llama, GPTQ_W4, tmp_path / "out")


def test_other_errors_are_not_taken_for_it(
    narrow_llama: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def forward(self: LoadedSubgraph, model: nn.Module, **inputs: Any) -> dict[str, Any]:
        calls.append(self)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(LoadedSubgraph, "forward", forward)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        calibrate(narrow_llama, GPTQ_W4, tmp_path / "out")
    assert len(calls) == 1


def test_batches_are_split_in_order(narrow_llama: Small) -> None:
    manifest, batches = narrow_llama.load().manifest, token_batches([(5, 7), (2, 9)])
    assert largest_batch(manifest, batches) == 5
    parts = split_batches(manifest, batches, 2)
    assert parts is not None
    assert [tuple(part["input_ids"].shape) for part in parts] == [(2, 7), (2, 7), (1, 7), (2, 9)]
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(torch.cat([part[name] for part in parts[:3]]), batches[0][name])
        assert torch.equal(parts[3][name], batches[1][name])


@pytest.mark.parametrize("is_agreed", [True, False])
def test_workers_only_go_on_after_a_lack_of_memory_that_all_know(
    is_agreed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attempt(run: StreamingRun, step: Any, *, is_retry: bool) -> None:
        with agreed(run.workers) if is_agreed else contextlib.nullcontext():
            if run.workers.rank and not is_retry:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(StreamingRun, "_attempt", attempt)
    monkeypatch.setattr(StreamingRun, "_rebuild", lambda run, index: None)
    monkeypatch.setattr(StreamingRun, "_use_less_memory", lambda run, step, reason: run.workers.exchange(reason))
    step = SimpleNamespace(index=0, subgraph=SimpleNamespace(entry=SimpleNamespace(parameters=())))

    def run_step(workers: ThreadWorkers) -> str:
        run = StreamingRun.__new__(StreamingRun)
        run.workers, run.is_behind, run.model = workers, False, nn.Module()
        run.options = SimpleNamespace(device=torch.device("cpu"))  # type: ignore[assignment]
        run._run_step(step)  # type: ignore[arg-type]
        return "went on"

    found = outcomes(2, run_step)
    if is_agreed:
        assert found == ["went on", "went on"]
    else:
        assert found[0] == "went on"
        assert isinstance(found[1], torch.OutOfMemoryError)


def test_all_workers_know_when_one_has_no_memory_to_go_on_with_a_weight(
    narrow_llama: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifacts, failing = [narrow_llama.load() for _ in "01"], local()

    def join(*args: Any) -> Any:
        if failing.rank:
            raise torch.OutOfMemoryError("no room")
        return join_rows(*args)

    def run(workers: ThreadWorkers) -> None:
        failing.rank = workers.rank
        options = {"weights": narrow_llama.weights, "batches": token_batches(), "out": tmp_path / "out"}
        runtime.calibrate(artifacts[workers.rank], recipe=recipe(NARROW_W4), workers=workers, **options)

    monkeypatch.setattr("runtime.quantize.recipe_modifier.join_rows", join)
    found = outcomes(len(artifacts), run)
    assert [type(one) for one in found] == [OutOfMemory, OutOfMemory]
    assert all("no room" in str(one) for one in found)
    assert list(tmp_path.iterdir()) == []
