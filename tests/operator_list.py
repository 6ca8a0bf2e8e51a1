"""Write runtime/language/operators.txt, the overloads that `check` accepts without torch.

    python tests/operator_list.py [--new]

The list has the overloads that every named release of torch accepts. Run this in an environment of each supported
release in turn: the first time with `--new`, which makes the list of the installed release alone; each further run
adds its release, and removes what it does not accept. An overload or release that is not listed is checked with torch.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from runtime.errors import ArtifactError
from runtime.language.operators import ALLOWED, LISTED_PATH, is_allowed, listed, require_operators

RELEASE = ".".join(torch.__version__.split(".")[:2])


@functools.cache
def accepted() -> frozenset[str]:
    """The overloads that the installed torch has and that artifacts may call."""
    found = []
    for name in sorted(ALLOWED):
        packet = getattr(torch.ops.aten, name, None)
        overloads = packet.overloads() if isinstance(packet, torch._ops.OpOverloadPacket) else []
        found += [
            f"{name}.{overload}" for overload in overloads if is_allowed(name, overload) and _passes(name, overload)
        ]
    return frozenset(found)


def _passes(name: str, overload: str) -> bool:
    try:
        require_operators({f"{name}.{overload}": ""})
    except ArtifactError:
        return False
    return True


def main(is_new: bool) -> None:
    releases, overloads = (frozenset[str](), accepted()) if is_new else listed()
    rows: dict[str, list[str]] = {}
    for operator in sorted(overloads & accepted()):
        name, _, overload = operator.partition(".")
        rows.setdefault(name, []).append(overload)
    named = sorted({*releases, RELEASE}, key=lambda release: [int(part) for part in release.split(".")])
    lines = [f"# torch {' '.join(named)}", *(f"{name} {' '.join(own)}" for name, own in rows.items())]
    LISTED_PATH.write_text("\n".join(lines) + "\n", encoding="ascii")
    print(f"{len(rows)} operators for torch {', '.join(named)}")


if __name__ == "__main__":
    main("--new" in sys.argv[1:])
