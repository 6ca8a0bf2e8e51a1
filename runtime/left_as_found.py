"""Leave the process as it was found by code that ran on tensors without values.

A model's code may remember what it has calculated: in a `functools.lru_cache`, a dictionary of its module, a class, a
helper object. Whatever it remembers while it is traced, or while it runs on shapes alone, is a tensor without values,
which whoever calls the model next would be given. So what can change is copied before and put back afterwards
(`runtime.mutable_state`):

    the model's own     modules, helper objects, classes, and the Python modules of these: every change
    anybody else's      every other Python module that may keep something of a model: all changes, where one of them is
                        a tensor, a symbolic size or a node of a graph, or holds one
    lru_cache           wherever it is: entries that hold such a thing are removed. One with a maximal size does not let
                        go of single entries, so it is cleared

This happens after each run, also of one that fails or is interrupted. Blocks may be nested: the outermost one copies.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import signal
import sys
import threading
import types
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

from runtime.mutable_state import StateWalk, is_unrelated, related_modules

_LRU: type = type(functools.lru_cache(lambda: None))
_LOCK = threading.RLock()  # what is replaced while a model is traced is replaced for all threads
_PLAIN = (str, int, float, bool, type(None), bytes, complex, types.FunctionType, types.BuiltinFunctionType, type)
_RARELY = (100_000, 50, 50)  # as `gc.set_threshold` takes it
_MOST_LOOKED_AT = 10_000


class Found:
    """What was found.

    Args:
        roots: the model.
    """

    def __init__(self, roots: Iterable[Any]) -> None:
        walk = StateWalk()
        walk.go(roots)
        for module in related_modules():
            walk.go([module], module.__name__)
        self._kept = walk.kept
        self._walked = walk.caches
        self._entries = [(entries, dict(entries)) for cache in walk.caches if (entries := _entries(cache)) is not None]
        self._misses = {cache: cache.cache_info().misses for cache in walk.caches}
        self._alive = walk  # ids of what was copied stay theirs
        self._depth = 0
        self.is_restoring = False
        self.is_interrupted = False

    @contextlib.contextmanager
    def run(self) -> Iterator[None]:
        """Around each run of the model's code: afterwards everything is restored, unless this run is part of another."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                self.restore()
                self.is_restoring = False

    @contextlib.contextmanager
    def ended(self) -> Iterator[None]:
        """Entered last, right before the model's code: from its end on, nobody interrupts what puts things back."""
        try:
            yield
        finally:
            self.is_restoring = True

    def restore(self) -> None:
        """Put back what was found."""
        before, self.is_restoring = self.is_restoring, True
        try:
            changed = [kept for kept in self._kept if kept.is_changed]
            poisoned = {kept.home for kept in changed if kept.home and any(map(holds_tensors, kept.fresh()))}
            for kept in changed:
                if not kept.home or kept.home in poisoned:
                    kept.restore()
            for entries, content in self._entries:
                for key in [key for key in entries if key not in content]:
                    if holds_tensors(key) or holds_tensors(entries[key]):
                        del entries[key]
            for cache in _all_caches(self._walked):
                if cache.cache_info().currsize and self._is_poisoned(cache):
                    cache.cache_clear()
        finally:
            self.is_restoring = before

    def _is_poisoned(self, cache: Any) -> bool:
        """Whether a cache holds what it must not keep. One that was there may have held real tensors before."""
        is_new = self._misses.get(cache, -1) not in (-1, cache.cache_info().misses)
        entries = _entries(cache)
        if entries is not None and any(entries is known for known, _ in self._entries):
            return False  # put right already
        own = (cache, cache.__dict__, getattr(cache, "__wrapped__", None), type(cache))
        parts = [item for item in gc.get_referents(cache) if not any(item is mine for mine in own)]
        return any(holds_tensors(item, only_valueless=not is_new) for item in parts)


_active: Found | None = None


@contextlib.contextmanager
def left_as_found(*roots: Any) -> Iterator[Found]:
    """Within the block, code of these models may remember whatever it likes.

    Other threads that want the same wait. The code itself runs within `Found.run`.
    """
    global _active
    with _LOCK:
        if _active is not None:
            yield _active
            return
        with _rarely_collected():
            _active = found = Found(roots)
            try:
                with _interrupted_between(found):
                    try:
                        yield found
                    finally:
                        found.restore()
            finally:
                _active = None


@contextlib.contextmanager
def _rarely_collected() -> Iterator[None]:
    """Let Python look for cyclic garbage rarely: looking through a million objects again and again takes long."""
    before = gc.get_threshold()
    gc.set_threshold(*(max(usual, rare) if usual else 0 for usual, rare in zip(before, _RARELY, strict=True)))
    try:
        yield
    finally:
        gc.set_threshold(*before)


@contextlib.contextmanager
def _interrupted_between(found: Found) -> Iterator[None]:
    """Let nobody interrupt what puts things back: the interruption comes when that is done."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def handle(number: int, frame: types.FrameType | None) -> None:
        if found.is_restoring:
            found.is_interrupted = True
        else:
            signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if found.is_interrupted:
            raise KeyboardInterrupt


def holds_tensors(value: Any, *, only_valueless: bool = False) -> bool:
    """Whether a value is a tensor, a symbolic size or a node of a graph, or holds one anywhere.

    Args:
        value: anything.
        only_valueless: real tensors do not count.
    """
    pending, seen = [value], dict[int, Any]()
    while pending and len(seen) < _MOST_LOOKED_AT:
        item = pending.pop()
        if isinstance(item, _PLAIN) or id(item) in seen:
            continue
        seen[id(item)] = item
        if _is_traced(item, only_valueless):
            return True
        if isinstance(item, dict):
            pending += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple, set, frozenset)):
            pending += item
        elif isinstance(item, types.MethodType):
            pending.append(item.__self__)
        elif isinstance(item, functools.partial):
            pending += [item.args, item.keywords]
        elif not isinstance(item, types.ModuleType) and (
            not is_unrelated(type(item).__module__) or type(item).__module__ in ("collections", "types", "weakref")
        ):
            pending += _parts(item)
    return False


def _parts(item: Any) -> list[Any]:
    found = list(getattr(item, "__dict__", {}).values())
    for cls in type(item).__mro__:
        slots = (value for value in vars(cls).values() if type(value) is types.MemberDescriptorType)
        for slot in slots:
            with contextlib.suppress(AttributeError):
                found.append(slot.__get__(item))
    return [*found, *item] if isinstance(item, Iterable) and isinstance(item, (list, set)) else found


def _is_traced(value: Any, only_valueless: bool) -> bool:
    torch: Any = sys.modules.get("torch")
    if torch is None:
        return False
    if isinstance(value, torch.Tensor):
        return not only_valueless or value.is_meta or hasattr(value, "fake_mode")
    symbols = (torch.SymInt, torch.SymFloat, torch.SymBool)
    return isinstance(value, symbols) or type(value).__module__.startswith("torch.fx")


def _entries(cache: Any) -> dict[Any, Any] | None:
    """The dictionary of a cache without a maximal size; None for one that has another structure."""
    if cache.cache_parameters()["maxsize"] is not None:
        return None
    own = cache.__dict__
    found = [item for item in gc.get_referents(cache) if type(item) is dict and item is not own]
    return found[0] if len(found) == 1 and len(found[0]) == cache.cache_info().currsize else None


_known: list[weakref.ref[Any]] = []
_num_modules = 0


def _all_caches(walked: Iterable[Any]) -> list[Any]:
    """Every `functools.lru_cache` of the process. All objects are looked at when modules have been imported since the
    last time, otherwise the recent ones.
    """
    global _num_modules
    is_same = len(sys.modules) == _num_modules
    objects = [*gc.get_objects(generation=0), *gc.get_objects(generation=1)] if is_same else gc.get_objects()
    found = {id(cache): cache for cache in objects if type(cache) is _LRU}
    del objects
    if is_same:
        known = (ref() for ref in _known)
        found |= {id(cache): cache for cache in (*known, *walked) if cache is not None}
    _num_modules = len(sys.modules)
    _known[:] = [weakref.ref(cache) for cache in found.values()]
    return [cache for cache in found.values() if not _is_of_sympy(cache)]


def _is_of_sympy(cache: Any) -> bool:
    return str(getattr(cache, "__module__", "")).partition(".")[0] in ("sympy", "mpmath")
