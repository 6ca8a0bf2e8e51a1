"""The chain equals the model: traced in memory, compiled and loaded, in other shapes, dtypes and paddings."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel

import runtime.chain
from runtime.chain import Artifact
from runtime.weights.parameters import assign
from seqbuild import compile_model, match_modules, trace_subgraphs
from seqbuild.chain.subgraph import Subgraph
from seqbuild.chain.targets import default_targets
from tests.sweep import sweep
from tests.tiny_models import (
    TEXT_MODELS,
    ZOO,
    assert_near,
    assert_same,
    make_inputs,
    minilm_directory,
    randomize,
    run_chain,
    run_model,
    save_config,
    tiny_model,
)

SAMPLE = (2, 12)
# (batch, length, padding): the sample's own shape, then everything else
CASES = [(2, 12, ""), (2, 12, "left"), (1, 7, "right"), (4, 31, "left"), (3, 3, ""), (12, 12, "right")]


def check_cases(subgraphs: object, model: PreTrainedModel, *, near: bool = False) -> None:
    for seed, (batch, length, padding) in enumerate(CASES):
        inputs = make_inputs(model, batch, length, padding, seed=seed)
        expected = run_model(model, inputs)
        got = run_chain(subgraphs, model, inputs)  # type: ignore[arg-type]
        (assert_near if near else assert_same)(got, expected)


def sdpa_model(name: str) -> PreTrainedModel:
    """The model with scaled_dot_product_attention, where its family has that (gemma2 lost it in transformers 5.2x)."""
    try:
        return tiny_model(name, attention="sdpa")
    except ValueError as error:
        assert "does not support an attention implementation" in str(error)
        pytest.skip(f"{name} has no sdpa in this transformers")


@cache
def traced(name: str) -> tuple[PreTrainedModel, list[Subgraph]]:
    """A model of the zoo and its chain, traced in memory once."""
    model = tiny_model(name)
    return model, trace_subgraphs(model, make_inputs(model, *SAMPLE), default_targets(model))


@pytest.fixture(scope="module")
def minilm() -> PreTrainedModel:
    model: PreTrainedModel = AutoModel.from_pretrained(minilm_directory(), attn_implementation="eager")
    return model.float().eval()


# Plain, with windows and caps, with experts, with a scan, with an encoder.
USUAL = ("llama", "gemma2", "qwen3_moe", "mamba", "t5")


@pytest.mark.parametrize("name", sweep(ZOO, *USUAL))
def test_in_memory_equals_the_model(name: str) -> None:
    model, subgraphs = traced(name)
    check_cases(subgraphs, model)


@pytest.mark.parametrize("name", sweep(["llama", "gemma2", "gpt2", "opt", "t5"], "opt", "t5"))
def test_in_memory_sdpa_equals_the_model(name: str) -> None:
    model = sdpa_model(name)
    subgraphs = trace_subgraphs(model, make_inputs(model, *SAMPLE), default_targets(model))
    check_cases(subgraphs, model, near=True)


def test_real_bert_in_memory(minilm: PreTrainedModel) -> None:
    subgraphs = trace_subgraphs(minilm, make_inputs(minilm, *SAMPLE), ["BertLayer"])
    assert sum(len(subgraph.submodules(minilm, recurse=False)) for subgraph in subgraphs) >= 6
    check_cases(subgraphs, minilm)


def test_real_bert_compiled(minilm: PreTrainedModel, tmp_path: Path) -> None:
    path = compile_model(minilm_directory(), attn_implementation="eager", out=tmp_path)
    artifact = runtime.chain.load(path)
    check_cases(artifact.subgraphs, minilm)


Load = Callable[[str, str], Artifact]


@pytest.fixture(scope="module")
def load(compiled: Callable[..., Path]) -> Load:
    """Load the artifact of a model of the zoo, compiled from nothing but its config on disk."""
    return lambda name, attention: runtime.chain.load(compiled(name, attn_implementation=attention))


def filled(artifact: Artifact, reference: PreTrainedModel, dtype: torch.dtype) -> nn.Module:
    """The artifact's own module tree with the reference's weights in it."""
    model = artifact.empty_model(dtype)
    assert all(parameter.is_meta for parameter in model.parameters())
    for name, tensor in reference.state_dict().items():
        assign(model, name, tensor)
    return model


@pytest.mark.parametrize("name", sweep(ZOO, *USUAL, "gpt2", "bert"))
def test_compiled_equals_the_model_in_float32(name: str, load: Load) -> None:
    artifact, reference = load(name, "eager"), tiny_model(name)
    model = filled(artifact, reference, torch.float32)
    for seed, (batch, length, padding) in enumerate(CASES):
        inputs = make_inputs(reference, batch, length, padding, seed=seed)
        assert_same(run_chain(artifact.subgraphs, model, inputs), run_model(reference, inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", sweep(TEXT_MODELS, "llama", "gemma2", "gpt2"))
def test_the_same_artifact_equals_the_model_in_half_precision(name: str, dtype: torch.dtype, load: Load) -> None:
    artifact, reference = load(name, "eager"), tiny_model(name, dtype=dtype)
    model = filled(artifact, reference, dtype)
    assert next(model.parameters()).dtype == dtype
    for seed, (batch, length, padding) in enumerate(CASES):
        inputs = make_inputs(reference, batch, length, padding, seed=seed)
        assert_same(run_chain(artifact.subgraphs, model, inputs), run_model(reference, inputs))


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_compiled_sdpa_equals_the_model(name: str, load: Load) -> None:
    reference = sdpa_model(name)
    artifact = load(name, "sdpa")
    model = filled(artifact, reference, torch.float32)
    assert artifact.manifest.model.attn_implementation == "sdpa"
    for seed, (batch, length, padding) in enumerate(CASES):
        inputs = make_inputs(reference, batch, length, padding, seed=seed)
        assert_near(run_chain(artifact.subgraphs, model, inputs), run_model(reference, inputs))


def test_code_names_neither_device_nor_weight_dtype(load: Load) -> None:
    for name in (*USUAL, "gpt2", "bert", "opt", "phi3", "mixtral", "bart"):  # other tests compile these, too
        for subgraph in load(name, "eager").subgraphs:
            assert "cpu" not in subgraph.source
            assert "bfloat16" not in subgraph.source
            assert repr(torch.finfo(torch.bfloat16).min) not in subgraph.source
    gemma2 = load("gemma2", "eager")
    assert "run.dtype" in gemma2.subgraphs[0].source
    assert "run.lowest" in gemma2.subgraphs[0].source


@pytest.mark.parametrize(
    ("name", "targets_per_subgraph"),
    sweep(itertools.product(ZOO, (1, 2)), *(("llama", 1), ("qwen3_moe", 1), ("t5", 1), ("llama", 2), ("t5", 2))),
)
def test_each_target_lies_in_exactly_one_subgraph(name: str, targets_per_subgraph: int) -> None:
    model, subgraphs = traced(name)
    patterns = default_targets(model)
    if targets_per_subgraph > 1:
        sample = make_inputs(model, *SAMPLE)
        subgraphs = trace_subgraphs(model, sample, patterns, targets_per_subgraph=targets_per_subgraph)
    places = Counter(module for subgraph in subgraphs for module in subgraph.submodules(model, recurse=False))
    targets = match_modules(model, patterns)
    assert len(targets) >= 2
    assert {module: places[module] for module in targets} == dict.fromkeys(targets, 1)
    for subgraph in subgraphs:
        assert sum(module in targets for module in subgraph.submodules(model, recurse=False)) <= targets_per_subgraph
    if targets_per_subgraph == 2:
        assert_same(
            run_chain(subgraphs, model, make_inputs(model, 3, 5, "left")),
            run_model(model, make_inputs(model, 3, 5, "left")),
        )


def test_llama_is_cut_as_written_here() -> None:
    model, subgraphs = traced("llama")
    called = [[model_name(model, module) for module in s.submodules(model, recurse=False)] for s in subgraphs]
    assert called == [
        ["model.embed_tokens", "model.rotary_emb", "model.layers.0"],
        ["model.layers.1"],
        ["model.layers.2"],
        ["model.norm", "lm_head"],
    ]
    assert subgraphs[0].input_names == ["input_ids", "attention_mask"]
    assert subgraphs[0].consumed_names == ["input_ids", "attention_mask"]
    shared = ["where", "getitem", "getitem_1", "unsqueeze"]  # mask, cosine, sine, positions: in the order of their use
    assert subgraphs[1].input_names == ["model_layers_0", *shared]
    assert subgraphs[1].consumed_names == ["model_layers_0"]
    assert subgraphs[2].input_names == ["model_layers_1", *shared]
    assert subgraphs[2].consumed_names == ["model_layers_1", *shared]
    assert subgraphs[3].input_names == subgraphs[3].consumed_names == ["model_layers_2"]


def model_name(model: PreTrainedModel, module: object) -> str:
    return next(name for name, other in model.named_modules() if other is module)


def test_code_does_not_depend_on_weights_or_on_their_kind() -> None:
    def sources(seed: int, batch: int) -> list[str]:
        model = randomize(tiny_model("llama"), seed)
        sample = make_inputs(model, batch, 9, seed=seed)
        return [s.code.source for s in trace_subgraphs(model, sample, ["LlamaDecoderLayer"])]

    assert sources(1, 2) == sources(2, 5)


def test_an_opaque_step_survives_the_artifact(tmp_path: Path) -> None:
    source = save_config("llama", tmp_path / "llama")
    path = compile_model(source, attn_implementation="eager", ignore=["create_causal_mask"], out=tmp_path / "out")
    artifact = runtime.chain.load(path)
    assert artifact.manifest.subgraphs[0].opaque == ("transformers.masking_utils:create_causal_mask",)
    assert artifact.manifest.subgraphs[0].objects == ("config",)
    assert 'self.get_submodule("").config' in artifact.subgraphs[0].source
    reference = tiny_model("llama")
    model = filled(artifact, reference, torch.float32)
    for batch, length, padding in CASES:
        inputs = make_inputs(reference, batch, length, padding)
        assert_same(run_chain(artifact.subgraphs, model, inputs), run_model(reference, inputs))


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_encoder_and_decoder_lengths_are_independent(name: str, load: Load) -> None:
    reference, subgraphs = traced(name)
    artifact = load(name, "eager")
    model = filled(artifact, reference, torch.float32)
    for encoder_length, decoder_length in [(9, 4), (5, 11)]:
        inputs = make_inputs(reference, 2, encoder_length, "left")
        decoder = make_inputs(reference, 2, decoder_length, "right")
        inputs |= {key: value for key, value in decoder.items() if key.startswith("decoder")}
        assert_same(run_chain(artifact.subgraphs, model, inputs), run_model(reference, inputs))
        assert_same(run_chain(subgraphs, reference, inputs), run_model(reference, inputs))


@pytest.mark.parametrize(("batch", "length"), sweep([(1, 6), (2, 2), (4, 4), (3, 3), (32, 8)], (1, 6), (4, 4), (32, 8)))
def test_the_sample_shape_leaves_no_trace(batch: int, length: int) -> None:
    """A batch of one, a square batch, sizes that the model has itself: the chain serves other shapes all the same."""
    model = tiny_model("llama")
    subgraphs = trace_subgraphs(model, make_inputs(model, batch, length), ["LlamaDecoderLayer"])
    check_cases(subgraphs, model)
