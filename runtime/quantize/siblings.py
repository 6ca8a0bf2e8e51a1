"""Which modules engines join into one matrix, where nothing but their names says it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable

# By the last parts of their names, modules of one parent that vLLM's models join.
JOINED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("query", "key", "value"),
    ("wq", "wk", "wv"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)


def siblings_by_name(names: Iterable[str]) -> dict[str, Hashable]:
    """For each module that engines join with others of these something that is equal for these."""
    found: dict[str, tuple[str, tuple[str, ...]]] = {}
    for name in names:
        parent, _, own = name.rpartition(".")
        together = next((joined for joined in JOINED if own in joined), None)
        if together is not None:
            found[name] = (parent, together)
    count = Counter(found.values())
    return {name: key for name, key in found.items() if count[key] > 1}
