"""A few of the architectures of docs/coverage.md, each compiled, loaded and compared in five shapes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.zoo import cases
from tests.zoo_check import check, misread_parameters

# What takes longest comes first: workers take tests in this order.
NAMES = (
    *("image-text-to-text/qwen2_vl", "image-text-to-text/llava", "image-text-to-text/mllama"),
    *("image-text-to-text/paligemma", "causal LM/gemma4_text", "seq2seq/t5", "causal LM/deepseek_v3"),
    *("seq2seq/fsmt", "seq2seq/bart", "causal LM/cpmant", "speech seq2seq/whisper", "causal LM/mistral"),
    *("causal LM/qwen3_moe", "causal LM/gpt_neox", "causal LM/big_bird", "causal LM/xlm", "causal LM/jamba"),
    *("causal LM/mamba", "causal LM/olmo2", "masked LM/bert", "masked LM/fnet", "masked LM/deberta-v2"),
    *("masked LM/electra", "text encoder/clip_text_model", "image encoder/vit"),
)
SAVED = (
    *("causal LM/gpt-sw3", "causal LM/mixtral", "causal LM/gpt_oss", "causal LM/falcon", "causal LM/bamba"),
    *("masked LM/xlm-roberta", "masked LM/albert", "seq2seq/marian", "seq2seq/switch_transformers"),
    *("speech seq2seq/whisper", "image encoder/detr", "image-text-to-text/qwen2_5_vl"),
)
ALL = {case.name: case for case in cases()}


@pytest.mark.filterwarnings("default::FutureWarning")  # of models that call their own modules by old names
@pytest.mark.parametrize("name", NAMES)
def test_the_chain_is_the_model(name: str) -> None:
    row = check(ALL[name])
    assert not row.problem
    assert row.equal == row.deep == "bit for bit"
    assert row.subgraphs > 1


@pytest.mark.parametrize("name", SAVED)
def test_what_transformers_saves_is_read(name: str, tmp_path: Path) -> None:
    assert misread_parameters(ALL[name], tmp_path) == []
