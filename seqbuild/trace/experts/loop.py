"""Whether a forward is a loop over experts that does the same for each, watched on tensors without values.

Where transformers marks a class it promises that. Elsewhere it is looked at: the forward is run for a few choices of
experts (each for some tokens; few for many tokens), and every operation of torch is seen. Whatever is not listed here
is refused, for what is recorded of one expert must be all that is done for any:

    indices     become a mask, and that the numbers of the experts that are used, in order; of each the tokens that are
                sent to it, and the places that it has among their experts. Nothing else is asked of them.
    states      are chosen by an expert's tokens, and weights by its tokens and places, once each: those lists go
                nowhere else
    parameters  are chosen by an expert's number, or used whole
    the sum     starts as zeros, and what one expert returns is added to it, once, where its tokens are
    sizes       that depend on tokens are not looked at, but to put axes together and apart
    in place    nothing is changed but the sum, and the module keeps nothing

For each expert there must be the same operations, whichever others are used, and for any number of tokens. Experts
without weights come after the others, and are alike among themselves. What is accepted here is then executed
(`seqbuild.trace.experts.proof`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from seqbuild.trace.experts.watch import HIDDEN, WEIGHTS, Block, OtherwiseError, Watching
from seqbuild.trace.real.weightless import kept_as_found


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertLoop:
    """What is known of a loop over experts.

    Attributes:
        num_experts: how many have weights; 0 where the parameters tell.
        num_identity: how many there are besides, numbered after those.
        num_dims: of the hidden states.
    """

    num_experts: int = 0
    num_identity: int = 0
    num_dims: int = 2


class _CountedError(Exception):
    """Carries the number of classes of experts away."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count


class _FailedError(Exception):
    """The forward itself raises an error."""


def watched_loop(module: nn.Module, width: int) -> ExpertLoop:
    """Run a module's forward, and see what it does for each expert.

    Args:
        module: its forward takes hidden states, indices and weights.
        width: of the hidden states.

    Raises:
        ValueError: when experts differ, or more is done than to add up what they return.
    """
    for num_dims in (2, 3):
        count = _num_classes(module, width, num_dims)
        for num_all in (count, count - 1):  # the last class may be for no expert at all
            if num_all < 1:
                continue
            watched = _WatchedExperts(module, width, num_dims)
            try:
                blocks = watched.blocks(_all_of(num_all))
            except (OtherwiseError, _FailedError):
                continue
            _require_same(blocks, watched, num_all, has_none=num_all < count)
            return _understood([blocks[number] for number in range(num_all)], num_dims)
    raise OtherwiseError


def _all_of(num_all: int) -> list[list[int]]:
    """Experts of tokens, [K, T]: all, for one token each but the first. Some forwards need more than one for each
    token, and the numbers of tokens are even, to be two axes.
    """
    index = [0] * (3 - num_all % 2) + list(range(1, num_all))
    return [index, [0] * len(index)]


def _others_of(num_all: int) -> Iterator[list[list[int]]]:
    """The same, for three experts; two, one of them never in the first place; and one, for many tokens."""
    few = (0, num_all // 2, num_all - 1)
    yield [[few[(token + place) % 3] for token in range(14)] for place in range(3)]
    yield [[0] * 6, [num_all - 1] * 6]
    yield [[num_all // 2] * 150] * 2


def _require_same(blocks: Mapping[int, Block], watched: _WatchedExperts, num_all: int, *, has_none: bool) -> None:
    """Refuse a forward that does anything else for an expert when others are used, or none."""
    for index_KT in _others_of(num_all):
        try:
            found = watched.blocks(index_KT)
        except _FailedError:
            raise OtherwiseError from None
        if any(block.notes != blocks[number].notes for number, block in found.items()):
            raise OtherwiseError("what the forward does for an expert depends on the choice of others, or on sizes")
    if has_none:
        try:
            watched.blocks([[0, num_all, num_all - 1, num_all], [num_all, num_all, 0, num_all - 1]], none=num_all)
        except _FailedError:
            return  # there is no such number, then


def _understood(blocks: Sequence[Block], num_dims: int) -> ExpertLoop:
    num_experts = sum(block.has_own for block in blocks)
    groups = [group for group in (blocks[:num_experts], blocks[num_experts:]) if group]
    if not num_experts or any(block.notes != group[0].notes for group in groups for block in group):
        raise OtherwiseError("what the forward does differs from expert to expert")
    return ExpertLoop(
        num_experts=num_experts,
        num_identity=len(blocks) - num_experts,
        num_dims=num_dims,
    )


def _num_classes(module: nn.Module, width: int, num_dims: int) -> int:
    """How many numbers the forward tells apart."""
    call = _ExpertCall(module, width, num_dims, [[0, 0], [0, 0]])
    try:
        call.run(_Counting())
    except _CountedError as counted:
        return counted.count
    except Exception:  # whatever it does with other sizes, or without values: no list of errors is complete
        return 0
    return 0


class _Counting(TorchFunctionMode):
    """Stop where indices become masks, one for each class."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.one_hot:
            count = args[1] if len(args) > 1 else kwargs.get("num_classes", 0)
            raise _CountedError(int(count))
        return func(*args, **kwargs)


class _WatchedExperts:
    """A module whose forward is watched."""

    def __init__(self, module: nn.Module, width: int, num_dims: int) -> None:
        self.module = module
        self.width = width
        self.num_dims = num_dims

    def blocks(self, index_KT: Sequence[Sequence[int]], none: int = -1) -> dict[int, Block]:
        """What is done for each expert that is used.

        Args:
            index_KT: for each place the experts of all tokens.
            none: the number that is for no expert at all.

        Raises:
            OtherwiseError: when something else is done, or another result comes of it.
            _FailedError: when the forward fails by itself.
        """
        call = _ExpertCall(self.module, self.width, self.num_dims, index_KT)
        watching = Watching(call.states, call.index, call.weights, call.values)
        before = [(inner, dict(vars(inner))) for inner in self.module.modules()]
        with kept_as_found(self.module):
            try:
                result = call.run(watching)
            except Exception as error:
                raise OtherwiseError if watching.is_refused else _FailedError from error
            if any(_is_changed(inner, own) for inner, own in before):
                raise OtherwiseError
        found = watching.found(result)
        used = sorted({own for own_T in index_KT for own in own_T} - {none})
        is_whole = [block.expert for block in watching.blocks] == used
        if not is_whole or result.shape != call.states.shape or result.dtype != call.states.dtype:
            raise OtherwiseError
        return found


def _is_changed(inner: nn.Module, before: Mapping[str, Any]) -> bool:
    own = vars(inner)
    return own.keys() != before.keys() or any(own[name] is not value for name, value in before.items())


class _ExpertCall:
    """A call of a module's own forward on tensors without values, but for indices.

    Args:
        module: the module.
        width: of the hidden states.
        num_dims: likewise.
        index_KT: for each place the experts of all tokens.
    """

    def __init__(self, module: nn.Module, width: int, num_dims: int, index_KT: Sequence[Sequence[int]]) -> None:
        num_tokens = len(index_KT[0])
        shape = (num_tokens,) if num_dims == 2 else (num_tokens // 2, 2)
        self.module = module
        self.index = torch.tensor(index_KT).T
        with torch.inference_mode(False):  # tensors must tell whether they are changed
            self.states = torch.empty(*shape, width, dtype=HIDDEN, device="meta")
            self.weights = torch.empty(num_tokens, len(index_KT), dtype=WEIGHTS, device="meta")
            self.values = {
                name: torch.empty(p.shape, dtype=HIDDEN, device="meta") for name, p in module.named_parameters()
            }

    def run(self, mode: TorchFunctionMode) -> torch.Tensor:
        """The forward's result, while the mode sees what it does."""
        forward = inspect.unwrap(type(self.module).forward)
        with torch.inference_mode(False), torch.no_grad(), replaced_parameters(self.module, self.values), mode:
            result: torch.Tensor = forward(self.module, self.states, self.index, self.weights)
        return result


class replaced_parameters:  # noqa: N801
    """For a while, the parameters of a module are these tensors."""

    def __init__(self, module: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
        self.module = module
        self.values = values
        self.before: list[tuple[dict[str, Any], str, Any]] = []

    def __enter__(self) -> None:
        for name, value in self.values.items():
            owner, _, own = name.rpartition(".")
            table: Any = self.module.get_submodule(owner).__dict__["_parameters"]
            self.before.append((table, own, table[own]))
            table[own] = value

    def __exit__(self, *_: object) -> None:
        for table, own, value in self.before:
            table[own] = value
