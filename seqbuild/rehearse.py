"""Rehearse a step that fails on fake tensors: run it for real on small random values, to learn the shape of
its result.

A function that loops over what `nonzero` found, or asks `.item()` and decides, needs values. It is run by itself, once
with the sizes of the sample and once with larger ones: a size that stays the same is a constant, one that follows an
input's size becomes that symbol again, and anything else is an error. A number in the result may have come from the
values, so it becomes a symbol without a value: the trace can calculate with it, but not decide by it.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import _disable_current_modes

from runtime.errors import TraceError
from seqbuild.weightless import small_real_parameters, small_tensor

if TYPE_CHECKING:
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

# A step with more weights than this is not run for real: compiling is to stay a laptop's work.
LIMIT_BYTES = 4 * 2**30

Memory = dict[Any, tuple[Any, Any]]


def rehearse(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    modules: Sequence[nn.Module],
    fake_mode: FakeTensorMode,
    memory: Memory,
) -> Any:
    """The result of `function(*args, **kwargs)` in fake tensors, learned from two real runs.

    Args:
        function: called outside of every mode; the model's fake parameters are exchanged for real ones meanwhile.
        args: with fake tensors and symbols.
        kwargs: likewise.
        modules: those whose parameters the function uses.
        fake_mode: owns the fake tensors of the result.
        memory: results of earlier rehearsals; a model's layers differ in nothing that is looked at here.

    Raises:
        TraceError: when the shape of the result follows from values, or the step is too large to be run.
    """
    shape_env = fake_mode.shape_env
    assert shape_env is not None
    sizes = _sizes((args, kwargs))
    key = (getattr(function, "__qualname__", ""), _signature(modules), _signature(args), _signature(kwargs))
    if key not in memory:
        _require_small(modules)
        stages = (_Stage(shape_env=shape_env, enlarge=1), _Stage(shape_env=shape_env, enlarge=2))
        small, large = (_run(function, args, kwargs, modules, stage) for stage in stages)
        memory[key] = small, large
    products = [one * two for one, two in itertools.combinations_with_replacement(sizes, 2)]  # tokens of a batch
    known = {
        tuple(_value(size, shape_env, enlarge) for enlarge in (1, 2)): size for size in reversed([*sizes, *products])
    }
    with _for_real():
        small, large = copy.deepcopy(memory[key])  # what is learned is written into it
    return _Learner(fake_mode=fake_mode, known=known).learn(small, large)


def _run(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    modules: Sequence[nn.Module],
    stage: _Stage,
) -> Any:
    with _for_real(), small_real_parameters(modules):
        return function(*stage.real(list(args)), **stage.real(dict(kwargs)))


@contextlib.contextmanager
def _for_real() -> Iterator[None]:
    """No mode that records or fakes is active, and random numbers that are drawn are nobody else's."""
    with _disable_current_modes(), unset_fake_temporarily(), torch.random.fork_rng(devices=[]):
        yield


def _require_small(modules: Sequence[nn.Module]) -> None:
    num_bytes = sum(p.numel() * p.element_size() for module in modules for p in module.parameters())
    if num_bytes > LIMIT_BYTES:
        raise TraceError(
            f"a step with {num_bytes / 2**30:.0f} GiB of weights depends on values, and is too large to be run for its "
            "shape"
        )


def _signature(value: Any) -> Any:
    """What of a step's arguments and modules decides the structure of its result, to compare."""
    if isinstance(value, nn.Module):
        return type(value), tuple((name, tuple(p.shape)) for name, p in value.named_parameters())
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(map(str, value.shape))
    if isinstance(value, (tuple, list)):
        return tuple(_signature(item) for item in value)
    if isinstance(value, (dict, UserDict)):
        return tuple((key, _signature(item)) for key, item in value.items())
    return str(value) if isinstance(value, (str, int, float, bool, torch.SymInt, type(None))) else id(value)


def sample_sizes(shape_env: ShapeEnv) -> Mapping[Any, int]:
    """The sample's size for each symbol that stands for one; torch has renamed the table."""
    name = "backed_var_to_val" if hasattr(shape_env, "backed_var_to_val") else "var_to_val"
    sizes: Mapping[Any, int] = getattr(shape_env, name)
    return sizes


def _value(size: torch.SymInt, shape_env: ShapeEnv, enlarge: int) -> int:
    """A size for the sample (1), or for one whose free sizes are twice as large (2)."""
    expression = shape_env.replace(size.node.expr)
    hints = {symbol: sample_sizes(shape_env).get(symbol) for symbol in expression.free_symbols}
    if any(hint is None for hint in hints.values()):
        raise TraceError("a size that comes from values goes into a step that needs values itself")
    return int(expression.xreplace({symbol: sympy.Integer(int(hint or 0) * enlarge) for symbol, hint in hints.items()}))


def _sizes(value: Any) -> list[torch.SymInt]:
    """Every symbolic size among the arguments, simplest first."""
    found: dict[Any, torch.SymInt] = {}
    for item in _leaves(value):
        for size in item.shape if isinstance(item, torch.Tensor) else (item,):
            if isinstance(size, torch.SymInt):
                found.setdefault(size.node.expr, size)
    return sorted(found.values(), key=lambda size: (len(size.node.expr.free_symbols), str(size.node.expr)))


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, (dict, UserDict)):
        for item in value.values():
            yield from _leaves(item)
    else:
        yield value


@dataclass(kw_only=True)
class _Stage:
    """Makes real arguments of fake ones."""

    shape_env: ShapeEnv
    enlarge: int
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(1))

    def real(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return small_tensor(value, self.generator, [self.size(size) for size in value.shape])
        if isinstance(value, torch.SymInt):
            return self.size(value)
        if isinstance(value, (torch.SymBool, torch.SymFloat)):
            return False if isinstance(value, torch.SymBool) else 0.5
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(self.real(item) for item in value))
        if isinstance(value, (tuple, list)):
            return type(value)(self.real(item) for item in value)
        if isinstance(value, dict):
            return {key: self.real(item) for key, item in value.items()}
        return value

    def size(self, size: int | torch.SymInt) -> int:
        return _value(size, self.shape_env, self.enlarge) if isinstance(size, torch.SymInt) else int(size)


@dataclass(kw_only=True)
class _Learner:
    """Makes a fake result of two real ones."""

    fake_mode: FakeTensorMode
    known: Mapping[tuple[int, ...], torch.SymInt]

    def learn(self, small: Any, large: Any) -> Any:
        if type(small) is not type(large):
            raise TraceError(f"a step returns {type(small).__name__} or {type(large).__name__}, as its values have it")
        if isinstance(small, torch.Tensor):
            return self._tensor(small, large)
        if isinstance(small, (tuple, list)):
            self._require_equal(len(small), len(large))
            items = [self.learn(one, two) for one, two in zip(small, large, strict=True)]
            return type(small)(*items) if hasattr(small, "_fields") else type(small)(items)
        if isinstance(small, (dict, UserDict)):
            self._require_equal(list(small), list(large))
            for key in list(small):
                small[key] = self.learn(small[key], large[key])
            return small
        if dataclasses.is_dataclass(small):
            for item in dataclasses.fields(small):
                learned = self.learn(getattr(small, item.name), getattr(large, item.name))
                object.__setattr__(small, item.name, learned)
            return small
        return self._number(small, large)

    def _tensor(self, small: torch.Tensor, large: torch.Tensor) -> torch.Tensor:
        self._require_equal(small.dim(), large.dim())
        sizes = [
            one if one == two else self._symbol(one, two) for one, two in zip(small.shape, large.shape, strict=True)
        ]
        with self.fake_mode:
            return torch.empty(sizes, dtype=small.dtype, device="cpu")

    def _symbol(self, small: int, large: int) -> torch.SymInt:
        if (small, large) not in self.known:
            raise TraceError(
                f"the size of a step's result follows from values, or in no simple way from sizes: it was {small} with "
                f"those of the sample, and {large} with twice as large ones"
            )
        return self.known[small, large]

    def _number(self, small: Any, large: Any) -> Any:
        shape_env = self.fake_mode.shape_env
        assert shape_env is not None
        if (small, large) in self.known:
            return self.known[small, large]
        makers: dict[type, Callable[[], Any]] = {
            int: shape_env.create_unbacked_symint,
            float: shape_env.create_unbacked_symfloat,
            bool: shape_env.create_unbacked_symbool,
        }
        return makers[type(small)]() if type(small) in makers else small

    def _require_equal(self, small: Any, large: Any) -> None:
        if small != large:
            raise TraceError(f"the structure of a step's result follows from values: {small}, then {large}")
