"""Requests for log-likelihoods: their tokens, batches and scores, compared with plain calls of transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import runtime
from runtime.artifact.manifest import DimEntry
from runtime.chain import read_manifest
from runtime.data.tokenizer import load_tokenizer
from runtime.evaluation.encoding import TextEncoder, resolved_max_length
from runtime.evaluation.likelihood import log_likelihoods
from runtime.evaluation.options import PassOptions
from runtime.evaluation.requests import TokenRequest, plan_requests, valid_sizes
from runtime.evaluation.scoring import ScoringOptions, plan_batches, scoring
from runtime.streaming.activations import Budget
from tests.runtime.small import RECIPES, VOCABULARY, Small, calibrate, load_transformers, recipe

CPU = torch.device("cpu")


def random_requests(count: int = 12, longest: int = 30) -> list[TokenRequest]:
    """Contexts of different lengths, each with two continuations of one token and one of some tokens."""
    generator = torch.Generator().manual_seed(3)

    def tokens(most: int) -> tuple[int, ...]:
        length = int(torch.randint(1, most + 1, (1,), generator=generator))
        return tuple(torch.randint(2, VOCABULARY, (length,), generator=generator).tolist())

    contexts = [tokens(longest) for _ in range(count)]
    return [TokenRequest(context, tokens(most)) for context in contexts for most in (1, 1, 6)]


def plain_scores(weights: Path, requests: list[TokenRequest], max_length: int) -> list[tuple[float, bool]]:
    """Each request alone, by the definition, in float64."""
    model = load_transformers(weights)
    found = []
    for request in requests:
        tokens = (request.context + request.continuation)[-(max_length + 1) :]
        with torch.no_grad():
            logits_SV = model(torch.tensor([tokens[:-1]])).logits[0].double()
        own = torch.tensor(request.continuation)
        rows_SV = logits_SV[-len(own) :]
        picked = rows_SV.log_softmax(-1)[torch.arange(len(own)), own]
        found.append((float(picked.sum()), bool((rows_SV.argmax(-1) == own).all())))
    return found


def scores(small: Small, requests: list[TokenRequest], options: PassOptions | None = None, **how: Any) -> list[Any]:
    plan = ScoringOptions(**{"max_length": 256, **how})
    options = options or PassOptions(device=CPU)
    with scoring(small.load(), how.pop("weights", small.weights), requests, plan, options) as (found, _):
        return found


def assert_same(found: list[Any], expected: list[tuple[float, bool]]) -> None:
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


@pytest.mark.parametrize("name", ["gemma2", "qwen3_moe"])
def test_scores_are_those_of_plain_calls(request: pytest.FixtureRequest, name: str) -> None:
    small: Small = request.getfixturevalue(name)
    requests = random_requests()
    for max_length in (256, 12):
        expected = plain_scores(small.weights, requests, max_length)
        assert_same(scores(small, requests, max_length=max_length), expected)
    greedy = load_transformers(small.weights)(torch.tensor([requests[0].context])).logits[0, -1].argmax()
    assert scores(small, [TokenRequest(requests[0].context, (int(greedy),))])[0][1]


def test_scores_do_not_depend_on_batches_or_memory(narrow_llama: Small) -> None:
    requests = random_requests()
    usual = scores(narrow_llama, requests)
    assert_same(scores(narrow_llama, requests, batch_size=1), usual)
    on_disk = PassOptions(device=CPU, activation_memory=Budget(host_bytes=0))
    assert scores(narrow_llama, requests, on_disk) == usual
    assert scores(narrow_llama, list(reversed(requests))) == list(reversed(usual))


def test_scores_of_a_quantized_checkpoint(llama: Small, tmp_path: Path) -> None:
    calibrate(llama, recipe(RECIPES["W4A16"]), tmp_path / "out")
    requests = random_requests(4)
    with scoring(llama.load(), tmp_path / "out", requests, ScoringOptions(max_length=256), PassOptions(device=CPU)) as (
        found,
        _,
    ):
        assert_same(found, plain_scores(tmp_path / "out", requests, 256))


def test_rows_are_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Continuations of different lengths end together, wherever a part begins."""
    logits_SV = torch.randn(9, 11, generator=torch.Generator().manual_seed(1)).bfloat16()
    continuations = [(3,), (1, 2, 3), (4, 5, 6, 7, 8, 9, 10), tuple(logits_SV[-4:].argmax(-1).tolist())]
    whole = log_likelihoods(logits_SV, continuations)
    monkeypatch.setattr("runtime.evaluation.likelihood.NUMBERS_AT_A_TIME", 2 * 11)
    parts = log_likelihoods(logits_SV, continuations)
    exact_SV = logits_SV.double().log_softmax(-1)
    for (value, greedy), (other, other_greedy), tokens in zip(whole, parts, continuations, strict=True):
        expected = sum(float(exact_SV[9 - len(tokens) + place, token]) for place, token in enumerate(tokens))
        assert (value, other) == (pytest.approx(expected, abs=1e-5), pytest.approx(expected, abs=1e-5))
        assert greedy == other_greedy == (tokens == continuations[3])


def test_requests_that_read_the_same_tokens_share_a_sequence() -> None:
    pairs = [((5, 6), (7,)), ((5, 6), (8,)), ((5,), (6, 9)), ((5, 6), (7,))]
    requests = [TokenRequest(context, continuation) for context, continuation in pairs]
    plan = plan_requests(requests, max_length=10, batch_tokens=100)
    assert [(one.tokens, one.continuations) for one in plan.sequences] == [((5, 6), ((7,), (8,), (6, 9)))]
    assert plan.places == [(0, 0), (0, 1), (0, 2), (0, 0)]
    assert plan.num_truncated == 0
    shorter = plan_requests(requests[:2], max_length=1, batch_tokens=100)
    assert ([one.tokens for one in shorter.sequences], shorter.num_truncated) == ([(6,)], 2)


def test_batches_have_similar_lengths() -> None:
    requests = [TokenRequest((7,) * length, (1,)) for length in (40, 39, 38, 33, 20, 20, 20, 2)]
    requests = [TokenRequest((*request.context, 9 + index), (1,)) for index, request in enumerate(requests)]
    plan = plan_requests(requests, max_length=100, batch_tokens=90)
    lengths = [[len(plan.sequences[index].tokens) for index in batch] for batch in plan.batches]
    assert lengths == [[41, 40], [39], [34], [21, 21, 21], [3]]
    by_count = plan_requests(requests, max_length=100, batch_tokens=None, batch_size=3)
    assert [len(batch) for batch in by_count.batches] == [3, 1, 3, 1]


def test_sizes_for_which_the_artifact_is_valid(narrow_llama: Small) -> None:
    manifest = read_manifest(narrow_llama.artifact)
    rows, length = manifest.inputs[0].shape
    assert valid_sizes(manifest, 3, 20) == (3, 20)
    limited = replace(
        manifest, dims=(DimEntry(name=str(rows), min=2, max=4), DimEntry(name=str(length), min=8, max=30))
    )
    assert valid_sizes(limited, 1, 3) == (2, 8)
    assert valid_sizes(replace(limited, conditions=(f"{length} % 8 == 0",)), 3, 20) == (3, 24)
    artifact = narrow_llama.load()
    artifact.manifest = limited
    requests = [TokenRequest((7, 8, 9), (1,)), *(TokenRequest((7,) * 20, (index,)) for index in range(6))]
    _, batches = plan_batches(artifact, requests, ScoringOptions(max_length=256))
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 20), (2, 8)]
    assert all(bool(batch["attention_mask"].all()) for batch in batches)
    with pytest.raises(runtime.DataError, match=r"a request has 31 tokens, but the artifact is valid for at most 30"):
        plan_batches(artifact, [TokenRequest((7,) * 31, (1,))], ScoringOptions(max_length=256))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (TokenRequest((1,), ()), "a request has an empty continuation"),
        (TokenRequest((1,), (2,) * 9), "a continuation has 9 tokens, but the model reads at most 8"),
        (TokenRequest((1,), (VOCABULARY, 2)), f"token id {VOCABULARY}, but the model's vocabulary"),
    ],
)
def test_requests_that_cannot_be_scored(narrow_llama: Small, request_: TokenRequest, message: str) -> None:
    with pytest.raises(runtime.DataError, match=message):
        scores(narrow_llama, [request_], max_length=8)


def test_logits_that_are_not_numbers(narrow_llama: Small, tmp_path: Path) -> None:
    model = load_transformers(narrow_llama.weights)
    with torch.no_grad():
        model.get_parameter("lm_head.weight").mul_(1e38)
    model.save_pretrained(tmp_path / "broken")
    with (
        pytest.raises(runtime.QuantizationError, match="the logits are not finite"),
        scoring(
            narrow_llama.load(),
            tmp_path / "broken",
            random_requests(2),
            ScoringOptions(max_length=256),
            PassOptions(device=CPU),
        ),
    ):
        pass


def test_encoding(byte_tokenizer_dir: Path) -> None:
    """Byte b of a text is token 2 + b, and texts begin with <bos>, token 0."""
    tokenizer = load_tokenizer(byte_tokenizer_dir)
    encoder = TextEncoder(tokenizer=tokenizer, max_length=4)
    a, b, space = 2 + ord("a"), 2 + ord("b"), 2 + ord(" ")
    assert encoder.pair("a", "b") == TokenRequest((0, a), (b,))
    assert encoder.pair("a ", "b") == TokenRequest((0, a), (space, b))
    assert encoder.pair("", "ab") == TokenRequest((0,), (a, b))
    assert encoder.pair("", "<bos>a") == TokenRequest((0,), (a,))
    assert encoder.pair("<bos>a", "b") == TokenRequest((0, a), (b,))  # not a second one
    without = replace(encoder, add_bos_token=False, stated_prefix=1)
    assert without.pair("a", "b") == TokenRequest((a,), (b,))
    assert without.pair(" ", "b") == TokenRequest((1,), (space, b))
    text = "abcdefghi"
    whole = [0, *(2 + byte for byte in text.encode())]
    windows = list(encoder.windows(text))
    assert [token for one in windows for token in one.continuation] == whole
    assert [len(one.context) + len(one.continuation) - 1 for one in windows] == [4, 4, 4]
    assert windows[0].context == (0,)
    assert list(encoder.windows("<bos>")) == [TokenRequest((0,), (0,))]
    assert resolved_max_length(tokenizer, 64, None) == 64
    assert resolved_max_length(tokenizer, None, None) == 2048
    with pytest.raises(runtime.UsageError, match="--max-length 65 exceeds the model's 64 positions"):
        resolved_max_length(tokenizer, 64, 65)
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(runtime.DataError, match="neither a BOS nor an EOS token"):
        TextEncoder(tokenizer=tokenizer, max_length=4).pair("", "b")
