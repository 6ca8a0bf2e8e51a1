"""Remember what a leaf returned, and give the same to the next identical leaf without running it.

A model's layers are mostly alike: same classes, same shapes, same arguments, and so the same structure of the result.
Running one on fake tensors takes 50 to 500 ms; a hundred layers that differ in their number alone are run once.

A result is remembered only where it can be shown to follow from what was compared:

    compared    classes and their plain attributes, plain attributes, parameters and buffers of the leaf and of all
                modules in it, the contents of the configs they hold, and the arguments: their structure, Python values,
                and of tensors dtype, device, symbolic sizes and strides
    not         the number of a layer (`layer_idx` and the like), as long as nothing reads it while the leaf runs
    refused     a leaf that changes an argument or itself, returns something that is not new (an argument itself is
                all right), makes symbols of its own, has hooks inside, or holds or takes anything not listed here

What is refused runs as if there were no memory. One thing is taken for granted: code does not decide by globals that
change while the model runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, disable_fake_tensor_cache
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

from seqbuild.trace.record.descriptions import Describer, Description, made
from seqbuild.trace.record.looks import Look, UnknownValueError, replaced_symbols
from seqbuild.trace.record.number_reads import numbers_watched


class LeafMemory:
    """Results of leaves, by all that decides their structure.

    Args:
        root: the model, before its forwards are replaced: a module that has a forward of its own is never remembered.
        fake_mode: the mode that owns the fake tensors.
    """

    def __init__(self, root: nn.Module, fake_mode: FakeTensorMode) -> None:
        self._fake_mode = fake_mode
        self._patched = {id(module) for module in root.modules() if "forward" in module.__dict__}
        self._results: dict[Any, Description] = {}
        with fake_mode:
            self._usual = frozenset(vars(nn.Parameter(torch.empty(0), requires_grad=False)))

    def call(self, leaf: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], run: Callable[[], Any]) -> Any:
        """What `run` returns, which calls `leaf` with these arguments, or the same in new fake tensors."""
        before = self.look(leaf, args, kwargs)
        if before is None:
            return run()
        if before.key in self._results:
            return self.made_again(self._results[before.key], before)
        output, after, described = self.described(leaf, args, kwargs, before, run)
        if described is not None:
            self._results[after.key] = described
        return output

    def described(
        self, leaf: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], before: Look, run: Callable[[], Any]
    ) -> tuple[Any, Look, Description | None]:
        """What `run` returns, a look at everything after it, and a description of the result, if that follows from
        nothing but what was seen.
        """
        # Whole leaves are remembered: to look for single operators takes longer than to run them.
        with numbers_watched(before.numbered) as reads, disable_fake_tensor_cache(self._fake_mode):
            output = run()
        after = self.look(leaf, args, kwargs)
        if not reads and after is not None and after.facts == before.facts and self._is_same(before.key, after.key):
            with contextlib.suppress(UnknownValueError), torch._C.DisableTorchFunction():
                return output, after, Description(Describer(after).of(output))
        return output, before, None

    def _is_same(self, before: Any, after: Any) -> bool:
        """Whether nothing has changed but that sizes are known to be equal now: the first layer finds out that its mask
        is as long as its text. To run it again would give what it gave, in the sizes that are left.
        """
        return bool(before == after or replaced_symbols(before, self._fake_mode.shape_env) == after)

    def clear(self) -> None:
        """Forget everything."""
        self._results.clear()

    def look(self, leaf: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Look | None:
        """All that decides the structure of the result; None when something takes part that is not compared."""
        look = Look(fake_mode=self._fake_mode, patched=self._patched, usual=self._usual)
        try:
            with torch._C.DisableTorchFunction():
                look.at(leaf, args, kwargs)
        except UnknownValueError:
            return None
        return look

    def made_again(self, described: Description, look: Look) -> Any:
        """A result as it was described, of new fake tensors."""
        shape_env: Any = self._fake_mode.shape_env
        with disable_proxy_modes_tracing(), shape_env.sizes_kept_free(), self._fake_mode:
            return made(described.content, look.tensors)
