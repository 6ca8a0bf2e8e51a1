"""Decide what each subgraph of a run has to do, before the first one is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from runtime.checkpoint.dtypes import Stored
from runtime.streaming.steps import Schedule, Step

if TYPE_CHECKING:
    from runtime.artifact.manifest import SubgraphEntry
    from runtime.chain import Artifact
    from runtime.recipe.recipe import Assignment
    from runtime.streaming.work import StepModifier
    from runtime.weights.parameters import Weights


def plan_steps(
    artifact: Artifact, source: Weights, jobs: Mapping[str, Assignment], modifiers: Sequence[StepModifier]
) -> Schedule:
    """Decide what each subgraph does.

    Args:
        artifact: the chain.
        source: says which checkpoint tensors make which parameter.
        jobs: the modules to quantize.
        modifiers: say what they measure and rewrite.
    """
    owned = list(_owned_modules(artifact, jobs))
    measured = [
        any(is_measured(modifier, names, subgraph.entry) for modifier in modifiers)
        for names, subgraph in zip(owned, artifact.subgraphs, strict=True)
    ]
    last = max((index for index, runs in enumerate(measured) if runs), default=-1)
    replaced = {source.plain_key(f"{name}.weight") for name in jobs}
    seen: dict[str, None] = {}
    users: dict[str, int] = {}
    quantized: dict[str, None] = {}
    steps = []
    for index, subgraph in enumerate(artifact.subgraphs):
        names = subgraph.entry.parameters
        users.update({name: users.get(name, 0) + 1 for name in names})
        keys = dict.fromkeys(key for name in names for key in source.origins[name].keys)
        passes = tuple(key for key in keys if key not in replaced and key not in seen)
        seen.update(keys)
        steps.append(
            Step(
                index=index,
                subgraph=subgraph,
                modules=owned[index],
                is_run=index <= last,
                goes_on=index < last,
                loads=tuple(name for name in names if name not in quantized) if index <= last else (),
                passes=passes,
                adds=tuple(stored for modifier in modifiers for stored in _added(modifier, subgraph.entry)),
            )
        )
        quantized.update(dict.fromkeys(f"{name}.weight" for name in owned[index]))
    return Schedule(
        steps=tuple(steps),
        rest=tuple(key for key in source.checkpoint if key not in seen and key not in replaced),
        rewritten=frozenset(name for names in owned for modifier in modifiers for name in modifier.rewrites(names)),
        reused=frozenset(name for name, count in users.items() if count > 1),
    )


def is_measured(modifier: StepModifier, names: Sequence[str], entry: SubgraphEntry) -> bool:
    """Whether batches must run through a subgraph for a modifier, which quantizes these modules with it."""
    measures_cache = getattr(modifier, "measures_cache", None)
    return (bool(names) and modifier.measures(names)) or (measures_cache is not None and measures_cache(entry))


def _added(modifier: StepModifier, entry: SubgraphEntry) -> Sequence[Stored]:
    """What a modifier adds to the checkpoint with a subgraph; most add nothing, and do not say so."""
    adds = getattr(modifier, "adds", None)
    return adds(entry) if adds is not None else ()


def _owned_modules(artifact: Artifact, jobs: Mapping[str, Assignment]) -> Iterator[tuple[str, ...]]:
    """For each subgraph the modules to be quantized that it is the first to use, in its order."""
    done: dict[str, None] = {}
    for subgraph in artifact.subgraphs:
        weights = [name.removesuffix(".weight") for name in subgraph.entry.parameters if name.endswith(".weight")]
        names = tuple(name for name in weights if name in jobs and name not in done)
        done.update(dict.fromkeys(names))
        yield names
