"""Dry run: execute a step that fails on fake tensors on small real values, to learn the structure of its result.

A function that loops over the result of `nonzero`, or branches on `.item()`, needs values. It is executed on its
arguments for samples of several sizes and values (see `replay.py`). A size that is the same in all runs is a constant;
one that equals an input's size becomes that symbol; any other size depends on values and becomes a new symbol. A number
in the result may depend on values, too: the trace can calculate with it, but not branch on it. A tuple or list whose
length differs becomes a sequence of unknown length.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from runtime.errors import TraceError
from runtime.host.left_as_found import values_apart
from seqbuild.trace.python.sequences import UnknownLength
from seqbuild.trace.real.replay import Replay, copied, plain_execution
from seqbuild.trace.real.used_parameters import ParametersSeen, real_tensors

# A step with more weights than this is not executed, so that a laptop can compile any model.
LIMIT_BYTES = 4 * 2**30

Memory = dict[Any, tuple[tuple[Any, ...], tuple[str, ...]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class DryRun:
    """Result of a dry run: the result in fake tensors, the real one for each sample, names of the used parameters."""

    fake: Any
    real: tuple[Any, ...]
    used: tuple[str, ...]


def dry_run(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    modules: Sequence[nn.Module],
    replay: Replay,
    fake_mode: FakeTensorMode,
    memory: Memory,
    names: Mapping[int, Sequence[str]],
) -> DryRun:
    """Execute `function(*args, **kwargs)` on real values and return its result in fake tensors.

    Args:
        function: called outside all modes, with real parameters in place of the model's fake ones.
        args: positional arguments, with fake tensors and symbols.
        kwargs: named arguments, with fake tensors and symbols.
        modules: the modules whose parameters the function uses; real ones are created when a module is called.
        replay: provides real values of the arguments.
        fake_mode: the mode of the result's fake tensors.
        memory: results of earlier dry runs; steps that differ in their weights only share one.
        names: dotted names of the model's fake parameters, by their ids.

    Raises:
        TraceError: if the structure of the result depends on values, or the step is too large to be executed.
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
    with plain_execution():
        results, used_names = tuple(copied(result) for result in memory[key][0]), memory[key][1]
    merger = _ResultMerger(fake_mode=fake_mode, known=_known_sizes(replay, args, kwargs))
    return DryRun(fake=merger.merge(results), real=results, used=used_names)


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
    with plain_execution(), values_apart(), real_tensors(modules, LIMIT_BYTES) as real:
        real_args = [copied(replay.real(value, variant)) for value in args]
        real_kwargs = {name: copied(replay.real(value, variant)) for name, value in kwargs.items()}
        with ParametersSeen() as seen:
            result = function(*real_args, **real_kwargs)
    fakes = {id(made): fake for fake, made in real.made.items()}
    for tensor in seen.tensors:
        used.update(dict.fromkeys(names.get(fakes.get(tensor, tensor), ())))
    return result


def _known_sizes(replay: Replay, args: Any, kwargs: Any) -> Mapping[tuple[int, ...], torch.SymInt]:
    """Map the numbers that a size, or a product of two sizes (tokens of a batch), has in the samples to that size."""
    sizes = _sizes((args, kwargs))
    products = [one * two for one, two in itertools.combinations_with_replacement(sizes, 2)]
    known: dict[tuple[int, ...], torch.SymInt] = {}
    for size in [*sizes, *products]:
        try:
            numbers = tuple(replay.size(size, variant) for variant in range(len(replay.samples)))
        except TraceError:
            continue
        known.setdefault(numbers, size)  # even if it is the same in all samples: it may still vary
    return known


def _signature(value: Any) -> Any:
    """Return a key of everything in a step's arguments and modules that determines the structure of its result."""
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
    """Return the symbolic sizes among the arguments, simplest first."""
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
class _ResultMerger:
    """Merges the real results of all samples into one fake result."""

    fake_mode: FakeTensorMode
    known: Mapping[tuple[int, ...], torch.SymInt]

    def merge(self, results: Sequence[Any]) -> Any:
        first = results[0]
        if any(type(result) is not type(first) for result in results):
            kinds = " or ".join(dict.fromkeys(type(result).__name__ for result in results))
            raise TraceError(f"the type of a step's result depends on data: {kinds}")
        if isinstance(first, torch.Tensor):
            return self._tensor(results)
        if isinstance(first, (tuple, list)):
            if len({len(result) for result in results}) > 1:
                return UnknownLength()
            items = [self.merge(parts) for parts in zip(*results, strict=True)]
            return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
        if isinstance(first, (dict, UserDict)):
            self._require_equal([list(result) for result in results])
            made: Any = copy.copy(first)
            for key in list(first):
                made[key] = self.merge([result[key] for result in results])
            return made
        if dataclasses.is_dataclass(first):
            made = copy.copy(first)
            for item in dataclasses.fields(first):
                merged = self.merge([getattr(result, item.name) for result in results])
                object.__setattr__(made, item.name, merged)
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
                raise TraceError(f"the structure of a step's result depends on data: {values[0]} or {value}")
