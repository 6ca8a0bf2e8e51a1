"""Judge a checkpoint by plain calls of transformers: losses and divergences from the original model, by window.

    PYTHON quality_judge.py ORIGINAL CHECKPOINT WINDOWS.json

The last line of the output is JSON: for each window the negative log-likelihood summed over its tokens but the first,
the sum of KL(original || checkpoint) over the same positions, and their number. Nothing of this project is imported, so
that it runs in any environment with transformers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

_WINDOWS_AT_A_TIME = 8


def divergence(original_BSV: torch.Tensor, other_BSV: torch.Tensor) -> torch.Tensor:
    """Compute KL(original || other) in nats at each position, [B, S], from logits."""
    original, other = original_BSV.log_softmax(dim=-1), other_BSV.log_softmax(dim=-1)
    return (original.exp() * (original - other)).sum(dim=-1)


def losses(logits_BSV: torch.Tensor, ids_BS: torch.Tensor) -> torch.Tensor:
    """Compute the negative log-likelihood of each token but the first, [B, S - 1]."""
    logs = logits_BSV[:, :-1].log_softmax(dim=-1)
    return -logs.gather(-1, ids_BS[:, 1:, None])[..., 0]


def main() -> None:
    from transformers import AutoModelForCausalLM

    original, checkpoint, windows = sys.argv[1:]
    quantized = json.loads((Path(checkpoint) / "config.json").read_text()).get("quantization_config") or {}
    if (quantized.get("transform_config") or {}).get("config_groups"):
        raise ValueError("transformers ignores transform_config, so the perplexity would be that of another model")
    models: list[Any] = []
    for path in (original, checkpoint) if original != checkpoint else (original,):
        models.append(AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval())
    ids_WS = torch.tensor(json.loads(Path(windows).read_text()))
    found: dict[str, list[float]] = {"nll": [], "kl": []}
    with torch.no_grad():
        for ids_BS in ids_WS.split(_WINDOWS_AT_A_TIME):
            logits = [model(input_ids=ids_BS, use_cache=False).logits.float() for model in models]
            if not all(bool(torch.isfinite(each).all()) for each in logits):
                raise ValueError("the logits are not finite")
            found["nll"] += losses(logits[-1], ids_BS).double().sum(dim=1).tolist()
            found["kl"] += divergence(logits[0][:, :-1], logits[-1][:, :-1]).double().sum(dim=1).tolist()
    print(json.dumps({**found, "count": ids_WS.shape[1] - 1}))


if __name__ == "__main__":
    main()
