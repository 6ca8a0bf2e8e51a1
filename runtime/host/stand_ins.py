"""Give some modules a stand-in for a slow import that they do not need, and import as usual everywhere else."""

from __future__ import annotations

import builtins
import contextlib
import sys
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


@contextlib.contextmanager
def standing_in(stand_ins: Mapping[str, StandIn]) -> Iterator[None]:
    """Let imports of these modules bind stand-ins while the block runs, unless the module is imported already.

    Args:
        stand_ins: by the name that the import statement states.
    """
    usual = builtins.__import__

    def imported(
        name: str,
        globals: Mapping[str, Any] | None = None,
        locals: Mapping[str, Any] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> Any:
        found = stand_ins.get(name) if level == 0 and name not in sys.modules else None
        if found is not None and found.is_for(str((globals or {}).get("__name__"))):
            return found.module
        return usual(name, globals, locals, fromlist or (), level)

    builtins.__import__ = imported
    try:
        yield
    finally:
        builtins.__import__ = usual
