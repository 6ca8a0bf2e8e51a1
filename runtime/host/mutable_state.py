"""Mutable state of Python objects: find it, copy it, and restore it.

Code may keep state in an attribute, a dictionary of its module, a class, a helper object, a closure, or a default
argument. `StateWalk` visits all of these, starting from given objects, and copies each once, one level deep;
`SavedState.restore` restores such a copy. Tensors are values here: their numbers are neither copied nor restored.

Objects of the standard library, of torch and of other libraries unrelated to models are not visited, except for
containers, functions and modules of a network, because they hold locks, files and threads.
"""

from __future__ import annotations

import collections
import functools
import operator
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

_LRU: type = type(functools.lru_cache(lambda: None))
_ATOMIC = frozenset(
    (
        *(type(None), bool, int, float, complex, str, bytes, bytearray, range, slice, type(...), types.CodeType),
        *(types.BuiltinFunctionType, types.GetSetDescriptorType, types.MemberDescriptorType),
        *(types.MethodDescriptorType, types.WrapperDescriptorType, types.GenericAlias, types.MappingProxyType),
        weakref.ref,
    )
)
_FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial, _LRU)
_DESCRIPTORS = (property, classmethod, staticmethod, functools.cached_property, functools.partialmethod)
# Libraries that keep no state of a model. All others, except the standard library, may.
_UNRELATED_NAMES = """
    torch torchgen functorch sympy mpmath numpy scipy networkx triton pandas pyarrow sklearn matplotlib seqbuild
    runtime huggingface_hub hf_xet filelock fsspec httpx httpcore httpx2 httpcore2 h11 anyio sniffio idna certifi
    requests urllib3 charset_normalizer yaml _yaml jinja2 markupsafe tokenizers safetensors tqdm regex msgspec
    psutil packaging typing_extensions pytest _pytest pluggy hypothesis xdist execnet coverage mypy mypyc pydantic
    pydantic_core loguru rich typer click cffi cryptography setuptools pkg_resources _distutils_hack dateutil pytz
    six attr attrs truststore annotated_types typing_inspection google cython_runtime datasets multiprocess dill
    IPython
"""
_UNRELATED = frozenset(_UNRELATED_NAMES.split())
# Modules with large tables of names, which running a model does not change.
_TABLES = ("transformers.conversion_mapping", "transformers.core_model_loading", "transformers.utils.import_utils")
_OF_LIBRARIES = (
    collections.UserDict,
    collections.UserList,
    collections.ChainMap,
    weakref.WeakKeyDictionary,
    weakref.WeakValueDictionary,
    weakref.WeakSet,
    types.SimpleNamespace,
    threading.local,
)
# A container with more than _DATA numbers or strings, or _MOST_ENTERED objects, is data, not state of a model.
_DATA, _MOST_ENTERED = 1000, 20_000
_SKIPPED_IN_CLASSES = ("__dict__", "__weakref__", "__abstractmethods__", "_abc_impl", "__doc__")


def is_unrelated(module: str | None) -> bool:
    """Whether the module of this name, and objects of its classes, keep no state of a model.

    Classes that code creates may have no module.
    """
    top = (module or "").partition(".")[0]
    return top in _UNRELATED or (top in sys.stdlib_module_names and top != "__main__") or module in _TABLES


@dataclass(frozen=True, slots=True)
class SavedState:
    """A mutable object and a copy of its content.

    Attributes:
        owner: the container, object, class, cell or Python module.
        content: the copy of its content.
        access: reads and writes its content.
        home: the Python module that it was reached from; empty if it belongs to the model, where every change counts.
    """

    owner: Any
    content: Any
    access: Access
    home: str

    @property
    def is_changed(self) -> bool:
        """Whether the owner's content differs from the copy."""
        return not same_content(self.access.read(self.owner), self.content)

    def fresh(self) -> list[Any]:
        """The values that the owner holds now and the copy does not."""
        before = {id(value) for value in _values(self.content)}
        return [value for value in _values(self.access.read(self.owner)) if id(value) not in before]

    def restore(self) -> None:
        """Write the copy back to the owner."""
        self.access.write(self.owner, self.content)


@dataclass(frozen=True, slots=True)
class Access:
    """Functions that read the content of a kind of object, as a new dictionary or list, and that write it."""

    read: Callable[[Any], Any]
    write: Callable[[Any, Any], None]


def same_content(one: Any, other: Any) -> bool:
    """Whether two contents are the same objects in the same order."""
    if len(one) != len(other):
        return False
    if isinstance(one, dict):
        return all(map(operator.is_, one, other)) and all(map(operator.is_, one.values(), other.values()))
    if isinstance(one, set):
        return {id(value) for value in one} == {id(value) for value in other}
    return all(map(operator.is_, one, other))


def _values(content: Any) -> Iterable[Any]:
    return [*content.keys(), *content.values()] if isinstance(content, dict) else content


def _is_dead(value: Any) -> bool:
    return isinstance(value, weakref.ref) and value() is None


def _write_dict(owner: dict[Any, Any], content: dict[Any, Any]) -> None:
    kind: Any = collections.OrderedDict if isinstance(owner, collections.OrderedDict) else dict
    kind.clear(owner)
    for key, value in content.items():
        if not (_is_dead(key) or _is_dead(value)):
            kind.__setitem__(owner, key, value)


def _write_set(owner: set[Any], content: set[Any]) -> None:
    set.clear(owner)
    set.update(owner, [value for value in content if not _is_dead(value)])


def _write_deque(owner: collections.deque[Any], content: list[Any]) -> None:
    collections.deque.clear(owner)
    collections.deque.extend(owner, content)


def _write_attributes(owner: Any, content: dict[str, Any]) -> None:
    """Write to the `__dict__` itself, because the object's own `__setattr__` may do anything."""
    _write_dict(owner.__dict__, content)


def _write_namespace(owner: types.ModuleType, content: dict[str, Any]) -> None:
    """Write a module's namespace, but keep objects imported in the meantime, and Python's own dunder names."""
    namespace = owner.__dict__
    for name in [name for name in namespace if name not in content]:
        if not _is_imported(namespace[name]) and not _is_dunder(name):
            del namespace[name]
    for name, value in content.items():
        if namespace.get(name, content) is not value and not _is_dunder(name):
            namespace[name] = value


def _is_imported(value: Any) -> bool:
    return (
        isinstance(value, (types.ModuleType, type, types.FunctionType))
        and getattr(value, "__module__", None) != "__main__"
    )


def _is_dunder(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def _write_class(owner: type, content: dict[str, Any]) -> None:
    now = dict(vars(owner))
    for name in now:
        if name not in content and name not in _SKIPPED_IN_CLASSES:
            type.__delattr__(owner, name)
    for name, value in content.items():
        if now.get(name, content) is not value and name not in _SKIPPED_IN_CLASSES:
            type.__setattr__(owner, name, value)


def _slots(owner: Any) -> Iterator[Any]:
    for cls in type(owner).__mro__:
        if "__slots__" in vars(cls):
            yield from (value for value in vars(cls).values() if type(value) is types.MemberDescriptorType)


def _read_slots(owner: Any) -> dict[Any, Any]:
    found = {}
    for slot in _slots(owner):
        try:
            found[slot] = slot.__get__(owner)
        except AttributeError:
            continue
    return found


def _write_slots(owner: Any, content: dict[Any, Any]) -> None:
    for slot in _slots(owner):
        if slot in content:
            slot.__set__(owner, content[slot])
        elif slot in _read_slots(owner):
            slot.__delete__(owner)


def _read_cell(owner: types.CellType) -> list[Any]:
    try:
        return [owner.cell_contents]
    except ValueError:
        return []


def _write_cell(owner: types.CellType, content: list[Any]) -> None:
    if content:
        owner.cell_contents = content[0]
    else:
        del owner.cell_contents


_DICT = Access(lambda owner: dict(dict.items(owner)), _write_dict)
_LIST = Access(list, lambda owner, content: list.__setitem__(owner, slice(None), content))
_SET = Access(set, _write_set)
_DEQUE = Access(list, _write_deque)
_ATTRIBUTES = Access(lambda owner: dict(owner.__dict__), _write_attributes)
_NAMESPACE = Access(lambda owner: dict(owner.__dict__), _write_namespace)
_CLASS = Access(lambda owner: dict(vars(owner)), _write_class)
_SLOTS = Access(_read_slots, _write_slots)
_CELL = Access(_read_cell, _write_cell)
_PLAIN = (_DICT, _LIST, _SET)


class StateWalk:
    """A walk over everything reachable that copies mutable state.

    Attributes:
        saved: the copies.
        caches: every `functools.lru_cache` that was reached.
    """

    def __init__(self) -> None:
        self.saved: list[SavedState] = []
        self.caches: list[Any] = []
        self._seen: set[int] = set()
        self._alive: list[Any] = []  # keeps visited objects alive, so that no other object gets their id
        self._home = ""
        self._descend: dict[type, Callable[[Any], Iterable[Any]] | None] = {}

    def go(self, roots: Iterable[Any], home: str = "") -> None:
        """Visit everything reachable from `roots`: a model, or the Python module named `home`."""
        self._home = home
        pending = list(roots)
        seen, kinds, alive = self._seen, self._descend, self._alive
        while pending:
            value = pending.pop()
            kind = type(value)
            if kind in _ATOMIC or id(value) in seen:
                continue
            if kind not in kinds:
                kinds[kind] = self._how(value, kind)
            descend = kinds[kind]
            if descend is None:
                continue
            seen.add(id(value))
            alive.append(value)
            pending.extend(descend(value))

    def _how(self, value: Any, kind: type) -> Callable[[Any], Iterable[Any]] | None:
        """Choose the function that visits objects of a type; None if there is nothing to visit."""
        if issubclass(kind, dict):
            return self._with_attributes(self._dict) if kind is not dict else self._dict
        for base, access in ((list, _LIST), (set, _SET), (collections.deque, _DEQUE)):
            if issubclass(kind, base):
                return functools.partial(self._container, access)
        if issubclass(kind, (tuple, frozenset)):
            return list
        if issubclass(kind, type):
            return self._class
        if issubclass(kind, types.ModuleType):
            return self._namespace
        if issubclass(kind, _FUNCTIONS):
            return self._function
        if issubclass(kind, _DESCRIPTORS):
            return lambda owner: [getattr(owner, name, None) for name in ("fget", "fset", "__func__", "func")]
        if kind is types.CellType:
            return self._cell
        return self._object if _is_entered(kind) else None

    def _keep(self, owner: Any, access: Access) -> Any:
        content = access.read(owner)
        if self._home and content and access in _PLAIN and all(type(value) is str for value in _values(content)):
            return []  # a table of names
        self.saved.append(SavedState(owner, content, access, self._home))
        return content

    def _container(self, access: Access, owner: Any) -> list[Any]:
        if len(owner) > _DATA and type(next(iter(owner))) in _ATOMIC:
            return []
        content = list(self._keep(owner, access))
        return content if len(content) < _MOST_ENTERED else []

    def _cell(self, owner: types.CellType) -> list[Any]:
        return list(self._keep(owner, _CELL))

    def _dict(self, owner: dict[Any, Any]) -> list[Any]:
        content = self._keep(owner, _DICT) or {}
        return [*content.values(), *(key for key in content if type(key) is not str)]

    def _with_attributes(self, visit: Callable[[Any], list[Any]]) -> Callable[[Any], list[Any]]:
        def both(owner: Any) -> list[Any]:
            own = self._keep(owner, _ATTRIBUTES) if getattr(owner, "__dict__", None) else {}
            return [*visit(owner), *own.values(), type(owner)]

        return both

    def _object(self, owner: Any) -> list[Any]:
        found: list[Any] = [type(owner)]
        if hasattr(owner, "__dict__"):
            found += self._keep(owner, _ATTRIBUTES).values()
        if any(True for _ in _slots(owner)):
            found += self._keep(owner, _SLOTS).values()
        return found

    def _class(self, cls: type) -> list[Any]:
        if is_unrelated(cls.__module__):
            return []
        found = [value for name, value in self._keep(cls, _CLASS).items() if name not in _SKIPPED_IN_CLASSES]
        return [*found, *cls.__bases__, *self._written_in(cls.__module__)]

    def _function(self, function: Any) -> list[Any]:
        if isinstance(function, types.MethodType):
            return [function.__self__, function.__func__]
        if isinstance(function, functools.partial):
            return [function.func, function.args, function.keywords]
        if isinstance(function, _LRU):
            self.caches.append(function)
        elif is_unrelated(function.__module__):
            return []
        own = self._keep(function, _ATTRIBUTES).values()
        inner = getattr(function, "__wrapped__", None)
        parts = (getattr(function, name, None) for name in ("__defaults__", "__kwdefaults__", "__closure__"))
        return [*own, *parts, inner]

    def _written_in(self, name: str) -> list[Any]:
        """The Python module that defines a class, if the class belongs to the model."""
        return [sys.modules[name]] if not self._home and name in sys.modules else []

    def _namespace(self, module: types.ModuleType) -> list[Any]:
        """Visit a Python module; functions and classes only if the module defines them."""
        if is_unrelated(module.__name__):
            return []
        content = self._keep(module, _NAMESPACE)
        return [value for name, value in content.items() if not _is_dunder(name) and _belongs(value, module.__name__)]


def _belongs(value: Any, module: str) -> bool:
    kind = type(value)
    if kind in _ATOMIC or issubclass(kind, types.ModuleType):
        return False
    if issubclass(kind, (type, types.FunctionType)):
        return getattr(value, "__module__", None) == module
    return True


def _is_entered(kind: type) -> bool:
    """Whether objects of a type are visited: those of code that may belong to a model, and some of libraries."""
    if issubclass(kind, _OF_LIBRARIES):
        return True
    if not is_unrelated(kind.__module__):
        return True
    torch: Any = sys.modules.get("torch")
    return torch is not None and issubclass(kind, (torch.nn.Module, torch.Tensor))


def related_modules() -> list[types.ModuleType]:
    """Every Python module in this process that may keep state of a model."""
    found = [module for name, module in list(sys.modules.items()) if not is_unrelated(name)]
    return [module for module in found if isinstance(module, types.ModuleType)]
