"""The host's part of seqbuild: check an artifact, run it, calibrate, quantize, evaluate. It never traces."""

import sys

if sys.argv[:1] == ["-m"] and sys.path and sys.path[0] != __path__[0].rpartition("/")[0]:
    # `python -m runtime` looks for modules in the current directory first, which may belong to an unchecked artifact.
    # So that goes before anything else is imported, `__future__` included. `python -P` has already left it out.
    # While NAME of `python -m NAME` is looked for, argv[0] is "-m", and orig_argv ends with NAME and its arguments.
    _name = sys.orig_argv[-len(sys.argv)].partition(".")[0]
    if (_name == "runtime" or _name.endswith("mruntime")) and not getattr(sys.flags, "safe_path", False):
        del sys.path[0]

import importlib
from typing import TYPE_CHECKING, Any

from runtime.errors import (
    ArtifactError,
    DataError,
    DeviceError,
    ModelError,
    OutputError,
    PlanError,
    QuantizationError,
    RecipeError,
    SeqbuildError,
    SignatureError,
    TargetError,
    TraceError,
    UsageError,
    VersionError,
    WeightsError,
    WorkerError,
)

if TYPE_CHECKING:
    from runtime.calibration import calibrate
    from runtime.chain import Artifact, load
    from runtime.data.samples import batches, load_tokens
    from runtime.dequantization import Dequantized, dequantize
    from runtime.evaluation import evaluate
    from runtime.host.dispatch import dispatch_for_sequential
    from runtime.planning.fit import Limits
    from runtime.planning.request import Planned, plan_artifact
    from runtime.recipe.recipe import Recipe
    from runtime.recipe_sweep import Sweep, sweep
    from runtime.streaming.activations import Budget

__version__ = "0.2.0"

__all__ = [
    "Artifact",
    "ArtifactError",
    "Budget",
    "DataError",
    "Dequantized",
    "DeviceError",
    "Limits",
    "ModelError",
    "OutputError",
    "PlanError",
    "Planned",
    "QuantizationError",
    "Recipe",
    "RecipeError",
    "SeqbuildError",
    "SignatureError",
    "Sweep",
    "TargetError",
    "TraceError",
    "UsageError",
    "VersionError",
    "WeightsError",
    "WorkerError",
    "batches",
    "calibrate",
    "dequantize",
    "dispatch_for_sequential",
    "evaluate",
    "load",
    "load_tokens",
    "plan_artifact",
    "sweep",
]

_HOMES = {
    "Artifact": "runtime.chain",
    "Budget": "runtime.streaming.activations",
    "Dequantized": "runtime.dequantization",
    "Limits": "runtime.planning.fit",
    "Planned": "runtime.planning.request",
    "Recipe": "runtime.recipe.recipe",
    "Sweep": "runtime.recipe_sweep",
    "batches": "runtime.data.samples",
    "calibrate": "runtime.calibration",
    "dequantize": "runtime.dequantization",
    "dispatch_for_sequential": "runtime.host.dispatch",
    "evaluate": "runtime.evaluation",
    "load": "runtime.chain",
    "load_tokens": "runtime.data.samples",
    "plan_artifact": "runtime.planning.request",
    "sweep": "runtime.recipe_sweep",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first access, so that `import runtime` does not import torch."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names, which need not be imported yet, and Python's own."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
