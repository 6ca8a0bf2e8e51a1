"""Give some modules a stand-in for a slow import that they do not need, and import as usual everywhere else."""

from __future__ import annotations

import builtins
import contextlib
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class StandIn:
    """What an import binds instead of a module.

    Attributes:
        module: the object that takes its place.
        packages: whose modules get the stand-in, with those of their subpackages.
        modules: other modules that get it.
    """

    module: Any
    packages: Sequence[str] = ()
    modules: Sequence[str] = ()

    def is_for(self, importer: str) -> bool:
        """Whether a module gets the stand-in."""
        return importer in (*self.packages, *self.modules) or importer.startswith(
            tuple(f"{package}." for package in self.packages)
        )


class _Here(threading.local):
    """The stand-ins of one thread, of the innermost block last."""

    def __init__(self) -> None:
        self.blocks: list[Mapping[str, StandIn]] = []


class _Imports:
    """Replaces the import function of the process while any thread has stand-ins."""

    def __init__(self) -> None:
        self.here = _Here()
        self._lock, self._num_blocks, self._usual = threading.Lock(), 0, builtins.__import__
        self._own = self._imported  # one object, which `leave` compares

    def enter(self) -> None:
        with self._lock:
            if not self._num_blocks and builtins.__import__ is not self._own:
                self._usual, builtins.__import__ = builtins.__import__, self._own
            self._num_blocks += 1

    def leave(self) -> None:
        with self._lock:
            self._num_blocks -= 1
            if not self._num_blocks and builtins.__import__ is self._own:  # else other code calls ours
                builtins.__import__ = self._usual

    def _imported(
        self,
        name: str,
        globals: Mapping[str, Any] | None = None,
        locals: Mapping[str, Any] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> Any:
        if level == 0 and name not in sys.modules:
            for stand_ins in reversed(self.here.blocks):
                found = stand_ins.get(name)
                if found is not None and found.is_for(str((globals or {}).get("__name__"))):
                    return found.module
        return self._usual(name, globals, locals, fromlist or (), level)


_IMPORTS = _Imports()


@contextlib.contextmanager
def standing_in(stand_ins: Mapping[str, StandIn]) -> Iterator[None]:
    """Let this thread's imports of modules that are not imported yet bind stand-ins while the block runs.

    Args:
        stand_ins: by the name that the import statement states.
    """
    _IMPORTS.here.blocks.append(stand_ins)
    _IMPORTS.enter()
    try:
        yield
    finally:
        _IMPORTS.leave()
        _IMPORTS.here.blocks.pop()
