"""Measure by gradients how much the model's prediction depends on the outputs of its modules.

forward     some samples run through all subgraphs with the original weights; the inputs of each subgraph are kept
backward    from the last subgraph to the first, each runs again on these inputs, and the gradient of its outputs
            becomes that of its inputs and of the outputs of its modules (`runtime.algorithms.output_fisher`)

One subgraph is in memory at a time, and the graph of one sample. Weights are read once in each direction.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from runtime.algorithms.output_fisher import OutputGradients, drawn_gradient
from runtime.data.masks import token_mask
from runtime.errors import ArtifactError, QuantizationError
from runtime.host.half_precision import quick_halves
from runtime.host.memory import is_out_of_memory
from runtime.search.watched_outputs import Index, JoinedPlace, watched_outputs
from runtime.streaming.activations import Activations

if TYPE_CHECKING:
    from torch import nn

    from runtime.chain import LoadedSubgraph
    from runtime.streaming.activations import Budget

LOGITS = "logits"
NO_LOGITS = "the model has no logits, by which errors of its modules could be weighed"
_SCALE_OF_HALVES = 256.0  # of gradients in float16, whose smallest numbers are not small enough


class NoGradientError(Exception):
    """Raised when no gradient passes through a subgraph."""


class SensitivityPass:
    """The samples of a search, on their way through the subgraphs and back.

    Args:
        model: the module tree; a subgraph's parameters are loaded when it runs.
        modules: that are watched.
        places: of experts' modules.
        samples: the model's inputs.
        device: where subgraphs run.
        lasting: see `Activations`.
        budget: the memory of the values between subgraphs.

    Attributes:
        found: of each module whose output has received a gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Sequence[str],
        places: Mapping[str, JoinedPlace],
        samples: Sequence[Mapping[str, Any]],
        taken: Sequence[str],
        device: torch.device,
        lasting: frozenset[str],
        budget: Budget | None,
    ) -> None:
        self.model, self.device = model, device
        self.places = places
        self.masks = [token_mask(sample) for sample in samples]
        inputs = [{name: value for name, value in sample.items() if name in taken} for sample in samples]
        self.activations = Activations(inputs, device, budget, None, lasting)
        self.found: dict[str, OutputGradients] = {}
        self._modules = dict.fromkeys(modules)
        self._carrying: dict[str, None] = {}  # values that depend on outputs of watched modules
        self._kept: list[list[dict[str, Any]]] = []  # by subgraph and sample
        self._gradients: list[dict[str, Any]] = [{} for _ in samples]  # by sample, of values between subgraphs
        self._scale = 1.0

    def forward(self, subgraph: LoadedSubgraph, *, is_last: bool) -> None:
        """Run all samples through a subgraph whose parameters are loaded, and keep its inputs.

        Raises:
            NoGradientError: the logits do not depend on watched modules in a way that torch can differentiate.
        """
        self._kept.append([])
        for sample in range(len(self.activations)):
            inputs = self.activations.fetch(sample, subgraph.input_names, private=True)
            with self._quick(subgraph):
                if not sample:
                    self._find_carrying(subgraph, is_last)
                outputs = {} if is_last else subgraph.forward(self.model, **inputs)
            self._kept[-1].append(self.activations.keep(sample, subgraph.input_names))
            self.activations.drop(sample, subgraph.consumed_names)
            self.activations.store(sample, outputs)

    def backward(self, subgraph: LoadedSubgraph, index: int, *, is_last: bool) -> None:
        """Run all samples through a subgraph again and back, after all later ones.

        Raises:
            NoGradientError: torch cannot differentiate it.
        """
        with self._frozen(subgraph):
            for sample, kept in enumerate(self._kept[index]):
                with self._quick(subgraph), torch.enable_grad():
                    self._back(subgraph, sample, kept, is_last)
                self.activations.release(kept)
        self._kept[index].clear()

    def _back(self, subgraph: LoadedSubgraph, sample: int, kept: dict[str, Any], is_last: bool) -> None:
        values = self.activations.fetch_kept(kept, private=True)
        given, leaves = self._with_leaves(values)
        counted = self.masks[sample]
        with _differentiable(), self._watched(subgraph, counted if isinstance(counted, torch.Tensor) else None):
            outputs = subgraph.forward(self.model, **given)
            ends, gradients = self._ends(outputs, sample, is_last)
            del outputs, given, values
            if ends:
                torch.autograd.backward(ends, gradients)
        for name, tensor in leaves:
            if tensor.grad is not None:
                self._add_gradient(sample, name, tensor.grad)

    def _add_gradient(self, sample: int, key: str, gradient: torch.Tensor) -> None:
        held = self._gradients[sample]
        held[key] = gradient if key not in held else held[key] + gradient

    def _ends(
        self, outputs: Mapping[str, Any], sample: int, is_last: bool
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return the outputs that have a gradient, and their gradients."""
        if is_last:
            logits = outputs[LOGITS]
            return [logits], [self._logits_gradient(logits, sample)]
        ends, gradients = [], []
        for key, tensor in _tensors(outputs):
            gradient = self._gradients[sample].pop(key, None)
            if gradient is not None and tensor.requires_grad:
                ends.append(tensor)
                gradients.append(gradient)
        return ends, gradients

    def _logits_gradient(self, logits: torch.Tensor, sample: int) -> torch.Tensor:
        flat_TV = logits.detach().reshape(-1, logits.shape[-1])
        uniform_T = torch.rand(len(flat_TV), generator=torch.Generator().manual_seed(sample), dtype=torch.float64)
        mask = self.masks[sample]
        parts = mask if isinstance(mask, tuple) else () if mask is None else (mask,)
        counts = next((part.flatten().to(self.device) for part in parts if part.shape == logits.shape[:-1]), None)
        gradient_TV = drawn_gradient(flat_TV, uniform_T.to(self.device), counts)
        self._scale = _SCALE_OF_HALVES if logits.dtype == torch.float16 else 1.0
        return (gradient_TV * self._scale).to(logits.dtype).view(logits.shape)

    def _with_leaves(self, values: Mapping[str, Any]) -> tuple[dict[str, Any], list[tuple[str, torch.Tensor]]]:
        """Let the values that depend on watched modules require gradients; the code may change them in place."""
        leaves: list[tuple[str, torch.Tensor]] = []
        given: dict[str, Any] = {}
        for name, value in values.items():
            flat, spec = pytree.tree_flatten(value)
            for place, one in enumerate(flat):
                key = _key(name, place)
                if key in self._carrying and isinstance(one, torch.Tensor):
                    leaf = one.detach().requires_grad_()
                    leaves.append((key, leaf))
                    flat[place] = leaf.clone()
            given[name] = pytree.tree_unflatten(flat, spec)
        return given, leaves

    def _find_carrying(self, subgraph: LoadedSubgraph, is_last: bool) -> None:
        """Find the outputs that depend on watched modules, with the first sample."""
        values = self.activations.fetch(0, subgraph.input_names, private=True)
        with self._frozen(subgraph), torch.enable_grad(), _differentiable(), self._watched(subgraph, None, finds=True):
            given, _ = self._with_leaves(values)
            outputs = subgraph.forward(self.model, **given)
        found = [key for key, tensor in _tensors(outputs) if tensor.requires_grad]
        self._carrying.update(dict.fromkeys(found))
        if not is_last:
            return
        if not isinstance(outputs.get(LOGITS), torch.Tensor):
            raise QuantizationError(NO_LOGITS, hint="set sensitivity: none")
        if not outputs[LOGITS].requires_grad:
            raise NoGradientError("the logits do not depend on any searched module in a differentiable way")

    @contextlib.contextmanager
    def _watched(self, subgraph: LoadedSubgraph, mask: torch.Tensor | None, *, finds: bool = False) -> Iterator[None]:
        """Collect the gradients of the outputs of watched modules while the block runs."""
        names = [name.removesuffix(".weight") for name in subgraph.entry.parameters if name.endswith(".weight")]

        def on_output(name: str, output: torch.Tensor, index: Index) -> torch.Tensor | None:
            result = None if output.requires_grad or index else output.detach().requires_grad_()
            tensor = output if result is None else result
            if not finds and tensor.requires_grad:
                hooks: Any = tensor  # torch has no types for its hooks
                hooks.register_hook(lambda gradient: self._observe(name, gradient, index, mask))
            return result

        with watched_outputs(self.model, [n for n in names if n in self._modules], self.places, on_output):
            yield

    def _observe(self, name: str, gradient: torch.Tensor, index: Index, mask: torch.Tensor | None) -> None:
        own = gradient[index]
        if name in self.places:
            own = self.places[name].columns(own)
        flat_TO = own.reshape(-1, own.shape[-1])
        if mask is not None and mask.numel() == len(flat_TO):  # the host finds the indices, without waiting for a GPU
            flat_TO = flat_TO.index_select(0, mask.flatten().nonzero().flatten().to(flat_TO.device))
        if name not in self.found:
            self.found[name] = OutputGradients(flat_TO.shape[-1], self.device)
        self.found[name].add(flat_TO, self._scale)

    @contextlib.contextmanager
    def _frozen(self, subgraph: LoadedSubgraph) -> Iterator[None]:
        """Compute no gradients of parameters while the block runs."""
        parameters = [self.model.get_parameter(name) for name in subgraph.entry.parameters if self._has(name)]
        before = [parameter.requires_grad for parameter in parameters]
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
        for parameter, had in zip(parameters, before, strict=True):
            parameter.requires_grad_(had)

    def _has(self, name: str) -> bool:
        owner, _, own = name.rpartition(".")
        return self.model.get_submodule(owner)._parameters.get(own) is not None

    def _quick(self, subgraph: LoadedSubgraph) -> contextlib.AbstractContextManager[None]:
        return quick_halves(self.device.type, subgraph.halves(self.model))


@contextlib.contextmanager
def _differentiable() -> Iterator[None]:
    """Report code that torch cannot differentiate as such."""
    try:
        yield
    except (RuntimeError, NotImplementedError, ArtifactError) as error:
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise NoGradientError(reason) from error


def _tensors(values: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each tensor of nested values, and its key."""
    for name, value in values.items():
        for place, one in enumerate(pytree.tree_leaves(value)):
            if isinstance(one, torch.Tensor):
                yield _key(name, place), one


def _key(name: str, place: int) -> str:
    return f"{name}/{place}"
