"""Which stacked parameters of a mixture the input of its experts meets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from runtime.artifact.manifest import MIXTURES
from runtime.experts.channel_flow import Reading, input_readings
from runtime.language.program import compile_program
from runtime.model.experts import Mixture, stack_shape
from runtime.model.leaves import build_leaf
from seqbuild.model.from_config import TRACE_DTYPE
from seqbuild.trace.experts.dense import is_dense_experts
from seqbuild.trace.experts.learn import is_experts
from seqbuild.trace.record.tracer import leaf_policy

if TYPE_CHECKING:
    from torch import nn


class Mixtures:
    """Finds that out; modules that do the same with parameters of the same shapes are looked at once."""

    def __init__(self) -> None:
        self._policy = leaf_policy(dtype=TRACE_DTYPE)
        self._known: dict[Any, tuple[Reading, ...]] = {}

    def readings(self, module: nn.Module) -> tuple[Reading, ...]:
        """The parameters, by their names in the module, and their axes along the input's channels; nothing for a
        module that holds no experts, or whose input is used for more than that.
        """
        leaf = self._policy.leaf(module) if is_experts(module) or is_dense_experts(module) else None
        if leaf is None or leaf.kind.kind not in MIXTURES:
            return ()
        shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
        key = repr((leaf.kind, leaf.source, shapes))
        if key not in self._known:
            built = build_leaf(leaf.kind, "experts", shapes, compile_program(leaf.source, "experts.py"))
            assert isinstance(built, Mixture), "its kind says so"
            apart = {name: stack_shape(shapes[name], built.num_experts) for name in built.flat}
            self._known[key] = input_readings(built, shapes | apart)
        return self._known[key]
