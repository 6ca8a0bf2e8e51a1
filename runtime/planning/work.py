"""The work of one subgraph, in operations and bytes, before it is divided among workers.

Shapes: O out features, I in features.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SharedInput:
    """An input of measured modules.

    Attributes:
        name: the first module that reads it.
        width: I.
        num_tokens: that are measured.
        has_hessian: whether a Hessian is summed up.
        lane_bytes: of the sum or the sample that the owner gets from each lane.
        small_bytes: of the statistics that every worker gets from every lane.
        final_bytes: of what the owner sends to all workers in the end.
    """

    name: str
    width: int
    num_tokens: float
    has_hessian: bool
    lane_bytes: int
    small_bytes: int
    final_bytes: int


@dataclass(frozen=True, kw_only=True)
class PlannedTile:
    """Rows that are solved at a time.

    Attributes:
        num_rows: O.
        result_bytes: packed.
    """

    num_rows: int
    result_bytes: int


@dataclass(frozen=True, kw_only=True)
class PlannedSolve:
    """Weights with one input that share a factorization.

    Attributes:
        source: the position of their input among the subgraph's.
        tiles: of their stacked rows.
        factor_bytes: of the factor, as it is sent.
        is_expert: whether the weights are of experts, which are solved before the others.
    """

    source: int
    tiles: tuple[PlannedTile, ...]
    factor_bytes: int
    is_expert: bool = False


@dataclass(frozen=True, kw_only=True)
class NearestWeight:
    """A weight that is rounded to nearest, by one worker.

    Attributes:
        source: the position of its input, whose owner rounds it; None for any worker.
        num_weights: O I.
        result_bytes: packed.
    """

    source: int | None
    num_weights: int
    result_bytes: int


@dataclass(frozen=True, kw_only=True)
class FactorSearch:
    """A search for the factors of an input's features, by the owner of its sum while the others wait.

    Attributes:
        width: I.
        num_rows: of all weights that are tried.
        num_candidates: that are tried on some of the rows, or on all of them.
    """

    width: int
    num_rows: int
    num_candidates: int


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """The work of one subgraph, before it is divided among workers.

    Attributes:
        measured, propagated: operations of the passes over all batches.
        inputs: that are measured.
        solves: by GPTQ.
        nearest: the weights that are rounded to nearest.
        searches: of AWQ.
        loaded_bytes: of weights.
        num_quantized: number of quantized weights' elements.
        num_modules: number of quantized modules.
    """

    measured: float
    propagated: float
    inputs: tuple[SharedInput, ...] = ()
    solves: tuple[PlannedSolve, ...] = ()
    nearest: tuple[NearestWeight, ...] = ()
    searches: tuple[FactorSearch, ...] = ()
    loaded_bytes: int = 0
    num_quantized: int = 0
    num_modules: int = 0
