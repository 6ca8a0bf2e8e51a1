"""Prove by execution that what a trace took for granted inside of a module does not matter.

A trace follows one sample. Where the model's code, or a kernel of torch, decides by a relation of sizes, the recorded
code holds the one outcome; often it is right for the other one, too: `if padding > 0: out = out[:, :length]` cuts off
nothing where there is no padding. So, when such a module returns, what was recorded of it is made into code and
executed on small random weights and inputs of sizes for which the relation holds and of sizes for which it does not,
and compared, bit for bit, with the module itself. The same is done for loops (`loops.py`), for several numbers of
turns.

What is proven is forgotten: whoever decides by the same relation elsewhere is noted, and proven, for itself. Equalities
are never proven, for torch simplifies sizes by them from then on. But the module may insist on one, as a vision tower
does on the size of images that its position table is made for: if it fails for other sizes, the equality is the
model's own, and becomes a condition of the artifact.
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
from seqbuild.trace.real.rehearse import LIMIT_BYTES
from seqbuild.trace.real.replay import for_real
from seqbuild.trace.real.used_parameters import really_there
from seqbuild.trace.real.weightless import kept_as_found
from seqbuild.trace.record.proof_programs import (
    SIZE,
    Call,
    MadeUpValues,
    RecordedProgram,
    leaves,
    nodes_after,
    sizes_in,
)
from seqbuild.trace.sizes.relations import is_assumption, is_statable
from seqbuild.trace.sizes.trials import Sizes, otherwise, trials

if TYPE_CHECKING:
    from seqbuild.blame import Culprit
    from seqbuild.trace.loops.record import Loops
    from seqbuild.trace.recorder import Recorder

_MOST_TRIED = 2**26  # parameters of a module that is executed to see which sizes it accepts
_logger = logging.getLogger(__name__)


class Proofs:
    """Watches the modules of one trace.

    Args:
        tracer: owns the graph.
        loops: of the same trace.
    """

    def __init__(self, tracer: Recorder, loops: Loops) -> None:
        self.tracer = tracer
        self.loops = loops
        self._closed: list[_Closed] = []

    def watched(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A forward that is proven, where that is needed, whenever it is recorded inside of a target."""

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
        self._set_demands_aside(call, num_assumed)
        assumed = [relation for relation, _ in shape_env.assumed[num_assumed:] if shape_env.is_assumption(relation)]
        turns = [question for loop in self.loops.unproven[num_loops:] for question in loop.questions()]
        questions = [*dict.fromkeys(map(shape_env.replace, assumed)), *turns]
        is_provable = questions and not any(isinstance(relation, sympy.Eq) for relation in questions)
        if is_provable and self._is_proven(call, questions):
            culprits = [culprit for _, culprit in shape_env.assumed[num_assumed:]]
            self._close(call, [*culprits, *(loop.culprit for loop in self.loops.unproven[num_loops:])][0])
            del self.loops.unproven[num_loops:]
            del shape_env.assumed[num_assumed:]
            shape_env.forget(known, shape_env.is_assumption)
        return output

    def _set_demands_aside(self, call: Call, num_assumed: int) -> None:
        """Take from what is assumed the equalities that the call's module insists on."""
        assumed = self.tracer.shape_env.assumed
        fresh = assumed[num_assumed:]
        decided = self.tracer.shape_env.decided
        found = (relation for relation, _ in fresh if is_assumption(relation, is_decided=relation in decided))
        relations = list(dict.fromkeys(found))
        equalities = [relation for relation in relations if isinstance(relation, sympy.Eq) and is_statable(relation)]
        if not equalities or sum(p.numel() for p in call.module.parameters()) > _MOST_TRIED:
            return
        demanded = [equality for equality in equalities if self._is_demanded(call, equality, relations)]
        self.tracer.shape_env.demanded += demanded
        assumed[num_assumed:] = [known for known in fresh if known[0] not in demanded]

    def _is_demanded(self, call: Call, equality: Any, relations: Sequence[Any]) -> bool:
        """Whether the call's module works with the sample's sizes, and fails whenever this does not hold of them."""
        shape_env = self.tracer.shape_env
        values = list(leaves((call.args, call.kwargs)))
        symbols = {symbol for value in values for size in sizes_in(value) for symbol in size.node._expr.free_symbols}
        sizes = otherwise(shape_env, call.known, symbols, equality, [r for r in relations if r is not equality])
        try:
            with disable_proxy_modes_tracing(), shape_env.sizes_kept_free(), _as_before(call):
                return bool(sizes) and [_works(call, chosen) for chosen in sizes] == [True] + [False] * (len(sizes) - 1)
        except Exception as error:
            _logger.debug("%s may not insist on %s: %s", type(call.module).__name__, equality, error)
            return False

    def _is_proven(self, call: Call, questions: Sequence[Any]) -> bool:
        try:
            program = RecordedProgram(self.tracer, call)
            sizes = trials(self.tracer.shape_env, call.known, program.symbols, questions)
            with disable_proxy_modes_tracing(), self.tracer.shape_env.sizes_kept_free(), _as_before(call):
                return bool(sizes) and all(program.is_right(chosen) for chosen in sizes)
        except Exception as error:
            _logger.debug("%s is not proven: %s", type(call.module).__name__, error)
            return False

    def _close(self, call: Call, culprit: Culprit | None) -> None:
        results = (self.tracer.known_node(value) for value in leaves(call.output) if isinstance(value, torch.Tensor))
        compared = dict.fromkeys(node for node in results if node is not None)
        self._closed.append(_Closed(inside=dict.fromkeys(call.nodes), compared=compared, culprit=culprit))

    def require_closed(self) -> None:
        """Refuse a trace in which a value that was not compared leaves a proven call.

        Raises:
            UntraceableError: naming it.
        """
        for closed in self._closed:
            for node in closed.inside:
                is_value = node.op != "get_attr" and isinstance(node.meta.get("val"), torch.Tensor)
                outside = (user for user in node.users if user not in closed.inside and user.target is not SIZE)
                if is_value and node not in closed.compared and any(outside):
                    raise UntraceableError(
                        f"{node.name} leaves the module that calculates it by another way than as a result",
                        culprit=closed.culprit,
                    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Closed:
    """A proven call: what was recorded of it, what of that was compared, and the line that made it necessary."""

    inside: Mapping[fx.Node, None]
    compared: Mapping[fx.Node, None]
    culprit: Culprit | None


def _works(call: Call, sizes: Sizes) -> bool:
    """Whether the call's module accepts arguments of these sizes."""
    with for_real(), kept_as_found(call.module), really_there([call.module], LIMIT_BYTES) as real:
        made = MadeUpValues(sizes, real)
        args, kwargs = made.of(tuple(call.args)), made.of(dict(call.kwargs))
        try:
            call.module.forward(*args, **kwargs)
        except (ValueError, RuntimeError, AssertionError):
            return False
    return True


@contextlib.contextmanager
def _as_before(call: Call) -> Iterator[None]:
    """The call's modules have the attributes that they had before it: it may have kept a state in them."""
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
