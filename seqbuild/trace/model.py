"""Trace an in-memory model into a chain of subgraphs."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from runtime.arguments import require_count
from runtime.errors import TargetError, TraceError
from runtime.host.left_as_found import left_as_found
from seqbuild.blame import Culprit, Function, UntraceableError
from seqbuild.chain.partition import partition_graph, target_of, topological_partition, trace_consumed_names
from seqbuild.chain.subgraph import Subgraph
from seqbuild.chain.targets import (
    as_names,
    get_sequential_ancestors,
    match_modules,
    outermost,
    require_targets,
    unmatched_targets,
)
from seqbuild.chain.uncompiled import original, uncompiled
from seqbuild.sample.given import require_module, require_sample
from seqbuild.sample.inputs import longer_text, populate_concrete_args
from seqbuild.trace.decide.decisions import Answer, UndecidedError
from seqbuild.trace.decide.equivalence import is_equivalent
from seqbuild.trace.record.leaf_policy import always_foreign
from seqbuild.trace.record.tracer import SequentialTracer
from seqbuild.trace.search import find_trace
from seqbuild.trace.surroundings import surroundings_as_found

if TYPE_CHECKING:
    from torch import fx, nn

_MOST_NAMED = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """A traced model.

    Attributes:
        graph: the graph of the whole forward.
        targets: the modules at which the graph was cut, outermost only, in execution order.
        subgraphs: the chain.
        tracer: the tracer, with its symbols, constants and unmatched names.
        auto_ignore: paths of the functions that became opaque steps without being listed in `ignore`.
        remarks: one sentence for each target that matches no module or that the sample does not reach.
    """

    graph: fx.Graph
    targets: tuple[nn.Module, ...]
    subgraphs: tuple[Subgraph, ...]
    tracer: SequentialTracer
    auto_ignore: tuple[str, ...]
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceOptions:
    """Options of a trace.

    Attributes:
        ignore: functions to record as one opaque step each, see `trace_subgraphs`.
        may_ignore: whether a function that cannot be recorded may become an opaque step, too.
        targets_per_subgraph: the number of targets in each subgraph.
        dtype: as for `SequentialTracer`.
        samples: real inputs of several sizes for steps that need values, the first with the sizes of the sample.
        is_batch_only: require a symbolic batch size, but not a symbolic length of token inputs.
        leaves: as for `SequentialTracer`.
    """

    ignore: tuple[str, ...] = ()
    may_ignore: Callable[[Function], bool] = lambda function: False
    targets_per_subgraph: int = 1
    dtype: torch.dtype | None = None
    samples: Sequence[Mapping[str, Any]] = ()
    is_batch_only: bool = True
    leaves: str = "target"


def trace_subgraphs(
    model: nn.Module,
    sample_input: Mapping[str, Any],
    sequential_targets: Sequence[str],
    ignore: Sequence[str] = (),
    targets_per_subgraph: int = 1,
    *,
    auto_ignore: bool = True,
) -> list[Subgraph]:
    """Trace a model and cut it so that each sequential target lies in exactly one subgraph.

    Running the subgraphs in order, each with the model's inputs and the outputs of earlier subgraphs, is equivalent to
    running the model.

    Args:
        model: real, on the meta device, or offloaded; it is left unchanged, even if tracing fails.
        sample_input: named inputs; for tensors, only shape and dtype matter.
        sequential_targets: class names, module names or `re:` patterns, see `match_modules`. A warning lists targets
            that match no module or that the sample does not reach, such as vision layers with text-only input.
        ignore: functions to record as one opaque step each: `function`, `Class.method`, `module.path.function`.
            Names without a match are ignored.
        targets_per_subgraph: the number of targets in each subgraph.
        auto_ignore: also make functions that cannot be recorded opaque steps, if that makes the trace possible.

    Raises:
        TargetError: if no target matches a module, or none is called.
        DataError: if the model's forward does not accept the sample.
        TraceError: if code cannot be recorded; the message names function, file and line.
        UsageError: if `targets_per_subgraph` is below one.
    """
    require_module(model)
    require_sample(original(model), sample_input)
    require_count("targets per subgraph", targets_per_subgraph)
    options = TraceOptions(
        ignore=as_names(ignore),
        targets_per_subgraph=targets_per_subgraph,
        may_ignore=lambda function: auto_ignore,
    )
    trace = trace_model(model, sample_input, sequential_targets, options)
    for remark in trace.remarks:
        warnings.warn(remark, stacklevel=2)
    return list(trace.subgraphs)


def trace_model(
    model: nn.Module,
    sample_input: Mapping[str, Any],
    sequential_targets: Sequence[str],
    options: TraceOptions = TraceOptions(),
) -> Trace:
    """Trace a model like `trace_subgraphs` and return the complete trace."""
    model, patterns = original(model), as_names(sequential_targets)
    with uncompiled(model), _in_eval_mode(model), left_as_found(model), surroundings_as_found():
        targets = require_targets(model, patterns)
        silent: dict[nn.Module, None] = {}
        while True:
            attempts = _Attempts(model=model, sample_input=sample_input, targets=targets, options=options)
            graph, tracer = find_trace(attempts.attempt, attempts.is_candidate, _is_equivalent)
            called = _called(graph, model, targets)
            silent |= dict.fromkeys(target for target in targets if target not in called)
            # A target that is never called may contain targets that are called.
            others = outermost(model, [module for module in match_modules(model, patterns) if module not in silent])
            if not others:
                raise _uncalled_error(model, targets)
            if others <= dict.fromkeys(called).keys():
                remarks = _remarks(model, patterns, silent, called)
                return _cut(model, graph, tracer, called, options.targets_per_subgraph, remarks)
            targets = others


@contextlib.contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    was_training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in was_training:
            module.training = True


_Attempt = tuple["fx.Graph", SequentialTracer]


@dataclass(kw_only=True)
class _Attempts:
    """Attempts to trace one model with one sample.

    Attributes:
        ancestors: the modules that contain a target.
        arguments: further arguments of the forward.
        foreign: forwards recorded as one step; attempts add to it if layers are traced through.
    """

    model: nn.Module
    sample_input: Mapping[str, Any]
    targets: Collection[nn.Module]
    options: TraceOptions
    ancestors: Collection[nn.Module] = field(init=False)
    arguments: Mapping[str, Any] = field(init=False)
    foreign: dict[str, None] = field(init=False)

    def __post_init__(self) -> None:
        concrete = populate_concrete_args(self.model, self.sample_input)
        self.ancestors = get_sequential_ancestors(self.model, self.targets)
        self.arguments = {name: concrete[name] for name in ("use_cache",) if name in concrete}
        self.foreign = dict.fromkeys(always_foreign(self.model) if self.options.leaves != "target" else ())

    def attempt(self, paths: Sequence[str], answers: Sequence[Answer]) -> _Attempt:
        """Trace with the sample's sizes as symbols; if that fails, with some sizes fixed, or with a longer sample."""
        try:
            return self._trace(self.sample_input, paths, answers)
        except UntraceableError as error:
            if error.fixed_by_model:  # the model rejects other sizes, so these can be constants
                with contextlib.suppress(TraceError):
                    return self._trace(self.sample_input, paths, answers, error.fixed_by_model)
            longer = longer_text(self.sample_input) if self.options.leaves != "target" else None
            if longer is None:
                raise
            with contextlib.suppress(TraceError):  # the sample may be too short for a loop
                traced, tracer = self._trace(longer, paths, answers)
                if tracer.is_for(self.sample_input):
                    return traced, tracer
            raise

    def _trace(
        self,
        sizes: Mapping[str, Any],
        paths: Sequence[str],
        answers: Sequence[Answer],
        fixed: Collection[tuple[str, int]] = (),
        marks_cache: bool = True,
    ) -> _Attempt:
        tracer = SequentialTracer(
            list(self.ancestors),
            _offloaded(self.model, self.ancestors),
            ignore=(*self.options.ignore, *(path for path in paths if path not in self.foreign)),
            leaves=self.options.leaves,
            foreign=self.foreign,
            dtype=self.options.dtype,
            targets=self.targets,
            answers=answers,
            samples=self.options.samples,
            fixed=fixed,
            marks_cache=marks_cache,
        )
        try:
            traced = tracer.trace(self.model, sizes, self.arguments)
            tracer.require_free_sizes(is_batch_only=self.options.is_batch_only)
        except UntraceableError as error:
            if tracer.cached is not None and tracer.cached.is_refused:
                return self._trace(sizes, paths, answers, fixed, marks_cache=False)
            error.earlier = _earlier_specialization(tracer, self.options.is_batch_only)
            error.fixed_by_model = tracer.fixed_by_model()
            raise
        except UndecidedError as error:
            error.earlier = _earlier_specialization(tracer, self.options.is_batch_only)
            raise
        if tracer.cached is not None and tracer.cached.is_refused:
            return self._trace(sizes, paths, answers, fixed, marks_cache=False)
        return traced, tracer

    def is_candidate(self, function: Function) -> bool:
        """Return whether a function that cannot be traced may become one step."""
        is_ancestor = function.is_forward and function.owner in self.ancestors
        is_wanted = not is_ancestor and self.options.may_ignore(function)
        if is_wanted and self.options.leaves != "target" and function.is_forward:
            self.foreign[function.path] = None
        return is_wanted


def _is_equivalent(one: _Attempt, other: _Attempt, places: Sequence[int]) -> bool:
    return is_equivalent(one[0], other[0], [one[1].decisions.mask_tests[place] for place in places])


def _earlier_specialization(tracer: SequentialTracer, is_batch_only: bool) -> Culprit | None:
    """Return the line of a failed trace that converted a size to a number although it must stay symbolic."""
    try:
        tracer.require_free_sizes(is_batch_only=is_batch_only)
    except UntraceableError as error:
        return error.culprit
    return None


def _cut(
    model: nn.Module,
    graph: fx.Graph,
    tracer: SequentialTracer,
    called: Collection[nn.Module],
    targets_per_subgraph: int,
    remarks: tuple[str, ...],
) -> Trace:
    """Cut the graph of a complete forward into a chain."""
    partitions = topological_partition(graph, called, targets_per_subgraph)
    subgraphs = partition_graph(model, partitions)
    trace_consumed_names(subgraphs)
    for subgraph in subgraphs:
        subgraph.constants = tracer.constants
    found = dict.fromkeys(node.meta["opaque"] for node in graph.nodes if "opaque" in node.meta)
    return Trace(
        graph=graph,
        targets=tuple(called),
        subgraphs=tuple(subgraphs),
        tracer=tracer,
        auto_ignore=tuple(path for path in found if path in tracer.ignore),
        remarks=remarks,
    )


def _called(graph: fx.Graph, model: nn.Module, targets: Collection[nn.Module]) -> list[nn.Module]:
    found = (target_of(node, model, targets) for node in graph.nodes)
    return list(dict.fromkeys(target for target in found if target is not None))


def _uncalled_error(model: nn.Module, targets: Collection[nn.Module]) -> TargetError:
    names = _names(model, targets)
    more = f" (nor are the other {len(names) - 1} targets)" if len(names) > 1 else ""
    return TargetError(
        f"target {names[0]!r} is never called by {type(model).__name__}.forward with this sample input{more}",
        hint="choose modules that are called, such as the classes of its layers",
    )


def _remarks(
    model: nn.Module, patterns: Sequence[str], silent: Collection[nn.Module], called: Collection[nn.Module]
) -> tuple[str, ...]:
    """Describe targets that are ignored."""
    found = [f"{sentence}; it is ignored" for sentence in unmatched_targets(model, patterns)]
    names = _names(model, silent)
    if names:
        shown = ", ".join(names[:_MOST_NAMED]) + (", ..." if len(names) > _MOST_NAMED else "")
        found.append(
            f"{len(names)} of {len(names) + len(called)} sequential targets are never called by "
            f"{type(model).__name__}.forward with this sample input and are ignored: {shown}"
        )
    return tuple(found)


def _names(model: nn.Module, modules: Collection[nn.Module]) -> list[str]:
    wanted = frozenset(modules)
    return [name for name, module in model.named_modules() if module in wanted]


def _offloaded(model: nn.Module, ancestors: Any) -> list[nn.Module]:
    """Return the modules, except ancestors, whose parameters accelerate offloads."""
    return [module for module in model.modules() if hasattr(module, "_hf_hook") and module not in ancestors]
