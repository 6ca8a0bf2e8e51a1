"""Record a model's forward at the dispatcher, with some modules as single steps.

The model's own Python code runs once, unchanged, on fake tensors with symbolic batch and sequence lengths. Operators
outside leaf modules are recorded as `torch.ops.aten` calls, and calls of leaf modules as `call_module`. Python control
flow is executed, so the model's source is neither parsed nor rewritten, and the graph contains no closures or live
objects, which makes it possible to save it.

Recording happens before decomposition (`pre_dispatch`), so composite operators such as `scaled_dot_product_attention`
stay whole and choose their kernel on the device of the run.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode, get_proxy_mode

from runtime.console import quiet
from runtime.errors import SeqbuildError, TraceError
from runtime.host.left_as_found import ProcessState, left_as_found
from runtime.status import doing
from seqbuild.blame import UntraceableError, advice, blame, specialized_size, unsupported_operator
from seqbuild.chain.partition import named_output
from seqbuild.sample.inputs import rehearsal_samples, symbolic_inputs
from seqbuild.trace.decide.constant_answers import constant_answer
from seqbuild.trace.decide.decisions import Answer, Decisions, UndecidedError
from seqbuild.trace.loops.record import Loops
from seqbuild.trace.python.builtins import (
    SymbolicInt,
    lengths_recorded,
    replaced,
    sets_in_order,
    symbolic_max,
    symbolic_min,
)
from seqbuild.trace.python.modes import LiteralTensors, SymbolicIndices, limits_marked, vmap_recorded
from seqbuild.trace.python.sequences import JoinsRecorded
from seqbuild.trace.real.weightless import (
    TRACING_CONFIG,
    attributes_restored,
    configured,
    fake_parameters,
    hooks_set_aside,
)
from seqbuild.trace.record.cached_values import CachedValues, encoder_modules
from seqbuild.trace.record.dead_code import drop_dead_code, drop_dropout
from seqbuild.trace.record.leaf_cache import LeafCache
from seqbuild.trace.record.leaf_policy import LeafPolicy, leaves_left_alone
from seqbuild.trace.record.opaque import find_opaque_steps
from seqbuild.trace.record.proofs import Proofs
from seqbuild.trace.record.sections import Sections
from seqbuild.trace.record.steps import Steps
from seqbuild.trace.record.values import ValueTracer, changed_in_place
from seqbuild.trace.sizes.relations import is_assumption, is_expressible
from seqbuild.trace.sizes.symbols import WatchedSizes, model_sizes, numbers_hashable, sample_sizes

# Torch logs failures on fake tensors, which this package reports itself.
_FAILURE_LOGS = ("torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes")


class SequentialTracer(ValueTracer):
    """An fx tracer that traces through the ancestors of sequential targets and records other modules as steps.

    Args:
        ancestors: the modules to trace through, which contain sequential targets, see `get_sequential_ancestors`.
        offloaded: modules with offloaded parameters; never traced through, even if they are ancestors.
        ignore: functions (`function`, `Class.method`, `module.path.function`) to record as one opaque step each.
        dtype: the dtype of floating-point parameters during the trace; None keeps their own. A dtype that the model's
            code never names marks every place that depends on the run's dtype.
        targets: modules that must not be called inside an opaque step.
        answers: answers to data-dependent decisions, in order, see `seqbuild.trace.decide.decisions`.
        samples: real inputs for steps that need values, the first with the sizes of the sample; empty generates them.
        leaves: `target` makes every module that contains no target one step; `linear` makes only modules that the host
            can build by itself steps (see `runtime.model.leaves`) and traces through all others, including targets.
        foreign: paths of forwards (`module:Class.forward`) whose modules are steps in any case.
        fixed: inputs and axes whose sizes are not symbolic.
        marks_cache: mark the values that would enter the key-value cache, if `leaves` is not `target`.

    After `trace`, `shape_env` contains the symbols and the assumptions about them, `constants` the tensors that the
    code between steps needs, and `unmatched_ignore` the names in `ignore` without a match.
    """

    def __init__(
        self,
        ancestors: set[nn.Module] | Sequence[nn.Module],
        offloaded: set[nn.Module] | Sequence[nn.Module] = (),
        *,
        ignore: Sequence[str] = (),
        dtype: torch.dtype | None = None,
        targets: Collection[nn.Module] = (),
        answers: Sequence[Answer] = (),
        samples: Sequence[Mapping[str, Any]] = (),
        leaves: str = "target",
        foreign: Collection[str] = (),
        fixed: Collection[tuple[str, int]] = (),
        marks_cache: bool = True,
    ) -> None:
        super().__init__(dtype)
        self.policy = leaf_policy(foreign, dtype) if leaves != "target" else None
        self.ancestors = frozenset(ancestors)
        self.offloaded = frozenset(offloaded)
        self.ignore = tuple(ignore)
        self.unmatched_ignore: tuple[str, ...] = ()
        self.targets = frozenset(targets)
        self.samples = samples
        self.fixed = frozenset(fixed)
        self.cached = CachedValues(self) if marks_cache and leaves != "target" else None
        self.decisions = Decisions(answers, self, lambda node: constant_answer(node, self.constants, self.dtype))
        self.shape_env = WatchedSizes(self.decisions)
        self.fake_mode = FakeTensorMode(shape_env=self.shape_env, allow_non_fake_inputs=True)
        self.fake_mode.cache_enabled = False  # it has few hits here
        self._real_buffers: dict[str, torch.Tensor] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether `m` is recorded as one step: if it is offloaded, or has no target inside and is a leaf."""
        if m in self.ancestors or m in self.offloaded:
            return m in self.offloaded
        return self.policy is None or self.policy.is_step(m)

    def trace(  # type: ignore[override]
        self, root: nn.Module, sample_input: Mapping[str, Any], concrete_args: Mapping[str, Any] | None = None
    ) -> fx.Graph:
        """Run `root(**sample_input, **concrete_args)` on fake tensors and return the recorded graph.

        Args:
            root: the model; real, on the meta device, or offloaded. It is left unchanged, even on failure.
            sample_input: named inputs; tensors become placeholders of symbolic size, other values are constants.
            concrete_args: further arguments whose values are part of the program, such as `use_cache=False`.

        Returns:
            The graph. Its output is a dict from the names of the model's output fields to their values.

        Raises:
            TraceError: if code cannot be recorded; the message names function, file and line.
        """
        with left_as_found(root) as found, found.run():
            # A copied context discards changes of context variables.
            return contextvars.copy_context().run(self._trace, root, sample_input, concrete_args, found)

    def _trace(
        self,
        root: nn.Module,
        sample_input: Mapping[str, Any],
        concrete_args: Mapping[str, Any] | None,
        found: ProcessState,
    ) -> fx.Graph:
        self.root = root
        self.graph = fx.Graph(tracer_cls=SequentialTracer)
        if self.policy is not None:
            self.policy.prepare(root)
        opaque, self.unmatched_ignore = find_opaque_steps(root, self.ignore)
        inputs = symbolic_inputs(sample_input, self.fake_mode, self.fixed)
        self.shape_env.own.update(model_sizes(inputs))
        self._real_buffers = {name: buffer for name, buffer in root.named_buffers() if not buffer.is_meta}
        with contextlib.ExitStack() as stack:
            for context in self._surroundings(root):
                stack.enter_context(context)
            self._name_objects(root)
            leaf_cache = LeafCache(root, self.fake_mode)
            steps = Steps(self, self.samples or rehearsal_samples(sample_input), self._lookup, leaf_cache)
            self._steps = steps
            self.decisions.replay = steps.replay
            loops = Loops(self)
            proofs = Proofs(self, loops)
            self._replace_forwards(root, steps, proofs, Sections(self, leaf_cache))
            if self.cached is not None:
                stack.enter_context(self.cached.queries_marked())
            for step in opaque:
                stack.enter_context(step.replaced(steps.opaque))
            deeper = {} if self.policy is None else {"min": symbolic_min, "max": symbolic_max, "range": loops.range}
            stack.enter_context(replaced(root, {"int": SymbolicInt, **deeper}))
            stack.enter_context(vmap_recorded(self))
            stack.enter_context(limits_marked(self.dtype))
            stack.enter_context(leaves_left_alone(inner for leaf in self._leaves(root) for inner in leaf.modules()))
            modes = (torch.no_grad(), enable_python_dispatcher(), self.fake_mode)
            for context in (
                *modes,
                JoinsRecorded(steps.join, loops.join, loops.is_collected),
                LiteralTensors(self.dtype),
                SymbolicIndices(),
            ):
                stack.enter_context(context)
            for name, value in inputs.items():
                if isinstance(value, torch.Tensor):
                    self.track(value, fx.Proxy(self.graph.placeholder(name), self))
            stack.enter_context(ProxyTorchDispatchMode(self, "symbolic", pre_dispatch=True))
            stack.enter_context(found.ended())
            self._run(root, {**inputs, **(concrete_args or {})})
        self._finish(root, proofs, loops)
        return self.graph

    def _surroundings(self, root: nn.Module) -> tuple[contextlib.AbstractContextManager[Any], ...]:
        """Return the contexts of the whole trace, in order of entry."""
        return (
            attributes_restored(root),
            sets_in_order((root, *self.ancestors)),
            hooks_set_aside(root, lambda name, module: self._is_step(root, name, module)),
            fake_parameters(root, self.fake_mode, self.dtype),
            configured(root, TRACING_CONFIG),
            lengths_recorded(root),
            numbers_hashable(),
            quiet(*_FAILURE_LOGS, level=logging.CRITICAL),
        )

    def _finish(self, root: nn.Module, proofs: Proofs, loops: Loops) -> None:
        """Check the graph and remove unneeded nodes and constants."""
        self._kept_alive.clear()
        self._steps = None
        drop_dropout(self.graph)
        drop_dead_code(self.graph)
        proofs.require_closed()
        loops.require_closed(self.graph)
        for node in self.graph.nodes:
            if "culprit" in node.meta:
                raise unsupported_operator(node.target, node.meta["culprit"], self.ancestors)
        self._require_overwritten_unseen()
        used = {node.target for node in self.graph.find_nodes(op="get_attr")}
        self.constants = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in self.constants.items()
            if name in used
        }
        self.graph.owning_module = root  # type: ignore[assignment]

    def _is_own_buffer(self, name: str) -> bool:
        own = self._real_buffers.get(name)
        tensors = [*self._real_buffers.items(), *self.root.named_parameters(remove_duplicate=False)]
        return own is not None and not any(
            other != name and tensor.untyped_storage()._cdata == own.untyped_storage()._cdata
            for other, tensor in tensors
        )

    def _require_overwritten_unseen(self) -> None:
        """Reject steps that use the module of an overwritten buffer, because they would read its old value."""
        seen = [str(node.target) for node in self.graph.nodes if node.op in ("get_attr", "call_module")]
        for name, place in self.overwritten.items():
            if any(name != other and (not other or name.startswith(f"{other}.")) for other in seen):
                raise changed_in_place(name, place)

    def _run(self, root: nn.Module, arguments: Mapping[str, Any]) -> None:
        """Record the model's forward, and attribute errors to a line of its code."""
        try:
            self.graph.output(self.create_arg(named_output(root(**arguments))))
        except UntraceableError:
            raise
        except UndecidedError as error:
            error.hint = advice(error.culprit, self.ancestors) if error.culprit is not None else error.hint
            raise
        except Exception as error:
            if isinstance(error, SeqbuildError) and not isinstance(error, TraceError):
                raise
            raise blame(error, self.ancestors) from error

    def require_free_sizes(self, *, is_batch_only: bool) -> None:
        """Reject a trace that is valid for one size of an input only.

        Args:
            is_batch_only: check the batch only (the first of several axes), not the length of token inputs. Other
                sizes, such as an image's, may be fixed by the model.

        Raises:
            TraceError: naming the input and the line of the model's code that depends on its size.
        """
        for relation, culprit in self.shape_env.assumed:
            is_assumed = is_assumption(relation, is_decided=relation in self.shape_env.decided)
            if not relation.free_symbols <= self.shape_env.own and is_assumed:
                raise specialized_size(f"the relation {relation} of sizes", culprit, self.ancestors)
        assumed = {guard.expr for guard in self.shape_env.guards}
        for relation, culprit in self.shape_env.inexpressible:
            known = self.shape_env.replace(relation)
            if (
                relation in assumed
                and known.free_symbols <= set(sample_sizes(self.shape_env))
                and not is_expressible(known)
            ):
                what = f"the relation {known} of sizes, which no condition can express"
                raise specialized_size(what, culprit, self.ancestors)
        for node in self.graph.find_nodes(op="placeholder"):
            shape = node.meta["val"].shape
            is_text = len(shape) == 2 and not node.meta["val"].is_floating_point()
            for axis, size in enumerate(shape):
                is_meant = (axis == 0 and len(shape) > 1) or (axis == 1 and is_text and not is_batch_only)
                if isinstance(size, torch.SymInt) and is_meant and self.shape_env.is_fixed(size):
                    what = f"the size of {node.target} along axis {axis} ({size.node.hint} in the sample)"
                    raise specialized_size(what, self.shape_env.culprits.get(size.node._expr), self.ancestors)

    def fixed_by_model(self) -> tuple[tuple[str, int], ...]:
        """Return the inputs and axes for which the model requires certain sizes, see `seqbuild.trace.record.proofs`."""
        symbols = {symbol for equality in self.shape_env.required_equalities for symbol in equality.free_symbols}
        return tuple(
            (str(node.target), axis)
            for node in self.graph.find_nodes(op="placeholder")
            for axis, size in enumerate(node.meta["val"].shape)
            if isinstance(size, torch.SymInt) and size.node._expr in symbols
        )

    def is_for(self, sample_input: Mapping[str, Any]) -> bool:
        """Return whether a trace made with other sizes is valid for this sample."""
        sizes: dict[Any, int] = {}
        for node in self.graph.find_nodes(op="placeholder"):
            for size, number in zip(node.meta["val"].shape, sample_input[str(node.target)].shape, strict=True):
                if isinstance(size, torch.SymInt):
                    sizes[self.shape_env.replace(size.node.expr)] = int(number)
        return self.shape_env.allows(sizes)

    def _lookup(self, node: fx.Node) -> Any:
        """Return the value of a `get_attr` node; buffers have real values even during the trace."""
        name = str(node.target)
        if "constant" in node.meta:
            return self.constants[name]
        if name in self._real_buffers:
            return self._real_buffers[name]
        return operator.attrgetter(name)(self.root) if name else self.root

    def _replace_forwards(self, root: nn.Module, steps: Steps, proofs: Proofs, sections: Sections) -> None:
        """Replace the forwards of modules; `attributes_restored` restores them.

        Leaves record a step. In a deep trace, assumptions about sizes are proven by the innermost module that makes
        them. Modules that a trace with `leaves="target"` would record as steps must not make decisions, because as
        steps they would be valid for all data. Targets also mark their nodes, and equal targets are recorded once.
        """
        encoder = encoder_modules(root) if self.cached is not None else frozenset()
        for name, module in root.named_modules():
            if self._is_step(root, name, module):
                module.forward = steps.leaf(name, module, module.forward)
                continue
            if module is not root and self.policy is not None:
                module.forward = proofs.watched(module, module.forward)
            if module in self.targets and module not in self.ancestors:
                module.forward = self._marked(name, module, module.forward, sections)
            elif module not in self.ancestors and root.get_submodule(name.rpartition(".")[0]) in self.ancestors:
                module.forward = self._watched(module.forward)
            if module is not root and self.cached is not None and module not in encoder:
                module.forward = self.cached.watched(name, module, module.forward) or module.forward

    def _watched(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            outer, self.shape_env.is_noting = self.shape_env.is_noting, True
            try:
                return forward(*args, **kwargs)
            finally:
                self.shape_env.is_noting = outer

        return call

    def _marked(
        self, name: str, module: nn.Module, forward: Callable[..., Any], sections: Sections
    ) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._within or get_proxy_mode() is None:
                return forward(*args, **kwargs)
            doing(f"tracing {name}")
            self._within, self.shape_env.is_noting = name, True
            try:
                return sections.call(name, module, args, kwargs, functools.partial(forward, *args, **kwargs))
            finally:
                self._within, self.shape_env.is_noting = "", False

        return call

    def _leaves(self, root: nn.Module) -> Iterator[nn.Module]:
        return (module for name, module in root.named_modules() if self._is_step(root, name, module))

    def _is_step(self, root: nn.Module, name: str, module: nn.Module) -> bool:
        return module is not root and self.is_leaf_module(module, name)


def leaf_policy(foreign: Collection[str] = (), dtype: torch.dtype | None = None) -> LeafPolicy:
    """Create a policy that records programs of leaves with this tracer; for the arguments see `LeafPolicy`."""
    return LeafPolicy(
        foreign, dtype, lambda module, sample: SequentialTracer([module], dtype=dtype).trace(module, sample)
    )
