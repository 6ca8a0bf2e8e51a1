"""Find the parameters that a model only looks rows up in: embedding tables, mostly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from runtime.artifact.manifest import ParameterEntry

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import fx

    from seqbuild.chain.subgraph import Subgraph
    from seqbuild.manifest.portable import Parts


def lookups(parts: Parts, subgraphs: Sequence[Subgraph], parameters: Mapping[str, ParameterEntry]) -> tuple[str, ...]:
    """Return the names of these parameters, in the order of the parameter table.

    Opaque steps are not examined: a table that one of them uses in another way is read as a whole there.

    Args:
        parts: the leaves, of which embeddings only look rows up.
        subgraphs: the graphs that read other parameters.
        parameters: the manifest's parameter table.
    """
    tables = {f"{name}.weight" for name, kind in parts.leaves.items() if parts.kinds[kind].kind == "Embedding"}
    others: set[str] = set()
    for subgraph in subgraphs:
        for name, is_lookup in _uses(subgraph.graph):
            (tables if is_lookup else others).add(name)
    return tuple(name for name in parameters if name in tables and name not in others)


def _uses(graph: fx.Graph) -> Iterator[tuple[str, bool]]:
    """Yield the parameters that a graph reads, and for each use whether it is a lookup."""
    for node in graph.find_nodes(op="get_attr"):
        for user in node.users:
            is_lookup = user.target is torch.ops.aten.embedding.default and user.args[0] is node
            yield str(node.target), is_lookup and node not in user.args[1:]
