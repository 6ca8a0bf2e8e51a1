from __future__ import annotations

import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import runtime
import seqbuild.build
from runtime.chain import LoadedSubgraph
from runtime.checkpoint.reader import Checkpoint
from tests.runtime.small import NARROW, RECIPES, Small, calibrate, load_transformers, recipe, token_batches
from tests.tiny_models import minilm_directory

BATCHES = token_batches([(3, 33), (2, 33), (1, 7), (2, 1)], seed=9)


def perplexity(model: Any) -> float:
    """The definition, in float64, over the model in memory."""
    losses = []
    for batch in BATCHES:
        with torch.no_grad():
            logits_BSV = model(**batch, use_cache=False).logits.double()
        for sample_SV, ids_S in zip(logits_BSV, batch["input_ids"].tolist(), strict=True):
            for step in range(1, len(ids_S)):
                losses.append(-torch.log_softmax(sample_SV[step - 1], dim=0)[ids_S[step]].item())
    assert len(losses) == 5 * 32 + 6
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("name", ["llama", "sharded_llama", "gemma2", "qwen3_moe", "mixtral"])
def test_original(request: pytest.FixtureRequest, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.host.half_precision.slow_halves", lambda: ())  # transformers multiplies as torch does
    small: Small = request.getfixturevalue(name)
    result = runtime.evaluate(small.load(), weights=small.weights, batches=BATCHES)
    assert result.perplexity == pytest.approx(perplexity(load_transformers(small.weights)), rel=1e-5)
    assert result.num_tokens == 166
    assert result.num_bytes == sum(path.stat().st_size for path in small.weights.glob("*.safetensors"))


@pytest.mark.parametrize("scheme", RECIPES)
def test_quantized(llama: Small, tmp_path: Path, scheme: str) -> None:
    calibrate(llama, recipe(RECIPES[scheme], modifier="GPTQModifier"), tmp_path / "out")
    result = runtime.evaluate(llama.load(), weights=tmp_path / "out", batches=BATCHES)
    assert result.perplexity == pytest.approx(perplexity(load_transformers(tmp_path / "out")), rel=1e-5)


def test_result_does_not_depend_on_the_size_of_batches(llama: Small) -> None:
    samples = [batch["input_ids"][index] for batch in BATCHES for index in range(len(batch["input_ids"]))]
    one, all_at_once = (
        runtime.evaluate(llama.load(), weights=llama.weights, batches=runtime.batches(samples, size))
        for size in (1, 100)
    )
    assert one.num_tokens == all_at_once.num_tokens == 166
    assert one.perplexity == pytest.approx(all_at_once.perplexity, rel=1e-6)


def test_a_thread_of_its_own_reads_each_tensor_once(llama: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next subgraph's weights are read while one computes; those that are tied are kept, not read again."""
    read: list[tuple[str, str]] = []
    real = Checkpoint.read

    def recorded(self: Checkpoint, key: str) -> torch.Tensor:
        read.append((key, threading.current_thread().name))
        return real(self, key)

    monkeypatch.setattr(Checkpoint, "read", recorded)
    runtime.evaluate(llama.load(), weights=llama.weights, batches=token_batches())
    on_disk = "model.embed_tokens.weight"  # rows are looked up in it
    assert sorted([on_disk, *(key for key, _ in read)]) == sorted(Checkpoint(llama.weights))
    assert {name for _, name in read} == {"weights_0"}


def test_progress_names_the_targets(llama: Small) -> None:
    lines: list[str] = []
    runtime.evaluate(llama.load(), weights=llama.weights, batches=BATCHES[:1], progress=lines.append)
    layers = [f"[{index + 1}/4] model.layers.{index}" for index in range(3)]
    assert lines == [*layers, "[4/4] lm_head, model.norm"]


@pytest.mark.parametrize("batches", [[], token_batches([(4, 1)])])
def test_nothing_to_predict(llama: Small, monkeypatch: pytest.MonkeyPatch, batches: list[dict[str, Any]]) -> None:
    def forward(self: LoadedSubgraph, model: Any, **inputs: Any) -> dict[str, Any]:
        raise AssertionError("ran before it was checked")

    monkeypatch.setattr(LoadedSubgraph, "forward", forward)
    with pytest.raises(runtime.DataError, match="no sample has two tokens"):
        runtime.evaluate(llama.load(), weights=llama.weights, batches=batches)


def test_logits_without_a_perplexity(narrow_llama: Small, tmp_path: Path) -> None:
    model = load_transformers(narrow_llama.weights)
    with torch.no_grad():
        model.get_parameter("lm_head.weight").mul_(1e30)
    model.save_pretrained(tmp_path / "broken")
    with pytest.raises(runtime.QuantizationError, match="so perplexity is not finite"):
        runtime.evaluate(narrow_llama.load(), weights=tmp_path / "broken", batches=BATCHES)


def llama_classifier(directory: Path) -> Path:
    transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**NARROW)).save_pretrained(directory)
    return directory


def masked_bert(directory: Path) -> Path:
    sizes = {key: value for key, value in NARROW.items() if key != "num_key_value_heads"}
    transformers.BertForMaskedLM(transformers.BertConfig(**sizes)).save_pretrained(directory)
    return directory


def t5(directory: Path) -> Path:
    sizes = {"d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8, "vocab_size": 258}
    transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda directory: minilm_directory(), "BertModel returns last_hidden_state, pooler_output, but no logits"),
        (llama_classifier, "LlamaForSequenceClassification"),
        (masked_bert, "BertForMaskedLM does not predict each token from the previous ones alone"),
    ],
)
def test_models_that_are_no_causal_language_models(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    weights = make(tmp_path / "model")
    artifact = runtime.load(seqbuild.build.build(weights, out=tmp_path / "artifacts").path)
    with pytest.raises(runtime.ModelError) as caught:
        runtime.evaluate(artifact, weights=weights, batches=BATCHES)
    assert message in str(caught.value)
    assert "perplexity is defined for causal and encoder-decoder language models" in str(caught.value)


def test_a_decoder_that_nobody_says_how_to_begin(tmp_path: Path) -> None:
    weights = t5(tmp_path / "model")  # its config has no decoder_start_token_id
    artifact = runtime.load(seqbuild.build.build(weights, out=tmp_path / "artifacts").path)
    with pytest.raises(runtime.DataError, match="not state how decoder_input_ids of T5ForConditionalGeneration follow"):
        runtime.evaluate(artifact, weights=weights, batches=BATCHES)
    given = [batch | {"decoder_input_ids": batch["input_ids"]} for batch in BATCHES]
    with pytest.raises(runtime.DataError, match="batch 0 has decoder_input_ids but no labels"):
        runtime.evaluate(artifact, weights=weights, batches=given)
