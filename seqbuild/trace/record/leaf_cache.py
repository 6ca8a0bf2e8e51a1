"""Cache the results of leaves, so that equal leaves run only once.

Most layers of a model have the same classes, shapes and arguments, and therefore results of the same structure. Running
one on fake tensors takes 50 to 500 ms; a hundred layers that differ only in their index are run once.

A result is cached only if it provably depends on nothing but the compared state:

    compared    classes and their plain attributes; plain attributes, parameters and buffers of the leaf and all modules
                in it; the contents of their configs; the arguments: their structure, Python values, and for tensors
                dtype, device, symbolic sizes and strides
    ignored     the index of a layer (`layer_idx` and the like), unless it is read while the leaf runs
    not cached  a leaf that modifies an argument or itself, returns something that is neither new nor an argument,
                creates symbols, has hooks inside, or contains or receives anything not listed here

One assumption is not checked: code does not branch on globals that change while the model runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, disable_fake_tensor_cache
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

from seqbuild.trace.experts.signature import UnknownValueError
from seqbuild.trace.record.call_state import CallState, replaced_symbols
from seqbuild.trace.record.descriptions import Describer, Description, recreated
from seqbuild.trace.record.number_reads import numbers_watched


class LeafCache:
    """Results of leaves, by the state that determines their structure.

    Args:
        root: the model, before its forwards are replaced; modules with an instance attribute `forward` are not cached.
        fake_mode: the mode of the fake tensors.
    """

    def __init__(self, root: nn.Module, fake_mode: FakeTensorMode) -> None:
        self._fake_mode = fake_mode
        self._patched = {id(module) for module in root.modules() if "forward" in module.__dict__}
        self._results: dict[Any, Description] = {}
        with fake_mode:
            self._usual = frozenset(vars(nn.Parameter(torch.empty(0), requires_grad=False)))

    def call(self, leaf: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], run: Callable[[], Any]) -> Any:
        """Return a cached result in new fake tensors, or that of `run`, which calls `leaf` with these arguments."""
        before = self.state_of(leaf, args, kwargs)
        if before is None:
            return run()
        if before.key in self._results:
            return self.recreate(self._results[before.key], before)
        output, after, described = self.run_and_describe(leaf, args, kwargs, before, run)
        if described is not None:
            self._results[after.key] = described
        return output

    def run_and_describe(
        self, leaf: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], before: CallState, run: Callable[[], Any]
    ) -> tuple[Any, CallState, Description | None]:
        """Return the result of `run`, the state after it, and a description of the result if it may be cached."""
        # Torch's cache of single operators is off: whole leaves are cached here, and its lookups cost more than runs.
        with numbers_watched(before.numbered) as reads, disable_fake_tensor_cache(self._fake_mode):
            output = run()
        after = self.state_of(leaf, args, kwargs)
        if not reads and after is not None and after.facts == before.facts and self._is_same(before.key, after.key):
            with contextlib.suppress(UnknownValueError), torch._C.DisableTorchFunction():
                return output, after, Description(Describer(after).of(output))
        return output, before, None

    def _is_same(self, before: Any, after: Any) -> bool:
        """Return whether nothing changed, except that sizes became equal.

        For example, the first layer finds that its mask is as long as its text. Running it again would give the same
        result in the remaining symbols.
        """
        return bool(before == after or replaced_symbols(before, self._fake_mode.shape_env) == after)

    def state_of(self, leaf: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> CallState | None:
        """Return the state that determines the structure of the result; None if something cannot be compared."""
        state = CallState(fake_mode=self._fake_mode, patched=self._patched, usual=self._usual)
        try:
            with torch._C.DisableTorchFunction():
                state.fill(leaf, args, kwargs)
        except UnknownValueError:
            return None
        return state

    def recreate(self, described: Description, state: CallState) -> Any:
        """Recreate a described result with new fake tensors."""
        shape_env: Any = self._fake_mode.shape_env
        with disable_proxy_modes_tracing(), shape_env.sizes_kept_free(), self._fake_mode:
            return recreated(described.content, state.tensors)
