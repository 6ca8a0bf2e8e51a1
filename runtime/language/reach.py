"""Everything that library functions can reach: a walk over the graph of the references in their source."""

from __future__ import annotations

from collections.abc import Iterable

from runtime.language.library import ClassDefinition, FunctionDefinition, bases, methods
from runtime.language.references import References, stored_values, summary
from runtime.language.reviewed import SETTLED, is_computing, is_free, is_known, is_method_elsewhere

_CONSTRUCTORS = ("__init__", "__new__", "__post_init__", "__call__")


class Reach:
    """Everything that functions reach, given the classes of the objects they work with.

    The walk does not infer which method `value.name(...)` calls: it reaches all methods of that name in these classes
    and in those instantiated on the way. A name that none of them defines must be known to be harmless.

    Args:
        classes: the classes of the objects that exist before the call.
    """

    def __init__(self, classes: Iterable[ClassDefinition]) -> None:
        self.functions: dict[str, FunctionDefinition] = {}
        self._problems: dict[str, None] = {}
        self._classes: dict[str, ClassDefinition] = {}
        self._methods: dict[str, dict[str, FunctionDefinition]] = {}
        self._stored: dict[str, list[References]] = {}
        self._origins: dict[str, str] = {}  # used attribute name -> path of the first function that uses it
        self._called: dict[str, None] = {}
        self._pending: list[FunctionDefinition] = []
        for cls in classes:
            self._add(cls)

    def follow(self, functions: Iterable[FunctionDefinition]) -> Reach:
        """Continue the walk from these functions."""
        for function in functions:
            self._reach(function, function.path)
        while self._pending:
            function = self._pending.pop()
            found = summary(function)
            settled = [name for name in found.stored if SETTLED.fullmatch(name)]
            if settled and not function.qualified.endswith("__init__"):
                self._problem(function.path, f"sets {settled[0]}")
            self._take(found, function.path)
        return self

    @property
    def problems(self) -> list[str]:
        """The reached actions that are not known to be harmless, one sentence each."""
        found = list(self._problems)
        for name, origin in self._origins.items():
            is_defined = name in self._methods or name in self._stored or is_free(name)
            if not is_defined and name in self._called:
                found.append(f"{origin} calls the unknown method {name}")
            elif not is_defined and not name.startswith("__") and is_method_elsewhere(name):
                found.append(f"{origin} reads the method {name}")
        return found

    def _problem(self, origin: str, what: str) -> None:
        self._problems[f"{origin} {what}"] = None

    def _take(self, found: References, origin: str) -> None:
        for problem in found.problems:
            self._problem(origin, problem)
        for inner in found.functions.values():
            self._reach(inner, origin)
        for cls in found.classes.values():
            self._make(cls, origin)
        self._called.update(found.called)
        for name in (*found.called, *found.read):
            self._name(name, origin)

    def _reach(self, function: FunctionDefinition, origin: str) -> None:
        if function.path in self.functions or is_known(function.path) or is_known(function.path.rpartition(".")[0]):
            return
        if not is_computing(function.source.name):
            self._problem(origin, f"reaches {function.path}")
            return
        self.functions[function.path] = function
        self._pending.append(function)

    def _make(self, cls: ClassDefinition, origin: str) -> None:
        """Add a class that a function names and may therefore instantiate, and reach its constructors."""
        self._add(cls)
        for one in bases(cls):
            own = methods(one)
            for name in _CONSTRUCTORS:
                if name in own:
                    self._reach(own[name], origin)

    def _name(self, name: str, origin: str) -> None:
        if name in self._origins:
            return
        self._origins[name] = origin
        for function in self._methods.get(name, {}).values():
            self._method(function, origin)
        for found in self._stored.get(name, ()):
            self._take(found, origin)

    def _method(self, function: FunctionDefinition, origin: str) -> None:
        """Reach a method, except one with a harmless name such as `to` outside of the models' own classes: in a
        calculation such a name means the tensor's method.
        """
        name = function.qualified.rpartition(".")[2]
        if not is_free(name) or function.source.name.startswith("transformers.models."):
            self._reach(function, origin)

    def _add(self, cls: ClassDefinition) -> None:
        for one in bases(cls):
            if one.path in self._classes:
                continue
            self._classes[one.path] = one
            for name, function in methods(one).items():
                self._methods.setdefault(name, {})[function.path] = function
                if name in self._origins:
                    self._method(function, self._origins[name])
                for stored, found in stored_values(function):
                    self._stored.setdefault(stored, []).append(found)
                    if stored in self._origins:
                        self._take(found, function.path)
