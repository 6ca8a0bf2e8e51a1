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


def num_together(
    names: Sequence[str],
    job: Assignment,
    num_in: int,
    experts: Mapping[str, tuple[str, int]],
    mixture_sizes: Mapping[str, int],
) -> int:
    """The number of batches that a GPU solves at the same time, if `names` is one: several of small experts.

    It may not depend on the number of workers, or on how many experts are measured at a time.

    Args:
        names: modules that are solved together.
        job: of the modules.
        num_in: I.
        experts: the mixture and the number of each module of an expert.
        mixture_sizes: the number of experts of each mixture.
    """
    from runtime.algorithms.gptq_stack_factors import num_stacked
    from runtime.algorithms.grid import is_grouped

    own = {experts.get(name) for name in names}
    expert = experts.get(names[0])
    if expert is None or len(own) > 1 or job.algorithm != "gptq" or job.options is None or job.options.refine:
        return 1
    if job.options.actorder is None and is_grouped(job.scheme.weights):
        return 1  # the grids of each are fitted alone, between products
    return num_stacked(num_in, mixture_sizes[expert[0]])


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
