"""Steps: calls that are recorded whole. A leaf module, an opaque function, a join of a sequence of unknown length.

What a step returns must be known in fake tensors, so that the trace can go on. There is a ladder: it is run on the fake
tensors; where that fails it is rehearsed on real ones; and where only a size of the sample lets it run, that size is
burnt in, which the trace then states or refuses. The rung that was taken is noted on the node.
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
from seqbuild.chain.marks import copy_dict
from seqbuild.trace.real.rehearse import LIMIT_BYTES, Memory, Rehearsal, rehearse
from seqbuild.trace.real.replay import Replay
from seqbuild.trace.real.used_parameters import ParametersSeen, really_there
from seqbuild.trace.record.caches import EmptyCaches
from seqbuild.trace.record.opaque import OpaqueStep
from seqbuild.trace.sizes.symbols import SizeBurntInError

if TYPE_CHECKING:
    from seqbuild.trace.record.leaf_memory import LeafMemory
    from seqbuild.trace.recorder import Recorder

REHEARSED = "rehearsed"


class TargetInsideError(TraceError):
    """A function that calls a target cannot be one step."""


class Steps:
    """Records the steps of one trace.

    Args:
        tracer: owns the graph.
        samples: real inputs of different sizes, see `seqbuild.trace.real.replay`.
        lookup: from the name of a `get_attr` node to what it stands for.
        leaf_memory: gives the results of leaves that are like an earlier one.
    """

    def __init__(
        self,
        tracer: Recorder,
        samples: Sequence[Mapping[str, Any]],
        lookup: Callable[[fx.Node], Any],
        leaf_memory: LeafMemory,
    ) -> None:
        self.tracer = tracer
        self.leaf_memory = leaf_memory
        self.replay = Replay(samples, tracer.shape_env, tracer.node_of, self._execute, lookup)
        self._memory: Memory = {}
        self._states: dict[int, tuple[Any, dict[Any, Any], fx.Node]] = {}
        self._caches = EmptyCaches()
        self._opaque_depth = 0

    def leaf(self, name: str, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        """What replaces a leaf module's forward while the trace lasts."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if get_proxy_mode() is None:  # already inside another step
                if self._opaque_depth and module in self.tracer.targets:
                    raise TargetInsideError(f"an opaque step calls the target {name}")
                return forward(*args, **kwargs)
            if _modules(args, kwargs) and module not in self.tracer.targets:
                return forward(*args, **kwargs)  # an artifact hands modules to opaque steps alone: it is traced through
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
            output, rehearsal, used = self._run(function, args, kwargs, modules, is_known_to_fail)
        filled = [(value, old) for value, old in before if not _same(value, old)]
        if filled:
            for value, old in filled:
                self._state(value, old)
            node_args, node_kwargs = (self._with_states(arguments) for arguments in (args, kwargs))
        node = make(node_args, node_kwargs)
        node.meta["structure"] = output
        if used is not None:
            node.meta["uses"] = used
        if rehearsal is not None:
            node.meta["rung"] = REHEARSED
        result = self.tracer.track(output, fx.Proxy(node, self.tracer))
        if rehearsal is not None:
            self.replay.remember(node, rehearsal.real)
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
    ) -> tuple[Any, Rehearsal | None, tuple[str, ...] | None]:
        """A step's result in fake tensors, what its rehearsal taught, and, for opaque ones, the parameters it uses."""
        shape_env, names = self.tracer.shape_env, self.tracer.parameter_names
        with disable_proxy_modes_tracing(), shape_env.ignore_fresh_unbacked_symbols():
            try:
                if is_known_to_fail:
                    raise TraceError("a sequence of unknown length has no fake tensors")
                with shape_env.sizes_kept_free(), self._seen() as seen:
                    if seen is None and len(modules) == 1:
                        call = functools.partial(function, *args, **kwargs)
                        output = self.leaf_memory.call(modules[0], args, kwargs, call)
                    else:
                        output = function(*args, **kwargs)
                return output, None, self._used(seen)
            except Exception as error:
                if isinstance(error, TargetInsideError):
                    raise
                try:
                    rehearsal = rehearse(
                        function,
                        args,
                        kwargs,
                        modules=modules,
                        replay=self.replay,
                        fake_mode=self.tracer.fake_mode,
                        memory=self._memory,
                        names=names,
                    )
                    return rehearsal.fake, rehearsal, rehearsal.used if self._opaque_depth else None
                except TargetInsideError:
                    raise
                except Exception as second:
                    if isinstance(error, SizeBurntInError):  # not by a loop over it: the step allows no other size
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
        with values_apart(), really_there(_modules(args, kwargs), LIMIT_BYTES):
            return function(*args, **kwargs)

    def state_node(self, value: Any) -> fx.Node | None:
        """The node of a dictionary that steps fill, as long as nothing else has changed it."""
        known = self._states.get(id(value))
        return known[2] if known is not None and _same(value, known[1]) else None

    def _state(self, value: MutableMapping[Any, Any], old: dict[Any, Any]) -> None:
        """Make a dictionary that a step has filled a value of the graph: every step must get the same one."""
        known = self._states.get(id(value))
        if known is None or not _same(old, known[1]):
            node = self.tracer.create_node(
                "call_function", copy_dict, (self.tracer.create_arg(dict(old)),), {}, "state"
            )
            self._states[id(value)] = (value, old, node)

    def _with_states(self, value: Any) -> Any:
        """`create_arg`, with the dictionaries that are states by their nodes, whatever the step has made of them."""
        if id(value) in self._states:
            return self._states[id(value)][2]
        if type(value) is tuple:
            return tuple(self._with_states(item) for item in value)
        if isinstance(value, (dict, UserDict)):
            return {key: self._with_states(item) for key, item in value.items()}
        return self.tracer.create_arg(value)

    def _refill(self, value: MutableMapping[Any, Any], old: dict[Any, Any]) -> None:
        """Name what the step has put into a dictionary."""
        previous = self._states[id(value)][2]
        node = self.tracer.create_node("call_function", copy_dict, (previous,), {}, "state")
        proxy = fx.Proxy(node, self.tracer)
        for key, item in list(value.items()):
            if key not in old or old[key] is not item:
                value[key] = self.tracer.track(item, self.tracer.item(proxy, key))
        self._states[id(value)] = (value, dict(value), node)


def _modules(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[nn.Module]:
    """Modules among the arguments of a step."""
    return [value for value in (*args, *kwargs.values()) if isinstance(value, nn.Module)]


def _dicts(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[MutableMapping[Any, Any]]:
    """Dictionaries among the arguments of a step."""
    for item in (*args, *kwargs.values()):
        if isinstance(item, (dict, UserDict)) and not dataclasses.is_dataclass(item):
            yield item


def _same(one: Mapping[Any, Any], other: Mapping[Any, Any]) -> bool:
    return list(one) == list(other) and all(one[key] is other[key] for key in one)


@contextlib.contextmanager
def _contents_kept(found: Sequence[tuple[MutableMapping[Any, Any], dict[Any, Any]]]) -> Iterator[None]:
    """Dictionaries get back the content that they are listed with when the step fails halfway."""
    try:
        yield
    except BaseException:
        for item, content in found:
            item.clear()
            item.update(content)
        raise
