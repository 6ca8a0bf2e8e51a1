"""The subgraphs that llm-compressor's sequential pipeline gets; `make clients` runs the pipeline itself."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from runtime.errors import DataError, ModelError
from seqbuild.peer.subgraphs import OneshotSubgraph, load_subgraphs
from tests.tiny_models import ZOO

IDS = torch.randint(3, 128, (2, 11), generator=torch.Generator().manual_seed(0))
TEXT = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
TEXT["attention_mask"][0, :4] = 0


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LlamaForCausalLM:
    monkeypatch.setenv("SEQBUILD_CACHE", str(tmp_path))
    torch.manual_seed(0)
    made: LlamaForCausalLM = LlamaForCausalLM(LlamaConfig(**ZOO["llama"][1], attn_implementation="eager")).eval()
    return made


def subgraphs_of(model: Any, sample: Mapping[str, Any] = TEXT, **changes: Any) -> list[OneshotSubgraph]:
    options: dict[str, Any] = {
        "targets": ("LlamaDecoderLayer",),
        "ignore": (),
        "targets_per_subgraph": 1,
        "attention": "eager",
    }
    return load_subgraphs(model, sample, **options | changes)


def run(subgraphs: list[OneshotSubgraph], model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Run the subgraphs as the pipeline does, with values from a cache that consumed names leave."""
    values = dict(batch)
    outputs: dict[str, Any] = {}
    with torch.no_grad():
        for subgraph in subgraphs:
            outputs = subgraph.forward(model, **{name: values[name] for name in values if name in subgraph.input_names})
            values |= outputs
            for name in subgraph.consumed_names:
                del values[name]
    return outputs


def test_they_compute_what_the_model_does_with_its_own_modules(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.model.layers[1].mlp = nn.Sequential(model.model.layers[1].mlp)  # as modifiers replace modules
    subgraphs = subgraphs_of(model)
    called: list[nn.Module] = []
    for module in model.modules():
        module.register_forward_hook(lambda module, inputs, output: called.append(module))
    shorter = {name: tensor[:1, 3:] for name, tensor in TEXT.items()}
    for batch in (TEXT, shorter):
        called.clear()
        logits = run(subgraphs, model, batch)["logits"]
        assert set(called) >= set(model.model.layers.modules()) - {model.model.layers}
        with torch.no_grad():
            assert torch.equal(logits, model(**batch).logits)
    assert [sum(layer in subgraph.submodules(model) for layer in model.model.layers) for subgraph in subgraphs] == [
        *(1, 1, 1),
        *(0 for _ in subgraphs[3:]),
    ]

    def never(*_: object, **__: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr("seqbuild.passes._trace", never)
    assert len(subgraphs_of(model)) == len(subgraphs)


def test_a_batch_with_other_inputs_is_compiled_for_them(model: LlamaForCausalLM) -> None:
    batch = {"input_ids": IDS, "labels": IDS, "loss_mask": torch.ones_like(IDS)}
    subgraphs = subgraphs_of(model, batch)
    assert subgraphs[0].input_names == ("input_ids",)
    with torch.no_grad():
        assert torch.equal(run(subgraphs, model, batch)["logits"], model(input_ids=IDS).logits)


def test_sizes_that_the_artifact_is_not_valid_for(model: LlamaForCausalLM) -> None:
    with pytest.raises(DataError, match="but its sequence is 11 elsewhere"):
        run(subgraphs_of(model), model, {**TEXT, "attention_mask": TEXT["attention_mask"][:, :9]})


@pytest.mark.parametrize("change", ["missing", "more"])
def test_a_model_that_differs_from_its_config(model: LlamaForCausalLM, change: str) -> None:
    if change == "missing":
        model.model.layers = model.model.layers[:2]
        problem = "no module model.layers.2, which its config describes"
    else:
        model.model.layers.append(model.model.layers[0].__class__(model.config, 3))
        problem = "the target model.layers.3 of the model is not a target of its artifact"
    with pytest.raises(ModelError, match=problem):
        subgraphs_of(model)


@pytest.mark.skipif(importlib.util.find_spec("llmcompressor") is not None, reason="llm-compressor is installed")
def test_without_llm_compressor() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import seqbuild.llmcompressor"], capture_output=True, text=True, check=False
    )
    assert "ImportError: the pipeline of seqbuild requires llm-compressor 0.14 or newer" in done.stderr
    assert done.stderr.strip().endswith("pip install llmcompressor")
