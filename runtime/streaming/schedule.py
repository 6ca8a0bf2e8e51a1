"""The schedule of a run: what each subgraph does, decided before the first one is loaded.

The run executes it, and the plan predicts its cost.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from runtime.checkpoint.dtypes import DTYPES, dtype_name
from runtime.checkpoint.stored import Stored
from runtime.errors import WeightsError
from runtime.formats.compressed import stored_dtypes, stored_shapes
from runtime.weights.origins import required_key

if TYPE_CHECKING:
    from pathlib import Path

    from runtime.artifact.manifest import SubgraphEntry
    from runtime.chain import Artifact, LoadedSubgraph
    from runtime.recipe.recipe import Assignment
    from runtime.weights.origins import ParameterSource


class StepRequirements(Protocol):
    """What a modifier needs of a run, asked before the run starts.

    Optional methods: `measures_cache(entry)`, whether batches must run through a subgraph whatever is quantized in it,
    `adds(entry)`, the tensors that it writes with a subgraph by `Work.add`, and `compares(names)`, whether it needs the
    activations of the original model to change these modules.
    """

    def measures(self, names: Sequence[str]) -> bool:
        """Whether batches must run to change these modules."""

    def rewrites(self, names: Sequence[str]) -> Sequence[str]:
        """The parameters, besides the weights of these modules, that it changes by `Work.rewrite`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One subgraph of a run.

    Attributes:
        index: its position in the chain.
        subgraph: its code, its inputs, and the values that it frees.
        modules: the modules that are quantized with it: those that it is the first to use.
        is_measured: whether batches run through it for a modifier.
        compares: whether a modifier compares with the activations of the original model.
        carries: whether a later step does, so that these go through it.
        is_split: whether they differ from the present ones before it, so that it runs for both.
        is_run: whether batches run through it at all; if not, only weights that are quantized are loaded.
        goes_on: whether a later step needs its outputs.
        loads: the parameters that are loaded before it runs; if it does not, those that are rewritten.
        keeps: changed parameters that stay in memory after it, because a later step runs with them.
        reads: the checkpoint tensors that it is the first to use.
        passes: those of them that are written unchanged, unless a modifier rewrites them.
        writes: the tensors that it writes, in the order in which they fill the shards.
    """

    index: int
    subgraph: LoadedSubgraph
    modules: tuple[str, ...]
    is_measured: bool
    compares: bool
    carries: bool
    is_split: bool
    is_run: bool
    goes_on: bool
    loads: tuple[str, ...]
    keeps: frozenset[str]
    reads: tuple[str, ...]
    passes: tuple[str, ...]
    writes: tuple[Stored, ...]

    @property
    def label(self) -> str:
        """The name of the subgraph, for messages."""
        return self.subgraph.label

    @property
    def is_split_after(self) -> bool:
        """Whether the activations of the original model are needed after it, and differ from the present ones."""
        return self.carries and (self.is_split or self.is_measured or bool(self.modules))

    @property
    def num_written_bytes(self) -> int:
        """Size of the tensors that it writes."""
        return sum(stored.num_bytes for stored in self.writes)

    def called(self, jobs: Mapping[str, Assignment]) -> dict[str, Assignment]:
        """The assignments of all modules that it uses, those quantized with earlier steps included."""
        names = (name.removesuffix(".weight") for name in self.subgraph.entry.parameters)
        return {name: jobs[name] for name in names if name in jobs}


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """All steps of a run.

    Attributes:
        steps: one for each subgraph, in order.
        rest: checkpoint tensors that no subgraph uses; they are written unchanged after the last step.
        rewritten: parameters that a modifier changes without quantizing them; they keep their place in the checkpoint.
        lasting: values between subgraphs that outlive the subgraph after the one that makes them.
    """

    steps: tuple[Step, ...]
    rest: tuple[Stored, ...]
    rewritten: frozenset[str]
    lasting: frozenset[str]

    def outputs(self, directory: Path) -> Iterator[Stored]:
        """Every tensor that the run writes, in the order in which they fill the shards.

        Raises:
            WeightsError: when quantization makes a tensor that the checkpoint in `directory` has already.
        """
        written: dict[str, None] = {}
        for stored in (*(stored for step in self.steps for stored in step.writes), *self.rest):
            if stored.name in written:
                raise WeightsError(
                    f"{directory} holds tensor {stored.name!r}, and quantization makes one of that name",
                    hint="remove it from the checkpoint",
                )
            written[stored.name] = None
            yield stored


def plan_steps(
    artifact: Artifact, source: ParameterSource, jobs: Mapping[str, Assignment], modifiers: Sequence[StepRequirements]
) -> Schedule:
    """Decide what each subgraph does.

    Args:
        artifact: the chain.
        source: which stored tensors make which parameter.
        jobs: the modules to quantize.
        modifiers: what they measure, rewrite and add.
    """
    entries = [subgraph.entry for subgraph in artifact.subgraphs]
    owned = list(_owned_modules(entries, jobs))
    streams = list(_all_streams(entries, owned, modifiers))
    last_run = {name: i for i, entry in enumerate(entries) if streams[i].is_run for name in entry.parameters}
    replaced = {source.plain_key(f"{name}.weight") for name in jobs}
    tensors = ModuleTensors(source)
    seen: dict[str, None] = {}
    quantized: dict[str, None] = {}
    changed: list[str] = []
    rewritten: list[str] = []
    steps = []
    for index, (subgraph, names, stream) in enumerate(zip(artifact.subgraphs, owned, streams, strict=True)):
        entry = subgraph.entry
        keys = dict.fromkeys(key for name in entry.parameters for key in source.origins[name].keys)
        reads = tuple(key for key in keys if key not in seen)
        passes = tuple(key for key in reads if key not in replaced)
        seen.update(keys)
        rewrites = [name for modifier in modifiers for name in modifier.rewrites(names)]
        rewritten += rewrites
        changed += [*(f"{name}.weight" for name in names), *rewrites]
        changed = [name for name in changed if last_run.get(name, -1) > index]
        steps.append(
            Step(
                index=index,
                subgraph=subgraph,
                modules=names,
                loads=tuple(n for n in (entry.parameters if stream.is_run else rewrites) if n not in quantized),
                keeps=frozenset(changed),
                reads=reads,
                passes=passes,
                writes=(
                    *(stored for name in names for stored in tensors.of(name, jobs[name])),
                    *_added(modifiers, entry),
                    *(source.stored(key) for key in passes),
                ),
                **stream._asdict(),
            )
        )
        quantized.update(dict.fromkeys(f"{name}.weight" for name in names))
    return Schedule(
        steps=tuple(steps),
        rest=tuple(source.stored(key) for key in source.stored_names() if key not in seen and key not in replaced),
        rewritten=frozenset(rewritten),
        lasting=frozenset(lasting_values(entries)),
    )


class _Streams(NamedTuple):
    """How batches go through a step; see `Step`."""

    is_measured: bool
    compares: bool
    carries: bool
    is_split: bool
    is_run: bool
    goes_on: bool


def _all_streams(
    entries: Sequence[SubgraphEntry], owned: Sequence[Sequence[str]], modifiers: Sequence[StepRequirements]
) -> Iterator[_Streams]:
    """Decide for each subgraph whether batches go through it, and for which model; `owned` are its modules."""
    compared = [_compares(modifiers, names) for names in owned]
    measured = [_is_measured(modifiers, names, entry) for names, entry in zip(owned, entries, strict=True)]
    changed_first = next((index for index, names in enumerate(owned) if names or measured[index]), len(owned))
    last = max((index for index, is_measured in enumerate(measured) if is_measured), default=-1)
    for index, is_measured in enumerate(measured):
        yield _Streams(
            is_measured=is_measured,
            compares=compared[index],
            carries=any(compared[index + 1 :]),
            is_split=index > changed_first and any(compared[index:]),
            is_run=index <= last,
            goes_on=index < last,
        )


class ModuleTensors:
    """The tensors of quantized modules in the new checkpoint, under the checkpoint's names.

    Args:
        source: which stored tensor makes which parameter.
    """

    def __init__(self, source: ParameterSource) -> None:
        self._source = source
        self._known: dict[tuple[int, tuple[int, ...], str], list[Stored]] = {}

    def of(self, name: str, job: Assignment) -> Iterator[Stored]:
        """The tensors of one module."""
        key = required_key(self._source, f"{name}.weight")
        stored = self._source.stored(key)
        kind = (id(job.scheme), stored.shape, stored.dtype)
        if kind not in self._known:  # it takes a millisecond, and there may be thousands of experts
            shapes = stored_shapes(stored.shape, job.scheme)
            dtypes = stored_dtypes(job.scheme, DTYPES[stored.dtype])
            self._known[kind] = [Stored(part, dtype_name(dtype), shapes[part]) for part, dtype in dtypes.items()]
        prefix = key.removesuffix("weight")
        return (Stored(f"{prefix}{part.name}", part.dtype, part.shape) for part in self._known[kind])


def _is_measured(modifiers: Sequence[StepRequirements], names: Sequence[str], entry: SubgraphEntry) -> bool:
    """Whether batches must run through a subgraph for any modifier; these modules are quantized with it."""
    if names and any(modifier.measures(names) for modifier in modifiers):
        return True
    return any(modifier.measures_cache(entry) for modifier in modifiers if hasattr(modifier, "measures_cache"))


def _compares(modifiers: Sequence[StepRequirements], names: Sequence[str]) -> bool:
    """Whether any modifier compares with the original model to change these modules."""
    found = (modifier.compares(names) for modifier in modifiers if hasattr(modifier, "compares"))
    return bool(names) and any(found)


def _added(modifiers: Sequence[StepRequirements], entry: SubgraphEntry) -> Iterator[Stored]:
    """The tensors that modifiers add to the checkpoint with a subgraph."""
    for modifier in modifiers:
        if hasattr(modifier, "adds"):
            yield from modifier.adds(entry)


def _owned_modules(entries: Sequence[SubgraphEntry], jobs: Mapping[str, Assignment]) -> Iterator[tuple[str, ...]]:
    """For each subgraph the modules to quantize that it is the first to use, in its order."""
    done: dict[str, None] = {}
    for entry in entries:
        weights = [name.removesuffix(".weight") for name in entry.parameters if name.endswith(".weight")]
        names = tuple(name for name in weights if name in jobs and name not in done)
        done.update(dict.fromkeys(names))
        yield names


def lasting_values(entries: Sequence[SubgraphEntry]) -> Iterator[str]:
    """Yield the values that outlive the subgraph after the one that makes them."""
    made: dict[str, int] = {}
    for index, entry in enumerate(entries):
        yield from (name for name in entry.input_names if name in made and made[name] < index - 1)
        made.update(dict.fromkeys(entry.output_names, index))
