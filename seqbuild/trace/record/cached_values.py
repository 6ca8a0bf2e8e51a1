"""Mark the values of a forward that enter the key-value cache, by passing attention a cache that takes notes.

A model is traced without a cache. Every module that updates a cache is called with a `_NotingCache` instead of None.
Its `update` marks the nodes of its arguments and returns them, as an empty cache does, so the trace does not change. If
the model's code uses the cache in a way that a `_NotingCache` does not support, the trace is repeated without it, and
the artifact contains no information about the cache.

The queries that a model passes to its attention function are marked as well, because attention schemes quantize them.
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

from seqbuild.trace.record.number_reads import passed_to_cache

if TYPE_CHECKING:
    from seqbuild.trace.record.values import ValueTracer

# Metadata key of a node: pairs of a module's name and the part (key, value or query) of it that the node is.
CACHED = "cached"
KEY, VALUE, QUERY = "k", "v", "q"
# Names of the cache in the signatures of attention in transformers and similar code.
_PARAMETERS = ("cache", "past_key_values", "past_key_value", "layer_past", "past_kv", "layer_state")
_UPDATE = re.compile(r"\.update\(")


class CachedValues:
    """MaskTest the values that enter the cache while a forward is recorded.

    Args:
        tracer: provides the node of each tensor.

    Attributes:
        is_refused: whether code used the cache in an unsupported way.
    """

    def __init__(self, tracer: ValueTracer) -> None:
        self.tracer = tracer
        self.is_refused = False
        self._within: list[str] = []

    def watched(self, name: str, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any] | None:
        """Wrap a forward so that its module gets a noting cache instead of None; return None if it updates no cache."""
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
                args, kwargs = self._with_noting_cache(name, signature, parameter, args, kwargs)
                return forward(*args, **kwargs)
            finally:
                self._within.pop()

        return call

    def _with_noting_cache(
        self, name: str, signature: inspect.Signature, parameter: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Replace a cache argument that is None by a noting cache; an omitted one, as in encoders, stays omitted."""
        try:
            bound = signature.bind_partial(*args, **kwargs)
        except TypeError:  # the forward itself raises the error
            return args, kwargs
        if bound.arguments.get(parameter, self) is not None:
            return args, kwargs
        if parameter in kwargs:
            return args, {**kwargs, parameter: _NotingCache(self, name)}
        place = list(signature.parameters).index(parameter)
        return (*args[:place], _NotingCache(self, name), *args[place + 1 :]), kwargs

    def mark(self, module: str, part: str, tensor: Any) -> None:
        """Mark a tensor as a key, value or query of a module."""
        node = self.tracer.known_node(tensor) if isinstance(tensor, torch.Tensor) else None
        if node is None or node.op not in ("call_function", "call_module"):
            self.is_refused = True
            return
        marks = node.meta.get(CACHED, ())
        node.meta[CACHED] = (*marks, (module, part)) if (module, part) not in marks else marks

    @contextlib.contextmanager
    def queries_marked(self) -> Iterator[None]:
        """Mark the queries that are passed to attention functions of transformers while the block runs."""
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
    """Return the encoder's modules of an encoder-decoder model; an encoder processes all tokens at once, uncached."""
    config, find = getattr(root, "config", None), getattr(root, "get_encoder", None)
    if not getattr(config, "is_encoder_decoder", False) or find is None:
        return frozenset()
    encoder = find()
    inside = isinstance(encoder, nn.Module) and encoder is not root
    return frozenset(encoder.modules()) if inside else frozenset()


class _NotingCache:
    """A cache for one module that stores nothing and marks its arguments."""

    def __init__(self, owner: CachedValues, module: str) -> None:
        self._owner = owner
        self._module = module
        self.is_updated: dict[Any, bool] = _Never()
        self.layers: tuple[Any, ...] = ()

    @property
    def self_attention_cache(self) -> _NotingCache:
        """Return a decoder's cache for its own tokens."""
        return self

    @property
    def cross_attention_cache(self) -> _NotingCache:
        """Return a decoder's cache for the encoder's tokens."""
        return self

    def update(self, key: Any, value: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Mark and return keys and values, as an empty cache returns them."""
        passed_to_cache(sys._getframe(1))
        self._owner.mark(self._module, KEY, key)
        self._owner.mark(self._module, VALUE, value)
        return key, value

    def update_indexer(self, key: Any, *args: Any, **kwargs: Any) -> Any:
        """Return keys that select tokens; they are not part of attention's keys and values."""
        passed_to_cache(sys._getframe(1))
        return key

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        """Return 0, the length of an empty cache."""
        passed_to_cache(sys._getframe(1))
        return 0

    def __getattr__(self, name: str) -> Any:
        self._owner.is_refused = True
        raise AttributeError(f"the cache of a trace does not support {name}")


class _Never(dict[Any, bool]):
    """The flags of updated layers: always unset."""

    def get(self, key: Any, default: Any = None) -> Any:
        passed_to_cache(sys._getframe(1))
        return default

    def __setitem__(self, key: Any, value: bool) -> None:
        passed_to_cache(sys._getframe(1))


@functools.cache
def _cache_parameter(kind: Any) -> str | None:
    """Return a class's name for the cache that its forward updates; None if it updates none."""
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
    """Return the signature of a bound forward."""
    try:
        whole = inspect.signature(kind.forward)
    except (TypeError, ValueError):
        return inspect.Signature()
    return whole.replace(parameters=list(whole.parameters.values())[1:])


def is_marked_outside(nodes: Sequence[fx.Node], layer: str, graph: fx.Graph) -> bool:
    """Return whether other nodes than these compute keys or values of a layer."""
    inside = dict.fromkeys(nodes)
    return any(_is_in(module, layer) and node not in inside for node, module, _ in marked_nodes(graph))


def moved(marks: Sequence[tuple[str, str]], old: str, new: str) -> tuple[tuple[str, str], ...]:
    """Rename the marks of one layer for another layer with the same computation."""
    return tuple((new + module.removeprefix(old) if _is_in(module, old) else module, part) for module, part in marks)


def _is_in(module: str, other: str) -> bool:
    return module == other or module.startswith(f"{other}.")


def marked_nodes(graph: fx.Graph) -> Iterator[tuple[fx.Node, str, str]]:
    """Yield the marked nodes of a graph except inputs, each with a module and a part, in order."""
    for node in graph.nodes:
        for module, part in node.meta.get(CACHED, ()) if node.op != "placeholder" else ():
            yield node, module, part
