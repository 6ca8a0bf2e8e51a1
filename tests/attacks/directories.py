"""Attacks by the directory: what lies there is no plain file, is not listed, or is not what was looked at."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

from runtime.artifact.manifest import MANIFEST_NAME
from tests.attacks.attack import Attack
from tests.runtime.artifacts import write


def done(name: str, reason: str, change: Callable[[Path], object]) -> Attack:
    """The usual artifact, to which this is done."""

    def make(root: Path) -> None:
        write(root)
        change(root)

    return Attack(name, reason, make)


def moved(name: str, path: str, link: Callable[[Path, Path], object], reason: str = "is not a plain file") -> Attack:
    """A file or directory of the artifact moved out of it, and linked to."""

    def change(root: Path) -> None:
        outside = root.parent / f"outside-{root.name}"
        shutil.move(root / path, outside)
        link(root / path, outside)

    return done(name, reason, change)


def _symlink(path: Path, target: Path) -> None:
    path.symlink_to(target)


def _hardlink(path: Path, target: Path) -> None:
    os.link(target, path)


def _socket(path: Path) -> None:
    place = Path.cwd()
    os.chdir(path.parent)  # the name of a socket may not be long
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(place)


def _sparse(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(2**40)


def _pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def _device(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def _file(root: Path, name: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text("import os\nos.system('touch owned')\n")


DIRECTORIES = [
    moved("a symbolic link for a program", "subgraphs/000.py", _symlink),
    moved("a symbolic link for the config", "config.json", _symlink),
    moved("a symbolic link for the manifest", MANIFEST_NAME, _symlink),
    moved("a symbolic link for a directory", "subgraphs", _symlink),
    moved("a hard link for a program", "subgraphs/000.py", _hardlink),
    moved("a hard link for the manifest", MANIFEST_NAME, _hardlink),
    moved("a hard link for the constants", "constants.safetensors", _hardlink),
    done("a symbolic link that is not listed", "is not a plain file", lambda root: _symlink(root / "x", Path("/etc"))),
    done(
        "a hard link within the artifact",
        "is not a plain file",
        lambda root: os.link(root / "subgraphs/000.py", root / "subgraphs/002.py"),
    ),
    done("a dangling link", "is not a plain file", lambda root: _symlink(root / "x", root / "nothing")),
    done("a link to itself", "is not a plain file", lambda root: _symlink(root / "x", root / "x")),
    done("a link to its own directory", "is not a plain file", lambda root: _symlink(root / "subgraphs/x", root)),
    done("a device for a program", "is not a plain file", lambda root: _device(root / "subgraphs/000.py")),
    done("a pipe", "is not a plain file", lambda root: _pipe(root / "pipe")),
    done("a pipe for a program", "is not a plain file", lambda root: _pipe(root / "subgraphs/000.py")),
    done("a pipe for the manifest", "is not a plain file", lambda root: _pipe(root / MANIFEST_NAME)),
    done("a socket", "is not a plain file", lambda root: _socket(root / "socket")),
    done("a terabyte for a program", "subgraphs/000.py is damaged", lambda root: _sparse(root / "subgraphs/000.py")),
    done("a terabyte for the manifest", f"{MANIFEST_NAME} is damaged", lambda root: _sparse(root / MANIFEST_NAME)),
    done(
        "a terabyte for the constants",
        "constants.safetensors is damaged",
        lambda root: _sparse(root / "constants.safetensors"),
    ),
    done(
        "a directory for a program",
        "is incomplete: ",
        lambda root: ((root / "subgraphs/000.py").unlink(), (root / "subgraphs/000.py").mkdir()),
    ),
    *(
        done(f"an unlisted {name}", "which its manifest does not list", lambda root, name=name: _file(root, name))
        for name in (
            "typing.py",
            "torch.py",
            "runtime/__main__.py",
            "sitecustomize.py",
            "conftest.py",
            "evil.so",
            "subgraphs/__init__.py",
            "modeling/x.py",
            ".hidden",
            "evil.pth",
            "a/b/c/d/e.py",
            "a\x1b[2Jb",
        )
    ),
    done("an unlisted empty directory", "does not list", lambda root: (root / "torch").mkdir()),
    done(
        "an unlisted name that is no text",
        "does not list",
        lambda root: Path(os.fsdecode(os.fsencode(root) + b"/\xff\xfe")).write_bytes(b""),
    ),
    done("a deep directory", "does not list", lambda root: (root / "/".join("d" * 200)).mkdir(parents=True)),
    done("a missing program", "is incomplete: ", lambda root: (root / "subgraphs/001.py").unlink()),
    done("no manifest", "has no manifest", lambda root: (root / MANIFEST_NAME).unlink()),
]
