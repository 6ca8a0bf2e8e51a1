"""Restore the state of the process after a model's code has run on tensors without values.

A model's code may cache its results: in a `functools.lru_cache`, a dictionary of its module, a class, a helper object.
Results cached while it is traced, or runs on shapes alone, are tensors without values, which the next call of the model
would get. So mutable state is copied before and restored afterwards (`runtime.host.mutable_state`):

    the model's own     modules, helper objects, classes, and their Python modules: every change is reverted
    others'             every other Python module that may keep state of a model: all its changes are reverted if one of
                        them is or holds a tensor, a symbolic size or a node of a graph
    lru_cache           anywhere: entries that hold such a value are removed. One with a maximal size is cleared,
                        because its entries cannot be removed singly

This happens after each run, also after one that fails or is interrupted. Blocks may be nested: the outermost one
copies.
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

from runtime.host.mutable_state import SavedState, StateWalk, is_unrelated, related_modules, same_content

_LRU: type = type(functools.lru_cache(lambda: None))
_LOCK = threading.RLock()  # replacements made while a model is traced affect all threads
_PLAIN = (str, int, float, bool, type(None), bytes, complex, types.FunctionType, types.BuiltinFunctionType, type)
_RARE_COLLECTION = (100_000, 50, 50)  # arguments of `gc.set_threshold`
_MOST_VISITED = 10_000
# Attributes in which a `torch.nn.Module` keeps its parts.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)
_MODULE_PARTS = ("_parameters", "_buffers", "_modules", "forward", *_HOOKS)


class ProcessState:
    """A copy of the process's mutable state, taken before a model's code runs.

    Args:
        roots: the model.
    """

    def __init__(self, roots: Iterable[Any]) -> None:
        walk = StateWalk()
        walk.go(roots)
        for module in related_modules():
            walk.go([module], module.__name__)
        self._saved = walk.saved
        self._networks = [saved for saved in walk.saved if _is_network(saved)]
        self._walked = walk.caches
        self._entries = [(entries, dict(entries)) for cache in walk.caches if (entries := _entries(cache)) is not None]
        self._misses = {id(cache): cache.cache_info().misses for cache in _all_caches(walk.caches)}
        self._alive = walk  # keeps the copied objects alive, so that their ids stay theirs
        self._depth = 0
        self.is_restoring = False
        self.delayed_signal = 0

    @contextlib.contextmanager
    def run(self) -> Iterator[None]:
        """Enclose a run of the model's code; restore the state afterwards unless the run is part of another."""
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
        """Enclose the model's code itself: from its end on, interruptions wait until the state is restored."""
        try:
            yield
        finally:
            self.is_restoring = True

    def restore(self) -> None:
        """Restore the saved state."""
        before, self.is_restoring = self.is_restoring, True
        try:
            changed = [saved for saved in self._saved if saved.is_changed]
            tainted = _modules_holding_tensors(changed)
            for saved in changed:
                if not saved.home or saved.home in tainted:
                    saved.restore()
            self._clear_caches()
        finally:
            self.is_restoring = before

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Enclose a run on real values inside another run, so that neither sees the results that the other caches."""
        changed = [saved for saved in self._saved if saved.is_changed]
        entered = {id(saved): saved.access.read(saved.owner) for saved in changed}
        tainted = _modules_holding_tensors(changed)
        hooks = [(table, dict(table)) for module in self._networks for table in _hook_tables(module.owner)]
        for saved in changed:
            if saved.home in tainted or any(map(holds_tensors, saved.fresh())):
                saved.access.write(saved.owner, _with_replacements(saved.content, entered[id(saved)]))
                _remove_hooks_since(saved)
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
            for saved in self._saved:
                content = entered.get(id(saved), saved.content)
                is_same = same_content(saved.access.read(saved.owner), content)
                is_counted = is_same or not saved.home or id(saved) in entered or any(map(holds_tensors, saved.fresh()))
                if is_counted and not is_same:
                    saved.access.write(saved.owner, content)
            for table, before in hooks:
                if not same_content(dict(table), before):
                    table.clear()
                    table.update(before)

    def _clear_caches(self) -> None:
        for entries, content in self._entries:
            for key in [key for key in entries if key not in content]:
                if holds_tensors(key) or holds_tensors(entries[key]):
                    del entries[key]
        for cache in _all_caches(self._walked):
            if cache.cache_info().misses != self._misses.get(id(cache)) and self._is_tainted(cache):
                cache.cache_clear()

    def _is_tainted(self, cache: Any) -> bool:
        """Whether a cache with new entries holds a tensor."""
        entries = _entries(cache)
        if entries is not None and any(entries is known for known, _ in self._entries):
            return False  # its entries have been removed already
        own = (cache, cache.__dict__, getattr(cache, "__wrapped__", None), type(cache))
        return any(holds_tensors(item) for item in gc.get_referents(cache) if not any(item is mine for mine in own))


_active: ProcessState | None = None


def _modules_holding_tensors(changed: Iterable[SavedState]) -> set[str]:
    """The Python modules in which a changed value is or holds a tensor."""
    return {saved.home for saved in changed if saved.home and any(map(holds_tensors, saved.fresh()))}


def _is_network(saved: SavedState) -> bool:
    """Whether the saved state is that of the attributes of a `torch.nn.Module`."""
    torch: Any = sys.modules.get("torch")
    return torch is not None and isinstance(saved.owner, torch.nn.Module) and "_forward_hooks" in saved.content


def _hook_tables(module: Any) -> list[dict[int, Any]]:
    """The tables of a network module's hooks. A trace exchanges them, so they are not those that were saved."""
    return [module.__dict__[name] for name in _HOOKS if name in module.__dict__]


def _remove_hooks_since(saved: SavedState) -> None:
    """Remove the hooks that a network module got since its attributes were saved.

    transformers keeps in an attribute that it has added hooks. Without the attribute it adds them again, and each
    hidden state would be collected twice.
    """
    if not _is_network(saved):
        return
    for name in _HOOKS:
        table, before = saved.owner.__dict__.get(name, {}), saved.content.get(name, {})
        for key in [key for key, hook in table.items() if key not in before and not _is_replacement(hook)]:
            del table[key]


def _with_replacements(found: Any, now: Any) -> Any:
    """Return the saved content, updated with this project's own replacements: forwards, builtins, parameters."""
    if not isinstance(found, dict):
        return found
    return {**found, **{key: value for key, value in now.items() if key in _MODULE_PARTS or _is_replacement(value)}}


def _is_replacement(value: Any) -> bool:
    homes = (getattr(value, "__module__", None), type(value).__module__)
    return any(isinstance(home, str) and home.partition(".")[0] in ("seqbuild", "runtime") for home in homes)


@contextlib.contextmanager
def values_apart() -> Iterator[None]:
    """Enter `ProcessState.apart` of the current run, if there is one."""
    with _active.apart() if _active is not None else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def left_as_found(*roots: Any) -> Iterator[ProcessState]:
    """Save the state of the process, and restore it after each `ProcessState.run` within the block.

    Blocks of other threads wait.
    """
    global _active
    with _LOCK:
        if _active is not None:
            yield _active
            return
        with _rare_collection():
            _active = found = ProcessState(roots)
            try:
                with _uninterrupted_restoring(found):
                    yield found
            finally:
                _active = None


@contextlib.contextmanager
def _rare_collection() -> Iterator[None]:
    """Make Python collect cyclic garbage rarely: each collection would visit the million objects of the walk."""
    before = gc.get_threshold()
    gc.set_threshold(*(max(usual, rare) if usual else 0 for usual, rare in zip(before, _RARE_COLLECTION, strict=True)))
    try:
        yield
    finally:
        gc.set_threshold(*before)


@contextlib.contextmanager
def _uninterrupted_restoring(found: ProcessState) -> Iterator[None]:
    """Delay signals that stop the process while the state is being restored until the end of the block."""
    is_main = threading.current_thread() is threading.main_thread()
    handlers: dict[int, Any] = {}
    for name in ("SIGHUP", "SIGINT", "SIGTERM") if is_main else ():
        number = getattr(signal, name, None)
        handler = None if number is None else signal.getsignal(number)
        if number is not None and callable(handler):
            handlers[number] = handler

    def handle(number: int, frame: types.FrameType | None) -> None:
        if found.is_restoring:
            found.delayed_signal = number
        else:
            handlers[number](number, frame)

    for number in handlers:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if found.delayed_signal:
            handlers[found.delayed_signal](found.delayed_signal, None)


def holds_tensors(value: Any) -> bool:
    """Whether a value is a tensor, a symbolic size or a node of a graph, or holds one anywhere."""
    pending, seen = [value], dict[int, Any]()
    while pending and len(seen) < _MOST_VISITED:
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
    return found


def _is_traced(value: Any) -> bool:
    torch: Any = sys.modules.get("torch")
    if torch is None:
        return False
    kinds = (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)
    return isinstance(value, kinds) or str(type(value).__module__).startswith("torch.fx")


def _entries(cache: Any) -> dict[Any, Any] | None:
    """The dictionary of an lru_cache without a maximal size; None if it has a maximal size or cannot be found."""
    if cache.cache_parameters()["maxsize"] is not None:
        return None
    own = cache.__dict__
    found = [item for item in gc.get_referents(cache) if type(item) is dict and item is not own]
    return found[0] if len(found) == 1 and len(found[0]) == cache.cache_info().currsize else None


_known: list[weakref.ref[Any]] = []
_num_modules = 0


def _all_caches(walked: Iterable[Any]) -> list[Any]:
    """Every `functools.lru_cache` of the process except sympy's: those found by the walk, and those of other libraries,
    which are searched again if modules have been imported since the last search.
    """
    global _num_modules
    if len(sys.modules) != _num_modules:
        _num_modules = len(sys.modules)
        _known[:] = [weakref.ref(item) for item in gc.get_objects() if type(item) is _LRU and not _is_of_sympy(item)]
    known = (ref() for ref in _known)
    return list({id(cache): cache for cache in (*known, *walked) if cache is not None}.values())


def _is_of_sympy(cache: Any) -> bool:
    return str(getattr(cache, "__module__", "")).partition(".")[0] in ("sympy", "mpmath")
