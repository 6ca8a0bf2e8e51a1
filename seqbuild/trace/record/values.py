"""Map the values of a forward to the nodes whose results they are, while the forward is recorded."""

from __future__ import annotations

import dataclasses
import operator
from collections import UserDict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, track_tensor_tree
from torch.utils import _pytree as pytree

from runtime.errors import TraceError
from runtime.language.operators import is_view
from seqbuild.blame import Culprit, UntraceableError, find_culprit
from seqbuild.chain.emit import is_supported
from seqbuild.chain.partition import WITHIN
from seqbuild.trace.python.sequences import UnknownLength
from seqbuild.trace.recorder import Recorder

if TYPE_CHECKING:
    from seqbuild.trace.record.steps import Steps

_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)
_LITERALS = (type(None), bool, int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format)


class ValueTracer(Recorder):
    """An fx tracer that knows the node of every tensor, symbol and named object in a model's code.

    Args:
        dtype: the dtype of the weights during the trace, see `SequentialTracer`.

    Attributes:
        constants: tensors created by the model's code, by the names of their nodes.
        parameter_names: all dotted names of each parameter and buffer, by its id.
        overwritten: for each buffer that the code overwrites in every run, the line.
    """

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.dtype = dtype
        self.constants: dict[str, torch.Tensor] = {}
        self.parameter_names: dict[int, tuple[str, ...]] = {}
        self.overwritten: dict[str, Culprit | None] = {}
        self._tensor_names: dict[int, str] = {}
        self._object_names: dict[int, str] = {}
        self._attribute_nodes: dict[str, fx.Node] = {}
        self._kept_alive: list[object] = []
        self._steps: Steps | None = None
        self._within = ""

    def create_arg(self, a: Any) -> Any:
        """Convert a Python value to an argument of a node; the error names the type if that is impossible."""
        if isinstance(a, torch.Tensor):
            return self._tensor_arg(a)
        if isinstance(a, UnknownLength):
            return a.node
        if isinstance(a, _SYMBOLS):
            value = self.unwrap_proxy(a)
            return value.node if isinstance(value, fx.Proxy) else super().create_arg(a)
        if isinstance(a, fx.Proxy):
            return a.node
        if isinstance(a, (fx.Node, *_LITERALS)):
            return a
        if isinstance(a, slice):
            return slice(self.create_arg(a.start), self.create_arg(a.stop), self.create_arg(a.step))
        if isinstance(a, (dict, UserDict)):
            state = self._steps.state_node(a) if self._steps is not None else None
            if state is not None:
                return state
            return {_plain_key(key): self.create_arg(value) for key, value in a.items()}
        if type(a) in (tuple, torch.Size):
            return tuple(self.create_arg(value) for value in a)
        if type(a) is list or type(a) is range:
            return [self.create_arg(value) for value in a]
        name = self._object_names.get(id(a))
        if name is not None:
            return self._attribute(name)
        raise TraceError(
            f"a step receives a value of type {type(a).__module__}.{type(a).__qualname__}, which cannot be saved",
            hint="make the function that passes it one opaque step with --ignore NAME",
        )

    def create_node(
        self,
        kind: str,
        target: Any,
        args: Any,
        kwargs: Any,
        name: str | None = None,
        type_expr: Any | None = None,
    ) -> fx.Node:
        """Create a node as `fx.Tracer` does, so that attributes keep their dotted names."""
        if target is torch.ops.aten.copy_.default and self._overwrites(args):
            target = torch.ops.aten.copy.default
        node = fx.Tracer.create_node(self, kind, target, args, kwargs, name, type_expr)
        if self._within and kind != "get_attr":
            node.meta[WITHIN] = self._within
        if isinstance(target, torch._ops.OpOverload):
            if not is_supported(target):
                node.meta["culprit"] = find_culprit()  # rejected at the end if the node is needed
            for written in _written(node, target._schema):
                if written.op == "get_attr":
                    self._refuse_writing(str(written.target))
        return node

    def _overwrites(self, args: tuple[Any, ...]) -> bool:
        """Return whether a buffer is overwritten before it was read.

        Later reads then use the new value as an ordinary result. The buffer itself is not modified, because each run of
        the chain overwrites it again.
        """
        buffer = args[0]
        if not isinstance(buffer, fx.Node) or buffer.op != "get_attr" or buffer.users:
            return False
        name = str(buffer.target)
        ids = [number for number, names in self.parameter_names.items() if name in names]
        if not self._is_own_buffer(name) or any(len(self.parameter_names[number]) > 1 for number in ids):
            return False
        for number in ids:
            self._tensor_names.pop(number, None)
        self.overwritten[name] = find_culprit()
        return True

    def _is_own_buffer(self, name: str) -> bool:
        """Return whether this buffer shares memory with no other tensor; a subclass that has the model overrides it."""
        return False

    def _refuse_writing(self, name: str) -> None:
        """Reject code that modifies a parameter or buffer, because a chain would do so again for every batch."""
        if any(name in names for names in self.parameter_names.values()):
            raise changed_in_place(name, find_culprit())

    def _tensor_arg(self, tensor: torch.Tensor) -> fx.Node:
        tracked = self.unwrap_proxy(tensor)
        if isinstance(tracked, fx.Proxy):
            return tracked.node
        name = self._tensor_names.get(id(tensor))
        return self._attribute(name) if name is not None else self._constant(tensor)

    def _attribute(self, name: str) -> fx.Node:
        if name not in self._attribute_nodes:
            self._attribute_nodes[name] = self.graph.get_attr(name)
        return self._attribute_nodes[name]

    def _constant(self, tensor: torch.Tensor) -> fx.Node:
        if tensor.is_meta or isinstance(tensor, torch._subclasses.FakeTensor):
            raise TraceError(
                f"the model uses a tensor of shape {tuple(tensor.shape)} that is neither parameter, buffer nor result, "
                "so its value is unknown without weights",
                hint="register it as a buffer of its module",
            )
        if tensor.dtype == self.dtype:
            raise TraceError(
                f"the model uses a tensor of shape {tuple(tensor.shape)} in the dtype of the weights, which is neither "
                "parameter nor buffer and would be rounded in the trace",
                hint="register it as a buffer of its module",
            )
        name = f"constant_{len(self.constants)}"
        self.constants[name] = tensor  # copied after the trace, because a copy made in its modes would be fake
        self._tensor_names[id(tensor)] = name
        self._kept_alive.append(tensor)
        node = self._attribute(name)
        node.meta["constant"] = tensor
        return node

    def _name_objects(self, root: nn.Module) -> None:
        """Store the dotted names of all tensors, modules and configs that a step may receive."""
        for tensors in (root.named_parameters(remove_duplicate=False), root.named_buffers(remove_duplicate=False)):
            for name, tensor in tensors:
                self._tensor_names.setdefault(id(tensor), name)
                self.parameter_names[id(tensor)] = (*self.parameter_names.get(id(tensor), ()), name)
        for name, module in root.named_modules():
            self._object_names.setdefault(id(module), name)
            config = getattr(module, "config", None)
            if config is not None and not isinstance(config, (*_LITERALS, dict)):
                self._object_names.setdefault(id(config), f"{name}.config" if name else "config")

    def node_of(self, value: Any) -> fx.Node | None:
        """Return the node whose result `value` is, or None."""
        if isinstance(value, UnknownLength):
            return value.node
        if not isinstance(value, (torch.Tensor, *_SYMBOLS)):
            return None
        found = self.unwrap_proxy(value)
        if isinstance(found, fx.Proxy):
            return found.node
        name = self._tensor_names.get(id(value))
        return self._attribute(name) if name is not None else None

    def known_node(self, tensor: torch.Tensor) -> fx.Node | None:
        """Return the node that looks up a parameter or buffer, or whose result a tensor is, if there is one."""
        name = self._tensor_names.get(id(tensor))
        if name is not None:
            return self._attribute_nodes.get(name)  # also if an operator returned the parameter itself
        found = self.unwrap_proxy(tensor)
        return found.node if isinstance(found, fx.Proxy) else None

    def outer_node(self, tensor: torch.Tensor) -> fx.Node | None:
        """Return `known_node`, or a new node for a parameter that has not been looked up yet."""
        name = self._tensor_names.get(id(tensor))
        return self._attribute(name) if name is not None else self.known_node(tensor)

    def name_of(self, module: nn.Module) -> str:
        """Return the dotted name of a module."""
        return self._object_names[id(module)]

    def track(self, value: Any, proxy: fx.Proxy) -> Any:
        """Register every tensor and symbol in `value` as a part of the result of `proxy`'s node.

        A tensor that already has a node, because a step returns its input, is replaced by an alias, so that earlier
        values keep their nodes.
        """
        if isinstance(value, torch.Tensor):
            if isinstance(self.unwrap_proxy(value), fx.Proxy) or id(value) in self._tensor_names:
                with disable_proxy_modes_tracing():
                    value = torch.ops.aten.alias.default(value)
            track_tensor_tree(value, proxy, constant=None, tracer=self)
            return value
        if isinstance(value, _SYMBOLS):
            track_tensor_tree(value, proxy, constant=None, tracer=self)
            return value
        if isinstance(value, UnknownLength):
            return UnknownLength(proxy.node)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(self.track(item, self.item(proxy, index)) for index, item in enumerate(value)))
        if isinstance(value, (tuple, list)):
            return type(value)(self.track(item, self.item(proxy, index)) for index, item in enumerate(value))
        if isinstance(value, (dict, UserDict)):
            for key in list(value):
                value[key] = self.track(value[key], self.item(proxy, _plain_key(key)))
            return value
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            for field in dataclasses.fields(value):
                attribute = self.create_node("call_function", getattr, (proxy.node, field.name), {})
                tracked = self.track(getattr(value, field.name), fx.Proxy(attribute, self))
                object.__setattr__(value, field.name, tracked)
        return value

    def item(self, proxy: fx.Proxy, key: Any) -> fx.Proxy:
        """Record access to the item `key` of a step's result."""
        return fx.Proxy(self.create_node("call_function", operator.getitem, (proxy.node, key), {}), self)


def _written(node: fx.Node, schema: Any) -> Iterator[fx.Node]:
    """Yield the tensors that an operator modifies; for views, the viewed tensor."""
    for place, argument in enumerate(schema.arguments if schema.is_mutable else ()):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = node.args[place] if place < len(node.args) else node.kwargs.get(argument.name)
            yield from (_viewed(part) for part in pytree.tree_leaves(given) if isinstance(part, fx.Node))


def _viewed(node: fx.Node) -> fx.Node:
    """Return the node that a node is a view of."""
    while isinstance(node.target, torch._ops.OpOverload) and node.args and isinstance(node.args[0], fx.Node):
        if not is_view(node.target.overloadpacket.__name__):
            break
        node = node.args[0]
    return node


def _plain_key(key: Any) -> Any:
    if isinstance(key, (str, int, bool)):
        return key
    if isinstance(key, torch.SymInt):
        return int(key)
    raise TraceError(
        f"a step receives a dictionary with a key of type {type(key).__qualname__}, which cannot be saved",
        hint="make the function that passes it one opaque step with --ignore NAME",
    )


def changed_in_place(name: str, place: Culprit | None) -> UntraceableError:
    """Create the error for code that modifies a parameter or buffer."""
    where = f"{place.name} ({place.file}, line {place.line})" if place is not None else "the model's code"
    return UntraceableError(
        f"{where} changes its own {name} in place while the model runs; an artifact would do so again for every batch",
        culprit=None,  # an opaque step must not do it either
        hint="switch it off in the model's config, if possible, or save the weights with the change",
    )
