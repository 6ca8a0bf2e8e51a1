"""Print the minimum versions that pyproject.toml declares, as pip's requirements: `make test-oldest`.

Bounded tools of the extras `dev` and `docs` are left out: they check the code and draw the documentation, and no test
needs them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10; runs in a new environment, where only pip is installed
    from pip._vendor import tomli as tomllib

PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
_REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)>=(?P<version>[\d.]+)(?P<marker>; .+)?")


def declared() -> dict[str, Any]:
    """Return the contents of pyproject.toml."""
    return tomllib.loads(PROJECT.read_text())


def requirements(project: dict[str, Any]) -> dict[str, list[str]]:
    """Return the declared requirements of the build, of the package and of each extra, without its own extras."""
    declared_extras = project["project"]["optional-dependencies"]
    extras = {name: lines for name, lines in declared_extras.items() if name not in ("dev", "docs")}
    groups = {"build": project["build-system"]["requires"], "": project["project"]["dependencies"], **extras}
    return {name: [line for line in lines if not line.startswith("seqbuild-llm[")] for name, lines in groups.items()}


def minimums(project: dict[str, Any]) -> dict[str, str]:
    """Return the declared minimum version of each package; each must have one."""
    found: dict[str, str] = {}
    for line in (line for lines in requirements(project).values() for line in lines):
        match = _REQUIREMENT.fullmatch(line)
        if match is None:
            raise ValueError(f"requirement {line!r} has another form than name>=version; state the minimum version")
        if found.setdefault(match["name"], match["version"]) != match["version"]:
            raise ValueError(f"{match['name']} has several minimum versions; state one")
    return found


def pins(project: dict[str, Any]) -> list[str]:
    """Return `name==minimum` for each package, with its environment marker."""
    minimums(project)
    lines = [line for group in requirements(project).values() for line in group]
    return sorted({line.replace(">=", "==", 1) for line in lines}, key=str.lower)


if __name__ == "__main__":
    print(*pins(declared()), sep="\n")
