"""What a decoder reads for labels, beside transformers' own functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import T5Config
from transformers.models.bart import modeling_bart
from transformers.models.fsmt import modeling_fsmt
from transformers.models.mbart import modeling_mbart
from transformers.models.t5.modeling_t5 import T5ForConditionalGeneration

from runtime.data.decoder import shifted

PAD, START = 1, 7
# Padding at the end, none, all but one place, and in the middle of nothing.
LABELS = torch.tensor([[11, 12, 13, 2, -100, -100], [21, 22, 23, 24, 25, 2], [31, -100, -100, -100, -100, -100]])


def test_a_token_of_the_config_comes_first() -> None:
    wanted = modeling_bart.shift_tokens_right(LABELS.clone(), PAD, START)
    assert torch.equal(shifted(LABELS, {"start": START, "pad": PAD}), wanted)


def test_t5() -> None:
    sizes = {"d_model": 8, "d_ff": 8, "num_layers": 1, "num_heads": 1, "d_kv": 8, "vocab_size": 64}
    model: Any = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0))
    wanted = model.prepare_decoder_input_ids_from_labels(LABELS.clone())
    assert torch.equal(shifted(LABELS, {"start": 0, "pad": 0}), wanted)


@pytest.mark.parametrize("module", [modeling_mbart, modeling_fsmt])
def test_the_last_label_comes_first(module: Any) -> None:
    wanted = module.shift_tokens_right(LABELS.clone(), PAD)
    assert torch.equal(shifted(LABELS, {"pad": PAD}), wanted)


def test_labels_are_left_as_they_are() -> None:
    before = LABELS.clone()
    shifted(LABELS, {"pad": PAD})
    assert torch.equal(LABELS, before)
