"""Plan requests for log-likelihoods: which sequences run, in which batches, and what is read from their logits.

A request is a context and a continuation. The model reads all of their tokens but the last one,

    tokens        c_1 c_2 c_3 | t_1 t_2 t_3
    model reads   c_1 c_2 c_3   t_1 t_2
    logits of             t_1   t_2 t_3      the last 3 positions

and at most `max_length` of them, the last ones. Requests for which the model reads the same tokens share a sequence:
all choices of one token after the same context, for instance.

Sequences run with the longest first. A sequence of a batch is filled up to the longest one on its right, where no
position of a causal model sees it. A batch ends where more than an eighth of a sequence would be filled up.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from runtime.artifact.size_expressions import holds
from runtime.data.inputs import IDS, MASK
from runtime.errors import ArtifactError, DataError

if TYPE_CHECKING:
    from runtime.artifact.manifest import Manifest

_MOST_FILLED = 8  # a batch ends before a sequence of which more than 1/8 would be filled up
_NUM_SIZES = 512  # sizes that are tried until one fulfils the artifact's conditions


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """The tokens of a context, at least one, and of its continuation."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadSequence:
    """The tokens that the model reads, and the continuations whose log-likelihoods are read from its logits.

    Attributes:
        tokens: the input.
        continuations: each with the last positions of the logits, as many as it has tokens.
    """

    tokens: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestPlan:
    """The sequences of all requests.

    Attributes:
        sequences: each different input once, the longest first.
        places: for each request its sequence, and its continuation there.
        batches: the sequences of each batch; all sequences in order.
        num_truncated: requests whose context is longer than the model's inputs, so that its beginning was left out.
    """

    sequences: Sequence[ReadSequence]
    places: Sequence[tuple[int, int]]
    batches: Sequence[range]
    num_truncated: int

    def inputs(self, manifest: Manifest) -> Iterator[dict[str, torch.Tensor]]:
        """Make `input_ids` and `attention_mask`, int64 [B, S], of each batch.

        The mask is all ones: what fills a sequence up comes after its last token, which does not see it.
        """
        for batch in self.batches:
            tokens = [self.sequences[index].tokens for index in batch]
            num_rows, length = valid_sizes(manifest, len(tokens), len(tokens[0]))
            ids_BS = torch.zeros(num_rows, length, dtype=torch.int64)
            for row, sequence in enumerate(tokens):
                ids_BS[row, : len(sequence)] = torch.tensor(sequence)
            yield {IDS: ids_BS, MASK: torch.ones_like(ids_BS)}


def plan_requests(
    requests: Sequence[TokenRequest], *, max_length: int, batch_tokens: int | None, batch_size: int | None = None
) -> RequestPlan:
    """Plan the sequences and batches of requests.

    Args:
        requests: in the order of the results.
        max_length: the most tokens that the model reads at once.
        batch_tokens: the most tokens of a batch of several sequences; None for no limit.
        batch_size: the most sequences of a batch; None for no limit.

    Raises:
        DataError: when a continuation is empty, or longer than `max_length`.
    """
    found: dict[tuple[int, ...], dict[tuple[int, ...], int]] = {}
    read: list[tuple[tuple[int, ...], int]] = []
    num_truncated = 0
    for request in requests:
        tokens = request.context + request.continuation
        _require_scorable(request, max_length)
        num_truncated += len(tokens) > max_length + 1
        inputs = tokens[-(max_length + 1) :][:-1]
        continuations = found.setdefault(inputs, {})
        read.append((inputs, continuations.setdefault(request.continuation, len(continuations))))
    order = sorted(found, key=lambda tokens: (-len(tokens), tokens))
    position = {tokens: index for index, tokens in enumerate(order)}
    return RequestPlan(
        sequences=[ReadSequence(tokens=tokens, continuations=tuple(found[tokens])) for tokens in order],
        places=[(position[tokens], index) for tokens, index in read],
        batches=list(_batches([len(tokens) for tokens in order], batch_tokens, batch_size)),
        num_truncated=num_truncated,
    )


def _require_scorable(request: TokenRequest, max_length: int) -> None:
    if not request.context or not request.continuation:
        empty = "continuation" if request.context else "context"
        raise DataError(f"a request has an empty {empty}, so no token is predicted", hint="check the task's data")
    if len(request.continuation) > max_length:
        raise DataError(
            f"a continuation has {len(request.continuation)} tokens, but the model reads at most {max_length}",
            hint="use another task, or raise --max-length if the model supports it",
        )


def _batches(lengths: Sequence[int], batch_tokens: int | None, batch_size: int | None) -> Iterator[range]:
    """Divide sequences, the longest first, into batches."""
    first = 0
    for index, length in enumerate(lengths):
        longest = lengths[first]
        count = index - first + 1
        is_full = batch_size is not None and count > batch_size
        is_full |= batch_tokens is not None and count * longest > batch_tokens
        if index > first and (is_full or (longest - length) * _MOST_FILLED > longest):
            yield range(first, index)
            first = index
    if lengths:
        yield range(first, len(lengths))


def valid_sizes(manifest: Manifest, num_rows: int, length: int) -> tuple[int, int]:
    """The smallest number of rows and tokens, at least these, for which the artifact is valid; these if none is found.

    The caller checks the batch, which states what is wrong with its sizes.
    """
    shape = next(entry.shape for entry in manifest.inputs if entry.name == IDS)
    ranges = [_range(manifest, *pair) for pair in zip(shape, (num_rows, length), strict=True)]
    lengths = range(max(ranges[1].start, length), min(ranges[1].stop, length + _NUM_SIZES))
    for size in lengths or (length,):
        for rows in (max(ranges[0].start, num_rows), num_rows + 1):
            sizes = {symbol: size for symbol, size in zip(shape, (rows, size), strict=True) if isinstance(symbol, str)}
            if rows in ranges[0] and size in ranges[1] and _all_hold(manifest, sizes):
                return rows, size
    return num_rows, length


def most_rows(manifest: Manifest) -> int | None:
    """The most rows of a batch for which the artifact is valid; None if their number is not limited."""
    shape = next(entry.shape for entry in manifest.inputs if entry.name == IDS)
    stop = _range(manifest, shape[0], 1).stop
    return None if stop == _NO_LIMIT else stop - 1


def longest_input(manifest: Manifest) -> int | None:
    """The most tokens of a sequence for which the artifact is valid; None if their number is not limited."""
    shape = next(entry.shape for entry in manifest.inputs if entry.name == IDS)
    stop = _range(manifest, shape[1], 1).stop
    return None if stop == _NO_LIMIT else stop - 1


_NO_LIMIT = 2**62


def _range(manifest: Manifest, symbol: str | int, size: int) -> range:
    """The sizes of a dimension."""
    if isinstance(symbol, int):
        return range(symbol, symbol + 1)
    for dim in manifest.dims:
        if dim.name == symbol:
            return range(dim.min, _NO_LIMIT if dim.max < 0 else dim.max + 1)
    return range(1, _NO_LIMIT)


def _all_hold(manifest: Manifest, sizes: Mapping[str, int]) -> bool:
    """Whether all conditions on these sizes hold."""
    for condition in manifest.conditions:
        with contextlib.suppress(ArtifactError):  # a condition on other sizes than those of a text
            if not holds(condition, sizes):
                return False
    return True
