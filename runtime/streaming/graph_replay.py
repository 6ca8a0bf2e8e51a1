"""Replay a subgraph's forward as a CUDA graph, where launching its kernels takes longer than running them.

A graph is captured for batches of one shape, and reads its inputs from fixed memory:

    batch 1    runs as usual, so that everything that is prepared on a first call exists
    batch 2    runs as usual; then a graph is captured and replayed, and its outputs are compared, bit for bit
    others     are copied into the graph's inputs, and its outputs are copied out after the replay

Replaying launches the same kernels, so results are equal. If they are not for the second batch, or if the code waits
for the device (data-dependent steps, conditions on tensors), no graph is used for this subgraph. A batch of another
shape, or with other numbers among its inputs, runs as usual until its own graph exists.

Only passes that compute the inputs of later subgraphs are replayed. Measuring passes call hooks of Python for every
batch, which count tokens, compare tensors by identity and may end a batch early.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from runtime.errors import ArtifactError
from runtime.language.attention import causal_masks, may_be_mask

Forward = Callable[[dict[str, Any]], dict[str, Any]]
_GRAPHS_AT_A_TIME = 4  # of a subgraph, for batches of so many shapes: each keeps its intermediate values


@dataclass(frozen=True, kw_only=True, slots=True)
class _Captured:
    """A graph, and the memory that it reads and writes."""

    graph: Any
    inputs: list[torch.Tensor]
    outputs: dict[str, Any]

    def replay(self, values: dict[str, Any]) -> dict[str, Any]:
        """Run the graph on other inputs, and copy its outputs out."""
        for place, value in zip(self.inputs, _tensors(values), strict=True):
            place.copy_(value)
        self.graph.replay()
        return _copied(self.outputs)


class GraphReplay:
    """Captures and replays the forwards of a run, one subgraph after the other.

    Args:
        device: a CUDA device.
        remark: receives a message for the user, once, if a subgraph cannot be replayed.

    Attributes:
        num_replays: the number of batches that were replayed.
    """

    def __init__(self, device: torch.device, remark: Callable[[str], None]) -> None:
        self.device = device
        self.remark = remark
        self.num_replays = 0
        self._has_remarked = False
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def of(self, label: str, forward: Forward) -> Iterator[Forward]:
        """Return a function that replaces the forward of one subgraph while its weights and hooks stay the same."""
        captured: dict[Hashable, _Captured | None] = {}  # None after the first batch of a shape
        is_possible = True

        def run(values: dict[str, Any]) -> dict[str, Any]:
            nonlocal is_possible
            shape = _shape_of(values) if is_possible else None
            found = captured.get(shape)
            if found is not None:
                self.num_replays += 1
                return found.replay(values)
            graphs = [one.graph for one in captured.values() if one is not None]
            if shape is None or shape not in captured or len(graphs) == _GRAPHS_AT_A_TIME:
                captured.setdefault(shape, None)
                return forward(values)
            before = _copied(values)  # the code may change its inputs in place
            outputs = forward(values)
            try:
                captured[shape] = self._captured(forward, before, outputs, graphs[0].pool() if graphs else None)
            except _NoReplayError as error:
                is_possible = False
                captured.clear()
                self._tell(label, str(error))
            return outputs

        yield run

    def _captured(self, forward: Forward, values: dict[str, Any], expected: dict[str, Any], pool: Any) -> _Captured:
        """Capture a graph, and compare its results with expected ones.

        Graphs of a subgraph share the memory of intermediate values, `pool`: results are copied out after each replay.

        Raises:
            _NoReplayError: stating why it cannot be used.
        """
        inputs = _copied_inputs(values)
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self.device)
        try:
            self._warm_up(forward, _copied_inputs(values), current)
            # Other threads read weights and allocate pinned memory meanwhile, which only this mode allows.
            mode = "thread_local"
            with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode=mode):
                outputs = forward(dict(inputs))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ArtifactError) as error:
            reason = " ".join(str(error.__context__ or error).split())[:200]
            raise _NoReplayError(f"the code cannot be captured: {reason}") from error
        finally:
            torch.cuda.set_stream(current)  # which a capture that fails does not restore
        found = _Captured(graph=graph, inputs=_tensors(inputs), outputs=outputs)
        if not _are_equal(found.replay(values), expected):
            raise _NoReplayError("a replayed graph has other results")
        return found

    def _warm_up(self, forward: Forward, values: dict[str, Any], current: Any) -> None:
        """Run once on the stream of the capture: what is allocated on the first use of a stream exists then.

        Code that waits for the device is an error here, because after a capture that fails, older versions of torch do
        not free all memory again.
        """
        mode = torch.cuda.get_sync_debug_mode()
        self._stream.wait_stream(current)
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.cuda.stream(self._stream):
                forward(values)
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            current.wait_stream(self._stream)

    def _tell(self, label: str, reason: str) -> None:
        if not self._has_remarked:
            self._has_remarked = True
            self.remark(f"warning: {label} runs without CUDA graphs, and perhaps other subgraphs: {reason}")


class _NoReplayError(Exception):
    """A subgraph cannot be replayed; the message states why."""


def _copied(values: dict[str, Any]) -> dict[str, Any]:
    copied: dict[str, Any] = pytree.tree_map_only(torch.Tensor, _copy, values)
    return copied


def _copied_inputs(values: dict[str, Any]) -> dict[str, Any]:
    """Copy values, and state of each copied mask whether it is causal: captured code cannot look at its numbers."""
    copied = _copied(values)
    for value, copy in zip(_tensors(values), _tensors(copied), strict=True):
        if may_be_mask(value):
            causal_masks().add(copy, causal_masks().has(value))
    return copied


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor with its strides; dimensions that are expanded stay so."""
    base = tensor
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if size > 1 and stride == 0:
            base = base.narrow(dim, 0, 1)
    return base.clone().expand(tensor.shape)


def _shape_of(values: dict[str, Any]) -> Hashable:
    """A key that is equal for batches that can be replayed by one graph; None if a value cannot be compared.

    It includes all values that are not tensors. Of the numbers in tensors, it only includes whether a mask is exactly
    causal, because attention leaves such a mask out.
    """
    leaves, spec = pytree.tree_flatten(values)
    found: list[Hashable] = [str(spec)]
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            is_causal = may_be_mask(leaf) and causal_masks().has(leaf)
            found.append((leaf.shape, leaf.stride(), leaf.dtype, leaf.device, is_causal))
        elif leaf is None or isinstance(leaf, (bool, int, float, str)):
            found.append((type(leaf), leaf))
        else:
            return None
    return tuple(found)


def _are_equal(first: Any, second: Any) -> bool:
    """Whether two results have the same structure, and the same bits."""
    leaves, spec = pytree.tree_flatten(first)
    others, other_spec = pytree.tree_flatten(second)
    return spec == other_spec and all(map(_is_same, leaves, others))


def _is_same(first: Any, second: Any) -> bool:
    if not isinstance(first, torch.Tensor):
        return type(first) is type(second) and bool(first == second)
    if not isinstance(second, torch.Tensor) or (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))
