"""Options of a compilation. Nothing here imports torch, so that a request can be looked up before torch is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime.arguments import as_path, require_count, shown
from runtime.errors import UsageError

POLICIES = ("auto", "linear", "target")


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Options of one compilation, as documented in `seqbuild.build.build`; empty `targets` select the model's own."""

    targets: tuple[str, ...]
    ignore: tuple[str, ...]
    auto_ignore: bool
    sample: Path | None
    text_only: bool
    targets_per_subgraph: int
    attn_implementation: str | None
    leaves: str


def make_options(
    *,
    targets: Sequence[str] | str | None = None,
    ignore: Sequence[str] | str = (),
    auto_ignore: bool = True,
    sample: str | os.PathLike[str] | None = None,
    text_only: bool = False,
    targets_per_subgraph: int = 1,
    attn_implementation: str | None = None,
    leaves: str = "auto",
) -> Options:
    """Validate and normalize the options of a user.

    Raises:
        UsageError: for an invalid option.
    """
    if leaves not in POLICIES:
        raise UsageError(f"the leaves are {leaves!r}", hint=f"they can be {', '.join(POLICIES)}")
    require_count("targets per subgraph", targets_per_subgraph)
    return Options(
        targets=_names("targets", targets or ()),
        ignore=_names("ignore", ignore),
        auto_ignore=auto_ignore,
        sample=as_path("the sample", sample) if sample is not None else None,
        text_only=text_only,
        targets_per_subgraph=targets_per_subgraph,
        attn_implementation=attn_implementation,
        leaves=leaves,
    )


def _names(option: str, names: Sequence[str] | str) -> tuple[str, ...]:
    found = (names,) if isinstance(names, str) or not isinstance(names, Iterable) else tuple(names)
    for name in found:
        if not isinstance(name, str):
            raise UsageError(f"{option} has {shown(name)}", hint="it must be a name or a list of names")
    return found
