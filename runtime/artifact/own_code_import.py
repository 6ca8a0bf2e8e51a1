"""Import a model's own code from memory: from the same bytes whose digests were compared.

The files become the modules of one private package. No search path is changed, nothing is written (no byte code, no
copy), nothing is fetched, and files outside of the list cannot be imported from it. transformers' own loader would copy
the files into a cache under the home directory and could query the hub.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
import threading
import traceback
import warnings
import weakref
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType
from typing import Any

from runtime.artifact.own_code import ModelCode
from runtime.errors import ModelError

_lock = threading.Lock()
_active: dict[str, tuple[_Importer, int]] = {}  # package to its importer and the number of its users


class LoadedCode:
    """A model's own code, importable until `close` or the end of this object's life.

    Two objects for the same files share their modules. Creating one executes nothing; `find` executes the code.

    Args:
        code: the files. The caller must have consent to run them.
    """

    def __init__(self, code: ModelCode) -> None:
        self.code = code
        self.package = code.package
        self.modules = code.modules
        _acquire(self.package, code)
        self.close = weakref.finalize(self, _release, self.package)

    def __enter__(self) -> LoadedCode:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __deepcopy__(self, memo: Any) -> LoadedCode:
        return self

    def find(self, module: str, class_name: str, base: type) -> type:
        """Return a class of the code; this executes its module and the modules that it imports.

        Args:
            module: dotted name, including the package's.
            class_name: name of the class in the module.
            base: required base class.

        Raises:
            ModelError: when the code fails, imports a module that is not installed, or has no such class.
        """
        file = module.removeprefix(f"{self.package}.").replace(".", "/") + ".py"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = getattr(importlib.import_module(module), class_name, None)
        except ModuleNotFoundError as error:
            is_own = not error.name or error.name.startswith(self.package)
            raise ModelError(
                f"the model's own code {self._place(error, file)} imports {error.name!r}, which is "
                + ("missing" if is_own else "not installed"),
                hint="" if is_own else "install the packages that it needs",
            ) from error
        except MemoryError:
            raise
        except (Exception, SystemExit) as error:
            why = (str(error).strip() or "no reason given").splitlines()[0]
            raise ModelError(
                f"the model's own code {self._place(error, file)} fails: {type(error).__name__}: {why}"
            ) from error
        if not isinstance(found, type) or not issubclass(found, base):
            raise ModelError(f"the model's own code {file} has no class {class_name} derived from {base.__name__}")
        return found

    def _place(self, error: BaseException, file: str) -> str:
        """Name the innermost line of the code in an error's traceback."""
        folder = _filename(self.package, "")
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(folder)]
        return f"{frames[-1].filename.removeprefix(folder)}, line {frames[-1].lineno}," if frames else file


def _acquire(package: str, code: ModelCode) -> None:
    with _lock:
        importer, count = _active.get(package) or (_Importer(package, code), 0)
        assert importer.code == code, "two models' codes have one digest"
        if not count:
            sys.meta_path.insert(0, importer)
        _active[package] = importer, count + 1


def _release(package: str) -> None:
    with _lock:
        importer, count = _active.pop(package)
        if count > 1:
            _active[package] = importer, count - 1
            return
        sys.meta_path.remove(importer)
        for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
            del sys.modules[name]


class _Importer(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Importer that finds and loads only the modules of one package."""

    def __init__(self, package: str, code: ModelCode) -> None:
        self.package = package
        self.code = code

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.package and not fullname.startswith(f"{self.package}."):
            return None
        stem, file = self._stem(fullname), self._file(fullname)
        is_folder = not stem or any(other.startswith(f"{stem}/") for other in self.code.files)
        if file is None and not is_folder:
            return None
        spec = ModuleSpec(fullname, self, is_package=file is None or file.endswith("/__init__.py"))
        if file is not None:
            spec.origin, spec.has_location = _filename(self.package, file), True
        return spec

    def get_source(self, fullname: str) -> str:
        file = self._file(fullname)
        return importlib.util.decode_source(self.code.files[file]) if file is not None else ""

    def get_code(self, fullname: str) -> CodeType:
        file = self._file(fullname)
        data = self.code.files[file] if file is not None else b""
        code: CodeType = compile(data, _filename(self.package, file or ""), "exec", dont_inherit=True)
        return code

    def is_package(self, fullname: str) -> bool:
        file = self._file(fullname)
        return file is None or file.endswith("/__init__.py")

    def _stem(self, fullname: str) -> str:
        return fullname[len(self.package) + 1 :].replace(".", "/")

    def _file(self, fullname: str) -> str | None:
        """Return a module's file; the package has none, as transformers ignores a model directory's `__init__.py`."""
        stem = self._stem(fullname)
        candidates = (f"{stem}/__init__.py", f"{stem}.py")
        return next((path for path in candidates if path in self.code.files), None) if stem else None


def _filename(package: str, path: str) -> str:
    """Make the file name shown in tracebacks: absolute, the same on every host, and not the name of a real file."""
    return f"/{package}/{path}"
