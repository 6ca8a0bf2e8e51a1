"""What each subgraph of a run has to do, decided before the first one is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runtime.checkpoint.dtypes import Stored, dtype_name
from runtime.errors import WeightsError

if TYPE_CHECKING:
    from runtime.chain import LoadedSubgraph
    from runtime.recipe.recipe import Assignment
    from runtime.weights.parameters import Weights


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One subgraph of a run.

    Attributes:
        index: its place in the chain.
        subgraph: its code, and what it takes and frees.
        modules: those that are quantized with it: the ones it is the first to use.
        is_run: whether batches go through it; if not, it needs no weights but those that are quantized.
        goes_on: whether a later subgraph needs what it returns.
        loads: the parameters that are streamed in before it runs.
        passes: checkpoint tensors that are written with it as they are.
        adds: tensors that modifiers write besides, which the original checkpoint does not have.
    """

    index: int
    subgraph: LoadedSubgraph
    modules: tuple[str, ...]
    is_run: bool
    goes_on: bool
    loads: tuple[str, ...]
    passes: tuple[str, ...]
    adds: tuple[Stored, ...] = ()

    @property
    def label(self) -> str:
        """Its targets, for people."""
        return ", ".join(self.subgraph.entry.targets) or "no target"


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """All steps, and the checkpoint tensors that belong to none of them.

    Attributes:
        steps: one for each subgraph, in order.
        rest: tensors that no subgraph uses; they are written as they are in the end.
        rewritten: names of parameters that a modifier changes without quantizing them; they keep their place in the
            checkpoint.
        reused: names of parameters that several subgraphs use.
    """

    steps: tuple[Step, ...]
    rest: tuple[str, ...]
    rewritten: frozenset[str]
    reused: frozenset[str]

    def outputs(self, step: Step, source: Weights, jobs: Mapping[str, Assignment]) -> Iterator[str]:
        """The names of all tensors that a step writes."""
        for name in step.modules:
            yield from (stored.name for stored in module_tensors(name, source, jobs[name]))
        yield from (stored.name for stored in step.adds)
        yield from step.passes


def output_tensors(plan: Schedule, source: Weights, jobs: Mapping[str, Assignment]) -> Iterator[Stored]:
    """Every tensor of the checkpoint that a run writes, in the order in which they fill its shards.

    Raises:
        WeightsError: when quantization makes a tensor that the checkpoint holds already.
    """
    written: dict[str, None] = {}
    for stored in _all_tensors(plan, source, jobs):
        if stored.name in written:
            raise WeightsError(
                f"{source.checkpoint.directory} holds tensor {stored.name!r}, and quantization makes one of that name",
                hint="remove it from the checkpoint",
            )
        written[stored.name] = None
        yield stored


def _all_tensors(plan: Schedule, source: Weights, jobs: Mapping[str, Assignment]) -> Iterator[Stored]:
    checkpoint = source.checkpoint
    for step in plan.steps:
        for name in step.modules:
            yield from module_tensors(name, source, jobs[name])
        yield from step.adds
        yield from (checkpoint.stored(key) for key in step.passes)
    yield from (checkpoint.stored(key) for key in plan.rest)


def module_tensors(name: str, source: Weights, job: Assignment) -> Iterator[Stored]:
    """What a quantized module is in the checkpoint: names, dtypes and shapes, under the checkpoint's names."""
    from runtime.checkpoint.dtypes import DTYPES
    from runtime.formats.compressed import stored_dtypes, stored_shapes

    key = source.plain_key(f"{name}.weight")
    assert key is not None, f"{name} was let through without a tensor of its own"
    shapes = stored_shapes(source.checkpoint.shape(key), job.scheme)
    dtypes = stored_dtypes(job.scheme, DTYPES[source.checkpoint.stored(key).dtype])
    for suffix, dtype in dtypes.items():
        yield Stored(f"{key.removesuffix('weight')}{suffix}", dtype_name(dtype), shapes[suffix])


def lasting_values(plan: Schedule) -> frozenset[str]:
    """The values that outlive the subgraph after the one that made them."""
    made: dict[str, int] = {}
    lasting: dict[str, None] = {}
    for step in plan.steps:
        entry = step.subgraph.entry
        lasting.update({name: None for name in entry.input_names if name in made and made[name] < step.index - 1})
        made.update(dict.fromkeys(entry.output_names, step.index))
    return frozenset(lasting)
