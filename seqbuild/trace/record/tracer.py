"""Record a model's forward at the dispatcher, with some modules as single steps.

The model's own Python runs once, unchanged, on fake tensors whose batch and sequence lengths are symbols. Whatever
reaches the dispatcher outside a leaf module is recorded as a `torch.ops.aten` call; a leaf's forward is replaced for
the duration by one `call_module`. Python control flow just runs, so nothing of the model's source is parsed or
rewritten, and the graph holds no closure and no live object: that is what makes it possible to save.

Recording happens before decomposition (`pre_dispatch`), so composite operators such as
`scaled_dot_product_attention` stay whole and choose their kernel on the device they run on.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import (
    ProxyTorchDispatchMode,
    get_proxy_mode,
)

from runtime.console import quiet
from runtime.errors import SeqbuildError, TraceError
from runtime.host.left_as_found import Found, left_as_found
from seqbuild.blame import UntraceableError, advice, blame, fixed_size, unsupported_operator
from seqbuild.chain.partition import named_output
from seqbuild.sample.inputs import rehearsal_samples, symbolic_inputs
from seqbuild.trace.decide.constant_answers import constant_answer
from seqbuild.trace.decide.decisions import Answer, Decisions, UndecidedError
from seqbuild.trace.loops.record import Loops
from seqbuild.trace.python.attribute_writes import leaves_left_alone
from seqbuild.trace.python.builtins import Whole, largest, lengths_recorded, replaced, sets_in_order, smallest
from seqbuild.trace.python.modes import LiteralTensors, SymbolicIndices, limits_marked, vmap_recorded
from seqbuild.trace.python.sequences import JoinsRecorded
from seqbuild.trace.real.weightless import fake_parameters, hooks_set_aside, kept_as_found, tracing_configs
from seqbuild.trace.record.cached_values import CachedValues, encoder_modules
from seqbuild.trace.record.dead_code import drop_dead_code, drop_dropout
from seqbuild.trace.record.leaf_memory import LeafMemory
from seqbuild.trace.record.leaf_policy import LeafPolicy
from seqbuild.trace.record.opaque import find_opaque_steps
from seqbuild.trace.record.proofs import Proofs
from seqbuild.trace.record.sections import Sections
from seqbuild.trace.record.steps import Steps
from seqbuild.trace.record.values import ValueTracer, changed_in_place
from seqbuild.trace.sizes.relations import is_assumption, is_statable
from seqbuild.trace.sizes.symbols import WatchedSizes, model_sizes, numbers_hashable, sample_sizes

# Torch logs whatever fails under fake tensors; ours is the one report a user sees.
_FAILURE_LOGS = ("torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes")


class SequentialTracer(ValueTracer):
    """An fx tracer that looks inside the ancestors of sequential targets and nowhere else.

    Args:
        ancestors: modules to trace through: those that contain a sequential target, see `get_sequential_ancestors`.
        offloaded: modules whose parameters live elsewhere; never traced into, even when they are ancestors.
        ignore: functions (`function`, `Class.method`, `module.path.function`) recorded as one opaque step each.
        dtype: give the model's floating point parameters this dtype while tracing, whatever they have; None keeps
            theirs. A dtype that the model's own code never names marks every place which follows the run's dtype.
        targets: modules that may not be called inside of an opaque step.
        answers: to decisions that follow from values, in their order, see `seqbuild.trace.decide.decisions`.
        samples: real inputs for steps that need values, the first with the sizes of the sample; none makes them up.
        leaves: `target` makes every module that contains no target one step; `linear` only what the host can build by
            itself (see `runtime.model.leaves`), and everything else is traced through, targets included.
        foreign: paths of forwards (`module:Class.forward`) whose modules are one step all the same.
        fixed: inputs and axes whose sizes are no symbols.
        marks_cache: note which values would enter the key-value cache, where leaves are traced to.

    After `trace`, `shape_env` holds the symbols and what was assumed about them, `constants` the tensors that the
    glue needs, and `unmatched_ignore` the names in `ignore` that fit no function.
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
        self.decisions = Decisions(answers, self, self._constant_answer)
        self.shape_env = WatchedSizes(self.decisions)
        self.fake_mode = FakeTensorMode(shape_env=self.shape_env, allow_non_fake_inputs=True)
        self.fake_mode.cache_enabled = False  # what it remembers is seldom asked for
        self._real_buffers: dict[str, torch.Tensor] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether `m` is recorded as one step: its parameters are elsewhere, or it contains no target and is a leaf by
        the policy.
        """
        if m in self.ancestors or m in self.offloaded:
            return m in self.offloaded
        return self.policy is None or self.policy.is_step(m)

    def trace(  # type: ignore[override]
        self, root: nn.Module, sample_input: Mapping[str, Any], concrete_args: Mapping[str, Any] | None = None
    ) -> fx.Graph:
        """Run `root(**sample_input, **concrete_args)` on fake tensors and return what it did.

        Args:
            root: the model; real, on the meta device or offloaded. It is left as it was found, also on failure.
            sample_input: named inputs; tensors become placeholders of symbolic size, anything else is taken as is.
            concrete_args: further arguments whose values are part of the program, such as `use_cache=False`.

        Returns:
            The graph. Its output is a dict from the names of the model's output fields to their values.

        Raises:
            TraceError: naming the function of the model, its file and its line, that could not be recorded.
        """
        with left_as_found(root) as found, found.run():
            # In a context of its own, so that what code keeps in context variables goes, too.
            return contextvars.copy_context().run(self._trace, root, sample_input, concrete_args, found)

    def _trace(
        self,
        root: nn.Module,
        sample_input: Mapping[str, Any],
        concrete_args: Mapping[str, Any] | None,
        found: Found,
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
            leaf_memory = LeafMemory(root, self.fake_mode)
            steps = Steps(self, self.samples or rehearsal_samples(sample_input), self._lookup, leaf_memory)
            self._steps = steps
            self.decisions.replay = steps.replay
            self._record_leaves(root, steps)
            loops = Loops(self)
            proofs = Proofs(self, loops)
            self._watch(root, proofs)
            self._watch_inside(root, Sections(self, leaf_memory))
            if self.cached is not None:
                self._note_caches(root, self.cached)
                stack.enter_context(self.cached.queries_marked())
            for step in opaque:
                stack.enter_context(step.replaced(steps.opaque))
            deeper = {} if self.policy is None else {"min": smallest, "max": largest, "range": loops.range}
            stack.enter_context(replaced(root, {"int": Whole, **deeper}))
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
        """What holds around the whole trace, in the order in which it is entered."""
        return (
            kept_as_found(root),
            sets_in_order((root, *self.ancestors)),
            hooks_set_aside(root, lambda name, module: self._is_step(root, name, module)),
            fake_parameters(root, self.fake_mode, self.dtype),
            tracing_configs(root),
            lengths_recorded(root),
            numbers_hashable(),
            quiet(*_FAILURE_LOGS, level=logging.CRITICAL),
        )

    def _finish(self, root: nn.Module, proofs: Proofs, loops: Loops) -> None:
        """Check what was recorded, and drop what the graph does not need."""
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
        """Refuse steps that are handed, or that are, a module of a buffer that was overwritten around them: they would
        see what the buffer held before.
        """
        seen = [str(node.target) for node in self.graph.nodes if node.op in ("get_attr", "call_module")]
        for name, place in self.overwritten.items():
            if any(name != other and (not other or name.startswith(f"{other}.")) for other in seen):
                raise changed_in_place(name, place)

    def _run(self, root: nn.Module, arguments: Mapping[str, Any]) -> None:
        """Run the model's forward while it is recorded; what goes wrong is laid at the door of a line of its code."""
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
        """Refuse a trace that holds for one size of an input only.

        Args:
            is_batch_only: look at the batch alone (the first of several axes), not at the length of token inputs. Other
                sizes may be the model's own, an image's for instance.

        Raises:
            TraceError: naming the input and the line of the model's code that decided by its size.
        """
        for relation, culprit in self.shape_env.assumed:
            is_assumed = is_assumption(relation, is_decided=relation in self.shape_env.decided)
            if not relation.free_symbols <= self.shape_env.own and is_assumed:
                raise fixed_size(f"the relation {relation} of sizes", culprit, self.ancestors)
        assumed = {guard.expr for guard in self.shape_env.guards}
        for relation, culprit in self.shape_env.unstatable:
            known = self.shape_env.replace(relation)
            if (
                relation in assumed
                and known.free_symbols <= set(sample_sizes(self.shape_env))
                and not is_statable(known)
            ):
                raise fixed_size(
                    f"the relation {known} of sizes (which artifacts cannot state)", culprit, self.ancestors
                )
        for node in self.graph.find_nodes(op="placeholder"):
            shape = node.meta["val"].shape
            is_text = len(shape) == 2 and not node.meta["val"].is_floating_point()
            for axis, size in enumerate(shape):
                is_meant = (axis == 0 and len(shape) > 1) or (axis == 1 and is_text and not is_batch_only)
                if isinstance(size, torch.SymInt) and is_meant and self.shape_env.is_fixed(size):
                    what = f"the size of {node.target} along axis {axis} ({size.node.hint} in the sample)"
                    raise fixed_size(what, self.shape_env.culprits.get(size.node._expr), self.ancestors)

    def insisted_on(self) -> tuple[tuple[str, int], ...]:
        """Inputs and axes whose sizes the model takes but some of (see `seqbuild.trace.record.proofs`), in their
        order.
        """
        symbols = {symbol for equality in self.shape_env.demanded for symbol in equality.free_symbols}
        return tuple(
            (str(node.target), axis)
            for node in self.graph.find_nodes(op="placeholder")
            for axis, size in enumerate(node.meta["val"].shape)
            if isinstance(size, torch.SymInt) and size.node._expr in symbols
        )

    def is_for(self, sample_input: Mapping[str, Any]) -> bool:
        """Whether a trace that was made with other sizes holds for those of this sample, too."""
        sizes: dict[Any, int] = {}
        for node in self.graph.find_nodes(op="placeholder"):
            for size, number in zip(node.meta["val"].shape, sample_input[str(node.target)].shape, strict=True):
                if isinstance(size, torch.SymInt):
                    sizes[self.shape_env.replace(size.node.expr)] = int(number)
        return self.shape_env.allows(sizes)

    def _lookup(self, node: fx.Node) -> Any:
        """What a `get_attr` node stands for; buffers have values even while they are fake."""
        name = str(node.target)
        if "constant" in node.meta:
            return self.constants[name]
        if name in self._real_buffers:
            return self._real_buffers[name]
        value: Any = self.root
        for part in name.split(".") if name else ():
            value = getattr(value, part)
        return value

    def _constant_answer(self, condition: fx.Node) -> bool | None:
        return constant_answer(condition, self.constants, self.dtype)

    def _record_leaves(self, root: nn.Module, steps: Steps) -> None:
        """Replace the forward of every leaf by one that records a single step; `kept_as_found` puts it back."""
        for name, module in root.named_modules():
            if self._is_step(root, name, module):
                module.forward = steps.leaf(name, module, module.forward)

    def _watch(self, root: nn.Module, proofs: Proofs) -> None:
        """Have what is assumed of sizes inside of leaves by the other policy proven, by the smallest module that it
        happens in.
        """
        if self.policy is not None:
            for name, module in root.named_modules():
                if module is not root and not self._is_step(root, name, module):
                    module.forward = proofs.watched(module, module.forward)

    def _watch_inside(self, root: nn.Module, sections: Sections) -> None:
        """Modules that are traced through, though they contain no target, are steps by the other policy, and right for
        all data then: so nothing may be decided inside of them. Targets also say so to the nodes that are made
        meanwhile, and each kind is recorded but once.
        """
        for name, module in root.named_modules():
            if module in self.ancestors or self._is_step(root, name, module):
                continue
            if module in self.targets:
                module.forward = self._marked(name, module, module.forward, sections)
            elif root.get_submodule(name.rpartition(".")[0]) in self.ancestors:
                module.forward = self._watched(module.forward)

    def _note_caches(self, root: nn.Module, cached: CachedValues) -> None:
        encoding = encoder_modules(root)
        for name, module in root.named_modules():
            if module is not root and module not in encoding and not self._is_step(root, name, module):
                module.forward = cached.watched(name, module, module.forward) or module.forward

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
    """The policy that records programs of leaves with this tracer; the arguments are those of `LeafPolicy`."""
    return LeafPolicy(
        foreign, dtype, lambda module, sample: SequentialTracer([module], dtype=dtype).trace(module, sample)
    )
