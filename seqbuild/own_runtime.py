"""Require that `runtime` is the package installed next to this one: many projects have a module of that name."""

from __future__ import annotations

import importlib.util
import os
import re
import sys

_FOLDER = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "runtime")
_FILE = os.path.join(_FOLDER, "__init__.py")
_VERSION = re.compile(r'^__version__ = "([^"\n]{1,40})"', re.MULTILINE)


def require_own_runtime(version: str) -> None:
    """Import `runtime`, and require that it is the one of this installation, and has the same version.

    A process of the program `seqbuild` runs no other code, so there a foreign `runtime` on the path is ignored.

    Raises:
        ImportError: another module is found first, or the one next to this package has another version.
        SystemExit: the same in the program `seqbuild`, after a message.
    """
    is_own_process = _is_own_process()
    try:
        _require(version, is_own_process)
    except ImportError as error:
        if not is_own_process:
            raise
        print(f"seqbuild: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _is_own_process() -> bool:
    program = (sys.argv or [""])[0]
    if program == "-m":  # the module that `python -m` runs is being looked for
        return sys.orig_argv[-len(sys.argv)].partition(".")[0].endswith("seqbuild")
    return os.path.basename(program) == "seqbuild"


def _require(version: str, is_own_process: bool) -> None:
    if not os.path.isfile(_FILE):
        raise ImportError(_broken(version), name="runtime", path=_FILE)
    is_imported = "runtime" in sys.modules
    found = _file_of(sys.modules["runtime"]) if is_imported else _file_on_path()
    if found is not None and not _is_same(found) and (is_imported or not is_own_process):
        raise ImportError(_foreign(found, is_imported), name="runtime", path=found)
    if not is_imported and (found is None or not _is_same(found)):
        _import_from_folder()
    import runtime

    if getattr(runtime, "__version__", None) != version:
        raise ImportError(_broken(version), name="runtime", path=_FILE)


def _file_of(module: object) -> str:
    folders = list(getattr(module, "__path__", ()))
    return str(getattr(module, "__file__", None) or (folders[0] if folders else module))


def _file_on_path() -> str | None:
    spec = importlib.util.find_spec("runtime")
    if spec is None:
        return None
    return spec.origin or next(iter(spec.submodule_search_locations or ()), None)


def _is_same(file: str) -> bool:
    folder = file if os.path.isdir(file) else os.path.dirname(file)
    return os.path.isdir(folder) and os.path.samefile(folder, _FOLDER)


def _import_from_folder() -> None:
    spec = importlib.util.spec_from_file_location("runtime", _FILE, submodule_search_locations=[_FOLDER])
    assert spec is not None and spec.loader is not None
    sys.modules["runtime"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def _broken(version: str) -> str:
    return (
        f"{_FILE} is missing, or belongs to another package or version than seqbuild {version} "
        f"(pip install --force-reinstall --no-deps seqbuild-llm=={version})"
    )


def _foreign(file: str, is_imported: bool) -> str:
    """Describe a foreign `runtime`, and how to get it out of the way."""
    item = os.path.dirname(file) if os.path.basename(file) == "__init__.py" else file
    folder = os.path.dirname(os.path.abspath(item))
    how = "was imported before" if is_imported else "comes first on the path"
    places = [os.path.abspath(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    away = f"remove {folder} from PYTHONPATH" if "PYTHONPATH" in os.environ and folder in places else "move it"
    return (
        f"seqbuild needs its own package runtime ({_FOLDER}), but {_described(item)} {how} "
        f"(rename {item}, or {away}, or use the program `seqbuild`, which ignores it)"
    )


def _described(item: str) -> str:
    """Name the file or folder; if it is a runtime of seqbuild, with its version."""
    try:
        with open(os.path.join(item, "__init__.py"), encoding="utf-8") as file:
            text = file.read(2**16)
    except (OSError, ValueError):
        return item
    stated = _VERSION.search(text)
    is_seqbuild = os.path.isfile(os.path.join(item, "artifact", "bundle.py"))
    return f"{item} of another seqbuild ({stated[1]})" if is_seqbuild and stated else item
