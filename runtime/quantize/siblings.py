"""Find modules that engines fuse into one matrix by their names, for artifacts that do not state it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable

# The last parts of the names of modules of one parent that vLLM's models fuse.
JOINED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("query", "key", "value"),
    ("wq", "wk", "wv"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)


def siblings_by_name(names: Iterable[str]) -> dict[str, Hashable]:
    """Map each module that engines fuse with others in `names` to a value that is equal for those."""
    found: dict[str, tuple[str, tuple[str, ...]]] = {}
    for name in names:
        parent, _, own = name.rpartition(".")
        together = next((joined for joined in JOINED if own in joined), None)
        if together is not None:
            found[name] = (parent, together)
    count = Counter(found.values())
    return {name: key for name, key in found.items() if count[key] > 1}
