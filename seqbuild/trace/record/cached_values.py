"""Which values of a forward enter the key-value cache, found out by handing attention a cache that takes notes.

A model is traced without a cache. So that its own code says what it would keep, every module that updates a cache is
called with a `_Notebook` where it would get none. Its `update` marks the nodes of what it is given, and returns them as
an empty cache does: nothing of the trace changes. That holds for code which uses the cache in the few ways that a
`_Notebook` has. Where code asks for more, the trace is made again without one, and the artifact says nothing about the
cache.

What a model hands to its attention function as queries is noted in the same way: schemes of attention round them, too.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from seqbuild.trace.record.number_reads import handed_over

if TYPE_CHECKING:
    from seqbuild.trace.record.values import ValueTracer

# Under this key a node says which values of which modules it is: pairs of the module's name and a part.
CACHED = "cached"
KEY, VALUE, QUERY = "k", "v", "q"
# What transformers and models of the same make call the cache in the signature of attention.
_PARAMETERS = ("cache", "past_key_values", "past_key_value", "layer_past", "past_kv", "layer_state")
_UPDATE = re.compile(r"\.update\(")


class CachedValues:
    """Marks the values that enter the cache while a forward is recorded.

    Args:
        tracer: knows which node a tensor is the result of.

    Attributes:
        is_refused: whether some code has used the cache in a way that an empty one might answer differently.
    """

    def __init__(self, tracer: ValueTracer) -> None:
        self.tracer = tracer
        self.is_refused = False
        self._within: list[str] = []

    def watched(self, name: str, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any] | None:
        """A forward that hands its module a notebook where it would get no cache; None if it updates none."""
        kind: Any = type(module)
        parameter = _cache_parameter(kind)
        if parameter is None or getattr(module, "is_decoder", True) is False:
            return None
        signature = _signature(kind)

        @functools.wraps(forward)
        def call(*args: Any, **kwargs: Any) -> Any:
            if get_proxy_mode() is None:
                return forward(*args, **kwargs)
            self._within.append(name)
            try:
                args, kwargs = self._with_notebook(name, signature, parameter, args, kwargs)
                return forward(*args, **kwargs)
            finally:
                self._within.pop()

        return call

    def _with_notebook(
        self, name: str, signature: inspect.Signature, parameter: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A call's arguments, with a notebook for a cache that is named and not there. Encoders name none."""
        try:
            bound = signature.bind_partial(*args, **kwargs)
        except TypeError:  # let the forward itself say so
            return args, kwargs
        if bound.arguments.get(parameter, self) is not None:
            return args, kwargs
        if parameter in kwargs:
            return args, {**kwargs, parameter: _Notebook(self, name)}
        place = list(signature.parameters).index(parameter)
        return (*args[:place], _Notebook(self, name), *args[place + 1 :]), kwargs

    def mark(self, module: str, part: str, tensor: Any) -> None:
        """Note that a tensor is a part of what a module keeps or compares with it."""
        node = self.tracer.known_node(tensor) if isinstance(tensor, torch.Tensor) else None
        if node is None or node.op not in ("call_function", "call_module"):
            self.is_refused = True
            return
        marks = node.meta.get(CACHED, ())
        node.meta[CACHED] = (*marks, (module, part)) if (module, part) not in marks else marks

    @contextlib.contextmanager
    def queries_marked(self) -> Iterator[None]:
        """Have the functions by which transformers computes attention mark the queries that they are given."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        found = ALL_ATTENTION_FUNCTIONS.get_interface

        def get_interface(*args: Any, **kwargs: Any) -> Callable[..., Any]:
            return self._marking(found(*args, **kwargs))

        vars(ALL_ATTENTION_FUNCTIONS)["get_interface"] = get_interface
        try:
            yield
        finally:
            del vars(ALL_ATTENTION_FUNCTIONS)["get_interface"]

    def _marking(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(module: Any, query: Any, *args: Any, **kwargs: Any) -> Any:
            if self._within and get_proxy_mode() is not None:
                self.mark(self._within[-1], QUERY, query)
            return function(module, query, *args, **kwargs)

        return call


def encoder_modules(root: nn.Module) -> frozenset[nn.Module]:
    """The modules of the encoder of an encoder-decoder model, which keeps nothing: it sees all tokens at once."""
    config, find = getattr(root, "config", None), getattr(root, "get_encoder", None)
    if not getattr(config, "is_encoder_decoder", False) or find is None:
        return frozenset()
    encoder = find()
    inside = isinstance(encoder, nn.Module) and encoder is not root
    return frozenset(encoder.modules()) if inside else frozenset()


class _Notebook:
    """A cache that keeps nothing and notes what it is given, for one module."""

    def __init__(self, owner: CachedValues, module: str) -> None:
        self._owner = owner
        self._module = module
        self.is_updated: dict[Any, bool] = _Never()
        self.layers: tuple[Any, ...] = ()

    @property
    def self_attention_cache(self) -> _Notebook:
        """Of a decoder's two caches, that of its own tokens."""
        return self

    @property
    def cross_attention_cache(self) -> _Notebook:
        """Of a decoder's two caches, that of the encoder's tokens."""
        return self

    def update(self, key: Any, value: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Note keys and values; an empty cache returns the same."""
        handed_over(sys._getframe(1))
        self._owner.mark(self._module, KEY, key)
        self._owner.mark(self._module, VALUE, value)
        return key, value

    def update_indexer(self, key: Any, *args: Any, **kwargs: Any) -> Any:
        """Keys by which tokens are chosen; they are no part of what attention keeps."""
        handed_over(sys._getframe(1))
        return key

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        """Nothing has been kept yet."""
        handed_over(sys._getframe(1))
        return 0

    def __getattr__(self, name: str) -> Any:
        self._owner.is_refused = True
        raise AttributeError(f"this trace has no cache with {name}")


class _Never(dict[Any, bool]):
    """Whether layers have been filled: none has, and it is not remembered that one was."""

    def get(self, key: Any, default: Any = None) -> Any:
        handed_over(sys._getframe(1))
        return default

    def __setitem__(self, key: Any, value: bool) -> None:
        handed_over(sys._getframe(1))


@functools.cache
def _cache_parameter(kind: Any) -> str | None:
    """What a class calls the cache that its own forward updates; None if it updates none."""
    parameters = _signature(kind).parameters
    named = next((name for name in _PARAMETERS if name in parameters), None)
    if named is None:
        return None
    try:
        source = inspect.getsource(inspect.unwrap(kind.forward))
    except (OSError, TypeError):
        return None
    return named if _UPDATE.search(source) else None


@functools.cache
def _signature(kind: Any) -> inspect.Signature:
    """Of a bound forward."""
    try:
        whole = inspect.signature(kind.forward)
    except (TypeError, ValueError):
        return inspect.Signature()
    return whole.replace(parameters=list(whole.parameters.values())[1:])


def is_marked_outside(nodes: Sequence[fx.Node], layer: str, graph: fx.Graph) -> bool:
    """Whether values that a layer keeps were calculated elsewhere than by these nodes."""
    inside = dict.fromkeys(nodes)
    return any(_is_in(module, layer) and node not in inside for node, module, _ in marked_nodes(graph))


def moved(marks: Sequence[tuple[str, str]], old: str, new: str) -> tuple[tuple[str, str], ...]:
    """Marks of one layer as those of another one that does the same."""
    return tuple((new + module.removeprefix(old) if _is_in(module, old) else module, part) for module, part in marks)


def _is_in(module: str, other: str) -> bool:
    return module == other or module.startswith(f"{other}.")


def marked_nodes(graph: fx.Graph) -> Iterator[tuple[fx.Node, str, str]]:
    """The nodes of a graph that are marked, each with a module and a part, in order; inputs are not."""
    for node in graph.nodes:
        for module, part in node.meta.get(CACHED, ()) if node.op != "placeholder" else ():
            yield node, module, part
