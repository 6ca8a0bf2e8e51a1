"""Key-value caches in 8 bits: measure what attention keeps, and run as a reader that keeps it rounded.

Readers round keys and values when they enter the cache: keys after their positions were turned in, both with one scale
for a layer. Rounding each number by itself, it does not matter that the chain repeats heads before its operator
`scaled_dot_product_attention`, where both can be had whatever the architecture: a mode of torch hands them out.

The scale is the largest magnitude over 448: of all batches and tokens with the observer `static_minmax`, else that of
the moving average of each batch's smallest and largest number, as llm-compressor's default has it. Padding is part of
it: the operator does not know which tokens are padded.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from runtime.errors import QuantizationError, RecipeError

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs

    from runtime.manifest import Manifest, SubgraphEntry

PARTS = ("k_scale", "v_scale")
_ATTRIBUTE = "key_values"  # of the model
_OPERATOR = torch.ops.aten.scaled_dot_product_attention.default


@dataclass(kw_only=True)
class KeyValues:
    """The key-value cache of a model.

    Attributes:
        args: its scheme.
        modules: the attention modules of each subgraph, in order of their calls.
        spans: the smallest and the largest number of keys and of values that were seen while measuring.
        scales: of keys and values by module, each [1]; where there are some, they are rounded.
        is_measuring: whether sizes are taken, and nothing is rounded.
    """

    args: QuantizationArgs
    modules: Mapping[tuple[str, ...], tuple[str, ...]]
    spans: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    scales: dict[str, Sequence[torch.Tensor]] = field(default_factory=dict)
    is_measuring: bool = False

    @classmethod
    def of(cls, manifest: Manifest, args: QuantizationArgs) -> KeyValues:
        """Those of an artifact's model.

        Raises:
            RecipeError: when the artifact does not say where its attention is.
        """
        if not manifest.attentions:
            raise RecipeError(
                "the artifact does not say where its keys and values are, so a key-value cache cannot be quantized",
                hint="compile with --leaves linear, and with the attention sdpa",
            )
        modules: dict[tuple[str, ...], tuple[str, ...]] = {}
        for entry in manifest.attentions:
            key = manifest.subgraphs[entry.subgraph].parameters
            modules[key] = (*modules.get(key, ()), entry.module)
        return cls(args=args, modules=modules)

    def all_modules(self) -> Iterator[str]:
        """Every attention module, in order of execution."""
        for modules in self.modules.values():
            yield from modules

    def scale_of(self, module: str, dtype: torch.dtype) -> list[torch.Tensor]:
        """The scales of keys and values that were measured, each [1]."""
        from runtime.schemes import static_cache_scale

        try:
            return [static_cache_scale(low, high, self.args, dtype) for low, high in self.spans[module]]
        except QuantizationError as error:
            raise QuantizationError(f"the keys and values of {module}: {error.message}", hint=error.hint) from error

    def handle(self, module: str, which: int, states: torch.Tensor) -> torch.Tensor:
        """Keys (0) or values (1) on their way into attention."""
        from compressed_tensors.quantization.lifecycle.forward import fake_quantize

        if self.is_measuring:
            if states.numel():
                self._measure(module, which, *map(float, states.aminmax()))
        elif module in self.scales:
            scale = self.scales[module][which].to(states.device)
            rounded: torch.Tensor = fake_quantize(states, scale, torch.zeros_like(scale), self.args)
            return rounded.to(states.dtype)
        return states

    def _measure(self, module: str, which: int, low: float, high: float) -> None:
        from runtime.presets import averaging_of

        if not (math.isfinite(low) and math.isfinite(high)):
            what = ("keys", "values")[which]
            raise QuantizationError(
                f"the {what} of {module} are not finite: they reach from {low} to {high}",
                hint="an activation overflowed: calibrate with --dtype bfloat16 or float32",
            )
        spans = self.spans.setdefault(module, [])
        if which >= len(spans):
            spans.append((low, high))  # of the first batch; keys come before values
            return
        before, averaging = spans[which], averaging_of(self.args)
        if averaging is None:
            spans[which] = min(before[0], low), max(before[1], high)
        else:
            spans[which] = (
                before[0] + averaging * (low - before[0]),
                before[1] + averaging * (high - before[1]),
            )


def attach(model: nn.Module, key_values: KeyValues) -> None:
    """Have a model's subgraphs measure or round their keys and values."""
    model.__dict__[_ATTRIBUTE] = key_values


def of_model(model: nn.Module) -> KeyValues | None:
    """What was attached."""
    found: KeyValues | None = model.__dict__.get(_ATTRIBUTE)
    return found


@contextlib.contextmanager
def watched(model: nn.Module, entry: SubgraphEntry) -> Iterator[None]:
    """Hand out keys and values while a subgraph runs, if anybody asked for them."""
    key_values = of_model(model)
    modules = key_values.modules.get(entry.parameters, ()) if key_values is not None else ()
    if key_values is None or not modules:
        yield
        return
    with _Interception(key_values, modules):
        yield


class _Interception(TorchFunctionMode):
    """Passes keys and values through `KeyValues.handle`, call by call."""

    def __init__(self, key_values: KeyValues, modules: Sequence[str]) -> None:
        super().__init__()
        self.key_values = key_values
        self.waiting = iter(modules)

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is not _OPERATOR:
            return func(*args, **(kwargs or {}))
        module = next(self.waiting)
        query, key, value, *rest = args
        with torch._C.DisableTorchFunction():
            key = self.key_values.handle(module, 0, key)
            value = self.key_values.handle(module, 1, value)
        return func(query, key, value, *rest, **(kwargs or {}))
