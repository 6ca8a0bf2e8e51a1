"""Find the stacked parameters of a mixture that multiply the input of its experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from runtime.artifact.manifest import MIXTURES
from seqbuild.manifest.experts.probe import make_probe
from seqbuild.manifest.experts.proportional import Reading, input_readings, output_writings
from seqbuild.model.from_config import TRACE_DTYPE
from seqbuild.trace.experts.dense import is_dense_experts
from seqbuild.trace.experts.learn import is_experts
from seqbuild.trace.record.tracer import leaf_policy

if TYPE_CHECKING:
    from torch import nn


class Mixtures:
    """Finder of these parameters; analyzes modules with the same code and parameter shapes once."""

    def __init__(self) -> None:
        self._policy = leaf_policy(dtype=TRACE_DTYPE)
        self._known: dict[Any, tuple[tuple[Reading, ...], tuple[Reading, ...]]] = {}

    def readings(self, module: nn.Module) -> tuple[Reading, ...]:
        """Return the parameters by name in the module, with their axes along the input's channels.

        The result is empty for a module without experts, or if the module's input has other uses.
        """
        return self._uses(module)[0]

    def writings(self, module: nn.Module) -> tuple[Reading, ...]:
        """Return the parameters whose rows compute the output, with their axes along its channels, likewise."""
        return self._uses(module)[1]

    def _uses(self, module: nn.Module) -> tuple[tuple[Reading, ...], tuple[Reading, ...]]:
        leaf = self._policy.leaf(module) if is_experts(module) or is_dense_experts(module) else None
        if leaf is None or leaf.kind.kind not in MIXTURES:
            return (), ()
        shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
        key = repr((leaf.kind, leaf.source, shapes))
        if key not in self._known:
            probe = make_probe(leaf.kind, leaf.source, shapes)
            self._known[key] = input_readings(probe), output_writings(probe)
        return self._known[key]
