"""Leave the process as it was found by code that ran on tensors without values.

A model's code may remember what it has calculated: in a `functools.lru_cache`, a dictionary of its module, a class, a
helper object. Whatever it remembers while it is traced, or while it runs on shapes alone, is a tensor without values,
which whoever calls the model next would be given. So what can change is copied before and put back afterwards
(`runtime.host.mutable_state`):

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

from runtime.host.mutable_state import Kept, StateWalk, is_unrelated, related_modules, same_content

_LRU: type = type(functools.lru_cache(lambda: None))
_LOCK = threading.RLock()  # what is replaced while a model is traced is replaced for all threads
_PLAIN = (str, int, float, bool, type(None), bytes, complex, types.FunctionType, types.BuiltinFunctionType, type)
_RARELY = (100_000, 50, 50)  # as `gc.set_threshold` takes it
_MOST_LOOKED_AT = 10_000
# Where a module of a network keeps its parts.
_MODULES_OWN = ("_parameters", "_buffers", "_modules", "forward", "_forward_hooks", "_forward_pre_hooks")


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
        self._misses = {id(cache): cache.cache_info().misses for cache in _all_caches(walk.caches)}
        self._alive = walk  # ids of what was copied stay theirs
        self._depth = 0
        self.is_restoring = False
        self.is_interrupted = False

    @contextlib.contextmanager
    def run(self) -> Iterator[None]:
        """Around each run of the model's code: afterwards all is restored, unless this run is part of another."""
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
            poisoned = _poisoned(changed)
            for kept in changed:
                if not kept.home or kept.home in poisoned:
                    kept.restore()
            self._clear_caches()
        finally:
            self.is_restoring = before

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Around a run on real values in the middle of another run: neither sees what the other one remembers."""
        changed = [kept for kept in self._kept if kept.is_changed]
        entered = {id(kept): kept.access.read(kept.owner) for kept in changed}
        poisoned = _poisoned(changed)
        for kept in changed:
            if kept.home in poisoned or any(map(holds_tensors, kept.fresh())):
                kept.access.write(kept.owner, _with_replacements(kept.content, entered[id(kept)]))
        filled = [
            (entries, content, dict(entries)) for entries, content in self._entries if len(entries) > len(content)
        ]
        self._clear_caches()
        try:
            yield
        finally:
            self._clear_caches()
            for entries, _, before in filled:
                entries.update(before)
            for kept in self._kept:
                content = entered.get(id(kept), kept.content)
                is_same = same_content(kept.access.read(kept.owner), content)
                is_counted = is_same or not kept.home or id(kept) in entered or any(map(holds_tensors, kept.fresh()))
                if is_counted and not is_same:
                    kept.access.write(kept.owner, content)

    def _clear_caches(self) -> None:
        for entries, content in self._entries:
            for key in [key for key in entries if key not in content]:
                if holds_tensors(key) or holds_tensors(entries[key]):
                    del entries[key]
        for cache in _all_caches(self._walked):
            if cache.cache_info().misses != self._misses.get(id(cache)) and self._is_poisoned(cache):
                cache.cache_clear()

    def _is_poisoned(self, cache: Any) -> bool:
        """Whether a cache that has been filled holds what it must not keep."""
        entries = _entries(cache)
        if entries is not None and any(entries is known for known, _ in self._entries):
            return False  # put right already
        own = (cache, cache.__dict__, getattr(cache, "__wrapped__", None), type(cache))
        return any(holds_tensors(item) for item in gc.get_referents(cache) if not any(item is mine for mine in own))


_active: Found | None = None


def _poisoned(changed: Iterable[Kept]) -> set[str]:
    """The Python modules in which a change is or holds a tensor."""
    return {kept.home for kept in changed if kept.home and any(map(holds_tensors, kept.fresh()))}


def _with_replacements(found: Any, now: Any) -> Any:
    """What was found, with what this project has replaced meanwhile: forwards, builtins, parameters."""
    if not isinstance(found, dict):
        return found
    kept = {key: value for key, value in now.items() if key in _MODULES_OWN or _is_replacement(value)}
    return {**found, **kept}


def _is_replacement(value: Any) -> bool:
    homes = (getattr(value, "__module__", None), type(value).__module__)
    return any(isinstance(home, str) and home.partition(".")[0] in ("seqbuild", "runtime") for home in homes)


@contextlib.contextmanager
def values_apart() -> Iterator[None]:
    """As `Found.apart`, of the run that is going on, if there is one."""
    with _active.apart() if _active is not None else contextlib.nullcontext():
        yield


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
                    yield found
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


def holds_tensors(value: Any) -> bool:
    """Whether a value is a tensor, a symbolic size or a node of a graph, or holds one anywhere."""
    pending, seen = [value], dict[int, Any]()
    while pending and len(seen) < _MOST_LOOKED_AT:
        item = pending.pop()
        if isinstance(item, _PLAIN) or id(item) in seen:
            continue
        seen[id(item)] = item
        if _is_traced(item):
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


def _is_traced(value: Any) -> bool:
    torch: Any = sys.modules.get("torch")
    if torch is None:
        return False
    kinds = (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)
    return isinstance(value, kinds) or type(value).__module__.startswith("torch.fx")


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
    """Every `functools.lru_cache` of the process that can outlive a trace: those that have been walked over, and those
    of other libraries, which are looked for again when modules have been imported since the last time.
    """
    global _num_modules
    if len(sys.modules) != _num_modules:
        _num_modules = len(sys.modules)
        _known[:] = [weakref.ref(item) for item in gc.get_objects() if type(item) is _LRU and not _is_of_sympy(item)]
    known = (ref() for ref in _known)
    return list({id(cache): cache for cache in (*known, *walked) if cache is not None}.values())


def _is_of_sympy(cache: Any) -> bool:
    return str(getattr(cache, "__module__", "")).partition(".")[0] in ("sympy", "mpmath")
