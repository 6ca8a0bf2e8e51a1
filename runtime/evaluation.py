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
from typing import TYPE_CHECKING, Any

import torch

from runtime.arguments import require_callable
from runtime.checkpoint.dequantize import as_weights, open_checkpoint
from runtime.data.checked_batches import model_batches
from runtime.data.decoder import LABELS, NOT_A_LABEL
from runtime.data.inputs import DECODER_IDS, IDS, MASK
from runtime.errors import DataError, ModelError, QuantizationError
from runtime.experts.split import require_artifact
from runtime.formats.rounded_inputs import input_quantization
from runtime.host.devices import as_device, as_dtype
from runtime.host.half_precision import quick_halves
from runtime.host.memory import OWN_THREADS, require_threads
from runtime.host.own_process import settle
from runtime.quantize.preparation import Prepared, prepare
from runtime.status import doing
from runtime.streaming.activations import Activations
from runtime.streaming.identity import run_identity
from runtime.weights.parameters import unload
from runtime.weights.stream import WeightStream
from runtime.workers.agreement import agreed
from runtime.workers.comparison import require_same
from runtime.workers.start import current

if TYPE_CHECKING:
    from runtime.artifact.manifest import Manifest
    from runtime.chain import Artifact
    from runtime.checkpoint.reader import Checkpoint
    from runtime.workers.group import Workers

LOGITS = "logits"
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
    start = time.perf_counter()
    artifact, place, dtype = require_artifact(artifact), as_device(device), as_dtype(dtype)
    given = as_weights(weights)
    require_callable("progress", progress)
    require_threads(torch.get_num_threads() - 1 + OWN_THREADS)
    require_predicting(artifact.manifest)
    batches = model_batches(artifact, batches, is_scored=True)
    labels = [_labels(artifact.manifest, index, batch) for index, batch in enumerate(batches)]
    num_tokens = _num_predicted(batches, labels)
    run_dtype = artifact.run_dtype(dtype)
    doing("checking the weights")
    prepared = prepare(artifact, open_checkpoint(given), None, run_dtype, place)
    source = prepared.weights
    for remark in source.remarks:
        progress(remark)
    source.checks.require_outside()
    group = current() if workers is None else workers
    if group.size > 1:
        _compare(group, prepared, batches, {"dtype": run_dtype, "device": place.type}, progress)
    total = _summed_loss(prepared, batches, labels, place, progress, group)
    return Evaluation(
        perplexity=_perplexity(total, num_tokens),
        num_tokens=num_tokens,
        num_bytes=source.checkpoint.total_bytes,
        seconds=time.perf_counter() - start,
    )


def _perplexity(total: float, num_tokens: int) -> float:
    """The perplexity for the summed loss of all predicted tokens, in nats."""
    if not math.isfinite(total) or total / num_tokens > _LARGEST_LOSS:
        raise QuantizationError(
            f"the mean loss is {total / num_tokens}, so perplexity is not finite",
            hint="try a wider --dtype; otherwise the weights are damaged",
        )
    return math.exp(total / num_tokens)


def _num_predicted(batches: Sequence[Mapping[str, torch.Tensor]], labels: Sequence[torch.Tensor]) -> int:
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


def _compare(
    workers: Workers,
    prepared: Prepared,
    batches: Sequence[Mapping[str, torch.Tensor]],
    options: Mapping[str, Any],
    progress: Callable[[str], None],
) -> None:
    """Require that all workers evaluate the same weights on the same data."""
    workers.step = "the comparison of the workers"
    with agreed(workers):
        identity = run_identity(
            artifact=prepared.artifact,
            checkpoint=prepared.weights.checkpoint,
            recipe=None,
            batches=batches,
            options=options,
        )
    for warning in require_same(workers, identity, torch.device(options["device"])):
        progress(warning)


def _summed_loss(
    prepared: Prepared,
    batches: Sequence[Mapping[str, torch.Tensor]],
    labels: Sequence[torch.Tensor],
    device: torch.device,
    progress: Callable[[str], None],
    workers: Workers,
) -> float:
    """Run all subgraphs on all batches and sum the losses of the last one's logits, in nats.

    Each worker runs every N-th batch, and all add the losses in the order of the batches.
    """
    settle()
    artifact, model, source = prepared.artifact, prepared.model, prepared.weights
    own = range(workers.rank, len(batches), workers.size)
    activations, last = Activations([batches[index] for index in own], device), artifact.subgraphs[-1]
    losses: list[float] = []
    loads = {index: subgraph.entry.parameters for index, subgraph in enumerate(artifact.subgraphs)}
    with (
        torch.no_grad(),
        quick_halves(device.type, last.halves(model)),
        input_quantization(model, source.schemes),
        WeightStream(source, loads, device) as stream,
    ):
        for index, subgraph in enumerate(artifact.subgraphs):
            workers.step = subgraph.label
            with agreed(workers):
                stream.load(model, index)
                for name in subgraph.entry.parameters:
                    source.load_input_parts(model, name)
                for batch, number in enumerate(own):
                    outputs = subgraph.forward(model, **activations.fetch(batch, subgraph.input_names))
                    activations.drop(batch, subgraph.consumed_names)
                    if subgraph is last:
                        losses.append(_loss(outputs[LOGITS], labels[number]))
                    else:
                        activations.store(batch, outputs)
            unload(model, subgraph.entry.parameters)
            progress(f"[{index + 1}/{len(artifact.subgraphs)}] {subgraph.label}")
    of_workers, total = workers.exchange(losses), 0.0
    for number in range(len(batches)):  # not by `sum`, which adds in another way since Python 3.12
        total += of_workers[number % workers.size][number // workers.size]
    return total


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
