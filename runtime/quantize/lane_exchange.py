"""Add the sums of the lanes that all workers have run in a round.

Every worker gets the small sums of all inputs. Gram matrices and drifts, or a sample of tokens, go to their owner,
panel by panel: a worker has the matrices of each input that its lanes reach, and a buffer for one panel from each other
worker.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from typing import Any

import torch

from runtime.algorithms.drift import DriftAccumulator
from runtime.algorithms.hessian import HessianAccumulator, hessian_bytes, panel_width
from runtime.quantize.channel_sums import ChannelSums
from runtime.quantize.statistics import InputStatistics, Needs
from runtime.workers.agreement import agreed
from runtime.workers.division import Division
from runtime.workers.group import Workers

GRAM, DRIFT, SAMPLE = "gram", "drift", "sample"  # attributes of `InputStatistics` that are sent to its owner


class SharingBrokenError(Exception):
    """Raised when modules that were assumed to read the same inputs do not."""


@dataclass(kw_only=True, slots=True)
class LaneCalls:
    """The modules that were called in a lane, in the order of their first calls.

    Attributes:
        leaders: the module that measures the input of each module.
        tokens: that each module has received.
        is_broken: whether a module did not receive the tensor of its leader.
    """

    leaders: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    is_broken: bool = False

    def is_consistent(self) -> bool:
        """Whether all modules have received every input of their leaders."""
        return not self.is_broken and all(self.tokens[n] == self.tokens[leader] for n, leader in self.leaders.items())


@dataclass(frozen=True, slots=True)
class _LaneSum:
    """The sum of a lane for one input, as its worker states it.

    Attributes:
        width: the number of features.
        tokens: the number of measured inputs.
        batches: the number of batches with measured inputs, if channels are measured.
        kept: the number of sampled inputs.
        stride: of the sample.
        dtype: of the sample.
    """

    width: int
    tokens: int
    batches: int
    kept: int = 0
    stride: int = 1
    dtype: str = ""

    @classmethod
    def of(cls, entry: InputStatistics) -> _LaneSum:
        batches = 0 if entry.lane is None else entry.lane.num_batches
        found = cls(entry.num_in_features, entry.lane_tokens, batches)
        if entry.sample is None or not entry.lane_tokens:
            return found
        part_TI, stride = entry.sample.lane_TI, entry.sample.stride
        return replace(found, kept=len(part_TI), stride=stride, dtype=str(part_TI.dtype).removeprefix("torch."))

    @property
    def packed_bytes(self) -> int:
        return ChannelSums.packed_bytes(self.width, self.batches) if self.batches else 0


_Lane = Mapping[str, _LaneSum]  # by the module that measures the input
_Givers = Mapping[str, Mapping[int, _LaneSum]]  # the same of lanes with tokens, and by rank in order


@dataclass(frozen=True, kw_only=True, slots=True)
class _Message:
    """A panel of a Gram matrix or of a drift, or a sample of tokens, of each worker that has one.

    Attributes:
        name: the module that measures the input.
        kind: the attribute of `InputStatistics` that is sent.
        left: the panel.
        shapes: by rank, in order.
        dtype: of the tensors.
    """

    name: str
    kind: str
    left: int
    shapes: Mapping[int, tuple[int, int]]
    dtype: torch.dtype

    def num_bytes(self, rank: int) -> int:
        return math.prod(self.shapes[rank]) * self.dtype.itemsize

    def view(self, buffer: torch.Tensor, rank: int) -> torch.Tensor:
        return buffer[: self.num_bytes(rank)].view(self.dtype).view(self.shapes[rank])


@dataclass(frozen=True, kw_only=True, slots=True)
class _Arrivals:
    """What an exchange needs, allocated before workers wait for each other.

    Attributes:
        packed: the small sums of the own lane.
        received: for those of another worker.
        given: for pieces to send to one owner each.
        taken: for pieces to receive from one worker each.
    """

    packed: torch.Tensor
    received: torch.Tensor
    given: list[torch.Tensor]
    taken: list[torch.Tensor]


class LaneExchange:
    """The statistics of all inputs; every worker has an entry for each.

    Args:
        workers: that share the run.
        division: assigns the owners.
        device: the device of the sums.
        names: of the modules that are measured, the same on all workers.
    """

    def __init__(self, workers: Workers, division: Division, device: torch.device, names: Sequence[str]) -> None:
        self.workers = workers
        self.division = division
        self.device = device
        self.names = names
        self._numbers = {name: number for number, name in enumerate(names)}
        self._entries: dict[str, InputStatistics] = {}  # by the module that measures the input
        self._owners: dict[str, int] = {}
        self._leaders: dict[str, str] = {}  # in the lanes of all workers
        self._num_lanes: dict[str, int] = {}  # in which a module was called
        self._num_ended = 0

    def entry(self, name: str, width: int, needs: Needs) -> InputStatistics:
        """Return the statistics of a module's inputs."""
        if name not in self._entries:
            self._entries[name] = InputStatistics(width, needs, self.device)
        return self._entries[name]

    def end_round(self, lane: LaneCalls, needs: Mapping[str, Needs]) -> None:
        """Add the lanes of all workers, in their order.

        Raises:
            SharingBrokenError: on all workers, if the lanes differ in which modules read the same inputs.
        """
        measured = dict.fromkeys(lane.leaders.values())
        found = self.workers.exchange(
            {
                "is_consistent": lane.is_consistent(),
                "calls": [[self._numbers[name], self._numbers[leader]] for name, leader in lane.leaders.items()],
                "sums": [[self._numbers[name], *astuple(_LaneSum.of(self._entries[name]))] for name in measured],
            }
        )
        self._require_consistency(found)
        lanes = [{self.names[number]: _LaneSum(*sums) for number, *sums in one["sums"]} for one in found]
        self._assign_owners(lanes, needs)
        givers = _givers(lanes)
        with agreed(self.workers):
            buffers = self._reserved(lanes, givers)
        self._fold_small_sums(lanes, buffers)
        self._fold_on_owners(givers, buffers)
        self._num_ended += self.workers.size

    def finish(self) -> dict[str, InputStatistics]:
        """Return the statistics by module, in the order of first calls, after all workers have run their lanes."""
        diagonals = []
        with agreed(self.workers):
            for entry in self._entries.values():
                if entry.is_here:
                    entry.reserve()
            for owner in range(self.workers.size):
                own = [entry for entry in self._entries.values() if entry.owner == owner and entry.num_diagonals]
                size = sum(entry.num_in_features * entry.num_diagonals for entry in own)
                diagonal = torch.empty(size, device=self.device)
                if owner == self.workers.rank and own:
                    torch.cat([part for entry in own for part in entry.diagonals()], out=diagonal)
                diagonals.append(diagonal)
        for owner, diagonal in enumerate(diagonals):
            if len(diagonal) and self.workers.size > 1:
                self.workers.broadcast(diagonal, owner)
        places = [0] * self.workers.size
        for entry in self._entries.values():
            begin = places[entry.owner]
            places[entry.owner] += entry.num_in_features * entry.num_diagonals
            of_all = diagonals[entry.owner][begin : places[entry.owner]].clone()
            entry.finish(torch.split(of_all, entry.num_in_features))
        return {name: self._entries[leader] for name, leader in self._leaders.items()}

    def _require_consistency(self, found: Sequence[Mapping[str, Any]]) -> None:
        is_consistent = all(one["is_consistent"] for one in found)
        for number, of_leader in itertools.chain.from_iterable(one["calls"] for one in found):
            name, leader = self.names[number], self.names[of_leader]
            is_consistent &= self._leaders.setdefault(name, leader) == leader
            self._num_lanes[name] = self._num_lanes.get(name, 0) + 1
        counts = self._num_lanes
        if not is_consistent or any(counts[name] != counts[leader] for name, leader in self._leaders.items()):
            raise SharingBrokenError

    def _assign_owners(self, lanes: Sequence[_Lane], needs: Mapping[str, Needs]) -> None:
        """Give the inputs that no earlier lane has reached to owners; every worker gets an entry for them."""
        new = {name: one.width for lane in lanes for name, one in lane.items() if name not in self._owners}
        owners = self.division.owners((name, hessian_bytes(width)) for name, width in new.items())
        for name, width in new.items():
            entry = self.entry(name, width, needs[name])
            self._owners[name] = entry.owner = owners[name]
            entry.is_here = entry.owner == self.workers.rank

    def _fold_small_sums(self, lanes: Sequence[_Lane], buffers: _Arrivals) -> None:
        for rank, lane in enumerate(lanes):
            is_own = rank == self.workers.rank
            num_bytes = _packed_bytes(lane)
            message = buffers.packed if is_own else buffers.received[:num_bytes]
            if num_bytes and self.workers.size > 1:
                self.workers.broadcast(message, rank)
            place = 0
            for name, one in lane.items():
                entry, end = self._entries[name], place + one.packed_bytes
                if is_own:
                    entry.fold(one.tokens, entry.take_lane())
                else:
                    sums = ChannelSums.unpacked(message[place:end], one.width, one.batches) if one.batches else None
                    entry.fold(one.tokens, sums)
                place = end

    def _pieces(self, owner: int, givers: _Givers) -> Iterator[_Message]:
        """List what an owner receives from other workers, in order."""
        for name, given in givers.items():
            entry = self._entries[name]
            if entry.owner != owner or list(given) == [owner]:
                continue
            width = entry.num_in_features
            height = panel_width(self.device.type)
            for left in range(0, width, height):
                shapes = {GRAM: (min(height, width - left), width - left), DRIFT: (min(height, width - left), width)}
                for kind in ((GRAM,) if entry.has_gram else ()) + ((DRIFT,) if entry.needs.drift else ()):
                    of_all = dict.fromkeys(given, shapes[kind])
                    yield _Message(name=name, kind=kind, left=left, shapes=of_all, dtype=torch.float32)
            if entry.has_sample:
                kept = {rank: (one.kept, width) for rank, one in given.items()}
                dtype = getattr(torch, next(iter(given.values())).dtype)
                yield _Message(name=name, kind=SAMPLE, left=0, shapes=kept, dtype=dtype)

    def _reserved(self, lanes: Sequence[_Lane], givers: _Givers) -> _Arrivals:
        """Allocate what the exchange needs: an error while workers wait for each other would reach them late."""
        rank = self.workers.rank
        most_given = most_taken = most_bytes = 0
        for owner in range(self.workers.size):
            is_given = False
            for piece in self._pieces(owner, givers):
                others = [one for one in piece.shapes if one != owner]
                if owner == rank:
                    self._entries[piece.name].reserve()
                    most_taken = max(most_taken, len(others))
                elif rank not in others:
                    continue
                is_given |= owner != rank
                most_bytes = max(most_bytes, *(piece.num_bytes(one) for one in others), 0)
            most_given += is_given
        own = [self._entries[name].lane for name in lanes[rank]] if self.workers.size > 1 else []
        packed = [sums.packed() for sums in own if sums is not None]
        others_bytes = [_packed_bytes(lane) for other, lane in enumerate(lanes) if other != rank]
        return _Arrivals(
            packed=torch.cat(packed) if packed else self._empty(0),
            received=self._empty(max(others_bytes, default=0)),
            given=[self._empty(most_bytes) for _ in range(most_given)],
            taken=[self._empty(most_bytes) for _ in range(most_taken)],
        )

    def _empty(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def _fold_on_owners(self, givers: _Givers, buffers: _Arrivals) -> None:
        """Send Gram matrices and samples to their owners, at a time a piece for each owner, and add them up there."""
        rank = self.workers.rank
        for entry in (self._entries[name] for name in givers):
            for matrix in entry.matrices if entry.is_here else ():
                matrix.fold_ended_()
        for step in itertools.zip_longest(*(self._pieces(owner, givers) for owner in range(self.workers.size))):
            given, taken = iter(buffers.given), iter(buffers.taken)
            sends: list[tuple[torch.Tensor, int]] = []
            receives: list[tuple[torch.Tensor, int]] = []
            for owner, piece in enumerate(step):
                if piece is not None and owner == rank:
                    receives = [(piece.view(next(taken), one), one) for one in piece.shapes if one != rank]
                elif piece is not None and rank in piece.shapes:
                    sends.append((piece.view(next(given), rank).copy_(self._own(piece)), owner))
            self.workers.swap(sends, receives)
            if step[rank] is not None:
                self._fold_piece(step[rank], {one: tensor for tensor, one in receives}, givers)
        for name, given_by in givers.items():
            if rank in given_by or self._entries[name].is_here:
                self._end_lane(self._entries[name], is_alone=list(given_by) == [rank])

    def _own(self, piece: _Message) -> torch.Tensor:
        entry = self._entries[piece.name]
        if piece.kind != SAMPLE:
            return _matrix(entry, piece.kind).lane_panel(piece.left)
        assert entry.sample is not None, "it has tokens"
        return entry.sample.lane_TI

    def _fold_piece(self, piece: _Message, received: Mapping[int, torch.Tensor], givers: _Givers) -> None:
        """Add what was received, and the own part, in the order of lanes."""
        entry = self._entries[piece.name]
        matrix = _matrix(entry, piece.kind) if piece.kind != SAMPLE else None
        is_first = matrix is not None and not matrix.has_total
        for rank in piece.shapes:
            if matrix is not None:
                panel_PR = received[rank] if rank in received else self._own(piece)
                matrix.fold_(piece.left, panel_PR, is_first=is_first)
                is_first = False
            elif entry.sample is not None and rank in received:
                one = givers[piece.name][rank]
                entry.sample.join(self._num_ended + rank, received[rank], one.stride, one.tokens)

    def _end_lane(self, entry: InputStatistics, *, is_alone: bool) -> None:
        """Start the next lane of an input, here and on its owner."""
        for matrix in entry.matrices:
            if entry.is_here and is_alone:
                matrix.end_lane()
            else:
                matrix.has_total |= entry.is_here
                matrix.drop_lane()
        if entry.sample is not None and entry.is_here:
            entry.sample.end_lane(self._num_ended + self.workers.rank)
        else:
            entry.sample = None


def _matrix(entry: InputStatistics, kind: str) -> HessianAccumulator | DriftAccumulator:
    found = entry.gram if kind == GRAM else entry.drift
    assert found is not None, "it has tokens, or has been reserved"
    return found


def _packed_bytes(lane: _Lane) -> int:
    return sum(one.packed_bytes for one in lane.values())


def _givers(lanes: Sequence[_Lane]) -> _Givers:
    found: dict[str, dict[int, _LaneSum]] = {}
    for rank, lane in enumerate(lanes):
        for name, one in lane.items():
            if one.tokens:
                found.setdefault(name, {})[rank] = one
    return found
