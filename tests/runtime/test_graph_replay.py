"""CUDA graphs of a forward, with an imitation of torch's functions that records operators and repeats them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch.utils import _pytree as pytree

import runtime.streaming.run
from runtime.errors import DataError, UsageError
from runtime.host.dispatch_modes import LeanDispatchMode
from runtime.language.attention import attention
from runtime.language.program import Run
from runtime.streaming.graph_replay import GraphReplay
from runtime.streaming.options import RunOptions
from tests.runtime.small import NARROW_W4, Small, calibrate, directory_bytes, recipe, token_batches

GPTQ = recipe(NARROW_W4, modifier="GPTQModifier")

WAITING = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)  # for the device


class Recorder(LeanDispatchMode):
    """Records every operator of a capture, with the tensors that it reads and returns."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = graph

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in WAITING:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        found = func(*args, **(kwargs or {}))
        self.graph.calls.append((func, args, kwargs or {}, found))
        return found


class Graph:
    """Repeats what was recorded, into the memory that the recorded operators returned."""

    is_wrong = False
    pools: ClassVar[list[Any]] = []  # of all captures

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Sequence[Any], Mapping[str, Any], Any]] = []
        self.is_complete = False

    def pool(self) -> Any:
        assert self.is_complete
        return self

    def replay(self) -> None:
        assert self.is_complete
        for func, args, kwargs, found in self.calls:
            again = func(*args, **kwargs)
            for place, value in zip(pytree.tree_leaves(found), pytree.tree_leaves(again), strict=True):
                if isinstance(place, torch.Tensor) and place.data_ptr() != value.data_ptr():
                    place.copy_(value)
        if self.is_wrong:
            next(found for func, *_, found in self.calls if func is torch.ops.aten.relu.default).add_(1)


class Stream:
    """A stream of the imitation; `current` is the one that is set."""

    current: Stream

    def __init__(self, device: Any = None) -> None:
        self.waited_for: list[Stream] = []

    def wait_stream(self, other: Stream) -> None:
        self.waited_for.append(other)


@contextlib.contextmanager
def capturing(graph: Graph, *, pool: Any, stream: Stream, capture_error_mode: str) -> Iterator[None]:
    """As torch.cuda.graph: nothing is computed, and a failed capture leaves its own stream set."""
    assert capture_error_mode == "thread_local"
    graph.pools.append(pool)
    Stream.current = stream
    with Recorder(graph):
        yield
    for *_, found in graph.calls:
        for leaf in pytree.tree_leaves(found):
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf._base is None:
                leaf.fill_(torch.nan)  # what a capture leaves in memory has no meaning
    graph.is_complete = True


class Syncs(LeanDispatchMode):
    """The mode in which waiting for the device is an error."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in WAITING:
            raise RuntimeError("called a synchronizing CUDA operation")
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stream]:
    main = Stream.current = Stream()
    modes: list[Any] = [0]
    Graph.pools.clear()
    errors: list[Syncs] = []

    def set_mode(mode: Any) -> None:
        modes.append(mode)
        if mode == "error":
            errors.append(Syncs())  # type: ignore[no-untyped-call]
            errors[-1].__enter__()
        elif errors:
            errors.pop().__exit__(None, None, None)

    @contextlib.contextmanager
    def on(stream: Stream) -> Iterator[None]:
        before, Stream.current = Stream.current, stream
        yield
        Stream.current = before

    for name, value in {
        "CUDAGraph": Graph,
        "graph": capturing,
        "Stream": Stream,
        "stream": on,
        "current_stream": lambda device=None: Stream.current,
        "set_stream": lambda stream: setattr(Stream, "current", stream),
        "get_sync_debug_mode": lambda: modes[-1],
        "set_sync_debug_mode": set_mode,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    yield main
    assert Stream.current is main, "the stream of the capture was left set"
    assert modes[-1] == 0 and not errors


def batches(*rows: int) -> list[dict[str, Any]]:
    return [
        {"x": torch.randn(count, 6, generator=torch.Generator().manual_seed(place)), "size": count, "deep": [None, "a"]}
        for place, count in enumerate(rows)
    ]


WEIGHT = torch.randn(6, 6, generator=torch.Generator().manual_seed(9))


def plain(values: dict[str, Any]) -> dict[str, Any]:
    hidden = values["x"] @ WEIGHT
    values["x"].mul_(2)  # code may change its inputs
    return {"y": hidden.relu().expand(2, *hidden.shape), "same": values["x"], "size": values["size"]}


def run(values: Sequence[dict[str, Any]], forward: Any = plain) -> tuple[list[dict[str, Any]], GraphReplay, list[str]]:
    remarks: list[str] = []
    graphs = GraphReplay(torch.device("cuda"), remarks.append)
    with torch.no_grad(), graphs.of("model.layers.0", forward) as replayed:
        return [replayed(one) for one in values], graphs, remarks


def assert_equal(found: Sequence[dict[str, Any]], expected: Sequence[dict[str, Any]]) -> None:
    for got, wanted in zip(found, expected, strict=True):
        assert list(got) == list(wanted)
        for name, value in wanted.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(got[name], value) and got[name].stride() == value.stride(), name
            else:
                assert got[name] == value


def test_the_third_batch_of_a_shape_is_replayed_with_the_same_result() -> None:
    found, graphs, remarks = run(batches(4, 4, 4, 4, 4))
    assert_equal(found, [plain(one) for one in batches(4, 4, 4, 4, 4)])
    assert graphs.num_replays == 3
    assert not remarks
    assert found[3]["y"].data_ptr() != found[4]["y"].data_ptr(), "outputs are copied out of the graph's memory"


def test_each_shape_has_a_graph_of_its_own_up_to_a_limit() -> None:
    sizes = (4, 3, 4, 3, 4, 3, 4, 5, 5, 5, 6, 6, 6, 7, 7, 7, 7)
    found, graphs, remarks = run(batches(*sizes))
    assert_equal(found, [plain(one) for one in batches(*sizes)])
    assert graphs.num_replays == 2 + 1 + 1 + 1  # and none of the fifth size
    assert Graph.pools[0] is None and len(set(Graph.pools[1:])) == 1, "graphs of a subgraph share memory"
    assert not remarks


def test_a_graph_is_replayed_for_masks_of_its_own_kind_only() -> None:
    """Attention leaves an exactly causal mask out; the graph of such a batch must not run one that is padded."""
    run_of = Run(device=torch.device("cpu"), dtype=torch.float32)

    def attends(values: dict[str, Any]) -> dict[str, Any]:
        return {"y": attention(run_of, *[values["x"]] * 3, values["mask"]), "mask": values["mask"]}

    def inputs() -> list[dict[str, Any]]:
        generator = torch.Generator().manual_seed(0)
        found = []
        for padded in (0, 0, 5, 0, 5, 5, 0, 3):
            mask = torch.ones(2, 1, 32, 32, dtype=torch.bool).tril()
            mask[:, :, padded:, :padded] = False
            found.append({"x": torch.randn(2, 2, 32, 8, generator=generator), "mask": mask})
        return found

    found, graphs, remarks = run(inputs(), attends)
    with torch.no_grad():
        assert_equal(found, [attends(one) for one in inputs()])
    assert not remarks
    assert graphs.num_replays == 2 + 2  # of each kind, all but the first two


def test_code_that_waits_for_the_device_runs_as_usual_and_says_so_once() -> None:
    def waits(values: dict[str, Any]) -> dict[str, Any]:
        return {"y": values["x"] * values["x"].sum().item()}

    values = batches(4, 4, 4)
    found, graphs, remarks = run(values, waits)
    assert_equal(found, [waits(one) for one in batches(4, 4, 4)])
    assert graphs.num_replays == 0
    assert remarks == [
        "warning: model.layers.0 runs without CUDA graphs, and perhaps other subgraphs: the code cannot be captured: "
        "called a synchronizing CUDA operation"
    ]
    with torch.no_grad(), graphs.of("model.layers.1", waits) as replayed:
        for one in batches(4, 4):
            replayed(one)
    assert len(remarks) == 1


def test_a_capture_that_fails_restores_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GraphReplay, "_warm_up", lambda *_: None)
    found, graphs, remarks = run(batches(4, 4, 4), lambda values: {"y": values["x"] * values["x"].sum().item()})
    assert len(found) == 3
    assert graphs.num_replays == 0
    assert "not permitted when stream is capturing" in remarks[0]


def test_a_graph_with_other_results_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Graph, "is_wrong", True)
    found, graphs, remarks = run(batches(4, 4, 4, 4))
    assert_equal(found, [plain(one) for one in batches(4, 4, 4, 4)])
    assert graphs.num_replays == 0
    assert remarks[0].endswith("a replayed graph has other results")


def test_errors_of_the_data_are_not_taken_for_a_failed_capture() -> None:
    calls = [0]

    def fails(values: dict[str, Any]) -> dict[str, Any]:
        calls[0] += 1
        if calls[0] == 3:
            raise DataError("this batch violates an assumption")
        return {"y": values["x"]}

    with pytest.raises(DataError):
        run(batches(4, 4), fails)


def test_options_require_a_cuda_device() -> None:
    with pytest.raises(UsageError, match="CUDA graphs require a CUDA device; got cpu"):
        RunOptions(device=torch.device("cpu"), cuda_graphs=True)


def test_a_run_with_graphs_has_the_same_bytes(
    narrow_llama: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = token_batches([(4, 40)] * 4 + [(2, 23)])
    made: list[GraphReplay] = []

    def graphs(*args: Any) -> GraphReplay:
        made.append(GraphReplay(*args))
        return made[-1]

    calibrate(narrow_llama, GPTQ, tmp_path / "plain", batches=data)
    monkeypatch.setattr(RunOptions, "__post_init__", lambda self: object.__setattr__(self, "cuda_graphs", True))
    monkeypatch.setattr(runtime.streaming.run, "GraphReplay", graphs)
    done = calibrate(narrow_llama, GPTQ, tmp_path / "graphs", batches=data)
    assert directory_bytes(tmp_path / "graphs") == directory_bytes(tmp_path / "plain")
    assert made[0].num_replays > 0
    told = [text for text in done.remarks if "CUDA graphs" in text]
    assert len(told) == 1 and told[0].startswith("warning: model.layers.0 "), "only on the CPU it reads rows from disk"
