"""Predict the memory and the work of tuning a step's weights by gradients (`runtime.quantize.block_tuning`).

At the peak, in float32: the parameters of the block; for each tuned weight its base, offsets, the best offsets and the
gradient; temporary copies of the largest one while it takes a step; and what autograd keeps of a batch, about the
results of all operators, which are half of the bytes that operators move. The outputs of the original block stay for
all batches.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from runtime.algorithms.hessian import FLOAT32
from runtime.planning.work import PassWork

if TYPE_CHECKING:
    from runtime.artifact.manifest import ParameterEntry
    from runtime.planning.forecast import Workload
    from runtime.planning.shapes import Footprint
    from runtime.recipe.recipe import Assignment
    from runtime.streaming.schedule import Step

_COPIES = 4  # of each tuned weight besides its parameter
_TEMPORARY = 13  # bytes for each number of the weight that takes a step
_FORWARDS = 3  # that a step takes as long as: the forward, and gradients of both operands of each product
_SCORES = 7  # passes that keep outputs, and that compare three starts, the best and the last state


@dataclass(frozen=True, kw_only=True, slots=True)
class TuningCost:
    """The cost of a step's tuning.

    Attributes:
        num_bytes: the peak, besides the model, statistics and kept outputs.
        kept_bytes: the outputs of the original block.
        work: of all passes.
    """

    num_bytes: int = 0
    kept_bytes: int = 0
    work: PassWork = field(default_factory=PassWork)


def tuning_cost(
    step: Step,
    jobs: Mapping[str, Assignment],
    parameters: Mapping[str, ParameterEntry],
    tables: Collection[str],
    footprint: Footprint | None,
    work: Workload,
) -> TuningCost:
    """Return the cost of tuning the modules of a step that the recipe tunes; none without a block.

    Args:
        step: in the run's schedule.
        jobs: the assignments of all modules.
        parameters: of the model.
        tables: parameters that are only looked up in.
        footprint: of a batch; None for a guess without activations.
        work: the planned workload.
    """
    names = [name for name in step.modules if jobs[name].tuning is not None]
    options = jobs[names[0]].tuning if names else None
    if options is None or not step.subgraph.entry.targets:
        return TuningCost()
    tuned = [math.prod(parameters[f"{name}.weight"].shape) for name in names]
    whole = sum(math.prod(parameters[name].shape) for name in step.subgraph.entry.parameters if name not in tables)
    num_bytes = FLOAT32 * (whole + _COPIES * sum(tuned)) + _TEMPORARY * max(tuned)
    if footprint is None:
        return TuningCost(num_bytes=num_bytes)
    widening = FLOAT32 / min(work.dtype.itemsize, FLOAT32)
    graph = widening * (footprint.routed.moved / 2 + footprint.working_bytes)
    outputs = [one for one in footprint.outputs.values() if isinstance(one, torch.Tensor) and one.is_floating_point()]
    largest = max((one.numel() * one.element_size() for one in outputs), default=0)
    num_batches = math.ceil(work.num_samples / work.batch_size)
    own = min(-(-options.batch_size // work.batch_size), num_batches)
    passes = footprint.routed.times(_FORWARDS * options.iters * own + _SCORES * num_batches)
    return TuningCost(num_bytes=num_bytes + round(graph), kept_bytes=largest * num_batches, work=passes)
