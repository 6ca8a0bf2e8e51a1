"""The options of `seqbuild quantize`. Nothing here imports torch."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.cli.batches import DEFAULT_BATCH_SIZE
from runtime.data.options import DataOptions
from runtime.errors import OutputError, UsageError
from runtime.host.publish import require_writable

if TYPE_CHECKING:
    from runtime.streaming.activations import Budget

BUILTIN = "builtin"
BUILTIN_DATA = DataOptions(sources=(BUILTIN,))
DEFAULT_SHARD_BYTES = 2 * 1000**3
# Of the built-in text.
EVALUATED_SAMPLES, EVALUATED_TOKENS = 64, 512


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizeOptions:
    """Options of one call, from the command line to the last step.

    The attributes that are not described are those of `CompileOptions`, `BatchOptions` and `RunOptions`.

    Attributes:
        model: hub id in the local cache, or model directory.
        out: the directory of the quantized checkpoint.
        scheme: a preset of compressed-tensors.
        algorithm: the algorithm for `scheme`; None for the default.
        recipe: path of a recipe, or the name of a preset or an algorithm; instead of `scheme`.
        targets: modules that `scheme` applies to; empty for all Linear modules.
        ignore: modules that `scheme` does not apply to, besides those that are never quantized.
        data: the calibration data; the source `builtin` is the built-in text.
        eval_data: text that the calibration does not read.
        evaluate: measure the perplexity of the model and of the result.
        command: writes the command that repeats the call, for the directory of the weights.
        artifacts: the directory that contains the compiled models; None for that of the user's cache.
    """

    model: str
    out: Path
    scheme: str | None = None
    algorithm: str | None = None
    recipe: str | None = None
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    data: DataOptions = BUILTIN_DATA
    eval_data: tuple[str, ...] = (BUILTIN,)
    evaluate: bool = True
    batch_size: int = DEFAULT_BATCH_SIZE
    tokenizer: Path | None = None
    revision: str | None = None
    text_only: bool = False
    leaves: str = "auto"
    artifacts: Path | None = None
    device: str = "auto"
    dtype: str = "auto"
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    resume: bool = False
    checkpoint_activations: int = 0
    activation_memory: Budget | None = None
    propagate_error: bool = True
    moe_calibrate_all_experts: bool = True
    statistics_memory: int | None = None
    solve_products: str = "float32"
    hash_weights: bool = True
    keep_statistics: Path | None = None
    statistics: Path | None = None
    command: Callable[[Path], str] = lambda weights: ""
    force: bool = False
    allow_version_skew: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        """Reject options that exclude each other.

        Raises:
            UsageError: naming them.
        """
        if (self.scheme is None) == (self.recipe is None):
            found = "both --scheme and --recipe were given" if self.scheme else "no scheme was given"
            raise UsageError(found, hint="pass --scheme W4A16, or another preset, or --recipe FILE")
        if self.recipe is not None:
            given = {"--algorithm": self.algorithm, "--targets": self.targets, "--ignore": self.ignore}
            for option, value in given.items():
                if value:
                    raise UsageError(f"{option} cannot be combined with --recipe", hint="state it in the recipe")


_ELSEWHERE = "pass --artifacts DIRECTORY, or set SEQBUILD_CACHE"


def user_artifacts() -> Path:
    """Return the directory of compiled models in the user's cache.

    Raises:
        UsageError: the user has no home directory, or may not write there. A directory that exists need not be
            writable: it may contain the artifact.
    """
    stated = os.environ.get("SEQBUILD_CACHE")
    try:
        if stated:
            found = Path(stated).expanduser() / "artifacts"
        else:
            found = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "seqbuild" / "artifacts"
    except RuntimeError as error:
        raise UsageError("the user's home directory is unknown", hint=_ELSEWHERE) from error
    try:
        if not found.is_dir():
            require_writable(found)
    except OSError as error:
        raise UsageError(f"the cache {found} cannot be read: {error.strerror}", hint=_ELSEWHERE) from error
    except OutputError as error:
        raise UsageError(error.message, hint=_ELSEWHERE) from error
    return found
