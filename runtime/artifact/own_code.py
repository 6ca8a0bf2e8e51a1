"""A model's own code: its files, the name of the package they are imported as, and the checks of an artifact's entries
about them. Nothing here executes or imports the code; `runtime.artifact.own_code_import` does, after consent.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

from runtime.artifact.encoding import canonical, sha256
from runtime.errors import ArtifactError, ModelError, SeqbuildError

if TYPE_CHECKING:
    from runtime.artifact.manifest import Manifest

FOLDER = "modeling"
FILE_LIMIT_BYTES = 4 * 2**20
_PREFIX = "seqbuild_modeling_"
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,200}\Z")
_CATCHES_IMPORTS = ("ImportError", "ModuleNotFoundError", "Exception", "BaseException")
_HOLDS_STATEMENTS = (ast.stmt, ast.ExceptHandler, ast.match_case)

Read = Callable[[str], "bytes | None"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCode:
    """The files of a model's own code.

    Attributes:
        files: content by path, relative to the model's directory (and to `modeling/` in an artifact), ascending.
    """

    files: Mapping[str, bytes]

    @property
    def package(self) -> str:
        """The package that the files are imported as. Its name is derived from their content: it does not depend on the
        directory, and differs between models.
        """
        return package_name({path: sha256(data) for path, data in self.files.items()})

    @property
    def modules(self) -> tuple[str, ...]:
        """Dotted names of all modules, including the package's name."""
        return tuple(f"{self.package}.{_module_of(path)}" for path in self.files)

    def executed(self, modules: Iterable[str]) -> tuple[str, ...]:
        """List the files that run when `modules` (names that include the package's) are imported."""
        entries = [name.partition(".")[2] for name in modules if name in self.modules]
        return tuple(needed_files(entries, self.files.get, "the model's code", ArtifactError))

    def refusal(self, who: str, classes: Iterable[str], modules: Iterable[str]) -> ModelError:
        """Make the error for code that runs only by consent, which is missing."""
        return ModelError(
            f"{who} brings its own code, for {', '.join(classes)}: this would execute "
            f"{', '.join(self.executed(modules))}",
            hint="read these files, and if you trust them, allow it with --trust-remote-code",
        )


def package_name(digests: Mapping[str, str]) -> str:
    """Derive the package's name from the digests of its files by path."""
    return _PREFIX + sha256(canonical(dict(digests)))[:16]


def is_own_module(module: str) -> bool:
    """Whether a dotted name belongs to a model's own code."""
    return module.startswith(_PREFIX)


@dataclass(frozen=True, kw_only=True, slots=True)
class Import:
    """An import statement: `from <level dots><module> import <names>`; an absolute `import a.b` has no names.

    `is_guarded`: the code works without it, because a `try` catches its failure or only type checkers read it.
    """

    level: int
    module: str
    names: tuple[tuple[str, str], ...]
    line: int
    is_guarded: bool


@lru_cache(maxsize=512)  # for library files, which all models of a process share
def parse_imports(data: bytes) -> tuple[Import, ...]:
    """Find every import statement of a file, at any depth.

    Raises:
        SyntaxError: when it is not valid Python; also ValueError, RecursionError and MemoryError from `ast.parse`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an invalid escape in a string of the model's code
        tree = ast.parse(data)
    return tuple(_imports(tree, False))


def _imports(node: ast.AST, is_guarded: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield Import(level=0, module=alias.name, names=(), line=node.lineno, is_guarded=is_guarded)
    elif isinstance(node, ast.ImportFrom):
        names = tuple((alias.name, alias.asname or alias.name) for alias in node.names)
        yield Import(level=node.level, module=node.module or "", names=names, line=node.lineno, is_guarded=is_guarded)
    guarded = _guarded_body(node)
    for _, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else ():
            if isinstance(child, _HOLDS_STATEMENTS):
                yield from _imports(child, is_guarded or child in guarded)


def _guarded_body(node: ast.AST) -> Sequence[ast.AST]:
    if isinstance(node, ast.Try):
        caught = [name for handler in node.handlers for name in _caught(handler.type)]
        return node.body if any(name in _CATCHES_IMPORTS for name in caught) else ()
    if isinstance(node, ast.If) and "TYPE_CHECKING" in (getattr(node.test, "id", ""), getattr(node.test, "attr", "")):
        return node.body
    return ()


def _caught(kind: ast.expr | None) -> list[str]:
    if kind is None:
        return ["BaseException"]
    return [getattr(part, "id", "") for part in (kind.elts if isinstance(kind, ast.Tuple) else [kind])]


def needed_files(
    entries: Iterable[str], read: Read, origin: str, kind: type[SeqbuildError] = ModelError
) -> dict[str, bytes]:
    """Collect the files of modules and of everything they import from each other, including subpackages.

    Args:
        entries: dotted names, relative to the model's directory.
        read: returns the content of a file by its path, None if it does not exist.
        origin: the owner of the code, for messages.
        kind: class of the error.

    Returns:
        Content by path, ascending.

    Raises:
        SeqbuildError: of `kind`, naming the file that is missing, invalid Python, or outside of the directory.
    """
    finder = _Closure(read=read, origin=origin, kind=kind)
    for module in entries:
        if not finder.take(module.split(".")):
            raise finder.refuse(f"{module.replace('.', '/')}.py is missing")
    while finder.pending:
        finder.follow(finder.pending.pop())
    return dict(sorted(finder.found.items()))


@dataclass(kw_only=True)
class _Closure:
    read: Read
    origin: str
    kind: type[SeqbuildError]
    found: dict[str, bytes] = field(default_factory=dict)
    pending: list[str] = field(default_factory=list)  # found but not yet parsed

    def refuse(self, why: str) -> SeqbuildError:
        return self.kind(
            f"{self.origin} brings its own code, and {why}", hint="complete or correct the model's directory"
        )

    def take(self, parts: Sequence[str]) -> bool:
        """Collect a module, its parent packages and everything it imports; False when its file does not exist."""
        if not all(_IDENTIFIER.match(part) for part in parts):
            raise self.refuse(f"{'.'.join(parts)!r} is not a valid module name")
        path = self._path(parts)
        if path is None:
            return False
        outer = ["/".join((*parts[:depth], "__init__.py")) for depth in range(1, len(parts))]
        for file in (*outer, path):
            data = self.read(file)
            if data is not None and file not in self.found:
                self.found[file] = data
                self.pending.append(file)
        return True

    def _path(self, parts: Sequence[str]) -> str | None:
        stem = "/".join(parts)
        return next((path for path in (f"{stem}/__init__.py", f"{stem}.py") if self.read(path) is not None), None)

    def follow(self, path: str) -> None:
        """Collect the files that a file imports from the same directory tree."""
        data = self.found[path]
        if len(data) > FILE_LIMIT_BYTES:
            raise self.refuse(f"{path} has {len(data)} bytes, more than the {FILE_LIMIT_BYTES} allowed")
        try:
            statements = parse_imports(data)
        except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
            raise self.refuse(f"{path} is not valid Python: {error or type(error).__name__}") from error
        for statement in statements:
            if statement.level:
                self._follow(path, path.split("/")[:-1], statement)

    def _follow(self, path: str, folder: Sequence[str], statement: Import) -> None:
        where = f"{path}, line {statement.line}"
        if statement.level - 1 > len(folder):
            raise self.refuse(f"{where} imports from outside of the model's directory")
        base = folder[: len(folder) - statement.level + 1]
        base = [*base, *(statement.module.split(".") if statement.module else ())]
        is_file = bool(base) and self.take(base)
        is_package = not is_file or "/".join((*base, "__init__.py")) in self.found
        for name, _ in statement.names if is_package else ():
            is_submodule = name != "*" and self.take([*base, name])
            if not is_submodule and not is_file and not statement.is_guarded:
                missing = "/".join(base if statement.module else (*base, name))
                raise self.refuse(f"{where} imports {missing}.py, which is missing")


def check_model_code(manifest: Manifest, contents: Mapping[str, bytes]) -> ModelCode | None:
    """Check an artifact's entries about its model's own code, without executing the code.

    Args:
        manifest: the table of contents.
        contents: the content of every listed file, with its digest already compared.

    Returns:
        The code, or None for a model that is part of transformers.

    Raises:
        ArtifactError: for a file that is not named as code, or incomplete code.
    """
    model = manifest.model
    listed = [path for path in contents if path.startswith(f"{FOLDER}/")]
    odd = [path for path in (*listed, *model.code) if path not in model.code or path not in listed]
    if odd:
        raise ArtifactError(f"{odd[0]} must be in {FOLDER}/ and be listed as the model's own code")
    if sorted(set(model.code)) != list(model.code):
        raise ArtifactError("the list of the model's own code is not in ascending order")
    files = {path.removeprefix(f"{FOLDER}/"): contents[path] for path in model.code}
    for path in files:
        if not path.endswith(".py") or not all(_IDENTIFIER.match(part) for part in path[:-3].split("/")):
            raise ArtifactError(f"{FOLDER}/{path} is not a Python module")
    code = ModelCode(files=files)
    named = [name for name in (model.module, model.config_module) if is_own_module(name)]
    for name in named:
        if name not in code.modules:
            raise ArtifactError(f"the model's class or config is in {name}, which is not among the files of {FOLDER}/")
    if not files:
        return None
    if not named:
        raise ArtifactError(f"the artifact contains {FOLDER}/, but neither its model nor its config comes from there")
    needed_files(map(_module_of, files), files.get, "the artifact", ArtifactError)
    return code


def _module_of(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
