"""`evaluate` of an unquantized model beside transformers' own call with the same tokens, family by family.

The chain has what data gives, and the model is called as anybody calls it: `model(input_ids)`,
`model(input_ids, attention_mask)`, with `labels` where there is a decoder.
"""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import transformers

from tests.plain_loss import (
    NOT_A_LABEL,
    PADDINGS,
    evaluated,
    plain_causal_loss,
    plain_target_loss,
    saved,
    token_batch,
)
from tests.sweep import sweep
from tests.zoo import Case, cases, unusable

ALL = {case.name: case for case in cases()}
FAMILIES = (
    *("gpt-sw3", "gptj", "opt", "bloom", "mpt", "falcon", "gemma2", "gemma3_text", "phi", "xlnet", "mamba"),
    "qwen3_moe",
)
DECODERS = ("t5", "mbart")
# They see, and are compiled with text alone.
SEEING = ("paligemma", "llava", "qwen2_vl", "mllama", "qwen3_vl_moe", "idefics2")
_CODES = "reads several streams of a sound's codes"
WITHOUT_PLAIN_CALL = {
    "causal LM/xmod": "its forward needs a language, which a plain call does not give",
    "causal LM/musicgen": _CODES,
    "causal LM/musicgen_melody": _CODES,
    "causal LM/rwkv": "changes its own weights while it runs, so it is not compiled (docs/coverage.md)",
}
TOLERANCE = 1e-6  # the loss is added up in float64, of logits in float32 that are equal or nearly so

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def check_causal(case: Case, directory: Path) -> None:
    model, artifact = saved(case, directory)
    ids_BS, mask_BS = token_batch(model.config, "")
    bare, count = plain_causal_loss(model, ids_BS, None)
    for padding in PADDINGS:
        ids_BS, mask_BS = token_batch(model.config, padding)
        wanted, num_tokens = plain_causal_loss(model, ids_BS, mask_BS)
        got = evaluated(artifact, directory, input_ids=ids_BS, attention_mask=mask_BS)
        assert got == (pytest.approx(wanted, rel=TOLERANCE), num_tokens), padding
        if not padding:
            assert got == (pytest.approx(bare, rel=TOLERANCE), count)


def check_decoder(case: Case, directory: Path) -> None:
    model, artifact = saved(case, directory)
    labels_BT, own_mask_BT = token_batch(model.config, "right", seed=4, prefix="decoder_", size=(3, 15))
    padded_BT = labels_BT.masked_fill(own_mask_BT == 0, NOT_A_LABEL)
    for padding in PADDINGS:
        ids_BS, mask_BS = token_batch(model.config, padding)
        for targets_BT in (labels_BT, padded_BT):
            wanted = plain_target_loss(model, ids_BS, mask_BS if padding else None, targets_BT)
            got = evaluated(artifact, directory, input_ids=ids_BS, attention_mask=mask_BS, labels=targets_BT)
            assert got == (pytest.approx(wanted[0], rel=TOLERANCE), wanted[1]), padding


@pytest.mark.parametrize("name", sweep(FAMILIES, "opt", "mpt", "mamba"))
def test_the_loss_is_that_of_a_plain_call(name: str, tmp_path: Path) -> None:
    check_causal(ALL[f"causal LM/{name}"], tmp_path)


@pytest.mark.parametrize("name", sweep(DECODERS, "t5"))
def test_the_loss_of_targets_is_that_of_a_plain_call(name: str, tmp_path: Path) -> None:
    check_decoder(ALL[f"seq2seq/{name}"], tmp_path)


def test_the_text_is_its_own_target(tmp_path: Path) -> None:
    model, artifact = saved(ALL["seq2seq/bart"], tmp_path)
    ids_BS, mask_BS = token_batch(model.config, "right")
    wanted = plain_target_loss(model, ids_BS, mask_BS, ids_BS.masked_fill(mask_BS == 0, NOT_A_LABEL))
    got = evaluated(artifact, tmp_path, input_ids=ids_BS, attention_mask=mask_BS)
    assert got == (pytest.approx(wanted[0], rel=TOLERANCE), wanted[1])


@pytest.mark.wide
@pytest.mark.parametrize("name", [name for name in ALL if name.startswith("causal LM/")])
def test_every_causal_language_model(name: str, tmp_path: Path) -> None:
    case = ALL[name]
    if reason := unusable(case) or WITHOUT_PLAIN_CALL.get(name, ""):
        pytest.skip(reason)
    check_causal(case, tmp_path)


@pytest.mark.wide
@pytest.mark.parametrize("name", SEEING)
def test_models_that_see_are_given_text(name: str, tmp_path: Path) -> None:
    check_causal(ALL[f"image-text-to-text/{name}"], tmp_path)


@pytest.mark.wide
@pytest.mark.parametrize("name", [name for name in ALL if name.startswith("seq2seq/")])
def test_every_encoder_decoder_model(name: str, tmp_path: Path) -> None:
    case = ALL[name]
    if reason := unusable(case):
        pytest.skip(reason)
    if not _has_decoder(case):
        pytest.skip("reads and writes one text")
    check_decoder(case, tmp_path)


def _has_decoder(case: Case) -> bool:
    return "decoder_input_ids" in inspect.signature(getattr(transformers, case.class_name).forward).parameters
