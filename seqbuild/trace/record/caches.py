"""What steps fill and later ones read: dictionaries, such as key-values that layers share, and caches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from runtime.errors import TraceError
from seqbuild.chain.marks import is_empty_cache


class EmptyCaches:
    """Takes empty caches of key-values out of the arguments of layers.

    Some models make a cache whether it is asked for or not, and a layer computes the same without it: what it adds to a
    cache is for the next token. A model may also let one stack of layers read what another has left there. As that is
    part of what it computes, it is refused: a chain has no cache.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[int, int], tuple[Any, nn.Module]] = {}

    def without(self, value: Any, modules: Sequence[nn.Module]) -> Any:
        """None for an empty cache, anything else as it is.

        Args:
            value: an argument of a step.
            modules: those that the step calls.

        Raises:
            TraceError: when layers of the same number have been given the cache before.
        """
        if not is_empty_cache(value):
            return value
        for module in modules:
            for number in sorted(_numbers(module)):
                _, before = self._seen.setdefault((id(value), number), (value, module))
                if before is not module:
                    raise TraceError(
                        f"layers of {type(module).__name__} read the key-values that layers of {type(before).__name__} "
                        "have left in a cache, and a chain of subgraphs has none",
                        hint="such a model cannot be compiled; compile the part of it that fills the cache by itself",
                    )
        return None


def _numbers(module: nn.Module) -> set[int]:
    found = (vars(part).get("layer_idx") for part in module.modules())
    return {number for number in found if type(number) is int}
