"""Record steps: calls of a leaf module, of an opaque function, or a join of a sequence of unknown length.

The trace needs a step's result in fake tensors. The step is run on fake tensors; if that fails, it gets a dry run on
real ones, which is stored in the node's metadata. If it works only for a size of the sample, that size becomes a
constant, which the trace then states as a condition or rejects.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import fx, nn
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode

from runtime.errors import TraceError
from runtime.host.left_as_found import values_apart
from seqbuild.chain.marks import copy_dict, is_empty_cache
from seqbuild.chain.partition import DRY_RUN
from seqbuild.trace.real.dry_run import LIMIT_BYTES, DryRun, Memory, dry_run
from seqbuild.trace.real.replay import Replay
from seqbuild.trace.real.used_parameters import ParametersSeen, real_tensors
from seqbuild.trace.record.opaque import OpaqueStep
from seqbuild.trace.sizes.symbols import SizeSpecializedError

if TYPE_CHECKING:
    from seqbuild.trace.record.leaf_cache import LeafCache
    from seqbuild.trace.recorder import Recorder


class TargetInsideError(TraceError):
    """A function that calls a target cannot be one step."""


class _EmptyCaches:
    """Replaces empty key-value caches among the arguments of layers by None.

    Some models create a cache even if none is requested. A layer computes the same without it, because what it adds is
    for the next token. But a model may also let one stack of layers read what another stack has added. This is part of
    the computation and is rejected, because a chain has no cache.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[int, int], tuple[Any, nn.Module]] = {}

    def without(self, value: Any, modules: Sequence[nn.Module]) -> Any:
        """Return None for an empty cache, and any other argument of a step that calls `modules` unchanged.

        Raises:
            TraceError: if another layer with the same index has received the cache before.
        """
        if not is_empty_cache(value):
            return value
        for module in modules:
            found = {vars(part).get("layer_idx") for part in module.modules()}
            for number in sorted(number for number in found if type(number) is int):
                _, before = self._seen.setdefault((id(value), number), (value, module))
                if before is not module:
                    raise TraceError(
                        f"layers of {type(module).__name__} read the key-values that layers of {type(before).__name__} "
                        "have stored in a cache, and a chain of subgraphs has no cache",
                        hint="such a model cannot be compiled; compile the part that fills the cache separately",
                    )
        return None


class Steps:
    """Records the steps of one trace.

    Args:
        tracer: the tracer with the graph.
        samples: real inputs of different sizes, see `seqbuild.trace.real.replay`.
        lookup: returns the value of a `get_attr` node.
        leaf_cache: provides the results of leaves that equal an earlier one.
    """

    def __init__(
        self,
        tracer: Recorder,
        samples: Sequence[Mapping[str, Any]],
        lookup: Callable[[fx.Node], Any],
        leaf_cache: LeafCache,
    ) -> None:
        self.tracer = tracer
        self.leaf_cache = leaf_cache
        self.replay = Replay(samples, tracer.shape_env, tracer.node_of, self._execute, lookup)
        self._memory: Memory = {}
        self._states: dict[int, tuple[Any, dict[Any, Any], fx.Node]] = {}
        self._caches = _EmptyCaches()
        self._opaque_depth = 0

    def leaf(self, name: str, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function that replaces a leaf module's forward during the trace."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if get_proxy_mode() is None:  # already inside another step
                if self._opaque_depth and module in self.tracer.targets:
                    raise TargetInsideError(f"an opaque step calls the target {name}")
                return forward(*args, **kwargs)
            if _modules(args, kwargs) and module not in self.tracer.targets:
                return forward(*args, **kwargs)  # traced through: generated code passes modules to opaque steps only
            return self._record(
                forward,
                args,
                kwargs,
                modules=[module],
                make=lambda a, k: self.tracer.create_node("call_module", name, a, k, name.replace(".", "_")),
            )

        return call

    def opaque(self, step: OpaqueStep, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record a call of an opaque function."""
        if get_proxy_mode() is None:
            return step.function(*args, **kwargs)

        def make(node_args: Any, node_kwargs: Any) -> fx.Node:
            name = step.function.__name__
            node = self.tracer.create_node("call_function", step.function, node_args, node_kwargs, name)
            node.meta["opaque"] = step.path
            return node

        self._opaque_depth += 1
        try:
            return self._record(step.function, args, kwargs, modules=_modules(args, kwargs), make=make)
        finally:
            self._opaque_depth -= 1

    def join(self, function: Any, args: tuple[Any, ...]) -> Any:
        """Record an operator on a sequence of unknown length."""
        return self._record(
            function,
            args,
            {},
            modules=[],
            make=lambda a, k: self.tracer.create_node("call_function", function, a, k),
            is_known_to_fail=True,
        )

    def _record(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        modules: Sequence[nn.Module],
        make: Callable[[Any, Any], fx.Node],
        is_known_to_fail: bool = False,
    ) -> Any:
        args = tuple(self._caches.without(value, modules) for value in args)
        kwargs = {name: self._caches.without(value, modules) for name, value in kwargs.items()}
        before = [(value, dict(value)) for value in _dicts(args, kwargs)]
        node_args, node_kwargs = self.tracer.create_arg(args), self.tracer.create_arg(kwargs)
        with _contents_kept(before):
            output, learned, used = self._run(function, args, kwargs, modules, is_known_to_fail)
        filled = [(value, old) for value, old in before if not _same(value, old)]
        if filled:
            for value, old in filled:
                self._state(value, old)
            node_args, node_kwargs = (self._with_states(arguments) for arguments in (args, kwargs))
        node = make(node_args, node_kwargs)
        node.meta["structure"] = output
        if used is not None:
            node.meta["uses"] = used
        if learned is not None:
            node.meta[DRY_RUN] = True
        result = self.tracer.track(output, fx.Proxy(node, self.tracer))
        if learned is not None:
            self.replay.remember(node, learned.real)
        for value, old in filled:
            self._refill(value, old)
        return result

    def _run(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        modules: Sequence[nn.Module],
        is_known_to_fail: bool,
    ) -> tuple[Any, DryRun | None, tuple[str, ...] | None]:
        """Return a step's result in fake tensors, its dry run if any, and the parameters that an opaque step uses."""
        shape_env, names = self.tracer.shape_env, self.tracer.parameter_names
        with disable_proxy_modes_tracing(), shape_env.ignore_fresh_unbacked_symbols():
            try:
                if is_known_to_fail:
                    raise TraceError("a sequence of unknown length cannot be joined on fake tensors")
                with shape_env.sizes_kept_free(), self._seen() as seen:
                    if seen is None and len(modules) == 1:
                        call = functools.partial(function, *args, **kwargs)
                        output = self.leaf_cache.call(modules[0], args, kwargs, call)
                    else:
                        output = function(*args, **kwargs)
                return output, None, self._used(seen)
            except Exception as error:
                if isinstance(error, TargetInsideError):
                    raise
                try:
                    learned = dry_run(
                        function,
                        args,
                        kwargs,
                        modules=modules,
                        replay=self.replay,
                        fake_mode=self.tracer.fake_mode,
                        memory=self._memory,
                        names=names,
                    )
                    return learned.fake, learned, learned.used if self._opaque_depth else None
                except TargetInsideError:
                    raise
                except Exception as second:
                    if isinstance(error, SizeSpecializedError):  # the step allows this size only
                        with self._seen() as seen:
                            output = function(*args, **kwargs)
                        return output, None, self._used(seen)
                    raise second if isinstance(second, TraceError) else error from second

    @contextlib.contextmanager
    def _seen(self) -> Iterator[ParametersSeen | None]:
        if not self._opaque_depth:
            yield None
            return
        with ParametersSeen() as seen:
            yield seen

    def _used(self, seen: ParametersSeen | None) -> tuple[str, ...] | None:
        names = self.tracer.parameter_names
        return None if seen is None else tuple(dict.fromkeys(n for t in seen.tensors for n in names.get(t, ())))

    def _execute(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        with values_apart(), real_tensors(_modules(args, kwargs), LIMIT_BYTES):
            return function(*args, **kwargs)

    def state_node(self, value: Any) -> fx.Node | None:
        """Return the node of a dictionary that steps fill, unless other code has modified it."""
        known = self._states.get(id(value))
        return known[2] if known is not None and _same(value, known[1]) else None

    def _state(self, value: MutableMapping[Any, Any], old: dict[Any, Any]) -> None:
        """Make a dictionary filled by a step a value of the graph, so that every step gets the same one."""
        known = self._states.get(id(value))
        if known is None or not _same(old, known[1]):
            node = self.tracer.create_node(
                "call_function", copy_dict, (self.tracer.create_arg(dict(old)),), {}, "state"
            )
            self._states[id(value)] = (value, old, node)

    def _with_states(self, value: Any) -> Any:
        """Apply `create_arg`, with the nodes of dictionaries from before the step modified them."""
        if id(value) in self._states:
            return self._states[id(value)][2]
        if type(value) is tuple:
            return tuple(self._with_states(item) for item in value)
        if isinstance(value, (dict, UserDict)):
            return {key: self._with_states(item) for key, item in value.items()}
        return self.tracer.create_arg(value)

    def _refill(self, value: MutableMapping[Any, Any], old: dict[Any, Any]) -> None:
        """Create nodes for the items that the step has added to a dictionary."""
        previous = self._states[id(value)][2]
        node = self.tracer.create_node("call_function", copy_dict, (previous,), {}, "state")
        proxy = fx.Proxy(node, self.tracer)
        for key, item in list(value.items()):
            if key not in old or old[key] is not item:
                value[key] = self.tracer.track(item, self.tracer.item(proxy, key))
        self._states[id(value)] = (value, dict(value), node)


def _modules(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[nn.Module]:
    """Return the modules among the arguments of a step."""
    return [value for value in (*args, *kwargs.values()) if isinstance(value, nn.Module)]


def _dicts(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[MutableMapping[Any, Any]]:
    """Yield the dictionaries among the arguments of a step."""
    for item in (*args, *kwargs.values()):
        if isinstance(item, (dict, UserDict)) and not dataclasses.is_dataclass(item):
            yield item


def _same(one: Mapping[Any, Any], other: Mapping[Any, Any]) -> bool:
    return list(one) == list(other) and all(one[key] is other[key] for key in one)


@contextlib.contextmanager
def _contents_kept(found: Sequence[tuple[MutableMapping[Any, Any], dict[Any, Any]]]) -> Iterator[None]:
    """Restore the given contents of dictionaries if the step fails."""
    try:
        yield
    except BaseException:
        for item, content in found:
            item.clear()
            item.update(content)
        raise
