"""Remember what a leaf returned, and give the same to the next identical leaf without running it.

A model's layers are mostly alike: same classes, same shapes, same arguments, and so the same structure of the result.
Running one on fake tensors takes 50 to 500 ms; a hundred layers that differ in their number alone are run once.

A result is remembered only where it can be shown to follow from what was compared:

    compared    classes and their plain attributes, plain attributes, parameters and buffers of the leaf and of all
                modules in it, the contents of the configs they hold, and the arguments: their structure, Python values,
                and of tensors dtype, device, symbolic sizes and strides
    not         the number of a layer (`layer_idx` and the like), as long as nothing reads it while the leaf runs
    refused     a leaf that changes an argument or itself, returns something that is not new (an argument itself is
                all right), makes symbols of its own, has hooks inside, or holds or takes anything not listed here

What is refused runs as if there were no memory. One thing is taken for granted: code does not decide by globals that
change while the model runs.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, disable_fake_tensor_cache
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.fx.experimental.sym_node import SymNode

from seqbuild.trace.experts.signature import MODULES_OWN
from seqbuild.trace.record.descriptions import Description, _Describer, _made
from seqbuild.trace.record.number_reads import _SHARED, _watched

# Attributes that number a layer. They always differ, and hardly any forward looks at them.
NUMBERS = ("layer_idx", "layer_id", "layer_index", "layer_number", "layer_num", "block_idx")

_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)
_PLAIN = (type(None), bool, int, str, bytes, torch.dtype, torch.device, torch.layout, torch.memory_format)
_IDENTICAL = (type, types.FunctionType, types.BuiltinFunctionType, enum.Enum)


class _UnknownError(Exception):
    """Something that is not compared."""


class LeafMemory:
    """Results of leaves, by all that decides their structure.

    Args:
        root: the model, before its forwards are replaced: a module that has a forward of its own is never remembered.
        fake_mode: the mode that owns the fake tensors.
    """

    def __init__(self, root: nn.Module, fake_mode: FakeTensorMode) -> None:
        self._fake_mode = fake_mode
        self._patched = {id(module) for module in root.modules() if "forward" in module.__dict__}
        self._results: dict[Any, Description] = {}
        with fake_mode:
            self._usual = frozenset(vars(nn.Parameter(torch.empty(0), requires_grad=False)))

    def call(self, leaf: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], run: Callable[[], Any]) -> Any:
        """What `run` returns, which calls `leaf` with these arguments, or the same in new fake tensors."""
        before = self.look(leaf, args, kwargs)
        if before is None:
            return run()
        if before.key in self._results:
            return self.made_again(self._results[before.key], before)
        output, after, described = self.described(leaf, args, kwargs, before, run)
        if described is not None:
            self._results[after.key] = described
        return output

    def described(
        self, leaf: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], before: Look, run: Callable[[], Any]
    ) -> tuple[Any, Look, Description | None]:
        """What `run` returns, a look at everything after it, and a description of the result, if that follows from
        nothing but what was seen.
        """
        # Whole leaves are remembered: to look for single operators takes longer than to run them.
        with _watched(before.numbered) as reads, disable_fake_tensor_cache(self._fake_mode):
            output = run()
        after = self.look(leaf, args, kwargs)
        if not reads and after is not None and after.facts == before.facts and self._is_same(before.key, after.key):
            with contextlib.suppress(_UnknownError), torch._C.DisableTorchFunction():
                return output, after, Description(_Describer(after).of(output))
        return output, before, None

    def _is_same(self, before: Any, after: Any) -> bool:
        """Whether nothing has changed but that sizes are known to be equal now: the first layer finds out that its mask
        is as long as its text. To run it again would give what it gave, in the sizes that are left.
        """
        return bool(before == after or _replaced(before, self._fake_mode.shape_env) == after)

    def clear(self) -> None:
        """Forget everything."""
        self._results.clear()

    def look(self, leaf: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Look | None:
        """All that decides the structure of the result; None when something takes part that is not compared."""
        look = Look(fake_mode=self._fake_mode, patched=self._patched, usual=self._usual)
        try:
            with torch._C.DisableTorchFunction():
                look.at(leaf, args, kwargs)
        except _UnknownError:
            return None
        return look

    def made_again(self, described: Description, look: Look) -> Any:
        """A result as it was described, of new fake tensors."""
        shape_env: Any = self._fake_mode.shape_env
        with disable_proxy_modes_tracing(), shape_env.sizes_kept_free(), self._fake_mode:
            return _made(described.content, look.tensors)


@dataclass(kw_only=True)
class Look:
    """All that decides the structure of a leaf's result."""

    fake_mode: FakeTensorMode
    patched: set[int]
    usual: frozenset[str]  # attributes that any fake tensor or parameter has
    key: Any = None
    facts: Any = None  # what changes when the leaf writes to a tensor or makes a symbol
    tensors: list[torch.Tensor] = field(default_factory=list)  # the arguments', then the parameters
    num_arguments: int = 0
    symbols: set[Any] = field(default_factory=set)
    containers: set[int] = field(default_factory=set)
    numbered: dict[tuple[type, str], None] = field(default_factory=dict)
    _places: dict[int, int] = field(default_factory=dict)
    _modules: dict[int, int] = field(default_factory=dict)
    _configs: dict[int, Any] = field(default_factory=dict)
    _classes: dict[type, Any] = field(default_factory=dict)

    def at(self, leaf: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Fill in everything.

        Raises:
            _UnknownError: when something takes part that is not compared.
        """
        if nn.modules.module._has_any_global_hook():  # type: ignore[no-untyped-call]
            raise _UnknownError
        values = self._value(tuple(args)), self._value(dict(kwargs))
        self.num_arguments = len(self.tensors)
        self.key = (values, self._module(leaf, is_outer=True), _surroundings())
        shape_env: Any = self.fake_mode.shape_env
        self.facts = shape_env.num_symbols(), [tensor._version for tensor in self.tensors]

    def _value(self, value: Any) -> Any:
        kind = type(value)
        if kind in _PLAIN:
            return kind, value
        if kind in (float, complex):
            return kind, repr(value)  # not-a-number equals itself then, and the two zeros differ
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, _SYMBOLS):
            return kind, self._size(value)
        if kind in (tuple, list, torch.Size) or (isinstance(value, tuple) and hasattr(value, "_fields")):
            self.containers.add(id(value))
            return kind, tuple([self._value(item) for item in value])
        if kind is dict:
            self.containers.add(id(value))
            return kind, tuple([(self._value(key), self._value(item)) for key, item in value.items()])
        if kind in (set, frozenset):
            return kind, frozenset([self._value(item) for item in value])
        if isinstance(value, _IDENTICAL):
            return kind, value
        if kind is functools.partial:
            return kind, self._value(value.func), self._value(value.args), self._value(value.keywords)
        if _is_config(kind):
            return self._config(value)
        raise _UnknownError

    def _tensor(self, tensor: torch.Tensor) -> Any:
        if id(tensor) in self._places:
            return "again", self._places[id(tensor)]
        self.require_plain(tensor)
        self._places[id(tensor)] = len(self.tensors)
        self.tensors.append(tensor)
        sizes = tuple([self._size(size) for size in (*tensor.shape, *tensor.stride(), tensor.storage_offset())])
        is_parameter = isinstance(tensor, nn.Parameter)
        return is_parameter, tensor.dtype, tensor.device, tensor.requires_grad, tensor.dim(), sizes

    def require_plain(self, tensor: torch.Tensor) -> None:
        """Refuse a tensor about which more is known than its sizes and strides."""
        is_plain = (
            isinstance(tensor, FakeTensor)
            and tensor.fake_mode is self.fake_mode
            and tensor.constant is None
            and vars(tensor).keys() <= self.usual
            and tensor.layout is torch.strided
            and not tensor.is_inference()
            and not tensor.is_conj()
            and not tensor.is_neg()
        )
        if not is_plain:
            raise _UnknownError

    def _size(self, size: Any) -> Any:
        if type(size) is int:
            return size
        if not isinstance(size.node, SymNode):
            raise _UnknownError
        self.symbols |= size.node.expr.free_symbols
        return size.node.expr

    def _config(self, config: Any) -> Any:
        if id(config) not in self._configs:
            self._configs[id(config)] = None  # a config that holds itself
            self._configs[id(config)] = tuple([(name, self._value(value)) for name, value in vars(config).items()])
        return id(config), self._configs[id(config)]

    def _module(self, module: nn.Module, *, is_outer: bool = False) -> Any:
        if id(module) in self._modules:
            return "again", self._modules[id(module)]
        self._modules[id(module)] = len(self._modules)
        own = module.__dict__
        if id(module) in self.patched:
            raise _UnknownError
        if not is_outer and (own["_forward_hooks"] or own["_forward_pre_hooks"]):
            raise _UnknownError  # those of the leaf itself run around what is remembered
        attributes = [self._attribute(module, name, value) for name, value in own.items() if name not in MODULES_OWN]
        tensors = [
            (name, None if tensor is None else self._tensor(tensor))
            for kind in ("_parameters", "_buffers")
            for name, tensor in own[kind].items()
        ]
        children = [(name, None if child is None else self._module(child)) for name, child in own["_modules"].items()]
        return self._class(type(module)), tuple(attributes), tuple(tensors), tuple(children)

    def _class(self, cls: type) -> Any:
        """A class with the plain attributes that its objects share: code may count in one of those."""
        if cls not in self._classes:
            found = {
                name: value
                for base in cls.__mro__[: cls.__mro__.index(nn.Module)]
                for name, value in vars(base).items()
            }
            shared = [
                (name, value) for name, value in found.items() if type(value) in _SHARED and not _is_private(name)
            ]
            self._classes[cls] = cls, tuple([(name, repr(value)) for name, value in shared])
        return self._classes[cls]

    def _attribute(self, module: nn.Module, name: str, value: Any) -> Any:
        if name in NUMBERS and type(value) is int and not any(name in vars(cls) for cls in type(module).__mro__):
            self.numbered[type(module), name] = None
            return name, "a number"
        return name, self._value(value)


def _replaced(key: Any, shape_env: Any) -> Any:
    """A key with all sizes as they are known now."""
    if isinstance(key, sympy.Basic):
        return shape_env.replace(key)
    if type(key) in (tuple, frozenset):
        return type(key)(_replaced(part, shape_env) for part in key)
    return key


def _surroundings() -> Any:
    """What of torch's state a forward may follow."""
    is_cast = torch.is_autocast_enabled("cpu")
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.get_autocast_dtype("cpu") if is_cast else None,
    )


def _is_private(name: str) -> bool:
    """Whether an attribute of a class is Python's own."""
    return name.startswith("__") and name.endswith("__")


def _is_config(kind: type) -> bool:
    return any(cls.__module__ == "transformers.configuration_utils" for cls in kind.__mro__)
