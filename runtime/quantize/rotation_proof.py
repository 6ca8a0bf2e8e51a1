"""Prove by execution that rotations do not change the function of a model, before a run starts.

One sample passes through the original and the rotated weights in float64, subgraph by subgraph. What the model's code
computes in narrower dtypes, norms for instance, is computed in float64 as well, so that the difference shows rounding
errors of float64 only.

A sample whose values of attention do not matter, because all tokens are masked for instance, would prove nothing. So it
also passes through weights whose values are rotated and not rotated back, and there the outputs must differ.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from runtime.artifact.size_expressions import size_of
from runtime.data.batches import split_batches
from runtime.data.inputs import MASK, require_in_range
from runtime.errors import ArtifactError, DataError, RecipeError
from runtime.quantize.rotated_weights import RotatedCheckpoint, RotatedModel
from runtime.recipe.recipe import some
from runtime.recipe.rotation_modifiers import SpinQuantModifier
from runtime.status import doing
from runtime.weights.parameters import Weights, place_buffers, unload

if TYPE_CHECKING:
    from torch import nn

    from runtime.artifact.manifest import Manifest
    from runtime.chain import Artifact
    from runtime.checkpoint.reader import Checkpoint
    from runtime.quantize.preparation import Prepared
    from runtime.recipe.recipe import Recipe
    from runtime.workers.group import Workers

# The largest difference of two outputs relative to the largest output. Rounding errors of float64 are near 1e-15 for
# each operation; a wrong rotation changes outputs by their own size.
TOLERANCE = 1e-9
_TOKENS = 16  # positions of a longer sample that are left out change nothing about the proof
_CPU = torch.device("cpu")


def prove_rotations(
    artifact: Artifact,
    prepared: Prepared,
    recipe: Recipe,
    batches: Sequence[Mapping[str, torch.Tensor]],
    workers: Workers,
) -> None:
    """Prove the rotations of a prepared model, if its recipe has any that are fused, on the first worker.

    Raises:
        RecipeError: see `require_same_function`.
    """
    if prepared.rotated is None or prepared.original is None or workers.rank:
        return
    doing("checking the rotations on a sample")
    modifier = next(entry for entry in recipe.rotations if isinstance(entry, SpinQuantModifier))
    where = f"{recipe.source}:{modifier.line}: {modifier.name}"
    require_same_function(artifact, prepared.original, prepared.rotated, batches, where)


def require_same_function(
    artifact: Artifact,
    checkpoint: Checkpoint,
    model: RotatedModel,
    batches: Sequence[Mapping[str, torch.Tensor]],
    where: str,
) -> float:
    """Run one sample through both models, and return the largest relative difference of their outputs.

    Args:
        artifact: the chain, as compiled.
        checkpoint: the original weights.
        model: what is rotated.
        batches: for the sample; made up if there are none.
        where: the modifier's name and line.

    Raises:
        RecipeError: the outputs differ by more than rounding errors, naming the spaces.
    """
    sample = sample_of(artifact.manifest, batches)
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in sample.items()}
    tree = wide_tree(artifact)
    plain = WideWeights(artifact, checkpoint, torch.float64, tree)
    models = [model, *([replace(model, turns={**model.turns, **model.half})] if model.half else [])]
    sides = [RotatedCheckpoint(plain, one, precise=True) for one in models]
    rotated = [WideWeights(artifact, side, torch.float64, tree) for side in sides]
    try:
        found = outputs_of(artifact, tree, (plain, *rotated), inputs)
    except (RuntimeError, IndexError, ValueError, TypeError, KeyError, ArtifactError, DataError) as error:
        reason = str(error).partition("\n")[0]
        hint = "remove the rotations" if batches else "pass --data"
        raise RecipeError(f"{where} cannot be checked on a sample: {reason}", hint=hint) from error
    difference, *others = (difference_of(found[0], other) for other in found[1:])
    if not difference <= TOLERANCE:
        raise RecipeError(
            f"{where} would change the model: outputs differ by {difference:.1e} of their size after rotating "
            f"{some(model.spaces)}",
            hint="compile the model again; the artifact's rotation spaces are wrong for it",
        )
    if any(other <= TOLERANCE for other in others):
        raise RecipeError(
            f"{where} cannot be checked on a sample: its outputs do not depend on the values of attention",
            hint="remove R2 from rotations" if batches else "pass --data",
        )
    return difference


class WideWeights(Weights):
    """Parameters in float64, whatever dtype the model prescribes for them."""

    def _used_dtype(self, name: str, stored: torch.Tensor) -> torch.dtype:
        return torch.float64 if stored.is_floating_point() else stored.dtype


def wide_tree(artifact: Artifact) -> nn.Module:
    """Build the module tree of a run in float64; its buffers have the values of float32, which artifacts contain."""
    tree = artifact.empty_model(torch.float32)
    place_buffers(tree, _CPU)
    tree.__dict__["run_dtype"] = torch.float64
    for module in tree.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point() and not buffer.is_meta:
                module._buffers[name] = buffer.double()
    return tree


def outputs_of(
    artifact: Artifact, tree: nn.Module, sides: Sequence[Weights], inputs: Mapping[str, Any]
) -> list[list[torch.Tensor]]:
    """Return the floating point outputs of each side; one subgraph's weights of one side are in memory at a time."""
    values, last = [dict(inputs) for _ in sides], list[list[torch.Tensor]]()
    for subgraph in artifact.subgraphs:
        for side, held in zip(sides, values, strict=True):
            side.load(tree, subgraph.entry.parameters, _CPU)
            own = {name: held[name] for name in subgraph.input_names}
            with torch.inference_mode(False), torch.no_grad(), _Float64():
                outputs = subgraph.forward(tree, **own)
            unload(tree, subgraph.entry.parameters)
            for name in subgraph.consumed_names:
                held.pop(name, None)
            held.update(outputs)
            if subgraph is artifact.subgraphs[-1]:
                last.append(list(_floats(outputs)))
    return last


def _floats(value: Any) -> Iterator[torch.Tensor]:
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
            yield leaf


def difference_of(ones: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> float:
    """The largest difference of two outputs, relative to the largest finite number of a tensor; infinite for tensors
    of different shapes.
    """
    found = [0.0]
    for one, two in zip(ones, others, strict=True):
        if one.shape != two.shape or not torch.equal(one.isfinite(), two.isfinite()):
            return float("inf")
        is_number = one.isfinite()
        if bool(is_number.any()):
            one, two = one[is_number].double(), two[is_number].double()
            found.append(float((one - two).abs().max() / one.abs().max().clamp_min(torch.finfo(torch.float64).tiny)))
    return max(found)


class _Float64(TorchFunctionMode):
    """Compute in float64 what code asks to be computed in a narrower floating point dtype."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        def widened(value: Any) -> Any:
            is_narrow = isinstance(value, torch.dtype) and value.is_floating_point
            return torch.float64 if is_narrow else value

        return func(*map(widened, args), **{name: widened(value) for name, value in (kwargs or {}).items()})


def sample_of(manifest: Manifest, batches: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, Any]:
    """Return one sample of the first batch, of few tokens if it can be shortened; made up without batches."""
    taken = {entry.name for entry in manifest.inputs}
    if not batches:
        return _made_up(manifest)
    whole = {name: value for name, value in batches[0].items() if name in taken}
    parts = split_batches(manifest, [whole], 1)
    sample = dict(parts[0]) if parts else dict(whole)
    with contextlib.suppress(DataError):
        short = _shortened(manifest, sample)
        require_in_range(manifest, [short])
        return short
    return sample


def _shortened(manifest: Manifest, sample: Mapping[str, Any]) -> dict[str, Any]:
    """Cut the second axis of inputs [batch, tokens, ...] of text models."""
    shapes = [entry.shape for entry in manifest.inputs]
    symbols = {shape[1] for shape in shapes if len(shape) > 1}
    if len(symbols) != 1 or not isinstance(next(iter(symbols)), str) or any(len(shape) > 2 for shape in shapes):
        return dict(sample)
    return {name: value[:, :_TOKENS] if value.dim() == 2 else value for name, value in sample.items()}


def _made_up(manifest: Manifest) -> dict[str, torch.Tensor]:
    sizes = {}
    for place, dim in enumerate(manifest.dims):
        usual = 2 if place == 0 else _TOKENS // 2
        sizes[dim.name] = max(dim.min, min(usual, dim.max) if dim.max > 0 else usual)
    vocabulary = manifest.limits.get("vocab_size", 16)
    found: dict[str, torch.Tensor] = {}
    for entry in manifest.inputs:
        shape = [size if isinstance(size, int) else size_of(size, sizes) for size in entry.shape]
        dtype = torch.float64 if entry.dtype == "model" else getattr(torch, entry.dtype)
        if entry.absent >= 0 or entry.name == MASK:
            found[entry.name] = torch.full(shape, 1 if entry.name == MASK else entry.absent, dtype=dtype)
        elif dtype.is_floating_point or not found:
            numbers = torch.arange(torch.Size(shape).numel()).reshape(shape) * 7919 % vocabulary
            found[entry.name] = (numbers / vocabulary if dtype.is_floating_point else numbers).to(dtype)
        else:
            found[entry.name] = torch.zeros(shape, dtype=dtype)
    return found
