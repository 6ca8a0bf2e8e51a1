"""Decide which modules are solved together, whether a solve overwrites its Hessian, and which modules engines fuse."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runtime.recipe.recipe import Assignment

# The last parts of the names of modules of one parent that vLLM's models fuse.
FUSED_NAMES = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("query", "key", "value"),
    ("wq", "wk", "wv"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)


def solved_together(
    names: Sequence[str], jobs: Mapping[str, Assignment], inputs: Mapping[str, Hashable]
) -> Iterator[list[str]]:
    """Yield modules in batches: GPTQ modules that read one input and have the same scheme and options.

    `inputs` has equal values for measured modules that read one input.
    """
    done: set[str] = set()
    for name in names:
        if name in done:
            continue
        together = [name]
        if jobs[name].algorithm == "gptq" and name in inputs:
            readers = [other for other in names if other in inputs and inputs[other] == inputs[name]]
            together = [other for other in readers if other not in done and _is_alike(jobs[name], jobs[other])]
        done.update(together)
        yield together


def may_overwrite(job: Assignment, together: Sequence[str], users: Iterable[str]) -> bool:
    """Whether the solve of the modules `together` may overwrite their Hessian, because nothing reads it afterwards.

    `users` are all modules that are not yet solved and read the same input.
    """
    # Refinement, and the fallback to rounding to nearest, read it again.
    is_read_again = job.options is None or bool(job.options.refine) or job.options.fallback == "rtn"
    return not is_read_again and all(name in together for name in users)


def _is_alike(one: Assignment, two: Assignment) -> bool:
    return one.algorithm == two.algorithm and one.options == two.options and one.scheme.weights == two.scheme.weights


def siblings_by_name(names: Iterable[str]) -> dict[str, Hashable]:
    """Map each module that engines fuse with others in `names` to a value that is equal for those."""
    found: dict[str, tuple[str, tuple[str, ...]]] = {}
    for name in names:
        parent, _, own = name.rpartition(".")
        together = next((joined for joined in FUSED_NAMES if own in joined), None)
        if together is not None:
            found[name] = (parent, together)
    count = Counter(found.values())
    return {name: key for name, key in found.items() if count[key] > 1}
