"""The solutions that tuning starts from: rounded to nearest, or GPTQ's; and the tuning of a module alone."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runtime.algorithms.auto_round import TunedWeight, tune_alone
from runtime.algorithms.gptq import quantize_siblings
from runtime.algorithms.rtn import quantize_rtn
from runtime.errors import QuantizationError

if TYPE_CHECKING:
    import torch
    from compressed_tensors.quantization import QuantizationArgs

    from runtime.algorithms.result import QuantizedWeight
    from runtime.quantize.rounding import Rounding
    from runtime.recipe.modifiers import AutoRoundOptions

_WEIGHED = "imatrix_mse"  # the observer that is tried besides that of the scheme


@dataclass(frozen=True, kw_only=True, slots=True)
class Starts:
    """Finds solutions for modules whose inputs were measured.

    Attributes:
        rounding: the weights and statistics of the step.
        scales: returns NVFP4's global scale of a module.
        options: of the tuning.
    """

    rounding: Rounding
    scales: Callable[[str], torch.Tensor | None]
    options: AutoRoundOptions

    def weight(self, name: str) -> TunedWeight:
        """Return a weight that starts rounded to nearest."""
        scale_dtype = self.rounding.scale_dtype_of(name)
        return TunedWeight(self.rounding.weight_of(name), self.nearest(name), self._args(name), scale_dtype=scale_dtype)

    def nearest(self, name: str) -> QuantizedWeight:
        """Round a weight to nearest, in the ranges of its scheme's observer."""
        return quantize_rtn(
            self.rounding.weight_of(name),
            self._args(name),
            scale_dtype=self.rounding.scale_dtype_of(name),
            global_scale=self.scales(name),
            importance_I=self.rounding.statistics[name].diagonal_I,
        )

    def solved(self, names: Sequence[str]) -> Iterator[dict[str, QuantizedWeight]]:
        """Yield GPTQ's solutions, of the modules that have one: in the ranges of the scheme's observer, and in ranges
        that are weighed by the inputs if the scheme states no observer.
        """
        for observer in (None, _WEIGHED):
            found: dict[str, QuantizedWeight] = {}
            for together in self._siblings(names):
                args = self._args(together[0])
                if observer is not None:
                    args = args if args.observer else args.model_copy(update={"observer": observer})
                try:
                    found |= zip(together, self._solutions(together, args), strict=True)
                except QuantizationError:  # all inputs are zero, or H does not factor
                    continue
            yield found
            if all(self._args(name).observer for name in names):
                return

    def _solutions(self, names: Sequence[str], args: QuantizationArgs) -> Iterator[QuantizedWeight]:
        return quantize_siblings(
            [self.rounding.weight_of(name) for name in names],
            self.rounding.statistics[names[0]].hessian_II,
            args,
            scale_dtype=self.rounding.scale_dtype_of(names[0]),
            global_scale=self.scales(names[0]),
        )

    def _siblings(self, names: Sequence[str]) -> list[list[str]]:
        """Group modules that read one input, and have the same scheme and scales."""
        groups: dict[Hashable, list[str]] = {}
        for name in names:
            scale = self.scales(name)
            key = (
                id(self.rounding.statistics[name]),
                id(self.rounding.jobs[name].scheme),
                self.rounding.scale_dtype_of(name),
                None if scale is None else float(scale),
            )
            groups.setdefault(key, []).append(name)
        return list(groups.values())

    def alone(self, name: str) -> QuantizedWeight:
        """Tune a weight by the Gram matrix of its inputs."""
        start = self.nearest(name)
        if not self.options.disable_opt_rtn:
            solutions = (found[name] for found in self.solved([name]) if name in found)
            start = min((start, *solutions), key=lambda one: self._loss(name, one))
        return tune_alone(
            self.rounding.weight_of(name),
            self.rounding.statistics[name].hessian_II,
            start,
            self._args(name),
            scale_dtype=self.rounding.scale_dtype_of(name),
            iters=self.options.iters,
            rate=self.options.rate,
        )

    def _loss(self, name: str, solution: QuantizedWeight) -> float:
        seen = self.rounding.statistics[name]
        return seen.output_square(self.rounding.weight_of(name), solution.weight_OI)

    def _args(self, name: str) -> QuantizationArgs:
        return self.rounding.jobs[name].scheme.weights
