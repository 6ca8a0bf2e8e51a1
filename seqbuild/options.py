"""Options of a compilation. Nothing here imports torch, so that an artifact can be found before torch is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.arguments import as_path, require_count, shown
from runtime.errors import UsageError

DEFAULT_OUT = Path("artifacts")
LEAVES = ("auto", "target", "linear")
ATTENTIONS = ("eager", "sdpa")


@dataclass(frozen=True, kw_only=True, slots=True)
class CompileOptions:
    """Options of one compilation, from the command line to the last pass.

    Paths may also be given as text, and a single name instead of a tuple of names.

    Attributes:
        model: hub id in the local cache, model directory, or config.json.
        targets: patterns of the modules to cut at; empty for the model's no-split classes.
        ignore: functions to record as one opaque step each.
        auto_ignore: also make functions that cannot be recorded opaque steps, wherever that helps.
        sample: a safetensors file with the model's inputs by name; None generates them.
        text_only: generate tokens only, so that a multimodal model can be calibrated with text.
        targets_per_subgraph: the number of targets in each subgraph.
        revision: branch, tag or commit of a hub id.
        attn_implementation: `eager` or `sdpa`; None for the default of transformers.
        out: the parent directory of the artifact's directory.
        force: compile again even if the artifact exists.
        trust_remote_code: allow executing the model's own code, if any.
        leaves: tracing depth. `target` stops at the targets, which a host calls as modules of the model's own classes.
            `linear` continues to modules that the host builds by itself, and keeps whole only what cannot be traced.
            `auto` selects `linear` if no module must be kept whole (the artifact is portable) or if it reaches the
            experts of a mixture (they can be quantized), and `target` otherwise.
    """

    model: str
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    auto_ignore: bool = True
    sample: Path | None = None
    text_only: bool = False
    targets_per_subgraph: int = 1
    revision: str | None = None
    attn_implementation: str | None = None
    out: Path = DEFAULT_OUT
    force: bool = False
    trust_remote_code: bool = False
    leaves: str = "auto"

    def __post_init__(self) -> None:
        """Validate and normalize the values.

        Raises:
            UsageError: naming the option.
        """
        self._set("out", as_path("out", self.out))
        if self.model != "":
            as_path("the model", self.model)
        self._set("model", os.fspath(self.model))  # a path would lose a leading ./
        _require_choice("--leaves", self.leaves, LEAVES)
        if self.attn_implementation is not None:
            _require_choice("--attn-implementation", self.attn_implementation, ATTENTIONS)
        require_count("targets per subgraph", self.targets_per_subgraph)
        self._set("targets", _names("targets", self.targets or ()))
        self._set("ignore", _names("ignore", self.ignore))
        if self.sample is not None:
            self._set("sample", as_path("the sample", self.sample))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # as frozen dataclasses do


def _require_choice(option: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"{option} must be one of {', '.join(choices)}; got {shown(value)}")


def _names(option: str, names: Any) -> tuple[str, ...]:
    found = (names,) if isinstance(names, str) or not isinstance(names, Iterable) else tuple(names)
    for name in found:
        if not isinstance(name, str):
            raise UsageError(f"{option} contains {shown(name)}", hint="give a name or a list of names")
    return found
