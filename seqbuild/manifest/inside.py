"""The manifest's tables about the inside of targets, for a trace that goes deeper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from seqbuild.manifest.attention import cached_values
from seqbuild.manifest.experts.tables import expert_tables
from seqbuild.manifest.lookups import lookups
from seqbuild.manifest.rotations import rotation_table
from seqbuild.manifest.scale_groups import mixture_groups, scale_groups

if TYPE_CHECKING:
    from torch import nn

    from runtime.artifact.manifest import ParameterEntry, SubgraphEntry
    from seqbuild.chain.emit import EmittedCode
    from seqbuild.chain.subgraph import Subgraph
    from seqbuild.manifest.portable import Parts


def inner_tables(
    model: nn.Module,
    subgraphs: Sequence[tuple[Subgraph, SubgraphEntry, EmittedCode]],
    parts: Parts,
    parameters: Mapping[str, ParameterEntry],
    conversions: Sequence[str],
) -> dict[str, Any]:
    """Return these tables by their names in the manifest.

    Args:
        model: the traced model.
        subgraphs: with their entries and code; empty for a trace that stops at the targets.
        parts: the leaves.
        parameters: the parameter table.
        conversions: the source code of the conversion programs.
    """
    graphs, entries, codes = [row[0] for row in subgraphs], [row[1] for row in subgraphs], [row[2] for row in subgraphs]
    groups = scale_groups(model, graphs, entries)
    layouts, mixtures = expert_tables(parts, parameters, conversions)
    return {
        "cached": cached_values(model, graphs, codes) if subgraphs else (),
        "scale_groups": tuple(group for group in groups if group.modules),
        "mixture_groups": mixture_groups(groups),
        "expert_layouts": layouts,
        "mixtures": mixtures,
        "rotations": rotation_table(model, graphs, entries),
        "lookups": lookups(parts, graphs, parameters),
    }
