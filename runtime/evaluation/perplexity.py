"""Measure perplexity, streamed through the subgraphs: one layer in memory at a time.

For a causal language model, over all samples, without padding, with N predicted tokens:

    ppl = exp( - 1/N sum over samples, over positions t >= 2, of log p(x_t | x_1 ... x_{t-1}) )

No token predicts the first one, so a sample of n tokens counts n - 1; a token after padding does not count either. An
encoder-decoder model predicts all labels y of a source x, the first one included:

    ppl = exp( - 1/N sum over samples, over positions t >= 1, of log p(y_t | x, y_1 ... y_{t-1}) )

The decoder's inputs follow from the labels by the model's own rule (`runtime.data.decoder`). A text without a target is
both source and labels. Both are the losses of transformers, `model(input_ids, attention_mask, labels)`, averaged over
all tokens instead of one batch's.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from runtime.arguments import require_callable
from runtime.data.checked_batches import model_batches
from runtime.data.decoder import LABELS, NOT_A_LABEL
from runtime.data.inputs import DECODER_IDS, IDS, MASK
from runtime.errors import DataError, ModelError, QuantizationError
from runtime.evaluation.logits import LOGITS
from runtime.evaluation.options import PassOptions
from runtime.evaluation.sides import opened
from runtime.experts.split import require_artifact
from runtime.host.devices import as_device, as_dtype
from runtime.workers.start import current

if TYPE_CHECKING:
    from runtime.artifact.manifest import Manifest
    from runtime.chain import Artifact
    from runtime.checkpoint.reader import Checkpoint
    from runtime.workers.group import Workers

_LARGEST_LOSS = 700.0  # its exponential is finite


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """The perplexity over `num_tokens` predicted tokens; `num_bytes` is the checkpoint's size on disk."""

    perplexity: float
    num_tokens: int
    num_bytes: int
    seconds: float


def evaluate(
    artifact: Artifact,
    *,
    weights: str | os.PathLike[str] | Checkpoint,
    batches: Sequence[Mapping[str, torch.Tensor]],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    progress: Callable[[str], None] = lambda line: None,
    workers: Workers | None = None,
) -> Evaluation:
    """Measure the perplexity of a causal or an encoder-decoder language model.

    Args:
        artifact: the compiled model.
        weights: directory or hub id of the original or a quantized checkpoint, or an open checkpoint.
        batches: the model's inputs, one mapping a batch, on the CPU. Tokens where `attention_mask` is zero are padding.
            `labels` [B, S] are the predicted tokens, or -100 for none; those of a causal model are at the position of
            the token itself. Without them, and without `decoder_input_ids`, the text itself is predicted.
        device: where subgraphs run.
        dtype: of weights and activations; None for the model's own.
        progress: called with one line for each subgraph.
        workers: the processes that share the batches; None for those that torchrun has started, see
            `runtime.workers.start`. The result has the same bits for any number of them.

    Raises:
        WorkerError: when another worker has failed, or has other weights or data.
        UsageError, DeviceError: for an argument of the wrong type, or a missing device.
        WeightsError: when the checkpoint does not fit the artifact.
        ModelError: when the model does not predict the next token.
        DataError: when batches are not the model's inputs, no token is predicted, or the decoder's inputs are unknown.
        QuantizationError: when the logits are not finite.
    """
    options = PassOptions(
        device=as_device(device), dtype=as_dtype(dtype), workers=current() if workers is None else workers
    )
    require_callable("progress", progress)
    return measure(artifact, weights, batches, options, progress)


def measure(
    artifact: Artifact,
    weights: str | os.PathLike[str] | Checkpoint,
    batches: Sequence[Mapping[str, torch.Tensor]],
    options: PassOptions,
    progress: Callable[[str], None],
) -> Evaluation:
    """Measure the perplexity, as `evaluate`, with all options of an evaluation."""
    start = time.perf_counter()
    artifact = require_artifact(artifact)
    checked, labels = scored_batches(artifact, batches)
    num_tokens = num_predicted(checked, labels)
    with opened(artifact, [weights], checked, options, progress) as (run, results):
        losses = run(lambda number, logits: _loss(logits[0], labels[number]))
        total = 0.0
        for loss in losses:  # not by `sum`, which adds in another way since Python 3.12
            total += loss
        evaluation = Evaluation(
            perplexity=perplexity_of(total, num_tokens),
            num_tokens=num_tokens,
            num_bytes=results.num_bytes[0],
            seconds=time.perf_counter() - start,
        )
        results.write({"perplexity": evaluation.perplexity, "tokens": num_tokens, "bytes": evaluation.num_bytes})
    return evaluation


def scored_batches(
    artifact: Artifact, batches: Sequence[Mapping[str, torch.Tensor]]
) -> tuple[list[dict[str, torch.Tensor]], list[torch.Tensor]]:
    """Check batches, and return them with the token that each position of their logits predicts.

    Raises:
        ModelError: when the model does not predict the next token.
        DataError: when batches are not the model's inputs.
    """
    require_predicting(artifact.manifest)
    checked = model_batches(artifact, batches, is_scored=True)
    return checked, [_labels(artifact.manifest, index, batch) for index, batch in enumerate(checked)]


def perplexity_of(total: float, num_tokens: int) -> float:
    """The perplexity for the summed loss of all predicted tokens, in nats.

    Raises:
        QuantizationError: when it is not finite.
    """
    if not math.isfinite(total) or total / num_tokens > _LARGEST_LOSS:
        raise QuantizationError(
            f"the mean loss is {total / num_tokens}, so perplexity is not finite",
            hint="try a wider --dtype; otherwise the weights are damaged",
        )
    return math.exp(total / num_tokens)


def num_predicted(batches: Sequence[Mapping[str, torch.Tensor]], labels: Sequence[torch.Tensor]) -> int:
    """The number of predicted tokens.

    Raises:
        DataError: if no token is predicted.
    """
    num_tokens = sum(int((labels_BS != NOT_A_LABEL).sum()) for labels_BS in labels)
    if num_tokens:
        return num_tokens
    if any(LABELS in batch for batch in batches):
        raise DataError(f"every label is {NOT_A_LABEL}, so no token is predicted", hint="give labels of tokens")
    raise DataError("no sample has two tokens, so no token is predicted", hint="use longer samples")


def require_predicting(manifest: Manifest) -> None:
    """Reject a model without a perplexity: one that does not predict each token from the previous ones."""
    logits = manifest.values.get(LOGITS)
    inputs = {entry.name: entry.shape for entry in manifest.inputs}
    read = DECODER_IDS if DECODER_IDS in inputs else IDS
    name = manifest.model.class_name
    if logits is None:
        why = f"{name} returns {', '.join(manifest.subgraphs[-1].output_names)}, but no logits"
    elif name.endswith("ForMaskedLM"):
        why = f"{name} does not predict each token from the previous ones alone"
    elif logits.shape[:-1] != inputs.get(read):
        why = f"the logits of {name} have the shape {list(logits.shape)}, not one row for each token"
    elif read not in inputs:
        why = f"{name} has no input {read}"
    else:
        return
    raise ModelError(why, hint="perplexity is defined for causal and encoder-decoder language models")


def _labels(manifest: Manifest, index: int, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The token that each position of the logits predicts, int64 [B, S]; -100 for none.

    Raises:
        DataError: when it is unknown.
    """
    if any(entry.name == DECODER_IDS for entry in manifest.inputs):
        if LABELS not in batch:
            what = f"batch {index} has {DECODER_IDS} but no labels"
            raise DataError(what, hint="give labels [batch, sequence]")
        return batch[LABELS]
    ids_BS = batch.get(LABELS, batch[IDS])
    if ids_BS.shape != batch[IDS].shape:
        shapes = f"{list(ids_BS.shape)} for {list(batch[IDS].shape)}"
        raise DataError(f"batch {index}: {LABELS} has the shape {shapes} tokens", hint="give one label for each token")
    labels_BS = torch.full_like(ids_BS, NOT_A_LABEL)
    labels_BS[:, :-1] = ids_BS[:, 1:]
    if MASK in batch:
        is_token_BS = batch[MASK] != 0
        labels_BS[:, :-1].masked_fill_(~(is_token_BS[:, 1:] & is_token_BS[:, :-1]), NOT_A_LABEL)
    return labels_BS


def _loss(logits_BSV: torch.Tensor, labels_BS: torch.Tensor) -> float:
    """The summed negative log-likelihood in nats; sample by sample, because logits in float32 are large."""
    losses = [
        torch.nn.functional.cross_entropy(
            logits_SV.float(), labels_S.to(logits_SV.device), reduction="none", ignore_index=NOT_A_LABEL
        )
        for logits_SV, labels_S in zip(logits_BSV, labels_BS, strict=True)
    ]
    return float(torch.stack(losses).sum(dtype=torch.float64))
