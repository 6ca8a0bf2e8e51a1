"""Check that a forward is a loop over experts with the same operations for each expert.

transformers guarantees this for the classes that it marks. Other classes are run on meta tensors for several choices of
experts (all experts with a few tokens, few experts with many tokens), and every torch operation is observed. The
program recorded for one expert must be complete for all, so anything not listed here is rejected:

    indices     are converted to a mask, the mask to the numbers of the used experts in order, and for each of them to
                its tokens and its places among their experts; they have no other use
    states      are selected by an expert's tokens, and weights by its tokens and places, once each; these lists have no
                other use
    parameters  are selected by an expert's number, or used whole
    the sum     starts as zeros, and each expert's result is added to it once, at its tokens
    sizes       that depend on tokens are only used to merge and split axes
    in place    only the sum is modified, and the module's attributes are unchanged

The operations for an expert must not depend on the other used experts or the number of tokens. Experts without weights
come last, and all of them have the same operations. An accepted loop is then compared by execution
(`seqbuild.trace.experts.proof`).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from seqbuild.trace.experts.watch import HIDDEN, WEIGHTS, Block, ForwardWatcher, UnexpectedForwardError
from seqbuild.trace.real.weightless import attributes_restored


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertLoop:
    """Properties of a loop over experts.

    Attributes:
        num_experts: the number of experts with weights; 0 if the parameters' shapes determine it.
        num_identity: the number of experts without weights, which follow those with weights.
        num_dims: the rank of the hidden states.
    """

    num_experts: int = 0
    num_identity: int = 0
    num_dims: int = 2


class _CountedError(Exception):
    """Carries the number of classes out of the forward."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count


class _FailedError(Exception):
    """The forward itself raises an error."""


def analyze_loop(module: nn.Module, width: int) -> ExpertLoop:
    """Run a module's forward and return the properties of its loop over experts.

    Args:
        module: a module whose forward takes hidden states, indices and weights.
        width: the width of the hidden states.

    Raises:
        ValueError: if experts differ, or the forward does more than add up their results.
    """
    for num_dims in (2, 3):
        count = _num_classes(module, width, num_dims)
        for num_all in (count, count - 1):  # the last class may mean "no expert"
            if num_all < 1:
                continue
            observe = functools.partial(_observed, module, width, num_dims)
            try:
                blocks = observe(_all_of(num_all))
            except (UnexpectedForwardError, _FailedError):
                continue
            _require_same(blocks, observe, num_all, has_none=num_all < count)
            return _expert_loop([blocks[number] for number in range(num_all)], num_dims)
    raise UnexpectedForwardError


def _all_of(num_all: int) -> list[list[int]]:
    """Return experts of tokens, [K, T], that use all experts, each but the first for one token.

    Some forwards need several experts per token, and the number of tokens is even so that it can be split in two axes.
    """
    index = [0] * (3 - num_all % 2) + list(range(1, num_all))
    return [index, [0] * len(index)]


def _others_of(num_all: int) -> Iterator[list[list[int]]]:
    """Yield experts of tokens that use three experts; two, one of them never first; one, for many tokens."""
    few = (0, num_all // 2, num_all - 1)
    yield [[few[(token + place) % 3] for token in range(14)] for place in range(3)]
    yield [[0] * 6, [num_all - 1] * 6]
    yield [[num_all // 2] * 150] * 2


def _require_same(
    blocks: Mapping[int, Block], observe: Callable[..., dict[int, Block]], num_all: int, *, has_none: bool
) -> None:
    """Reject a forward whose operations for an expert depend on the other used experts."""
    for index_KT in _others_of(num_all):
        try:
            found = observe(index_KT)
        except _FailedError:
            raise UnexpectedForwardError from None
        if any(block.notes != blocks[number].notes for number, block in found.items()):
            raise UnexpectedForwardError("the operations for an expert depend on the other used experts or on sizes")
    if has_none:
        try:
            observe([[0, num_all, num_all - 1, num_all], [num_all, num_all, 0, num_all - 1]], none=num_all)
        except _FailedError:
            return  # the forward rejects this number, so it does not mean "no expert"


def _expert_loop(blocks: Sequence[Block], num_dims: int) -> ExpertLoop:
    num_experts = sum(block.has_own for block in blocks)
    groups = [group for group in (blocks[:num_experts], blocks[num_experts:]) if group]
    if not num_experts or any(block.notes != group[0].notes for group in groups for block in group):
        raise UnexpectedForwardError("the operations differ between experts")
    return ExpertLoop(num_experts=num_experts, num_identity=len(blocks) - num_experts, num_dims=num_dims)


def _num_classes(module: nn.Module, width: int, num_dims: int) -> int:
    """Return the number of classes in the forward's mask of experts."""
    call = _ExpertCall(module, width, num_dims, [[0, 0], [0, 0]])
    try:
        call.run(_Counting())
    except _CountedError as counted:
        return counted.count
    except Exception:  # the forward may fail in any way on meta tensors or with this rank
        return 0
    return 0


class _Counting(TorchFunctionMode):
    """Stop where indices are converted to masks, one per class."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.one_hot:
            count = args[1] if len(args) > 1 else kwargs.get("num_classes", 0)
            raise _CountedError(int(count))
        return func(*args, **kwargs)


def _observed(
    module: nn.Module, width: int, num_dims: int, index_KT: Sequence[Sequence[int]], none: int = -1
) -> dict[int, Block]:
    """Run the forward and return the operations for each used expert; the number `none` means "no expert".

    Raises:
        UnexpectedForwardError: if the forward has other operations or another result.
        _FailedError: if the forward itself raises an error.
    """
    call = _ExpertCall(module, width, num_dims, index_KT)
    watching = ForwardWatcher(call.states, call.index, call.weights, call.values)
    before = [(inner, dict(vars(inner))) for inner in module.modules()]
    with attributes_restored(module):
        try:
            result = call.run(watching)
        except Exception as error:
            raise UnexpectedForwardError if watching.is_refused else _FailedError from error
        if any(_is_changed(inner, own) for inner, own in before):
            raise UnexpectedForwardError
    found = watching.found(result)
    used = sorted({own for own_T in index_KT for own in own_T} - {none})
    is_whole = [block.expert for block in watching.blocks] == used
    if not is_whole or result.shape != call.states.shape or result.dtype != call.states.dtype:
        raise UnexpectedForwardError
    return found


def _is_changed(inner: nn.Module, before: Mapping[str, Any]) -> bool:
    own = vars(inner)
    return own.keys() != before.keys() or any(own[name] is not value for name, value in before.items())


class _ExpertCall:
    """A call of a module's forward on meta tensors and real indices: for each place the experts of all tokens."""

    def __init__(self, module: nn.Module, width: int, num_dims: int, index_KT: Sequence[Sequence[int]]) -> None:
        num_tokens = len(index_KT[0])
        shape = (num_tokens,) if num_dims == 2 else (num_tokens // 2, 2)
        self.module = module
        self.index = torch.tensor(index_KT).T
        with torch.inference_mode(False):  # inference tensors have no version counter
            self.states = torch.empty(*shape, width, dtype=HIDDEN, device="meta")
            self.weights = torch.empty(num_tokens, len(index_KT), dtype=WEIGHTS, device="meta")
            self.values = {
                name: torch.empty(p.shape, dtype=HIDDEN, device="meta") for name, p in module.named_parameters()
            }

    def run(self, mode: TorchFunctionMode) -> torch.Tensor:
        """Run the forward in `mode` and return its result."""
        forward = inspect.unwrap(type(self.module).forward)
        with torch.inference_mode(False), torch.no_grad(), replaced_parameters(self.module, self.values), mode:
            result: torch.Tensor = forward(self.module, self.states, self.index, self.weights)
        return result


@contextlib.contextmanager
def replaced_parameters(module: nn.Module, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Replace the parameters of a module by these tensors while the block runs."""
    with contextlib.ExitStack() as stack:
        for name, value in values.items():
            owner, _, own = name.rpartition(".")
            table: Any = module.get_submodule(owner).__dict__["_parameters"]
            stack.callback(table.__setitem__, own, table[own])
            table[own] = value
        yield
