"""Record a model's forward at the dispatcher, with some modules as single steps.

The model's own Python runs once, unchanged, on fake tensors whose batch and sequence lengths are symbols. Whatever
reaches the dispatcher outside a leaf module is recorded as a `torch.ops.aten` call; a leaf's forward is replaced for
the duration by one `call_module`. Python control flow just runs, so nothing of the model's source is parsed or
rewritten, and the graph holds no closure and no live object: that is what makes it possible to save.

Recording happens before decomposition (`pre_dispatch`), so composite operators such as
`scaled_dot_product_attention` stay whole and choose their kernel on the device they run on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import operator
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import (
    ProxyTorchDispatchMode,
    PythonKeyTracer,
    disable_proxy_modes_tracing,
    get_proxy_mode,
    track_tensor_tree,
)

from runtime.errors import SeqbuildError, TraceError
from seqbuild.blame import blame, burnt_in
from seqbuild.leaf_memory import LeafMemory
from seqbuild.literals import LiteralTensors
from seqbuild.opaque import OpaqueStep, find_opaque_steps
from seqbuild.partition import named_output
from seqbuild.rehearse import Memory, rehearse
from seqbuild.sample import symbolic_inputs
from seqbuild.sizes import SizeBurntInError, WatchedSizes
from seqbuild.weightless import fake_parameters, hooks_set_aside, kept_as_found, tracing_configs

_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)
_LITERALS = (type(None), bool, int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format)


class SequentialTracer(PythonKeyTracer):
    """An fx tracer that looks inside the ancestors of sequential targets and nowhere else.

    Args:
        ancestors: modules to trace through: those that contain a sequential target, see `get_sequential_ancestors`.
        offloaded: modules whose parameters live elsewhere; never traced into, even when they are ancestors.
        ignore: functions (`function`, `Class.method`, `module.path.function`) recorded as one opaque step each.
        dtype: give the model's floating point parameters this dtype while tracing, whatever they have; None keeps
            theirs. A dtype that the model's own code never names marks every place which follows the run's dtype.

    After `trace`, `shape_env` holds the symbols and what was assumed about them, `constants` the tensors that the
    glue needs, and `unmatched_ignore` the names in `ignore` that fit no function.
    """

    def __init__(
        self,
        ancestors: set[nn.Module] | Sequence[nn.Module],
        offloaded: set[nn.Module] | Sequence[nn.Module] = (),
        *,
        ignore: Sequence[str] = (),
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.ancestors = frozenset(ancestors)
        self.offloaded = frozenset(offloaded)
        self.ignore = tuple(ignore)
        self.dtype = dtype
        self.constants: dict[str, torch.Tensor] = {}
        self.unmatched_ignore: tuple[str, ...] = ()
        self.shape_env = WatchedSizes()
        self.fake_mode = FakeTensorMode(shape_env=self.shape_env, allow_non_fake_inputs=True)
        self._tensor_names: dict[int, str] = {}
        self._object_names: dict[int, str] = {}
        self._attribute_nodes: dict[str, fx.Node] = {}
        self._kept_alive: list[object] = []
        self._rehearsals: Memory = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether `m` is recorded as one step: it is no ancestor of a target, or its parameters are elsewhere."""
        return m not in self.ancestors or m in self.offloaded

    def trace(  # type: ignore[override]
        self, root: nn.Module, sample_input: Mapping[str, Any], concrete_args: Mapping[str, Any] | None = None
    ) -> fx.Graph:
        """Run `root(**sample_input, **concrete_args)` on fake tensors and return what it did.

        Args:
            root: the model; real, on the meta device or offloaded. It is left as it was found, also on failure.
            sample_input: named inputs; tensors become placeholders of symbolic size, anything else is taken as is.
            concrete_args: further arguments whose values are part of the program, such as `use_cache=False`.

        Returns:
            The graph. Its output is a dict from the names of the model's output fields to their values.

        Raises:
            TraceError: naming the function of the model, its file and its line, that could not be recorded.
        """
        self.root = root
        self.graph = fx.Graph(tracer_cls=SequentialTracer)
        steps, self.unmatched_ignore = find_opaque_steps(root, self.ignore)
        inputs = symbolic_inputs(sample_input, self.fake_mode)
        with contextlib.ExitStack() as stack:
            stack.enter_context(kept_as_found(root))
            stack.enter_context(hooks_set_aside(root, lambda name, module: self._is_step(root, name, module)))
            stack.enter_context(fake_parameters(root, self.fake_mode, self.dtype))
            stack.enter_context(tracing_configs(root))
            stack.enter_context(_quiet_logs())
            self._name_objects(root)
            self._leaf_memory = LeafMemory(root, self.fake_mode)
            stack.enter_context(self._leaves_recorded(root))
            for step in steps:
                stack.enter_context(step.replaced(self._opaque_call))
            for context in (torch.no_grad(), enable_python_dispatcher(), self.fake_mode, LiteralTensors(self.dtype)):
                stack.enter_context(context)
            for name, value in inputs.items():
                if isinstance(value, torch.Tensor):
                    self._track(value, fx.Proxy(self.graph.placeholder(name), self))
            stack.enter_context(ProxyTorchDispatchMode(self, "symbolic", pre_dispatch=True))
            try:
                output = root(**inputs, **(concrete_args or {}))
            except SeqbuildError:
                raise
            except Exception as error:
                raise blame(error, self.ancestors) from error
            self.graph.output(self.create_arg(named_output(output)))
        self._kept_alive.clear()
        self._rehearsals.clear()
        self._leaf_memory.clear()
        _drop_dead_code(self.graph)
        used = {node.target for node in self.graph.find_nodes(op="get_attr")}
        self.constants = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in self.constants.items()
            if name in used
        }
        self.graph.owning_module = root  # type: ignore[assignment]
        return self.graph

    def require_free_sizes(self, *, is_batch_only: bool) -> None:
        """Refuse a trace that holds for one size of an input only.

        Args:
            is_batch_only: look at the batch alone (the first of several axes): the other sizes of a sample that
                somebody brings may be the model's own, an image's for instance.

        Raises:
            TraceError: naming the input and the line of the model's code that decided by its size.
        """
        for node in self.graph.find_nodes(op="placeholder"):
            shape = node.meta["val"].shape
            for axis, size in enumerate(shape):
                is_meant = not is_batch_only or (axis == 0 and len(shape) > 1)
                if isinstance(size, torch.SymInt) and is_meant and self.shape_env.is_fixed(size):
                    what = f"the size of {node.target} along axis {axis} ({size.node.hint} in the sample)"
                    raise burnt_in(what, self.shape_env.culprits.get(size.node._expr))

    def create_arg(self, a: Any) -> Any:
        """Turn a Python value into something a node can hold; names the type when it cannot."""
        if isinstance(a, torch.Tensor):
            return self._tensor_arg(a)
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
            return {_plain_key(key): self.create_arg(value) for key, value in a.items()}
        if type(a) in (tuple, torch.Size):
            return tuple(self.create_arg(value) for value in a)
        if type(a) is list or type(a) is range:
            return [self.create_arg(value) for value in a]
        name = self._object_names.get(id(a))
        if name is not None:
            return self._attribute(name)
        raise TraceError(
            f"a value of type {type(a).__module__}.{type(a).__qualname__} crosses a step and cannot be saved",
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
        """Create a node as `fx.Tracer` does: attributes keep their dotted names."""
        return fx.Tracer.create_node(self, kind, target, args, kwargs, name, type_expr)

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
                f"the model uses a tensor of shape {tuple(tensor.shape)} that is neither parameter, buffer nor result",
                hint="its value is not known without weights; register it as a buffer of its module",
            )
        if tensor.dtype == self.dtype:
            raise TraceError(
                f"the model uses a tensor of shape {tuple(tensor.shape)} in the dtype of the weights, which is neither "
                "parameter nor buffer",
                hint="its digits are rounded for the trace; register it as a buffer of its module",
            )
        name = f"constant_{len(self.constants)}"
        self.constants[name] = tensor  # copied when no mode is active any more, or the copy would be a fake
        self._tensor_names[id(tensor)] = name
        self._kept_alive.append(tensor)
        node = self._attribute(name)
        node.meta["constant"] = True
        return node

    def _name_objects(self, root: nn.Module) -> None:
        """Remember the dotted names of everything a step may be handed whole."""
        for tensors in (root.named_parameters(remove_duplicate=False), root.named_buffers(remove_duplicate=False)):
            for name, tensor in tensors:
                self._tensor_names.setdefault(id(tensor), name)
        for name, module in root.named_modules():
            self._object_names.setdefault(id(module), name)
            config = getattr(module, "config", None)
            if config is not None and not isinstance(config, (*_LITERALS, dict)):
                self._object_names.setdefault(id(config), f"{name}.config" if name else "config")

    @contextlib.contextmanager
    def _leaves_recorded(self, root: nn.Module) -> Iterator[None]:
        """Replace the forward of every leaf by one that records a single step."""
        with contextlib.ExitStack() as stack:
            for name, module in root.named_modules():
                if self._is_step(root, name, module):
                    own = module.__dict__.get("forward")
                    module.forward = self._leaf_call(name, module, module.forward)
                    stack.callback(_put_back, module, "forward", own)
            yield

    def _is_step(self, root: nn.Module, name: str, module: nn.Module) -> bool:
        return module is not root and self.is_leaf_module(module, name)

    def _leaf_call(self, name: str, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if get_proxy_mode() is None:  # already inside another leaf
                return forward(*args, **kwargs)
            node_args, node_kwargs = self.create_arg(args), self.create_arg(kwargs)
            output = self._leaf_memory.call(
                module, args, kwargs, lambda: self._unrecorded(forward, args, kwargs, [module])
            )
            node = self.create_node("call_module", name, node_args, node_kwargs, name.replace(".", "_"))
            return self._track(output, fx.Proxy(node, self))

        return call

    def _opaque_call(self, step: OpaqueStep, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if get_proxy_mode() is None:
            return step.function(*args, **kwargs)
        node_args, node_kwargs = self.create_arg(args), self.create_arg(kwargs)
        modules = [value for value in (*args, *kwargs.values()) if isinstance(value, nn.Module)]
        output = self._unrecorded(step.function, args, kwargs, modules)
        node = self.create_node("call_function", step.function, node_args, node_kwargs, step.function.__name__)
        node.meta["opaque"] = step.path
        return self._track(output, fx.Proxy(node, self))

    def _unrecorded(
        self, function: Callable[..., Any], args: Any, kwargs: dict[str, Any], modules: Sequence[nn.Module]
    ) -> Any:
        """Call a step for the structure of its result: on fake tensors, or else for real on small values."""
        with disable_proxy_modes_tracing(), self.shape_env.ignore_fresh_unbacked_symbols():
            try:
                with self.shape_env.sizes_kept_free():
                    return function(*args, **kwargs)
            except SeqbuildError:
                raise
            except Exception as error:
                try:
                    return rehearse(
                        function,
                        args,
                        kwargs,
                        modules=modules,
                        fake_mode=self.fake_mode,
                        memory=self._rehearsals,
                    )
                except Exception as second:
                    if isinstance(error, SizeBurntInError):  # not by a loop over it: the step allows no other size
                        return function(*args, **kwargs)
                    raise second if isinstance(second, TraceError) else error from None

    def _track(self, value: Any, proxy: fx.Proxy) -> Any:
        """Tie every tensor and symbol inside `value` to its place in the result of `proxy`'s node.

        A tensor that is already somebody's result (a step that hands its input through) becomes a fresh alias, so
        that what came before the step keeps its own name.
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
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(self._track(item, self._item(proxy, index)) for index, item in enumerate(value)))
        if isinstance(value, (tuple, list)):
            return type(value)(self._track(item, self._item(proxy, index)) for index, item in enumerate(value))
        if isinstance(value, (dict, UserDict)):
            for key in list(value):
                value[key] = self._track(value[key], self._item(proxy, _plain_key(key)))
            return value
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            for field in dataclasses.fields(value):
                attribute = self.create_node("call_function", getattr, (proxy.node, field.name), {})
                tracked = self._track(getattr(value, field.name), fx.Proxy(attribute, self))
                object.__setattr__(value, field.name, tracked)
        return value

    def _item(self, proxy: fx.Proxy, key: Any) -> fx.Proxy:
        return fx.Proxy(self.create_node("call_function", operator.getitem, (proxy.node, key), {}), self)


@contextlib.contextmanager
def _quiet_logs() -> Iterator[None]:
    """Torch logs whatever fails under fake tensors; ours is the one report a user sees."""
    loggers = [
        logging.getLogger(f"torch.{name}") for name in ("_subclasses.fake_tensor", "fx.experimental.symbolic_shapes")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _plain_key(key: Any) -> Any:
    if isinstance(key, (str, int, bool)):
        return key
    raise TraceError(
        f"a dictionary with a key of type {type(key).__qualname__} crosses a step of the model and cannot be saved",
        hint="make the function that passes it one opaque step with --ignore NAME",
    )


def _put_back(module: nn.Module, name: str, own: Any) -> None:
    if own is None:
        module.__dict__.pop(name, None)
    else:
        module.__dict__[name] = own


def _drop_dead_code(graph: fx.Graph) -> None:
    """Remove operators that nothing uses and that change nothing; calls of the model's own code always stay."""
    for node in reversed(graph.nodes):
        if not node.users and (node.op == "get_attr" or (node.op == "call_function" and _is_pure(node))):
            graph.erase_node(node)


def _is_pure(node: fx.Node) -> bool:
    if isinstance(node.target, torch._ops.OpOverload):
        return not node.target._schema.is_mutable
    return "opaque" not in node.meta
