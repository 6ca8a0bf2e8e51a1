"""A calibration in a process that has traced: nothing that libraries remembered meanwhile is in its way."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme

import runtime
from runtime.errors import DataError
from seqbuild import trace_subgraphs
from tests.runtime.small import NARROW, NARROW_W4, Small, calibrate, load_transformers, read_tensors, recipe
from tests.runtime.small import token_batches as batches

RECIPES = {
    "w8a8": recipe("targets: Linear, scheme: W8A8, ignore: [lm_head]"),
    "gptq": recipe(NARROW_W4, modifier="GPTQModifier"),
}


@pytest.fixture(scope="module")
def one_layer(small: Callable[..., Small]) -> Small:
    return small("LlamaForCausalLM", "LlamaConfig", {**NARROW, "num_hidden_layers": 1})


def forget() -> None:
    """What compressed-tensors has calculated, as in a new process."""
    kind = type(functools.cache(forget))
    for cache in (item for item in gc.get_objects() if type(item) is kind):
        if str(cache.__module__).startswith("compressed_tensors"):
            cache.cache_clear()


def test_a_calibration_after_a_trace_of_a_model_that_compressed_tensors_was_applied_to(
    one_layer: Small, tmp_path: Path
) -> None:
    for name, plan in RECIPES.items():
        calibrate(one_layer, plan, tmp_path / f"{name} before")
    model = load_transformers(one_layer.weights)
    scheme = preset_name_to_scheme("W8A8", ["Linear"])
    apply_quantization_config(model, QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"]))
    for name, parameter in model.named_parameters():
        if name.endswith("_scale"):
            parameter.data.fill_(0.05)
    forget()
    trace_subgraphs(model, batches()[0], ["LlamaDecoderLayer"])
    for name, plan in RECIPES.items():
        calibrate(one_layer, plan, tmp_path / f"{name} after")
        expected, found = (read_tensors(tmp_path / f"{name} {when}") for when in ("before", "after"))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    after = runtime.evaluate(one_layer.load(), weights=tmp_path / "w8a8 after", batches=batches())
    assert after.num_tokens > 0


@pytest.mark.parametrize("shape", [(4, 39), (4, 41), (3, 40)])
def test_a_mask_of_other_tokens_is_no_sample(one_layer: Small, shape: tuple[int, int]) -> None:
    model = load_transformers(one_layer.weights)
    sample = {**batches()[0], "attention_mask": torch.ones(shape, dtype=torch.int64)}
    with pytest.raises(DataError, match=r"attention_mask of the sample has the shape \[[34], .* for \[4, 40\] tokens"):
        trace_subgraphs(model, sample, ["LlamaDecoderLayer"])
