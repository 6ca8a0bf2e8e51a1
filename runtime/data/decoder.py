"""Derive the inputs of an encoder-decoder model's decoder from labels: they are shifted one position to the right.

    labels              x_1    x_2   ...   x_T                  the prediction at each position
    decoder_input_ids   start  x_1   ...   x_(T-1)              the tokens that each prediction is based on

Most families begin with a token of their config (T5 with padding, BART with the end of a sentence). mBART, PLBart and
FSMT begin with the last token of the labels, which is a language or the end of a sentence. The compiler determines the
rule of a model by running it, and states it in the manifest's `decoder`.

As in transformers, a label of -100 is not predicted; the decoder reads padding at its position.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from runtime.artifact.manifest import PAD, START

if TYPE_CHECKING:
    import torch

LABELS = "labels"
NOT_A_LABEL = -100


def shifted(labels_BT: torch.Tensor, rule: Mapping[str, int]) -> torch.Tensor:
    """Return the decoder's inputs for labels, both int64 [B, T].

    Args:
        labels_BT: token ids, -100 at positions without a label.
        rule: `pad`, the token at positions without a label; `start`, the first token, by default the last label.
    """
    import torch

    is_label_BT = labels_BT != NOT_A_LABEL
    plain_BT = labels_BT.masked_fill(~is_label_BT, rule[PAD])
    if START in rule:
        first_B = torch.full_like(plain_BT[:, 0], rule[START])
    else:
        place_T = torch.arange(labels_BT.shape[1], device=labels_BT.device)
        last_B = torch.where(is_label_BT, place_T, 0).amax(dim=1)
        first_B = plain_BT.gather(1, last_B[:, None])[:, 0]
    return torch.cat([first_B[:, None], plain_BT[:, :-1]], dim=1)
