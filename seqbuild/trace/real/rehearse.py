"""Rehearse a step that fails on fake tensors: run it for real on small values, to learn the shape of its result.

A function that loops over what `nonzero` found, or asks `.item()` and decides, needs values. It is run by itself on
what the samples give (see `replay.py`), samples of several sizes and values: a size that is always the same is a
constant, one that follows an input's size becomes that symbol again, and any other comes from the values, so it becomes
a symbol of its own. A number in the result may have come from the values, too: the trace can calculate with it, but not
decide by it. A tuple or list that is not always as long is a sequence of unknown length.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from runtime.errors import TraceError
from runtime.host.left_as_found import values_apart
from seqbuild.trace.python.sequences import UnknownLength
from seqbuild.trace.real.replay import Replay, copied, for_real
from seqbuild.trace.real.used_parameters import ParametersSeen, really_there

if TYPE_CHECKING:
    pass

# A step with more weights than this is not run for real: compiling is to stay a laptop's work.
LIMIT_BYTES = 4 * 2**30

Memory = dict[Any, tuple[tuple[Any, ...], tuple[str, ...]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rehearsal:
    """What a rehearsal taught: the result in fake tensors, the real one of each sample, the parameters it used."""

    fake: Any
    real: tuple[Any, ...]
    used: tuple[str, ...]


def rehearse(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    modules: Sequence[nn.Module],
    replay: Replay,
    fake_mode: FakeTensorMode,
    memory: Memory,
    names: Mapping[int, Sequence[str]],
) -> Rehearsal:
    """The result of `function(*args, **kwargs)` in fake tensors, learned from real runs.

    Args:
        function: called outside of every mode; the model's fake parameters are exchanged for real ones meanwhile.
        args: with fake tensors and symbols.
        kwargs: likewise.
        modules: those whose parameters the function uses; a real one is made when its module is called.
        replay: gives real values for the arguments.
        fake_mode: owns the fake tensors of the result.
        memory: results of earlier rehearsals; a model's layers differ in nothing that is looked at here.
        names: from the ids of the model's fake parameters to their dotted names.

    Raises:
        TraceError: when the structure of the result follows from values, or the step is too large to be run.
    """
    key = (getattr(function, "__qualname__", ""), _signature(modules), _signature(args), _signature(kwargs))
    if key not in memory:
        used: dict[str, None] = {}
        memory[key] = (
            tuple(
                _run(function, args, kwargs, modules, replay, variant, names, used)
                for variant in range(len(replay.samples))
            ),
            tuple(used),
        )
    with for_real():
        results, used_names = tuple(copied(result) for result in memory[key][0]), memory[key][1]
    learner = _Learner(fake_mode=fake_mode, known=_known_sizes(replay, args, kwargs))
    return Rehearsal(fake=learner.learn(results), real=results, used=used_names)


def _run(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    modules: Sequence[nn.Module],
    replay: Replay,
    variant: int,
    names: Mapping[int, Sequence[str]],
    used: dict[str, None],
) -> Any:
    with for_real(), values_apart(), really_there(modules, LIMIT_BYTES) as real:
        real_args = [copied(replay.real(value, variant)) for value in args]
        real_kwargs = {name: copied(replay.real(value, variant)) for name, value in kwargs.items()}
        with ParametersSeen() as seen:
            result = function(*real_args, **real_kwargs)
    fakes = {id(made): fake for fake, made in real.made.items()}
    for tensor in seen.tensors:
        used.update(dict.fromkeys(names.get(fakes.get(tensor, tensor), ())))
    return result


def _known_sizes(replay: Replay, args: Any, kwargs: Any) -> Mapping[tuple[int, ...], torch.SymInt]:
    """What sizes among the arguments, and products of two of them (tokens of a batch), are in each sample."""
    sizes = _sizes((args, kwargs))
    products = [one * two for one, two in itertools.combinations_with_replacement(sizes, 2)]
    known: dict[tuple[int, ...], torch.SymInt] = {}
    for size in [*sizes, *products]:
        try:
            numbers = tuple(replay.size(size, variant) for variant in range(len(replay.samples)))
        except TraceError:
            continue
        known.setdefault(numbers, size)  # also one that all samples have in common: it may be no constant
    return known


def _signature(value: Any) -> Any:
    """What of a step's arguments and modules decides the structure of its result, to compare."""
    if isinstance(value, nn.Module):
        return type(value), tuple((name, tuple(p.shape)) for name, p in value.named_parameters())
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(map(str, value.shape))
    if isinstance(value, UnknownLength):
        return id(value)
    if isinstance(value, (tuple, list)):
        return tuple(_signature(item) for item in value)
    if isinstance(value, (dict, UserDict)):
        return tuple((key, _signature(item)) for key, item in value.items())
    return str(value) if isinstance(value, (str, int, float, bool, torch.SymInt, type(None))) else id(value)


def _sizes(value: Any) -> list[torch.SymInt]:
    """Every symbolic size among the arguments, simplest first."""
    found: dict[Any, torch.SymInt] = {}
    for item in _leaves(value):
        for size in item.shape if isinstance(item, torch.Tensor) else (item,):
            if isinstance(size, torch.SymInt):
                found.setdefault(size.node.expr, size)
    return sorted(found.values(), key=lambda size: (len(size.node.expr.free_symbols), str(size.node.expr)))


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, UnknownLength):
        return
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, (dict, UserDict)):
        for item in value.values():
            yield from _leaves(item)
    else:
        yield value


@dataclass(kw_only=True)
class _Learner:
    """Makes a fake result of several real ones, one for each sample."""

    fake_mode: FakeTensorMode
    known: Mapping[tuple[int, ...], torch.SymInt]

    def learn(self, results: Sequence[Any]) -> Any:
        first = results[0]
        if any(type(result) is not type(first) for result in results):
            kinds = " or ".join(dict.fromkeys(type(result).__name__ for result in results))
            raise TraceError(f"a step returns {kinds}, as its values have it")
        if isinstance(first, torch.Tensor):
            return self._tensor(results)
        if isinstance(first, (tuple, list)):
            if len({len(result) for result in results}) > 1:
                return UnknownLength()
            items = [self.learn(parts) for parts in zip(*results, strict=True)]
            return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
        if isinstance(first, (dict, UserDict)):
            self._require_equal([list(result) for result in results])
            made: Any = copy.copy(first)
            for key in list(first):
                made[key] = self.learn([result[key] for result in results])
            return made
        if dataclasses.is_dataclass(first):
            made = copy.copy(first)
            for item in dataclasses.fields(first):
                learned = self.learn([getattr(result, item.name) for result in results])
                object.__setattr__(made, item.name, learned)
            return made
        return self._number(results)

    def _tensor(self, results: Sequence[torch.Tensor]) -> torch.Tensor:
        self._require_equal([result.dim() for result in results])
        sizes = [self._size(numbers) for numbers in zip(*(result.shape for result in results), strict=True)]
        with self.fake_mode:
            return torch.empty(sizes, dtype=results[0].dtype, device="cpu")

    def _size(self, numbers: tuple[int, ...]) -> int | torch.SymInt:
        if numbers in self.known:
            return self.known[numbers]
        if len(set(numbers)) == 1:
            return numbers[0]
        shape_env = self.fake_mode.shape_env
        assert shape_env is not None
        size = shape_env.create_unbacked_symint()
        torch._check(size >= 0)  # type: ignore[no-untyped-call]
        return size

    def _number(self, results: Sequence[Any]) -> Any:
        first = results[0]
        shape_env = self.fake_mode.shape_env
        assert shape_env is not None
        if type(first) is int and tuple(results) in self.known:
            return self.known[tuple(results)]
        makers: dict[type, Callable[[], Any]] = {
            int: shape_env.create_unbacked_symint,
            float: shape_env.create_unbacked_symfloat,
            bool: shape_env.create_unbacked_symbool,
        }
        return makers[type(first)]() if type(first) in makers else first

    def _require_equal(self, values: Sequence[Any]) -> None:
        for value in values[1:]:
            if value != values[0]:
                raise TraceError(f"the structure of a step's result follows from values: {values[0]}, then {value}")
