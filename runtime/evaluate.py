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
from runtime.checkpoint import Checkpoint
from runtime.errors import DataError
from runtime.quantized import input_quantization
from runtime.weights import Weights, unload

if TYPE_CHECKING:
    from runtime.artifact import Artifact

LOGITS = "logits"


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Perplexity over `num_tokens` predicted tokens; `num_bytes` is the checkpoint's size on disk."""

    perplexity: float
    num_tokens: int
    num_bytes: int
    seconds: float


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
        WeightsError: when the checkpoint does not fit the artifact.
        DataError: when the model has no logits, or no sample has two tokens.
    """
    start = time.perf_counter()
    last = artifact.subgraphs[-1]
    if LOGITS not in last.entry.output_names:
        raise DataError(
            f"{artifact.manifest.model.class_name} returns {', '.join(last.entry.output_names)} and no logits",
            hint="perplexity is for language models",
        )
    run_dtype = dtype if dtype is not None else getattr(torch, artifact.manifest.model.dtype)
    model = artifact.empty_model(run_dtype)
    source = Weights(artifact, Checkpoint(Path(weights)), run_dtype, model)
    activations = Activations(batches, torch.device(device))
    total, num_tokens = 0.0, 0
    with torch.no_grad(), input_quantization(model, source.schemes):
        for index, subgraph in enumerate(artifact.subgraphs):
            source.load(model, subgraph.entry.parameters, torch.device(device))
            for batch in range(len(activations)):
                outputs = subgraph.forward(model, **activations.fetch(batch, subgraph.input_names))
                activations.drop(batch, subgraph.consumed_names)
                if subgraph is last:
                    loss, count = _loss(outputs[LOGITS], batches[batch]["input_ids"])
                    total, num_tokens = total + loss, num_tokens + count
                else:
                    activations.store(batch, outputs)
            unload(model, subgraph.entry.parameters)
            progress(f"[{index + 1}/{len(artifact.subgraphs)}] {', '.join(subgraph.entry.targets) or 'no target'}")
    if not num_tokens:
        raise DataError("no sample has two tokens, so nothing is predicted", hint="use longer samples")
    return Evaluation(
        perplexity=math.exp(total / num_tokens),
        num_tokens=num_tokens,
        num_bytes=source.checkpoint.total_bytes,
        seconds=time.perf_counter() - start,
    )


def _loss(logits_BSV: torch.Tensor, tokens_BS: torch.Tensor) -> tuple[float, int]:
    """Summed negative log-likelihood in nats, and how many tokens were predicted."""
    predicted_TV = logits_BSV[:, :-1].float().flatten(0, 1)
    targets_T = tokens_BS[:, 1:].to(logits_BSV.device).flatten()
    loss = torch.nn.functional.cross_entropy(predicted_TV, targets_T, reduction="none")
    return float(loss.sum(dtype=torch.float64)), targets_T.numel()
