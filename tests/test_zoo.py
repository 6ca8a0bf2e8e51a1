"""A few of the architectures of docs/coverage.md, each compiled in one way or two, loaded and compared in five shapes.

All of them in all ways: `make coverage`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.sweep import sweep
from tests.zoo import cases
from tests.zoo_check import check, misread_parameters

# What takes longest comes first: workers take tests in this order.
CASES = (
    *(("image-text-to-text/qwen2_vl", "linear"), ("image-text-to-text/llava_next", "target")),
    *(("image-text-to-text/llava", "target"), ("image-text-to-text/llava_onevision", "target")),
    *(("image-text-to-text/mllama", "linear"), ("image-text-to-text/paligemma", "sdpa")),
    *(("causal LM/gemma4_text", "linear"), ("seq2seq/t5", "linear"), ("causal LM/deepseek_v3", "linear")),
    *(("seq2seq/fsmt", "linear"), ("seq2seq/bart", "sdpa"), ("causal LM/cpmant", "target")),
    *(("speech seq2seq/whisper", "linear"), ("causal LM/mistral", "target"), ("causal LM/mistral", "sdpa")),
    *(("causal LM/qwen3_moe", "target"), ("causal LM/qwen3_moe", "linear"), ("causal LM/gpt_neox", "linear")),
    *(("causal LM/big_bird", "linear"), ("causal LM/xlm", "target"), ("causal LM/jamba", "linear")),
    *(("causal LM/mamba", "linear"), ("causal LM/olmo2", "sdpa"), ("masked LM/bert", "linear")),
    ("masked LM/layoutlm", "target"),
    *(("masked LM/fnet", "target"), ("masked LM/deberta-v2", "linear"), ("masked LM/electra", "sdpa")),
    *(("text encoder/clip_text_model", "linear"), ("image encoder/vit", "target")),
)
SAVED = (
    *("causal LM/gpt-sw3", "causal LM/mixtral", "causal LM/gpt_oss", "causal LM/falcon", "causal LM/bamba"),
    *("masked LM/xlm-roberta", "masked LM/albert", "seq2seq/marian", "seq2seq/switch_transformers"),
    *("speech seq2seq/whisper", "image encoder/detr", "image-text-to-text/qwen2_5_vl", "image-text-to-text/llava"),
)
# One of each kind that no other test compiles: images in a step that collects hidden states, sound, masks, latent
# attention, scans with experts, windows.
USUAL = (
    *(
        ("image-text-to-text/llava_next", "target"),
        ("causal LM/gemma4_text", "linear"),
        ("causal LM/deepseek_v3", "linear"),
    ),
    *(("speech seq2seq/whisper", "linear"), ("causal LM/mistral", "sdpa"), ("causal LM/jamba", "linear")),
    *(("masked LM/deberta-v2", "linear"), ("image encoder/vit", "target")),
)
# Joined, stacked, interleaved, tied, shared between encoder and decoder, and the parts of a model that sees.
USUALLY_SAVED = (
    *("causal LM/gpt_oss", "causal LM/falcon", "masked LM/albert", "seq2seq/marian"),
    *("speech seq2seq/whisper", "image-text-to-text/llava"),
)
ALL = {case.name: case for case in cases()}


@pytest.mark.filterwarnings("default::FutureWarning")  # of models that call their own modules by old names
@pytest.mark.parametrize(("name", "way"), sweep(CASES, *USUAL))
def test_the_chain_is_the_model(name: str, way: str) -> None:
    row = check(ALL[name], (way,))
    assert not row.problem
    found = {"target": row.equal, "linear": row.deep, "sdpa": row.sdpa}[way]
    assert found == "bit for bit" if way != "sdpa" else found != "-"


@pytest.mark.parametrize("name", sweep(SAVED, *USUALLY_SAVED))
def test_what_transformers_saves_is_read(name: str, tmp_path: Path) -> None:
    assert misread_parameters(ALL[name], tmp_path) == []
