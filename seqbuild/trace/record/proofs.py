"""Prove by execution that assumptions about sizes inside a module do not matter.

A trace follows one sample. If the model's code, or a kernel of torch, branches on a relation of sizes, the recorded
code contains one outcome. Often it is correct for the other one, too: `if padding > 0: out = out[:, :length]` removes
nothing if there is no padding. So when such a module returns, its recorded code is executed on small random weights and
inputs, with sizes for which the relation holds and sizes for which it does not, and compared bit for bit with the
module itself. Loops (`seqbuild.trace.loops`) are proven in the same way for several numbers of iterations.

A proven assumption is dropped; other code with the same assumption needs its own proof. Equalities are never proven,
because torch simplifies sizes by them from then on. But a module may require one, as a vision tower requires the image
size of its position table: if it fails for other sizes, the equality becomes a condition of the artifact.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode

from seqbuild.blame import UntraceableError
from seqbuild.trace.real.dry_run import LIMIT_BYTES
from seqbuild.trace.real.replay import plain_execution
from seqbuild.trace.real.used_parameters import real_tensors
from seqbuild.trace.real.weightless import attributes_restored
from seqbuild.trace.record.proof_programs import (
    SIZE,
    Call,
    MadeUpValues,
    RecordedProgram,
    leaves,
    sizes_in,
)
from seqbuild.trace.recorder import nodes_after
from seqbuild.trace.sizes.relations import is_assumption, is_expressible
from seqbuild.trace.sizes.trials import Sizes, counterexamples, trials

if TYPE_CHECKING:
    from seqbuild.blame import Culprit
    from seqbuild.trace.loops.record import Loops
    from seqbuild.trace.recorder import Recorder

_MOST_TRIED = 2**26  # size limit of a module that is executed to find the sizes that it accepts
_logger = logging.getLogger(__name__)


class Proofs:
    """Proofs for the modules of one trace.

    Args:
        tracer: the tracer with the graph.
        loops: the loops of the same trace.
    """

    def __init__(self, tracer: Recorder, loops: Loops) -> None:
        self.tracer = tracer
        self.loops = loops
        self._closed: list[_Closed] = []

    def watched(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a forward so that its assumptions are proven whenever it is recorded inside a target."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if get_proxy_mode() is None or not self.tracer.shape_env.is_noting:
                return forward(*args, **kwargs)
            return self._call(module, forward, args, kwargs)

        return call

    def _call(
        self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        shape_env = self.tracer.shape_env
        known, num_assumed, num_loops = shape_env.known(), len(shape_env.assumed), len(self.loops.unproven)
        last = next(iter(reversed(self.tracer.graph.nodes)))
        tensors = [value for value in leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        inputs = {node: tensor for tensor in tensors if (node := self.tracer.known_node(tensor)) is not None}
        attributes = [(inner, dict(inner.__dict__)) for inner in module.modules()]
        output = forward(*args, **kwargs)
        call = Call(
            module=module,
            args=args,
            kwargs=kwargs,
            inputs=inputs,
            nodes=tuple(nodes_after(last)),
            output=output,
            known=known,
            attributes=attributes,
        )
        self._drop_required_equalities(call, num_assumed)
        assumed = [relation for relation, _ in shape_env.assumed[num_assumed:] if shape_env.is_assumption(relation)]
        about_loops = [question for loop in self.loops.unproven[num_loops:] for question in loop.questions()]
        questions = [*dict.fromkeys(map(shape_env.replace, assumed)), *about_loops]
        is_provable = questions and not any(isinstance(relation, sympy.Eq) for relation in questions)
        if is_provable and self._is_proven(call, questions):
            culprits = [culprit for _, culprit in shape_env.assumed[num_assumed:]]
            self._close(call, [*culprits, *(loop.culprit for loop in self.loops.unproven[num_loops:])][0])
            del self.loops.unproven[num_loops:]
            del shape_env.assumed[num_assumed:]
            shape_env.forget(known, shape_env.is_assumption)
        return output

    def _drop_required_equalities(self, call: Call, num_assumed: int) -> None:
        """Remove the equalities that the call's module requires from the assumptions."""
        assumed = self.tracer.shape_env.assumed
        fresh = assumed[num_assumed:]
        decided = self.tracer.shape_env.decided
        found = (relation for relation, _ in fresh if is_assumption(relation, is_decided=relation in decided))
        relations = list(dict.fromkeys(found))
        equalities = [relation for relation in relations if isinstance(relation, sympy.Eq) and is_expressible(relation)]
        if not equalities or sum(p.numel() for p in call.module.parameters()) > _MOST_TRIED:
            return
        required = [equality for equality in equalities if self._is_required(call, equality, relations)]
        self.tracer.shape_env.required_equalities += required
        assumed[num_assumed:] = [known for known in fresh if known[0] not in required]

    def _is_required(self, call: Call, equality: Any, relations: Sequence[Any]) -> bool:
        """Return whether the call's module accepts the sample's sizes and fails for sizes that violate the equality."""
        shape_env = self.tracer.shape_env
        values = list(leaves((call.args, call.kwargs)))
        symbols = {symbol for value in values for size in sizes_in(value) for symbol in size.node._expr.free_symbols}
        sizes = counterexamples(shape_env, call.known, symbols, equality, [r for r in relations if r is not equality])
        try:
            with disable_proxy_modes_tracing(), shape_env.sizes_kept_free(), _as_before(call):
                return bool(sizes) and [_works(call, chosen) for chosen in sizes] == [True] + [False] * (len(sizes) - 1)
        except Exception as error:
            _logger.debug("%s may not require %s: %s", type(call.module).__name__, equality, error)
            return False

    def _is_proven(self, call: Call, questions: Sequence[Any]) -> bool:
        try:
            program = RecordedProgram(self.tracer, call)
            sizes = trials(self.tracer.shape_env, call.known, program.symbols, questions)
            with disable_proxy_modes_tracing(), self.tracer.shape_env.sizes_kept_free(), _as_before(call):
                return bool(sizes) and all(program.is_equal(chosen) for chosen in sizes)
        except Exception as error:
            _logger.debug("%s is not proven: %s", type(call.module).__name__, error)
            return False

    def _close(self, call: Call, culprit: Culprit | None) -> None:
        results = (self.tracer.known_node(value) for value in leaves(call.output) if isinstance(value, torch.Tensor))
        compared = dict.fromkeys(node for node in results if node is not None)
        self._closed.append(_Closed(inside=dict.fromkeys(call.nodes), compared=compared, culprit=culprit))

    def require_closed(self) -> None:
        """Reject a trace in which code outside a proven call uses a value of it that was not compared.

        Raises:
            UntraceableError: naming the value.
        """
        for closed in self._closed:
            for node in closed.inside:
                is_value = node.op != "get_attr" and isinstance(node.meta.get("val"), torch.Tensor)
                outside = (user for user in node.users if user not in closed.inside and user.target is not SIZE)
                if is_value and node not in closed.compared and any(outside):
                    raise UntraceableError(
                        f"{node.name} is used outside the module that computes it but is not one of its results",
                        culprit=closed.culprit,
                    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Closed:
    """A proven call: the recorded nodes, the compared nodes, and the line that required the proof."""

    inside: Mapping[fx.Node, None]
    compared: Mapping[fx.Node, None]
    culprit: Culprit | None


def _works(call: Call, sizes: Sizes) -> bool:
    """Return whether the call's module accepts arguments of these sizes."""
    with plain_execution(), attributes_restored(call.module), real_tensors([call.module], LIMIT_BYTES) as real:
        made = MadeUpValues(sizes, real)
        args, kwargs = made.of(tuple(call.args)), made.of(dict(call.kwargs))
        try:
            call.module.forward(*args, **kwargs)
        except (ValueError, RuntimeError, AssertionError):
            return False
    return True


@contextlib.contextmanager
def _as_before(call: Call) -> Iterator[None]:
    """Give the call's modules their attributes from before the call, which may have stored a state in them."""
    found = [(module, dict(module.__dict__)) for module, _ in call.attributes]
    try:
        for module, attributes in call.attributes:
            _set_attributes(module, attributes)
        yield
    finally:
        for module, attributes in found:
            _set_attributes(module, attributes)


def _set_attributes(module: nn.Module, attributes: Mapping[str, Any]) -> None:
    module.__dict__.clear()
    module.__dict__.update(attributes)
