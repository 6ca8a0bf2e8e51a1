"""Functions and classes of this host's libraries, read from their source files without importing or executing them."""

from __future__ import annotations

import ast
import functools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from runtime.language.library_sources import source_file

LIBRARY = "transformers"
_DEPTH = 12  # of chains of modules that re-export a name
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True, eq=False)
class FunctionDefinition:
    """A function or method; `qualified` is `function` or `Class.method`."""

    source: LibrarySource
    qualified: str
    node: FunctionNode

    @property
    def path(self) -> str:
        """`module:qualified`, the name of the function as an opaque step."""
        return f"{self.source.name}:{self.qualified}"


@dataclass(frozen=True, slots=True, eq=False)
class ClassDefinition:
    """A class defined at the top level of a module."""

    source: LibrarySource
    node: ast.ClassDef

    @property
    def path(self) -> str:
        """`module:Class`."""
        return f"{self.source.name}:{self.node.name}"


@dataclass(frozen=True, slots=True, eq=False)
class ValueDefinition:
    """A value that the top level of a module assigns to a name."""

    source: LibrarySource
    name: str
    node: ast.expr

    @property
    def path(self) -> str:
        """`module:name`."""
        return f"{self.source.name}:{self.name}"


@dataclass(frozen=True, slots=True)
class ExternalName:
    """A module of the library, or any object of another library, by its dotted name."""

    name: str


Definition = FunctionDefinition | ClassDefinition | ValueDefinition | ExternalName


@dataclass(frozen=True, slots=True, eq=False)
class LibrarySource:
    """The top-level definitions of a module by name; branches may define a name several times."""

    name: str
    functions: Mapping[str, FunctionDefinition] = field(default_factory=dict)
    classes: Mapping[str, ClassDefinition] = field(default_factory=dict)
    imports: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # module, and the name in it, or ""
    values: Mapping[str, Sequence[ValueDefinition]] = field(default_factory=dict)
    stars: Sequence[str] = ()


@functools.lru_cache(maxsize=4096)
def source(module: str) -> LibrarySource | None:
    """Parse the source of a module, once per process; None if this host has no source file of it."""
    file = source_file(module)
    return _parsed(module, file.read_bytes(), is_package=file.name == "__init__.py") if file is not None else None


def find(module: str, name: str, depth: int = 0) -> list[Definition]:
    """Find the definitions of a top-level name of a module, following imports; empty if they cannot be determined."""
    found = source(module)
    if found is None or depth > _DEPTH:
        return []
    here: list[Definition] = []
    if name in found.functions:
        here.append(found.functions[name])
    if name in found.classes:
        here.append(found.classes[name])
    here += found.values.get(name, ())
    if name in found.imports:
        here += _imported(*found.imports[name], depth)
    if not here:
        for star in found.stars:
            here = find(star, name, depth + 1)
            if here:
                break
    return here


def find_path(path: str) -> list[FunctionDefinition]:
    """Find the function named by `module:function` or `module:Class.method`; empty if there is none."""
    module, _, qualified = path.partition(":")
    found = source(module)
    owner, _, own = qualified.rpartition(".")
    if found is None or owner.count("."):
        return []
    if not owner:
        is_plain = own in found.functions and own not in found.values and own not in found.imports
        return [found.functions[own]] if is_plain else []
    if owner not in found.classes or owner in found.values or owner in found.imports:
        return []
    method = methods(found.classes[owner]).get(own)
    return [method] if method is not None else []


def methods(cls: ClassDefinition) -> dict[str, FunctionDefinition]:
    """The methods defined in the class itself (not inherited), by name."""
    return {
        node.name: FunctionDefinition(cls.source, f"{cls.node.name}.{node.name}", node)
        for node in _statements(cls.node.body)
        if isinstance(node, FunctionNode)
    }


@functools.lru_cache(maxsize=4096)
def bases(cls: ClassDefinition) -> tuple[ClassDefinition, ...]:
    """The class and those of its base classes that the library defines, nearest first."""
    found = {cls.path: cls}
    for base in cls.node.bases:
        plain = base.value if isinstance(base, ast.Subscript) else base
        for definition in resolve(cls.source, plain):
            if isinstance(definition, ClassDefinition):
                for one in bases(definition):
                    found.setdefault(one.path, one)
    return tuple(found.values())


def resolve(where: LibrarySource, node: ast.expr) -> list[Definition]:
    """Find the definitions of `name` or `owner.name` as used in a module; empty if they cannot be determined."""
    if isinstance(node, ast.Name):
        return find(where.name, node.id)
    if not isinstance(node, ast.Attribute):
        return []
    found: list[Definition] = []
    for owner in resolve(where, node.value):
        if isinstance(owner, ExternalName) and _is_library(owner.name):
            found += find(owner.name, node.attr) or [ExternalName(f"{owner.name}.{node.attr}")]
        elif isinstance(owner, ExternalName):
            found.append(ExternalName(f"{owner.name}.{node.attr}"))
        elif isinstance(owner, ClassDefinition):
            found += [own[node.attr] for own in map(methods, bases(owner)) if node.attr in own]
    return found


def _imported(module: str, name: str, depth: int) -> list[Definition]:
    if not name:
        return [ExternalName(module)]
    if not _is_library(module):
        return [ExternalName(f"{module}.{name}")]
    return find(module, name, depth + 1) or [ExternalName(f"{module}.{name}")]


def _is_library(module: str) -> bool:
    return module == LIBRARY or module.startswith(f"{LIBRARY}.")


def _parsed(module: str, data: bytes, *, is_package: bool) -> LibrarySource:
    functions: dict[str, FunctionDefinition] = {}
    classes: dict[str, ClassDefinition] = {}
    imports: dict[str, tuple[str, str]] = {}
    values: dict[str, list[ValueDefinition]] = {}
    stars: list[str] = []
    found = LibrarySource(module, functions, classes, imports, values, stars)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(data)
    for node in _statements(tree.body):
        if isinstance(node, FunctionNode):
            functions.setdefault(node.name, FunctionDefinition(found, node.name, node))
        elif isinstance(node, ast.ClassDef):
            classes.setdefault(node.name, ClassDefinition(found, node))
        elif isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                imports[alias.asname or top] = (alias.name if alias.asname else top, "")
        elif isinstance(node, ast.ImportFrom):
            origin = _origin(node, module, is_package)
            stars += [origin for alias in node.names if alias.name == "*"]
            imports.update({alias.asname or alias.name: (origin, alias.name) for alias in node.names})
        elif isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                for part in ast.walk(target):
                    if isinstance(part, ast.Name):
                        values.setdefault(part.id, []).append(ValueDefinition(found, part.id, node.value))
    return found


def _origin(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    parts = parts[: len(parts) - node.level + is_package]
    return ".".join([*parts, node.module] if node.module else parts)


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements of a module or class, including those in its branches."""
    for node in body:
        yield node
        if isinstance(node, (ast.If, ast.Try, ast.With)):
            for part in ("body", "orelse", "finalbody"):
                yield from _statements(getattr(node, part, []))
            for handler in getattr(node, "handlers", []):
                yield from _statements(handler.body)
