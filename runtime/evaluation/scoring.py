"""Compute the log-likelihoods of all requests in one pass through the subgraphs."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from runtime.data.checked_batches import model_batches
from runtime.data.inputs import DECODER_IDS, model_inputs
from runtime.errors import DataError, ModelError, QuantizationError
from runtime.evaluation.likelihood import log_likelihoods
from runtime.evaluation.perplexity import require_predicting
from runtime.evaluation.requests import RequestPlan, TokenRequest, longest_input, most_rows, plan_requests
from runtime.evaluation.sides import Results, opened
from runtime.host.limits import available_bytes
from runtime.model.config import text_limits
from runtime.streaming.activations import Budget

if TYPE_CHECKING:
    import torch

    from runtime.artifact.manifest import Manifest
    from runtime.chain import Artifact
    from runtime.checkpoint.reader import Checkpoint
    from runtime.evaluation.options import PassOptions

BATCH_TOKENS = 4096
_MOST_LOGITS = 2**29  # numbers of a batch: 1 GiB in a 16-bit dtype
_LEAST_TOKENS = 256
Score = tuple[float, bool]


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoringOptions:
    """How requests become batches.

    Attributes:
        max_length: the most tokens that the model reads at once.
        batch_size: the most sequences of a batch; None for as many as have `BATCH_TOKENS` tokens.
    """

    max_length: int
    batch_size: int | None = None


def require_scoring(manifest: Manifest) -> None:
    """Reject a model that does not predict each token of a text from the previous ones.

    Raises:
        ModelError: naming it.
    """
    require_predicting(manifest)
    if any(entry.name == DECODER_IDS for entry in manifest.inputs):
        raise ModelError(
            f"{manifest.model.class_name} is an encoder-decoder model, whose tasks are not supported",
            hint="evaluate --data measures its perplexity",
        )


@contextmanager
def scoring(
    artifact: Artifact,
    weights: str | os.PathLike[str] | Checkpoint,
    requests: Sequence[TokenRequest],
    scoring_options: ScoringOptions,
    options: PassOptions,
    identity: Mapping[str, str] | None = None,
) -> Iterator[tuple[list[Score], Results]]:
    """Compute the log-likelihood of each request, and whether its continuation is greedy; yield what takes results.

    Args:
        artifact: the compiled model.
        weights: directory or hub id of the original or a quantized checkpoint, or an open checkpoint.
        requests: of all tasks.
        scoring_options: how they become batches.
        options: of the evaluation.
        identity: what decides the results besides.

    Raises:
        SeqbuildError: as `runtime.evaluation.sides.opened`, and when a request does not fit the model.
    """
    require_scoring(artifact.manifest)
    plan, batches = plan_batches(artifact, requests, scoring_options)

    def take(number: int, logits: tuple[torch.Tensor, ...]) -> list[list[Score]]:
        read = [plan.sequences[index] for index in plan.batches[number]]
        return [
            log_likelihoods(logits_SV[: len(sequence.tokens)], sequence.continuations)
            for logits_SV, sequence in zip(logits[0], read, strict=False)  # rows after the last sequence fill up
        ]

    with opened(artifact, [weights], batches, options, lambda line: None, identity) as (run, results):
        of_sequences = [scores for batch in run(take) for scores in batch]
        found = [_sound(*of_sequences[sequence][index]) for sequence, index in plan.places]
        yield found, results


def plan_batches(
    artifact: Artifact, requests: Sequence[TokenRequest], options: ScoringOptions
) -> tuple[RequestPlan, list[dict[str, torch.Tensor]]]:
    """Plan the sequences of requests, and make the model's inputs.

    Raises:
        DataError: when a request does not fit the model or the artifact.
    """
    manifest = artifact.manifest
    vocab_size, _ = text_limits(artifact)
    most_tokens = BATCH_TOKENS if vocab_size is None else min(BATCH_TOKENS, _MOST_LOGITS // vocab_size)
    plan = plan_requests(
        requests,
        max_length=options.max_length,
        batch_tokens=max(most_tokens, _LEAST_TOKENS) if options.batch_size is None else None,
        batch_size=min(filter(None, (options.batch_size, most_rows(manifest))), default=None),
    )
    longest = longest_input(manifest)
    found = len(plan.sequences[0].tokens) if plan.sequences else 0
    if longest is not None and found > longest:
        raise DataError(
            f"a request has {found} tokens, but the artifact is valid for at most {longest}",
            hint=f"pass --max-length {longest}, which leaves out the beginning of longer contexts",
        )
    batches = [model_inputs(manifest, batch) for batch in plan.inputs(manifest)]
    return plan, model_batches(artifact, batches)


def default_memory(device: torch.device) -> Budget:
    """The usual part of a device's memory, and half of the host's: values of all requests may be far larger."""
    free = available_bytes()
    return replace(Budget.default(device), host_bytes=None if free is None else free // 2)


def _sound(log_likelihood: float, is_greedy: bool) -> Score:
    if math.isnan(log_likelihood):
        raise QuantizationError(
            "the logits are not finite", hint="try a wider --dtype; otherwise the weights are damaged"
        )
    return log_likelihood, is_greedy
