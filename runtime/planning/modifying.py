"""What a subgraph takes while its weights are rescaled and rounded: `modify.modifier.RecipeModifier.apply`, in bytes.

Batches have gone through by then. What is left of them are sums of statistics, each until the last module that needs it
is rounded; rescaled weights are made in float32 when they are rounded or written, vectors at once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from runtime.planning.costs import copy_bytes, search_bytes, solve_bytes
from runtime.quantize.solve_batches import may_overwrite, solved_together

if TYPE_CHECKING:
    from runtime.quantize.needs import RecipeNeeds

Sums = Mapping[tuple[str, ...], int]  # the bytes of each sum, by the modules that share it


def modifying_bytes(
    modules: Sequence[str],
    needs: RecipeNeeds,
    shape_of: Callable[[str], tuple[int, ...]],
    sums: Sums,
    most_sums: int,
) -> int:
    """The most that is held beside the weights as they were.

    Args:
        modules: that are quantized with a subgraph, in order.
        needs: what the recipe does.
        shape_of: a parameter's shape, by name.
        sums: of its statistics.
        most_sums: of them at a time: experts are measured and rounded in groups.
    """
    most = 0
    copies: dict[str, int] = {}  # rescaled vectors
    rescaled: dict[str, int] = {}  # matrices, which are multiplied when their turn comes

    def held(left: Collection[str] | None = None) -> int:
        """With the sums of the modules that are left, all by default."""
        waiting = sum(size for names, size in sums.items() if left is None or any(name in left for name in names))
        return min(waiting, most_sums) + sum(copies.values())

    for transform, rescaling in needs.rescaled(modules):
        group = rescaling.group
        weights = [f"{name}.weight" for name in group.modules]
        taken = search_bytes([shape_of(name) for name in weights], transform.algorithm)
        most = max(most, held() + taken)
        touched = [*weights, group.producer, group.bias, *(other.name for other in group.others)]
        for name in (name for name in touched if name):
            shape = shape_of(name)
            if len(shape) == 1:
                copies[name] = copy_bytes(shape)
            else:
                rescaled[name] = 2 * copy_bytes(shape[-2:])
    most = max(most, held() + max(rescaled.values(), default=0))
    left = dict.fromkeys(modules)
    inputs = {name: number for number, names in enumerate(sums) for name in names}
    for together in solved_together(modules, needs.jobs, inputs):
        shapes = [shape_of(f"{name}.weight") for name in together]
        job = needs.jobs[together[0]]
        users = {name for names in sums if together[0] in names for name in names if name in left}
        overwrites = together[0] in inputs and may_overwrite(job, together, users)
        multiplied = sum(rescaled.get(f"{name}.weight", 0) for name in together)
        most = max(most, held(left) + multiplied + solve_bytes(shapes, job, overwrites=overwrites))
        for name in together:
            left.pop(name, None)
    return most
