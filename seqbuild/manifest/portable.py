"""Describe what a host needs to build the module tree by itself: leaves, and tensors that are not loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from runtime.artifact.encoding import sha256
from runtime.artifact.manifest import BufferEntry, LeafKind, SubgraphEntry
from runtime.model.config import LIMITS
from seqbuild.trace.record.leaf_policy import Leaf, forward_path
from seqbuild.trace.record.tracer import leaf_policy

if TYPE_CHECKING:
    from torch import nn

_RUN_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(kw_only=True)
class Parts:
    """Tables of a manifest that describe modules and computed tensors.

    Attributes:
        kinds: the kinds of leaves.
        leaves: the kind of each module that the code calls, by its dotted name.
        buffers: the origin of computed tensors, by their dotted names.
        foreign: modules that the host cannot build by itself: dotted name to `module:Class`.
        programs: by file, the sources of leaves with a computation of their own.
        constants: the values of computed tensors.
    """

    kinds: list[LeafKind] = field(default_factory=list)
    leaves: dict[str, int] = field(default_factory=dict)
    buffers: dict[str, BufferEntry] = field(default_factory=dict)
    foreign: dict[str, str] = field(default_factory=dict)
    programs: dict[str, str] = field(default_factory=dict)
    constants: dict[str, torch.Tensor] = field(default_factory=dict)


def parts(
    model: nn.Module, entries: Sequence[SubgraphEntry], rebuilt: Callable[[torch.dtype], nn.Module], traced: torch.dtype
) -> Parts:
    """Describe the modules and tensors that the code of these subgraphs calls and reads.

    Args:
        model: the model that was traced, with real buffers.
        entries: its subgraphs.
        rebuilt: builds the same model for another dtype of the weights, because some tensors are computed in it.
        traced: the dtype of `model`.
    """
    found = Parts()
    places: dict[str, int] = {}
    policy = leaf_policy(dtype=traced)
    modules = dict(model.named_modules(remove_duplicate=False))
    called = dict.fromkeys(name for entry in entries for name in entry.submodules)
    for name, module in modules.items():  # also those that are never called: a recipe may name them
        leaf = policy.leaf(module)
        if leaf is None and name in called:
            found.foreign[name] = forward_path(module).removesuffix(".forward")
        if leaf is None:
            continue
        described = repr((leaf.kind, leaf.source))
        if described not in places:
            places[described] = len(found.kinds)
            found.kinds.append(_with_program(leaf, found.programs))
        found.leaves[name] = places[described]
    persistent = model.state_dict(keep_vars=True)
    read = dict.fromkeys(name for entry in entries for name in entry.attributes if name not in persistent)
    if read:
        _describe_buffers(found, list(read), model, rebuilt, traced)
    return found


def _with_program(leaf: Leaf, programs: dict[str, str]) -> LeafKind:
    if not leaf.source:
        return leaf.kind
    file = next((file for file, source in programs.items() if source == leaf.source), f"leaves/{len(programs):03d}.py")
    programs[file] = leaf.source
    return dataclasses.replace(leaf.kind, program=file)


def _describe_buffers(
    found: Parts,
    names: Sequence[str],
    model: nn.Module,
    rebuilt: Callable[[torch.dtype], nn.Module],
    traced: torch.dtype,
) -> None:
    """Store the values of these tensors, equal ones once, and per run dtype where they depend on it."""
    models = {dtype: model if dtype == traced else rebuilt(dtype) for dtype in _RUN_DTYPES}
    stored: dict[str, str] = {}

    def store(tensor: torch.Tensor) -> str:
        plain = tensor.detach().cpu().contiguous()
        data = plain.flatten().view(torch.uint8) if plain.numel() else plain.flatten()
        digest = sha256(str((plain.dtype, tuple(plain.shape))).encode() + data.numpy().tobytes())
        if digest not in stored:
            stored[digest] = f"buffer_{len(stored)}"
            found.constants[stored[digest]] = plain.clone()
        return stored[digest]

    for name in names:
        made = {str(dtype).removeprefix("torch."): store(other.get_buffer(name)) for dtype, other in models.items()}
        same = set(made.values())
        found.buffers[name] = BufferEntry(constants={"": same.pop()} if len(same) == 1 else made)


def limits(config: object) -> dict[str, int]:
    """Return the limits on data that the config states: vocabulary size and longest sequence."""
    text: object = getattr(config, "get_text_config", lambda: config)()
    return {name: value for name in LIMITS if type(value := getattr(text, name, None)) is int and value > 0}
