"""Key-value caches in 8 bits: measure the cached values, and run with a rounded cache as a reader does.

Readers round keys and values when they enter the cache, with one scale per layer or per head. The artifact names these
values (`runtime.artifact.cached_values`): those that the model's own code would pass to its cache. They can differ from
the operands of attention: multi-head latent attention caches a latent and expands it afterwards. A scheme for attention
rounds the queries as well, with the same arguments.

The scale is the largest magnitude divided by that of the format (448 for FP8). With the observer `static_minmax` the
magnitude is that of all batches and tokens; else it is that of the moving averages of each batch's minimum and maximum,
which is llm-compressor's default. Padding counts, as it does there.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from runtime.artifact.cached_values import QUERY, hooked
from runtime.errors import ArtifactError, QuantizationError, RecipeError

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs

    from runtime.algorithms.hadamard import Hadamard
    from runtime.artifact.manifest import CachedValue, Manifest, SubgraphEntry
    from runtime.language.program import Program, Run
    from runtime.workers.group import Workers

CACHE_PARTS = ("k", "v")


class CompiledSubgraph(Protocol):
    """A subgraph of a loaded artifact: its manifest entry and its source."""

    @property
    def entry(self) -> SubgraphEntry:
        """Its entry in the manifest."""

    @property
    def source(self) -> str:
        """Its checked source."""


_ATTRIBUTE = "key_values"  # of the model
# Parameters of latent attention, whose cached tensor is not an operand of attention.
_LATENT = re.compile(r"\.kv_[ab]_")
_ROTATED = ("k", QUERY)
_HEADS = 1  # the dimension of heads in a cached value: [batch, heads, tokens, head size]


@dataclass(kw_only=True)
class KeyValues:
    """The key-value cache of a model.

    Attributes:
        args: its scheme; None if values are only rotated.
        parts: the values to round: `k`, `v`, and `q` for a scheme of attention.
        rotations: by attention module, the rotation of its queries and keys, before they are measured or rounded.
        entries: by a subgraph's parameters, its cached values in the manifest's order.
        modules: by a subgraph's parameters, its attention modules in order of execution.
        spans: by module and part, the measured minimum and maximum, of the layer or of each head.
        scales: by module and part; values that have a scale are rounded.
        is_measuring: whether values are measured instead of rounded.
        is_paused: whether values are neither, because the original model runs.
        measured: by module and part, minimum and maximum of each call in the lane that runs.
    """

    args: QuantizationArgs | None
    entries: Mapping[tuple[str, ...], tuple[CachedValue, ...]] = field(default_factory=dict)
    modules: Mapping[tuple[str, ...], tuple[str, ...]] = field(default_factory=dict)
    parts: tuple[str, ...] = CACHE_PARTS
    rotations: Mapping[str, Hadamard] = field(default_factory=dict)
    spans: dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    scales: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict)
    is_measuring: bool = False
    is_paused: bool = False
    measured: dict[tuple[str, str], list[tuple[torch.Tensor, torch.Tensor]]] = field(default_factory=dict)
    _programs: dict[tuple[str, tuple[CachedValue, ...]], Program] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls,
        manifest: Manifest,
        args: QuantizationArgs | None,
        *,
        has_queries: bool = False,
        rotations: Mapping[str, Hadamard] | None = None,
    ) -> KeyValues:
        """Create the cache of an artifact's model.

        Args:
            manifest: lists the cached values.
            args: the cache's scheme; None to round nothing.
            has_queries: whether queries are rounded, too.
            rotations: see the class.

        Raises:
            RecipeError: if the artifact does not list the values that the scheme rounds.
        """
        if not manifest.cached:
            raise RecipeError(
                "the artifact lists no key-value cache, so it cannot be quantized",
                hint="compile with --leaves linear; models without a cache, and attention modules that run several "
                "times in one forward, are unsupported",
            )
        if has_queries and not any(entry.part == QUERY for entry in manifest.cached):
            raise RecipeError(
                "the artifact does not list attention's queries, so only its cache can be quantized",
                hint="use kv_cache_scheme instead of a scheme for attention",
            )
        parts = () if args is None else (*CACHE_PARTS, QUERY) if has_queries else CACHE_PARTS
        rotated = rotations or {}
        found = cls(args=args, parts=parts, rotations=rotated)
        without = next((entry for entry in manifest.cached if not entry.heads and entry.part in parts), None)
        if found.is_by_head and without is not None:
            raise RecipeError(
                f"{without.module} cannot have a scale for each head: its cached values have no dimension of heads",
                hint="use strategy: tensor",
            )
        entries: dict[tuple[str, ...], tuple[CachedValue, ...]] = {}
        modules: dict[tuple[str, ...], tuple[str, ...]] = {}
        for entry in manifest.cached:
            key = manifest.subgraphs[entry.subgraph].parameters
            is_handled = entry.part in parts or (entry.part in _ROTATED and entry.module in rotated)
            entries[key] = (*entries.get(key, ()), *((entry,) if is_handled else ()))
            if args is not None:
                modules[key] = tuple(dict.fromkeys((*modules.get(key, ()), entry.module)))
        return dataclasses.replace(found, entries=entries, modules=modules)

    def all_modules(self) -> Iterator[str]:
        """Every attention module, in order of execution."""
        for modules in self.modules.values():
            yield from modules

    def of_subgraph(self, entry: SubgraphEntry) -> tuple[str, ...]:
        """The attention modules of one subgraph."""
        return self.modules.get(entry.parameters, ())

    def forget(self, modules: Sequence[str]) -> None:
        """Drop the measurements of some modules, before all batches run through them again."""
        self.measured.clear()
        for module in modules:
            for part in self.parts:
                self.spans.pop((module, part), None)

    def restore(self, modules: Sequence[str], spans_of: Callable[[str, str], torch.Tensor]) -> None:
        """Take the spans of some modules from the minima and maxima [calls, 2, H] of an earlier measurement."""
        self.forget(modules)
        for module in modules:
            for part in self.parts:
                for low_H, high_H in spans_of(module, part):
                    span = (low_H, high_H) if self.is_by_head else (low_H.amin(), high_H.amax())
                    self.add_span((module, part), *span)

    def end_round(self, workers: Workers, device: torch.device) -> None:
        """Add what every worker has measured in its lane to the spans: in the order of lanes, and of calls in each."""
        own = {key: torch.stack([torch.stack(span) for span in spans]) for key, spans in self.measured.items()}
        self.measured.clear()
        lists = workers.exchange([[*key, *spans.shape] for key, spans in own.items()])
        for rank, entries in enumerate(lists):
            for module, part, *shape in entries:
                key = (module, part)
                spans = own[key] if rank == workers.rank else torch.empty(shape, device=device)
                workers.broadcast(spans, rank)
                for low, high in spans:
                    self.add_span(key, low, high)

    def scale_of(self, module: str, part: str, dtype: torch.dtype) -> torch.Tensor:
        """Compute the scale from the measured span, [1] or [H, 1, 1].

        Raises:
            QuantizationError: if the span is not finite, or no scale can represent it.
            ArtifactError: if the number of heads differs from the artifact's.
        """
        low, high = self.spans[module, part]
        size = torch.maximum(low.abs(), high.abs()).to("cpu", torch.float64)
        if not torch.isfinite(size).all():
            what = {"k": "keys", "v": "values", "q": "queries"}[part]
            raise QuantizationError(
                f"the {what} of {module} reach {float(size.max())}, so their {part}_scale is undefined",
                hint="calibrate in bfloat16 or float32 (--dtype), or look for NaN and Inf in the weights",
            )
        from runtime.algorithms import grid

        bounds = low.float().cpu().reshape(-1), high.float().cpu().reshape(-1)
        try:
            scale, _ = grid.fit(*bounds, self.args, scale_dtype=dtype)
        except QuantizationError as error:
            raise QuantizationError(f"the {part}_scale of {module}: {error.message}", hint=error.hint) from error
        shaped = scale.reshape(-1, 1, 1) if self.is_by_head else scale.reshape(1)
        if shaped.shape != self.scale_shape(module, part):
            raise ArtifactError(f"{module} has {len(shaped)} heads, but the artifact states another number")
        return shaped

    def scale_shape(self, module: str, part: str) -> tuple[int, ...]:
        """The shape of a scale in the checkpoint."""
        if not self.is_by_head:
            return (1,)
        entries = (entry for inside in self.entries.values() for entry in inside)
        return (next(entry.heads for entry in entries if entry.module == module and entry.part == part), 1, 1)

    @property
    def is_by_head(self) -> bool:
        """Whether each head has a scale of its own."""
        strategy = None if self.args is None else self.args.strategy
        return str(getattr(strategy, "value", strategy)) == "attn_head"

    def handle(self, module: str, part: str, states: torch.Tensor) -> torch.Tensor:
        """Measure or round a value that enters the cache.

        Raises:
            ArtifactError: if it is not a floating point tensor.
        """
        if not isinstance(states, torch.Tensor) or not states.is_floating_point():
            raise ArtifactError(f"the cached {part} of {module} is not a floating point tensor")
        if part in _ROTATED and module in self.rotations:
            try:
                states = self.rotations[module].apply(states)
            except QuantizationError as error:
                raise ArtifactError(f"the {part} of {module} cannot be rotated: {error.message}") from error
        if self.is_paused:
            return states
        if self.is_measuring:
            if states.numel() and part in self.parts:
                self._measure(module, part, states)
        elif (module, part) in self.scales:
            from compressed_tensors.quantization.lifecycle.forward import fake_quantize

            scale = self.scales[module, part].to(states.device)
            plain = states.detach()
            rounded: torch.Tensor = fake_quantize(plain, scale, torch.zeros_like(scale), self.args).to(states.dtype)
            # Gradients pass as if the value were not rounded.
            return rounded if not states.requires_grad else states + (rounded - plain)
        return states

    def _measure(self, module: str, part: str, states: torch.Tensor) -> None:
        if self.is_by_head:
            if states.dim() != 4:
                raise ArtifactError(f"the cached {part} of {module} has {states.dim()} dimensions; expected 4")
            others = [dim for dim in range(4) if dim != _HEADS]
            low, high = states.amin(others).float(), states.amax(others).float()
        else:
            low, high = (bound.float() for bound in states.aminmax())
        self.measured.setdefault((module, part), []).append((low, high))

    def add_span(self, key: tuple[str, str], low: torch.Tensor, high: torch.Tensor) -> None:
        """Add minimum and maximum of a call to a span."""
        from runtime.formats.presets import averaging_of

        before, averaging = self.spans.get(key), averaging_of(self.args)
        if before is not None and averaging is None:
            low, high = torch.minimum(before[0], low), torch.maximum(before[1], high)
        elif before is not None and averaging is not None:
            low, high = torch.lerp(before[0], low, averaging), torch.lerp(before[1], high, averaging)
        self.spans[key] = low, high

    def program(self, subgraph: CompiledSubgraph) -> Program | None:
        """Compile the subgraph's program so that it passes its cached values to `Run.cached`; None if it has none."""
        entries = self.entries.get(subgraph.entry.parameters, ())
        if not entries:
            return None
        key = (subgraph.entry.file, tuple(dataclasses.replace(entry, subgraph=0, module="") for entry in entries))
        if key not in self._programs:
            from runtime.language.program import compile_program

            hooks = hooked(subgraph.source, entries)
            assert hooks is not None, "the artifact was checked"
            self._programs[key] = compile_program(subgraph.source, subgraph.entry.file, hooks, is_rewritten=True)
        return self._programs[key]

    def run(self, subgraph: CompiledSubgraph, run: Run) -> Run:
        """Return `run` with the `cached` function that the program of `program` calls."""
        entries = self.entries[subgraph.entry.parameters]

        def cached(place: int, value: Any) -> Any:
            return self.handle(entries[place].module, entries[place].part, value)

        return dataclasses.replace(run, cached=cached)


def latent_attention(manifest: Manifest) -> list[str]:
    """Modules of multi-head latent attention, whose cached tensor is not an operand of attention."""
    found = dict.fromkeys((entry.subgraph, entry.module) for entry in manifest.cached)
    return [
        module
        for index, module in found
        if any(name.startswith(f"{module}.") and _LATENT.search(name) for name in manifest.subgraphs[index].parameters)
    ]


def attach(model: nn.Module, key_values: KeyValues | None) -> None:
    """Make a model's subgraphs measure or round their keys and values; None to leave them as they are."""
    model.__dict__[_ATTRIBUTE] = key_values


def of_model(model: nn.Module) -> KeyValues | None:
    """The key-value cache attached to a model; None if there is none."""
    found: KeyValues | None = model.__dict__.get(_ATTRIBUTE)
    return found
