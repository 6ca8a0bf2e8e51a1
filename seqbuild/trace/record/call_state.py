"""Compute a key of everything that determines what a leaf returns, except the numbers in its weights."""

from __future__ import annotations

import enum
import functools
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.sym_node import SymNode
from transformers import PretrainedConfig

from seqbuild.trace.experts.signature import MODULES_OWN, UnknownValueError
from seqbuild.trace.record.number_reads import SHARED_KINDS

# Attributes with the index of a layer. They always differ, and hardly any forward reads them.
NUMBERS = ("layer_idx", "layer_id", "layer_index", "layer_number", "layer_num", "block_idx")
SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)
PLAIN = (type(None), bool, int, str, bytes, torch.dtype, torch.device, torch.layout, torch.memory_format)
IDENTICAL = (type, types.FunctionType, types.BuiltinFunctionType, enum.Enum)


@dataclass(kw_only=True)
class CallState:
    """The state that determines the structure of a leaf's result.

    Attributes:
        fake_mode: the mode of the fake tensors.
        patched: ids of modules with an instance attribute `forward`.
        usual: attributes that every fake tensor or parameter has.
        key: the state, comparable.
        facts: changes when the leaf modifies a tensor or creates a symbol.
        tensors: those among the arguments, then the parameters and buffers.
        num_arguments: the number of tensors among the arguments.
        symbols: the symbols in sizes of tensors.
        containers: ids of the containers among the arguments.
        numbered: classes and their attributes that contain a layer's index.
    """

    fake_mode: FakeTensorMode
    patched: set[int]
    usual: frozenset[str]
    key: Any = None
    facts: Any = None
    tensors: list[torch.Tensor] = field(default_factory=list)
    num_arguments: int = 0
    symbols: set[Any] = field(default_factory=set)
    containers: set[int] = field(default_factory=set)
    numbered: dict[tuple[type, str], None] = field(default_factory=dict)
    _places: dict[int, int] = field(default_factory=dict)
    _modules: dict[int, int] = field(default_factory=dict)
    _configs: dict[int, Any] = field(default_factory=dict)
    _classes: dict[type, Any] = field(default_factory=dict)

    def fill(self, leaf: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Compute the state before or after a call.

        Raises:
            UnknownValueError: if something cannot be compared.
        """
        if nn.modules.module._has_any_global_hook():  # type: ignore[no-untyped-call]
            raise UnknownValueError
        values = self._value(tuple(args)), self._value(dict(kwargs))
        self.num_arguments = len(self.tensors)
        self.key = (values, self._module(leaf, is_outer=True), surroundings())
        shape_env: Any = self.fake_mode.shape_env
        self.facts = shape_env.num_symbols(), [tensor._version for tensor in self.tensors]

    def _value(self, value: Any) -> Any:
        kind = type(value)
        if kind in PLAIN:
            return kind, value
        if kind in (float, complex):
            return kind, repr(value)  # so that NaN equals itself and 0.0 differs from -0.0
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, SYMBOLS):
            return kind, self._size(value)
        if kind in (tuple, list, torch.Size) or (isinstance(value, tuple) and hasattr(value, "_fields")):
            self.containers.add(id(value))
            return kind, tuple([self._value(item) for item in value])
        if kind is dict:
            self.containers.add(id(value))
            return kind, tuple([(self._value(key), self._value(item)) for key, item in value.items()])
        if kind in (set, frozenset):
            return kind, frozenset([self._value(item) for item in value])
        if isinstance(value, IDENTICAL):
            return kind, value
        if kind is functools.partial:
            return kind, self._value(value.func), self._value(value.args), self._value(value.keywords)
        if isinstance(value, PretrainedConfig):
            return self._config(value)
        raise UnknownValueError

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
        """Reject a tensor with other properties than dtype, device, sizes and strides."""
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
            raise UnknownValueError

    def _size(self, size: Any) -> Any:
        if type(size) is int:
            return size
        if not isinstance(size.node, SymNode):
            raise UnknownValueError
        self.symbols |= size.node.expr.free_symbols
        return size.node.expr

    def _config(self, config: Any) -> Any:
        if id(config) not in self._configs:
            self._configs[id(config)] = None  # a config may contain itself
            self._configs[id(config)] = tuple([(name, self._value(value)) for name, value in vars(config).items()])
        return id(config), self._configs[id(config)]

    def _module(self, module: nn.Module, *, is_outer: bool = False) -> Any:
        if id(module) in self._modules:
            return "again", self._modules[id(module)]
        self._modules[id(module)] = len(self._modules)
        own = module.__dict__
        if id(module) in self.patched:
            raise UnknownValueError
        if not is_outer and (own["_forward_hooks"] or own["_forward_pre_hooks"]):
            raise UnknownValueError  # hooks of the leaf itself run outside the cached part
        attributes = [self._attribute(module, name, value) for name, value in own.items() if name not in MODULES_OWN]
        tensors = [
            (name, None if tensor is None else self._tensor(tensor))
            for kind in ("_parameters", "_buffers")
            for name, tensor in own[kind].items()
        ]
        children = [(name, None if child is None else self._module(child)) for name, child in own["_modules"].items()]
        return self._class(type(module)), tuple(attributes), tuple(tensors), tuple(children)

    def _class(self, cls: type) -> Any:
        """Return a class with its plain attributes, which code may modify."""
        if cls not in self._classes:
            found = {
                name: value
                for base in cls.__mro__[: cls.__mro__.index(nn.Module)]
                for name, value in vars(base).items()
            }
            shared = [
                (name, value)
                for name, value in found.items()
                if type(value) in SHARED_KINDS and not (name.startswith("__") and name.endswith("__"))
            ]
            self._classes[cls] = cls, tuple([(name, repr(value)) for name, value in shared])
        return self._classes[cls]

    def _attribute(self, module: nn.Module, name: str, value: Any) -> Any:
        if name in NUMBERS and type(value) is int and not any(name in vars(cls) for cls in type(module).__mro__):
            self.numbered[type(module), name] = None
            return name, "index"
        return name, self._value(value)


def replaced_symbols(key: Any, shape_env: Any) -> Any:
    """Replace all sizes in a key by their current expressions."""
    if isinstance(key, sympy.Basic):
        return shape_env.replace(key)
    if type(key) in (tuple, frozenset):
        return type(key)(replaced_symbols(part, shape_env) for part in key)
    return key


def surroundings() -> Any:
    """Return the settings of torch that a forward may depend on."""
    is_cast = torch.is_autocast_enabled("cpu")
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.get_autocast_dtype("cpu") if is_cast else None,
    )
