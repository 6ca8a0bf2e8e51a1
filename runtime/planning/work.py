"""The work of one subgraph, in operations and bytes, before it is divided among workers.

Shapes: O out features, I in features.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, field


@dataclass(frozen=True, kw_only=True)
class PassWork:
    """The work of the model's own operators when batches pass through a subgraph.

    Attributes:
        products: operations of matrix products; a multiplication and an addition are two.
        attention: operations of fused attention.
        moved: bytes that other operators read or write.
        calls: number of operators.
    """

    products: float = 0.0
    attention: float = 0.0
    moved: float = 0.0
    calls: float = 0.0

    @property
    def operations(self) -> float:
        """Of products and attention."""
        return self.products + self.attention

    def __add__(self, other: PassWork) -> PassWork:
        products, attention, moved, calls = map(sum, zip(astuple(self), astuple(other), strict=True))
        return PassWork(products=products, attention=attention, moved=moved, calls=calls)

    def times(self, count: float) -> PassWork:
        """So many passes."""
        products, attention, moved, calls = (count * number for number in astuple(self))
        return PassWork(products=products, attention=attention, moved=moved, calls=calls)


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
        has_drift: whether the products with the original inputs are summed up.
    """

    name: str
    width: int
    num_tokens: float
    has_hessian: bool
    lane_bytes: int
    small_bytes: int
    final_bytes: int
    has_drift: bool = False


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
        num_stacked: how many of the kind are solved at the same time.
        is_corrected: whether the weights are corrected by the drift of their inputs.
        searched_kind: the kind of grid whose ranges are searched, see `planning.rates`; empty for ranges of extremes.
        num_passes: how many times columns are solved.
    """

    source: int
    tiles: tuple[PlannedTile, ...]
    factor_bytes: int
    is_expert: bool = False
    num_stacked: int = 1
    is_corrected: bool = False
    searched_kind: str = ""
    num_passes: int = 1


@dataclass(frozen=True, kw_only=True)
class NearestWeight:
    """A weight that is rounded to nearest, by one worker.

    Attributes:
        source: the position of its input, whose owner rounds it; None for any worker.
        num_weights: O I.
        result_bytes: packed.
        kind: of its grid, see `planning.rates`.
        compared: operations of the sizes of its output and of the output's error.
        is_clipped: whether its ranges are searched on the Gram matrix of its input.
    """

    source: int | None
    num_weights: int
    result_bytes: int
    kind: str
    compared: float = 0.0
    is_clipped: bool = False


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
        measured, propagated: the passes over all batches.
        tuned: all passes that gradients take.
        num_rounded: numbers of inputs that are rounded in the pass that goes on, to grids of `rounded_kind`.
        inputs: that are measured.
        solves: by GPTQ.
        nearest: the weights that are rounded to nearest.
        searches: of AWQ.
        loaded_bytes: of weights in the run's dtype; `read_bytes` of the checkpoint.
        rotated: numbers of the checkpoint that are rotated when they are read.
        written_bytes: of the new checkpoint.
        unpacked: quantized weights that later passes use, by kind of grid.
        num_modules: number of quantized modules.
    """

    measured: PassWork
    propagated: PassWork
    tuned: PassWork = field(default_factory=PassWork)
    num_rounded: float = 0.0
    rounded_kind: str = ""
    inputs: tuple[SharedInput, ...] = ()
    solves: tuple[PlannedSolve, ...] = ()
    nearest: tuple[NearestWeight, ...] = ()
    searches: tuple[FactorSearch, ...] = ()
    loaded_bytes: int = 0
    read_bytes: int = 0
    rotated: int = 0
    written_bytes: int = 0
    unpacked: tuple[tuple[str, int], ...] = ()
    num_modules: int = 0
