"""A few of the architectures of docs/coverage.md, each compiled, loaded and compared in five shapes."""

from __future__ import annotations

import pytest

from tests.zoo import cases
from tests.zoo_check import check

NAMES = (
    *(
        "causal LM/mistral",
        "causal LM/qwen3_moe",
        "causal LM/gemma4_text",
        "causal LM/gpt_neox",
        "causal LM/deepseek_v3",
    ),
    *("causal LM/big_bird", "causal LM/cpmant", "causal LM/xlm", "causal LM/jamba", "causal LM/mamba"),
    *("seq2seq/t5", "seq2seq/bart", "seq2seq/fsmt", "speech seq2seq/whisper", "masked LM/bert", "masked LM/fnet"),
    *("masked LM/deberta-v2", "text encoder/clip_text_model", "image encoder/vit", "image-text-to-text/llava_next"),
    *("image-text-to-text/qwen2_vl", "image-text-to-text/llava", "image-text-to-text/paligemma"),
    *("image-text-to-text/mllama", "image-text-to-text/qwen3_vl"),
)
ALL = {case.name: case for case in cases()}


@pytest.mark.filterwarnings("default::FutureWarning")  # of models that call their own modules by old names
@pytest.mark.parametrize("name", NAMES)
def test_the_chain_is_the_model(name: str) -> None:
    row = check(ALL[name])
    assert not row.problem
    assert row.equal == row.deep == "bit for bit"
    assert row.subgraphs > 1
