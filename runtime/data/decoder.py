"""What an encoder-decoder model's decoder reads, and what it is to write: labels, moved one place to the right.

    labels              x_1    x_2   ...   x_T                  what is predicted, position by position
    decoder_input_ids   start  x_1   ...   x_(T-1)              what each prediction follows from, beside the encoder

Most families begin with a token of their config (T5 with padding, BART with the end of a sentence). mBART, PLBart and
FSMT begin with the last token of the labels themselves, which is a language or the end of a sentence. Which rule is a
model's own, the compiler finds out by running it; the manifest's `decoder` states it.

A label of -100 is none, as everywhere in transformers: it is not predicted, and its place in the decoder's inputs is
padding.
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
    """The decoder's inputs for labels, both int64 [B, T].

    Args:
        labels_BT: token ids, and -100 where there is no label.
        rule: `pad`, the token in the place of those; `start`, the token that comes first, or none of it.
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
