"""seqbuild: compile a model once into a chain of subgraphs, for calibration and quantization anywhere."""

import sys

if sys.argv[:1] == ["-m"] and sys.path and sys.path[0] != __path__[0].rpartition("/")[0]:
    _name = sys.orig_argv[-len(sys.argv)].partition(".")[0]  # as in runtime/__init__.py
    if (_name == "seqbuild" or _name.endswith("mseqbuild")) and not getattr(sys.flags, "safe_path", False):
        del sys.path[0]

import importlib
from typing import TYPE_CHECKING, Any

from seqbuild.own_runtime import require_own_runtime

if TYPE_CHECKING:
    from runtime.planning.request import plan_artifact as plan
    from seqbuild.build import compile_model
    from seqbuild.chain.partition import (
        find_target_nodes,
        graph_is_well_formed,
        partition_graph,
        topological_partition,
        trace_consumed_names,
    )
    from seqbuild.chain.subgraph import Subgraph
    from seqbuild.chain.targets import get_sequential_ancestors, get_sequential_targets, match_modules
    from seqbuild.onecall.api import oneshot
    from seqbuild.sample.inputs import populate_concrete_args
    from seqbuild.trace.model import trace_subgraphs
    from seqbuild.trace.record.tracer import SequentialTracer
    from seqbuild.verify.artifact import verify_artifact

__version__ = "0.2.0"

require_own_runtime(__version__)

__all__ = [
    "SequentialTracer",
    "Subgraph",
    "compile_model",
    "find_target_nodes",
    "get_sequential_ancestors",
    "get_sequential_targets",
    "graph_is_well_formed",
    "match_modules",
    "oneshot",
    "partition_graph",
    "plan",
    "populate_concrete_args",
    "topological_partition",
    "trace_consumed_names",
    "trace_subgraphs",
    "verify_artifact",
]

_HOMES = {
    "SequentialTracer": "seqbuild.trace.record.tracer",
    "Subgraph": "seqbuild.chain.subgraph",
    "compile_model": "seqbuild.build",
    "find_target_nodes": "seqbuild.chain.partition",
    "get_sequential_ancestors": "seqbuild.chain.targets",
    "get_sequential_targets": "seqbuild.chain.targets",
    "graph_is_well_formed": "seqbuild.chain.partition",
    "match_modules": "seqbuild.chain.targets",
    "oneshot": "seqbuild.onecall.api",
    "partition_graph": "seqbuild.chain.partition",
    "plan": "runtime.planning.request:plan_artifact",
    "populate_concrete_args": "seqbuild.sample.inputs",
    "topological_partition": "seqbuild.chain.partition",
    "trace_consumed_names": "seqbuild.chain.partition",
    "trace_subgraphs": "seqbuild.trace.model",
    "verify_artifact": "seqbuild.verify.artifact",
}


def __getattr__(name: str) -> Any:
    """Import torch only on access to a name that needs it."""
    if name in _HOMES:
        home, _, other_name = _HOMES[name].partition(":")
        return getattr(importlib.import_module(home), other_name or name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names, which need not be imported yet, and Python's own."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
