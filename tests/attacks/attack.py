"""What an attack is: a hostile artifact whose digests are all right, and the reason for which it must be refused."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runtime.artifact.manifest import TensorEntry
from tests.runtime.artifacts import entry, write

_PRIVATE = "/seqbuild-"
VALUE = TensorEntry(dtype="model", shape=("batch", "sequence", 2))
OWNED = "owned"  # the file that attacks try to write into the current directory


@dataclass(frozen=True)
class Attack:
    """A hostile artifact.

    Attributes:
        name: what it tries.
        reason: a part of the message with which it must be refused.
        make: writes it under a directory that does not exist yet.
    """

    name: str
    reason: str
    make: Callable[[Path], object]


def program(name: str, reason: str, *lines: str, head: str = "", tail: str = "", **changes: Any) -> Attack:
    """An artifact of one subgraph, from x to y, with these statements."""
    head = head or "def forward(self, x, *, run):"
    tail = tail or '    return {"y": y}'
    source = "\n".join([head, *(f"    {line}" for line in lines), tail, ""])
    return raw_program(name, reason, source.encode("utf-8"), **changes)


def raw_program(name: str, reason: str, source: bytes, **changes: Any) -> Attack:
    """The same from the bytes of the file."""
    fields = {"file": "subgraphs/000.py", "input_names": ("x",), "output_names": ("y",), **changes}
    chain: dict[str, Any] = {"subgraphs": (entry(**fields),), "conversions": (), "parameters": {}, "constants": ()}
    chain["values"] = dict.fromkeys(fields["output_names"], VALUE)
    contents = {"config.json": b'{"model_type": "llama"}\n', "subgraphs/000.py": source}
    return Attack(name, reason, lambda root: write(root, contents, **chain))


@dataclass
class Watch:
    """What Python's audit events say has happened while it was on duty."""

    root: str = ""
    is_on: bool = False
    seen: list[str] = field(default_factory=list)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.is_on:
            return
        if _PRIVATE in repr(arguments):
            return  # copies that artifacts of other tests had of their own, taken away when these are
        if event in _NEVER or event.startswith(_NEVER_BEGINS):
            self.seen.append(f"{event} {arguments!r:.200}")
        elif event == "exec" and str(getattr(arguments[0], "co_filename", "")).startswith(self.root):
            self.seen.append(f"executed {arguments[0]!r:.200}")
        elif event == "open" and isinstance(arguments[1], str) and set("wax+") & set(arguments[1]):
            self.seen.append(f"wrote {arguments[0]!r:.200}")
        elif event == "import" and str(arguments[0]).startswith("seqbuild_modeling_"):
            self.seen.append(f"imported {arguments[0]}")


_NEVER = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.remove", "os.rename", "pty.spawn", "ctypes.dlopen")
_NEVER_BEGINS = ("subprocess.", "socket.connect", "socket.bind", "shutil.", "urllib.", "pickle.find_class")
WATCH = Watch()
sys.addaudithook(WATCH)


@contextlib.contextmanager
def watched(root: Path) -> Iterator[list[str]]:
    """Note all that an artifact must never make happen; the list fills while the block runs."""
    gc.freeze()  # or what other tests have left would be cleared away, and its files with it, while this one is watched
    WATCH.root, WATCH.seen, WATCH.is_on = str(root), [], True
    try:
        yield WATCH.seen
    finally:
        WATCH.is_on = False
        gc.unfreeze()
