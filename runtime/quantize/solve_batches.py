"""Which modules are solved together, and in what memory: one answer for the run and for the plan of its memory."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runtime.recipe.recipe import Assignment

# The most modules that are solved together: experts that are measured on all tokens see one input by the hundred.
_MOST_TOGETHER = 8


def solved_together(
    names: Sequence[str], jobs: Mapping[str, Assignment], inputs: Mapping[str, Hashable]
) -> Iterator[list[str]]:
    """Modules in batches: those by GPTQ that see one input and have one scheme and the same options.

    Args:
        names: the modules, in order.
        jobs: what is done to each.
        inputs: something that is equal for those that see one input; modules that are not measured have none.
    """
    done: set[str] = set()
    for name in names:
        if name in done:
            continue
        together = [name]
        if jobs[name].algorithm == "gptq" and name in inputs:
            fellows = [other for other in names if other in inputs and inputs[other] == inputs[name]]
            together = [other for other in fellows if other not in done and _is_alike(jobs[name], jobs[other])]
            together = together[:_MOST_TOGETHER]
        done.update(together)
        yield together


def may_overwrite(job: Assignment, together: Sequence[str], users: Iterable[str]) -> bool:
    """Whether a solve may work in the memory of its Hessian: whether nobody asks for that afterwards.

    Args:
        job: of the modules that are solved.
        together: these modules.
        users: all that have not been solved and see the same input.
    """
    # Who improves on the result, or rounds to nearest instead, asks for it again.
    is_asked_again = job.options is None or bool(job.options.refine) or job.options.fallback == "rtn"
    return not is_asked_again and all(name in together for name in users)


def _is_alike(one: Assignment, two: Assignment) -> bool:
    return one.algorithm == two.algorithm and one.options == two.options and one.scheme.weights == two.scheme.weights
