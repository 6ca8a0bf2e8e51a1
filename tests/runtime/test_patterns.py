"""Regular expressions of others: what Python's `re` means by them, and an end in time."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from runtime import patterns
from runtime.checkpoint.reader import Checkpoint
from runtime.errors import PatternError, RecipeError, TargetError, WeightsError
from runtime.formats.checkpoint_config import CheckpointSchemes
from runtime.patterns import fault, is_in, starts_with
from seqbuild.chain.targets import match_modules
from tests.runtime.place import Place, Run, assert_refused
from tests.runtime.small import NARROW_W4, Small, recipe
from tests.tiny_models import tiny_model

NAMES = [
    "lm_head",
    "model.embed_tokens",
    "model.norm",
    "visual.blocks.3.attn.qkv",
    "Model.Layers.0",
    "model.layers.1.mlp.experts.13.gate_proj",
    "naïve.größe.١",
    "a{1}b[",
    "",
    *(
        f"model.layers.{layer}.{part}"
        for layer in (0, 1, 10, 31)
        for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj", "mlp.gate", "input_layernorm.weight")
    ),
]
# As recipes, checkpoints' configs and transformers' classes write them.
USUAL = [
    ".*lm_head",
    "lm_head",
    "^(?!.*lm_head).*",
    "^(?!.*(lm_head|mlp)).*proj$",
    r".*self_attn\.(q|k|v|o)_proj$",
    r"model\.layers\.([0-9]|1[0-9])\..*",
    r"model\.layers\.\d+\.mlp\.experts\.\d+\.",
    r"model[.]layers[.]\d{1,2}[.]mlp",
    ".*gate$",
    ".*mlp.gate[.].*",
    "visual.*",
    r"(model\.)?layers?\.\w+",
    "(?i)model",
    r".*\bq_proj\b",
    r"(?<!self_attn)\.mlp",
    r"model.layers.(?P<n>\d)(?P=n)?",
    r"^model\.layers\.(?:0|31)\..*(?<=proj)$",
    r"[^.]+\.[^.]+$",
    r"naïve\.\w+\.\d",
    "",
    "$",
    r"\Alm_head\Z",
    r"a\{1\}b\[",
    r"[\[{]|a.1",
    "x*|m",
    "a{1}",
]
ENDLESS = ["(a|aa)+$", "(?:a|a|a)+[A-Z]", "(.|..)+[A-Z]"]
NAME = "a" * 80 + "!"


@pytest.mark.parametrize("expression", USUAL)
def test_they_mean_what_python_means(expression: str) -> None:
    assert fault(expression) == ""
    for name in NAMES:
        assert starts_with(expression, name) is (re.match(expression, name) is not None), name
        assert is_in(expression, name) is (re.search(expression, name) is not None), name


@pytest.mark.parametrize("expression", ["(?:.|\\w)" * 60 + "$", "(a+)+$", "(.*)*x", "(?=(a+)+$)", "(x+x+)+y"])
def test_those_that_python_never_ends_may_have_an_answer(expression: str) -> None:
    start = time.thread_time()
    assert not starts_with(expression, "a" * 55 + "\n!")
    assert time.thread_time() - start < 5


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "_LIMIT_S", 0.05)
    patterns._search.cache_clear()


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("expression", ENDLESS)
def test_others_end_with_an_error(expression: str) -> None:
    assert fault(expression) == ""
    for search in (starts_with, is_in):
        with pytest.raises(PatternError, match=r"takes too long on 'aaa.*may backtrack without bound"):
            search(expression, NAME)


def test_many_slow_searches_are_too_slow_together(monkeypatch: pytest.MonkeyPatch) -> None:
    patterns._search.cache_clear()
    monkeypatch.setattr(patterns, "_SLOW_S", 0.0)
    monkeypatch.setattr(patterns, "_TOTAL_S", 1e-3)
    with pytest.raises(PatternError, match="takes too long"):
        for _ in range(100_000):
            starts_with(".*x", NAME)
    patterns._search.cache_clear()


@pytest.mark.parametrize(
    ("expression", "why"),
    [
        ("(", "missing ), unterminated subpattern"),
        ("*", "nothing to repeat"),
        (r"\p{L}", "bad escape"),
        ("a" * 10_001, "it has 10001 characters"),
        ("((((a{1000}){1000}){1000}){1000})", "multiply to more than 10^12"),
        ("(a{200}){0,51}", "multiply to 10200, more than 10000"),
        ("(?:foo){e<=1}", "must be escaped by a backslash"),
        ("[[:alpha:]]", "must be escaped by a backslash"),
        ("(" * 5000 + ")" * 5000, ""),
    ],
)
def test_what_is_none_is_said_before_anything_is_searched(expression: str, why: str) -> None:
    start = time.thread_time()
    assert why in fault(expression) and fault(expression)
    assert time.thread_time() - start < 5
    with pytest.raises(PatternError, match="is not a valid regular expression"):
        starts_with(expression, "a")


@pytest.mark.usefixtures("soon")
class TestPlaces:
    def test_a_recipe(self, place: Place, run: Run) -> None:
        place.recipe.write_text("QuantizationModifier: {targets: Linear, scheme: W4A16, ignore: ['re:(.|..)+[A-Z]']}\n")
        assert_refused(run(place.calibrate()), "'(.|..)+[A-Z]' takes too long on ")
        assert not place.out.exists()

    def test_lookaheads_in_a_recipe_are_fine(self, narrow_llama: Small) -> None:
        parsed = recipe(NARROW_W4.replace("ignore: [lm_head]", "ignore: ['re:^(?!.*mlp).*']"))
        found = parsed.assign({"model.layers.0.mlp.up_proj": "Linear", "lm_head": "Linear"})
        assert list(found) == ["model.layers.0.mlp.up_proj"]

    def test_a_recipe_names_the_line_of_what_is_none(self) -> None:
        with pytest.raises(RecipeError, match=r"recipe.yaml:1: 're:\(a\{200\}.*multiply to"):
            recipe("{targets: 're:(a{200}){51}', scheme: W4A16}"[1:-1])

    def test_a_checkpoints_config(self, narrow_llama: Small) -> None:
        config = {
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "channel"}}},
            "ignore": [f"re:{ENDLESS[0]}"],
        }
        schemes = CheckpointSchemes.from_config(config)
        with pytest.raises(PatternError, match="takes too long"):
            schemes.find(NAME, "Linear")
        with pytest.raises(WeightsError, match="is not a valid regular expression"):
            CheckpointSchemes.from_config({**config, "ignore": ["re:("]})

    def test_targets_to_cut_at(self) -> None:
        model = tiny_model("llama")
        with pytest.raises(PatternError, match="takes too long"):
            match_modules(model, ["re:(.|..)+[A-Z]"])
        with pytest.raises(TargetError, match="is not a valid regular expression"):
            match_modules(model, ["re:(a{200}){51}"])


def test_an_artifacts_own_patterns(tmp_path: Path, place: Place, run: Run, soon: None) -> None:
    from dataclasses import replace

    from safetensors.torch import load_file, save_file

    from runtime.chain import read_manifest
    from tests.runtime.place import edit_manifest

    manifest = read_manifest(place.artifact)
    edit_manifest(place, model=replace(manifest.model, ignored_keys=(ENDLESS[1],)))
    path = place.weights / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, NAME: tensors["model.norm.weight"].clone()}, path)
    assert NAME in Checkpoint(place.weights) and json.loads((place.weights / "config.json").read_text())
    assert_refused(run(place.calibrate()), "the regular expression '(?:a|a|a)+[A-Z]' takes too long")
