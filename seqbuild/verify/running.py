"""Run a model and its chain under the same conditions."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from runtime.weights.parameters import assign
from seqbuild.chain.partition import named_output
from seqbuild.sample.shape import SampleShape
from seqbuild.trace.real.weightless import configured
from seqbuild.verify.difference import tensors

if TYPE_CHECKING:
    from runtime.chain import Artifact

# The shape of the sample, then other values, sizes, paddings, images and grids.
SHAPES = (
    SampleShape(),
    SampleShape(seed=1),
    SampleShape(batch=2, sequence=19, padding="left", images=2, scale=1, seed=5),
    SampleShape(batch=1, sequence=24, padding="right", scale=2, seed=6),
    SampleShape(batch=5, sequence=41, padding="left", seed=7),
)
EAGER_EXPERTS = {"_experts_implementation": "eager"}
SEED = 3
Prints = dict[str, list[str]]


class ChainStep(Protocol):
    """One subgraph of a chain."""

    @property
    def input_names(self) -> Collection[str]:
        """Return the names of the inputs."""

    @property
    def consumed_names(self) -> Collection[str]:
        """Return the inputs that are freed after this subgraph."""

    def forward(self, model: nn.Module, **inputs: Any) -> dict[str, Any]:
        """Execute it."""


def run_model(model: nn.Module, sample: Mapping[str, Any]) -> dict[str, Any]:
    """Run the model without a cache and return its output by field; the sample is not modified.

    Fused experts run one after the other (`eager`), as in a portable artifact, because other implementations sum in a
    different order. The random state is fixed, because some models use it.
    """
    extra = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    with configured(model, {"use_cache": False, **EAGER_EXPERTS}), torch.no_grad():
        torch.manual_seed(SEED)
        output = model(**copy.deepcopy(dict(sample)), **extra)
    return named_output(output)


def run_chain(subgraphs: Iterable[ChainStep], model: nn.Module, sample: Mapping[str, Any]) -> dict[str, Any]:
    """Run a chain and return its output; consumed values are freed, and the sample is not modified."""
    values: dict[str, Any] = copy.deepcopy(dict(sample))
    output: dict[str, Any] = {}
    torch.manual_seed(SEED)
    for subgraph in subgraphs:
        values.update(output)
        with configured(model, EAGER_EXPERTS), torch.no_grad():
            output = subgraph.forward(model, **{name: values[name] for name in subgraph.input_names})
        for name in subgraph.consumed_names:
            del values[name]
    return output


@contextlib.contextmanager
def fingerprints(model: nn.Module, names: Iterable[str]) -> Iterator[Prints]:
    """Record a digest of each output of the submodules `names` while the block runs, by name."""
    found: Prints = {}
    hooks = []
    for name in names:

        def note(module: nn.Module, inputs: Any, output: Any, name: str = name) -> None:
            digest = hashlib.sha256()
            for tensor in tensors(output):
                flat = tensor.detach().contiguous().flatten()
                digest.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
                digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
            found.setdefault(name, []).append(digest.hexdigest())

        hooks.append(model.get_submodule(name).register_forward_hook(note))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def with_weights(artifact: Artifact, model: nn.Module) -> nn.Module:
    """Return the host's module tree with the parameters of `model`, shared by both."""
    twin = artifact.empty_model(next(p.dtype for p in model.parameters() if p.is_floating_point()))
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in artifact.manifest.parameters:
            assign(twin, name, tensor.detach())
    return twin
