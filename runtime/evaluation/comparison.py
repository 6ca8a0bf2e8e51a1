"""Compare the predictions of two checkpoints over the same text, streamed side by side.

At each position t whose next token is predicted, P is the distribution of the first checkpoint, such as the original,
and Q that of the second one, such as a quantized one. With both logits in float32,

    KL(P || Q) = sum over v of P(v) (log P(v) - log Q(v))

in nats. They agree at t if both have the same most likely token. One subgraph of each checkpoint is in memory at a
time, and the logits of one batch of each.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy
import torch

from runtime.data.decoder import NOT_A_LABEL
from runtime.errors import QuantizationError, WeightsError
from runtime.evaluation.likelihood import NUMBERS_AT_A_TIME
from runtime.evaluation.perplexity import num_predicted, perplexity_of, scored_batches
from runtime.evaluation.sides import opened
from runtime.experts.split import require_artifact

if TYPE_CHECKING:
    from runtime.chain import Artifact
    from runtime.checkpoint.reader import Checkpoint
    from runtime.evaluation.options import PassOptions


@dataclass(frozen=True, kw_only=True, slots=True)
class Divergence:
    """How much the predictions of two checkpoints differ.

    Attributes:
        kl_mean, kl_median, kl_99, kl_max: of KL(P || Q) over all predicted tokens, in nats; 99 % are at most `kl_99`.
        agreement: the part of the tokens for which both have the same most likely token.
        perplexity, other_perplexity: of the first and the second checkpoint.
        num_tokens: predicted tokens.
        num_bytes, other_num_bytes: sizes of the checkpoints on disk.
        seconds: of the whole comparison.
    """

    kl_mean: float
    kl_median: float
    kl_99: float
    kl_max: float
    agreement: float
    perplexity: float
    other_perplexity: float
    num_tokens: int
    num_bytes: int
    other_num_bytes: int
    seconds: float

    def facts(self) -> dict[str, Any]:
        """The numbers that are the same for equal runs, by name."""
        return {name: value for name, value in asdict(self).items() if name != "seconds"}

    def lines(self) -> list[str]:
        """The numbers for a reader."""
        return [
            f"KL divergence {self.kl_mean:.6f} nats per token (median {self.kl_median:.6f}, 99 % {self.kl_99:.6f}, "
            f"max {self.kl_max:.6f})",
            f"same most likely token: {100 * self.agreement:.2f} %",
            f"perplexity {self.perplexity:.4f} and {self.other_perplexity:.4f} over {self.num_tokens} tokens, "
            f"{self.seconds:.1f} s",
        ]


def compare(
    artifact: Artifact,
    *,
    weights: str | os.PathLike[str] | Checkpoint,
    other: str | os.PathLike[str] | Checkpoint,
    batches: Sequence[Mapping[str, torch.Tensor]],
    options: PassOptions,
    progress: Callable[[str], None] = lambda line: None,
) -> Divergence:
    """Compare two checkpoints of one model, original or quantized.

    Args:
        artifact: the compiled model.
        weights: of P.
        other: of Q.
        batches: the model's inputs, as for `runtime.evaluation.perplexity.evaluate`.
        options: of the evaluation.
        progress: called with a line for each warning and each subgraph.

    Raises:
        SeqbuildError: as `runtime.evaluation.perplexity.evaluate`.
    """
    start = time.perf_counter()
    artifact = require_artifact(artifact)
    checked, labels = scored_batches(artifact, batches)
    num_tokens = num_predicted(checked, labels)

    def take(number: int, logits: tuple[torch.Tensor, ...]) -> list[list[float]]:
        return _differences(logits[0], logits[1], labels[number])

    with opened(artifact, [weights, other], checked, options, progress) as (run, results):
        found = run(take)
        divergences, agreed, losses, others = (
            numpy.concatenate([numpy.array(batch[kind], dtype=numpy.float64) for batch in found]) for kind in range(4)
        )
        if not numpy.isfinite(divergences).all():
            raise QuantizationError(
                f"KL(P || Q) is not finite for {int((~numpy.isfinite(divergences)).sum())} of {num_tokens} tokens",
                hint="try a wider --dtype; otherwise the weights are damaged",
            )
        median, at_99 = numpy.quantile(divergences, (0.5, 0.99))
        comparison = Divergence(
            kl_mean=math.fsum(divergences) / num_tokens,
            kl_median=float(median),
            kl_99=float(at_99),
            kl_max=float(divergences.max()),
            agreement=float(agreed.sum()) / num_tokens,
            perplexity=perplexity_of(math.fsum(losses), num_tokens),
            other_perplexity=perplexity_of(math.fsum(others), num_tokens),
            num_tokens=num_tokens,
            num_bytes=results.num_bytes[0],
            other_num_bytes=results.num_bytes[1],
            seconds=time.perf_counter() - start,
        )
        results.write(comparison.facts())
    return comparison


def _differences(logits_BSV: torch.Tensor, others_BSV: torch.Tensor, labels_BS: torch.Tensor) -> list[list[float]]:
    """For each predicted token the divergence, whether both agree, and the loss of each side."""
    if logits_BSV.shape != others_BSV.shape:
        shapes = f"{list(logits_BSV.shape)} and {list(others_BSV.shape)}"
        raise WeightsError(f"the logits of the checkpoints have the shapes {shapes}", hint="compare one model")
    found: list[list[float]] = [[], [], [], []]
    step = max(NUMBERS_AT_A_TIME // logits_BSV.shape[-1], 1)
    for logits_SV, others_SV, labels_S in zip(logits_BSV, others_BSV, labels_BS.to(logits_BSV.device), strict=True):
        positions = (labels_S != NOT_A_LABEL).nonzero()[:, 0]
        for rows in positions.split(step):
            first_SV, second_SV = (side_SV[rows].float().log_softmax(dim=-1) for side_SV in (logits_SV, others_SV))
            weights_SV = first_SV.exp()
            terms_SV = (first_SV - second_SV).masked_fill_(weights_SV == 0, 0).mul_(weights_SV)
            columns = labels_S[rows][:, None]
            found[0] += terms_SV.sum(dim=-1, dtype=torch.float64).clamp_(min=0).tolist()
            found[1] += (first_SV.argmax(dim=-1) == second_SV.argmax(dim=-1)).tolist()
            found[2] += (-first_SV.gather(1, columns))[:, 0].tolist()
            found[3] += (-second_SV.gather(1, columns))[:, 0].tolist()
    return found
