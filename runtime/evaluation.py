"""Perplexity, streamed through the subgraphs: one layer in memory at a time.

    ppl = exp( - 1/N sum over samples, over positions t >= 2, of log p(x_t | x_1 ... x_{t-1}) )

N counts the predicted tokens, one less than each sample's length.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from runtime.activations import Activations
from runtime.arguments import as_device, as_dtype, as_path, require_artifact, require_callable
from runtime.checked_batches import as_batches, require_inputs
from runtime.dequantize import open_checkpoint
from runtime.errors import DataError, ModelError, QuantizationError
from runtime.half_products import quick_halves
from runtime.quantized import input_quantization
from runtime.split import split_experts
from runtime.streaming.weight_stream import WeightStream
from runtime.weights import Weights, place_buffers, unload

if TYPE_CHECKING:
    from runtime.artifact import Artifact
    from runtime.manifest import Manifest

LOGITS = "logits"
_LARGEST_LOSS = 700.0  # its exponential is still a float


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Perplexity over `num_tokens` predicted tokens; `num_bytes` is the checkpoint's size on disk."""

    perplexity: float
    num_tokens: int
    num_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class _Part:
    """A subgraph, for the stream of weights."""

    index: int
    loads: Sequence[str]


def evaluate(
    artifact: Artifact,
    *,
    weights: str | os.PathLike[str],
    batches: Sequence[Mapping[str, torch.Tensor]],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Evaluation:
    """Measure a causal language model's perplexity.

    Args:
        artifact: the compiled model.
        weights: directory of a checkpoint: the original, or one quantized in compressed-tensors' format.
        batches: the model's inputs, one mapping a batch, on the CPU, without padding.
        device: where subgraphs run.
        dtype: of weights and activations; None for the model's own.
        progress: called with one line for each subgraph.

    Raises:
        UsageError, DeviceError: an argument of the wrong type, a device that is not there.
        WeightsError: when the checkpoint does not fit the artifact.
        ModelError: when the model does not predict the next token.
        DataError: when batches are not the model's inputs, or no sample has two tokens.
        QuantizationError: when the logits are not finite.
    """
    start = time.perf_counter()
    artifact, device, dtype = require_artifact(artifact), as_device(device), as_dtype(dtype)
    weights, batches = as_path("weights", weights), as_batches(batches)
    require_callable("progress", progress)
    _require_causal(artifact.manifest)
    batches = require_inputs(artifact, batches)
    num_tokens = sum(batch["input_ids"][:, 1:].numel() for batch in batches)
    if not num_tokens:
        raise DataError("no sample has two tokens, so nothing is predicted", hint="use longer samples")
    run_dtype = dtype if dtype is not None else getattr(torch, artifact.manifest.model.dtype)
    checkpoint = open_checkpoint(Path(weights))
    if checkpoint.is_quantized:
        artifact = split_experts(artifact, checkpoint)
    model = artifact.empty_model(run_dtype)
    place_buffers(model, torch.device(device))
    source = Weights(artifact, checkpoint, run_dtype, model)
    activations, last = Activations(batches, torch.device(device)), artifact.subgraphs[-1]
    total = 0.0
    parts = [_Part(index, subgraph.entry.parameters) for index, subgraph in enumerate(artifact.subgraphs)]
    with (
        torch.no_grad(),
        quick_halves(torch.device(device).type),
        input_quantization(model, source.schemes),
        WeightStream(source, parts, torch.device(device)) as stream,
    ):
        for index, subgraph in enumerate(artifact.subgraphs):
            stream.load(model, index)
            for name in subgraph.entry.parameters:
                source.load_input_parts(model, name)
            for batch in range(len(activations)):
                outputs = subgraph.forward(model, **activations.fetch(batch, subgraph.input_names))
                activations.drop(batch, subgraph.consumed_names)
                if subgraph is last:
                    total += _loss(outputs[LOGITS], batches[batch]["input_ids"])
                else:
                    activations.store(batch, outputs)
            unload(model, subgraph.entry.parameters)
            source.checkpoint.release()
            progress(f"[{index + 1}/{len(artifact.subgraphs)}] {', '.join(subgraph.entry.targets) or 'no target'}")
    if not math.isfinite(total) or total / num_tokens > _LARGEST_LOSS:
        raise QuantizationError(
            f"the mean loss is {total / num_tokens}, so there is no perplexity",
            hint="a wider --dtype may help; otherwise the weights are broken",
        )
    return Evaluation(
        perplexity=math.exp(total / num_tokens),
        num_tokens=num_tokens,
        num_bytes=source.checkpoint.total_bytes,
        seconds=time.perf_counter() - start,
    )


def _require_causal(manifest: Manifest) -> None:
    """Refuse what has no perplexity: a model that does not predict each token from those before it."""
    logits = manifest.values.get(LOGITS)
    inputs = {entry.name: entry.shape for entry in manifest.inputs}
    name = manifest.model.class_name
    if logits is None:
        why = f"{name} returns {', '.join(manifest.subgraphs[-1].output_names)} and no logits"
    elif "decoder_input_ids" in inputs or name.endswith("ForMaskedLM"):
        why = f"{name} does not predict each token from those before it alone"
    elif logits.shape[:-1] != inputs.get("input_ids"):
        why = f"the logits of {name} have the shape {list(logits.shape)}, which is not one for each token"
    else:
        return
    raise ModelError(why, hint="perplexity is for causal language models")


def _loss(logits_BSV: torch.Tensor, tokens_BS: torch.Tensor) -> float:
    """Summed negative log-likelihood in nats; sample by sample, for the vocabulary makes this the largest tensor."""
    losses = [
        torch.nn.functional.cross_entropy(logits_SV[:-1].float(), tokens_S[1:].to(logits_SV.device), reduction="none")
        for logits_SV, tokens_S in zip(logits_BSV, tokens_BS, strict=True)
    ]
    return float(torch.stack(losses).sum(dtype=torch.float64))
