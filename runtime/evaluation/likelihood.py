"""The log-likelihood of continuations, from the logits of a sequence, in float32.

For a continuation t_1 ... t_n whose tokens are predicted by the last n rows z_1 ... z_n of the logits,

    log p = sum over i of (z_i[t_i] - log sum over v of exp z_i[v])

and it is greedy if each t_i is the argmax of z_i. A few rows are converted to float32 at a time, because a row has as
many numbers as the vocabulary has tokens. Sums of a continuation are in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

NUMBERS_AT_A_TIME = 2**24  # in float32: 64 MiB


def log_likelihoods(logits_SV: torch.Tensor, continuations: Sequence[Sequence[int]]) -> list[tuple[float, bool]]:
    """Return the log-likelihood of each continuation in nats, and whether it is greedy.

    Args:
        logits_SV: of a sequence without padding; the last rows predict the tokens of a continuation.
        continuations: the tokens of each.
    """
    first = len(logits_SV) - max(map(len, continuations))
    sums = [0.0] * len(continuations)
    are_greedy = [True] * len(continuations)
    step = max(NUMBERS_AT_A_TIME // logits_SV.shape[1], 1)
    for start in range(first, len(logits_SV), step):
        some_SV = logits_SV[start : start + step].float()
        log_probs_SV = torch.log_softmax(some_SV, dim=-1)
        best = some_SV.argmax(dim=-1).tolist()
        for number, tokens in enumerate(continuations):
            skipped = start - (len(logits_SV) - len(tokens))  # tokens before `start`; negative if it begins later
            own = list(tokens[max(skipped, 0) : skipped + len(best)]) if skipped + len(best) > 0 else []
            if own:
                rows = slice(max(-skipped, 0), max(-skipped, 0) + len(own))
                picked_S = log_probs_SV[rows].gather(1, torch.tensor(own, device=some_SV.device)[:, None])
                sums[number] += float(picked_S.sum(dtype=torch.float64))
                are_greedy[number] &= best[rows] == own
    return list(zip(sums, are_greedy, strict=True))
