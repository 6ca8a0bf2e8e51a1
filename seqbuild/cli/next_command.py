"""The command that quantizes a model which was just compiled."""

from __future__ import annotations

import os
import shlex
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from seqbuild.cache.recall import Compiled
    from seqbuild.options import CompileOptions


def next_command(done: Compiled, options: CompileOptions) -> str:
    """Return the command, with MODEL_DIR for weights that are not beside the config, and DATA for images and sounds."""
    from runtime.data.inputs import is_text_only
    from seqbuild.model.source import resolve_source
    from seqbuild.text import builtin_text

    source = resolve_source(options.model, revision=options.revision)
    has_weights = any(source.directory.glob("*.safetensors"))
    scheme = "W4A16"
    words = ["seqbuild", "calibrate", str(done.path), "--weights"]
    place = str(source.directory) if os.path.exists(options.model) else options.model  # a hub id
    words.append(place if has_weights else "MODEL_DIR")
    words += ["--revision", options.revision] if has_weights and options.revision is not None else []
    words += ["--recipe", scheme, "--data", str(builtin_text()) if is_text_only(done.manifest) else "DATA"]
    if done.manifest.model.code and not done.manifest.is_portable:
        words.append("--trust-remote-code")
    return shlex.join([*words, "-o", f"{source.name}-{scheme}"])
