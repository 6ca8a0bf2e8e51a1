"""The table of checkpoint keys, worked out on two layers of each form, is the one worked out on all."""

from __future__ import annotations

import dataclasses
import queue
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel, conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaPreTrainedModel

import seqbuild.model.checkpoint_keys as module
from runtime.model.weightless import without_weights
from seqbuild.model.alike import Alike, fill_in, find_alike
from seqbuild.trace.model import trace_subgraphs
from tests.tiny_models import make_inputs, tiny_config, tiny_model


def full_table(model: PreTrainedModel) -> module.KeyTable:
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict(keep_vars=True).items()}
    return module._table(model, module._saved_shapes(model, module._saved_state(model)), wanted)


@pytest.mark.parametrize(
    ("name", "depth"), [("llama", 12), ("mixtral", 12), ("qwen3_moe", 5), ("qwen3", 4), ("gpt2", 4), ("bart", 5)]
)
def test_two_layers_tell_of_all(name: str, depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    key = {"gpt2": "n_layer", "bart": "decoder_layers"}.get(name, "num_hidden_layers")
    model = tiny_model(name, **{key: depth})
    expected = full_table(model)
    asked: list[int] = []
    usual = module._saved_shapes
    monkeypatch.setattr(module, "_saved_shapes", lambda model, state: asked.append(len(state)) or usual(model, state))
    found = module.key_table(model, None)
    for field in dataclasses.fields(expected):
        assert getattr(found, field.name) == getattr(expected, field.name)
    assert len(asked) == 1
    assert asked[0] < len(module._saved_state(model)), "some layers were left out"


def test_a_rule_that_counts_is_asked_for_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", num_hidden_layers=5)
    rule = WeightRenaming(r"layers\.3\.", r"layers.3.")
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda *_, **__: [rule])
    state = module._saved_state(model)
    assert module._table_by_two(model, state, {name: tuple(tensor.shape) for name, tensor in state.items()}) is None


def test_forms() -> None:
    names = [f"a.{number}.{part}" for number in (0, 1, 2, 9, 10, 11, 12, 13) for part in ("w", "b.3.c")]
    kinds = dict.fromkeys([*names, "b.0.w", "b.1.w", "head"], 1) | {"a.12.w": 2}
    assert find_alike(kinds) == [
        Alike(prefix="a.", numbers=("0", "1", "2", "9"), suffixes=(".w", ".b.3.c")),
        Alike(prefix="a.", numbers=("10", "11", "13"), suffixes=(".w", ".b.3.c")),
    ]


FORM = Alike(prefix="a.", numbers=("1", "2", "7"), suffixes=(".w",))


def test_numbers_are_put_in_where_they_stand() -> None:
    sources = {"a.1.w": ("x.1.1.q", "1.k"), "a.2.w": ("x.2.1.q", "2.k")}
    conversion = {"a.1.w": 4, "a.2.w": 4}
    assert fill_in([FORM], sources, conversion)
    assert sources["a.7.w"] == ("x.7.1.q", "7.k")
    assert conversion["a.7.w"] == 4
    nothing: dict[str, Any] = {}
    assert fill_in([FORM], nothing, {})
    assert nothing == {}


@pytest.mark.parametrize(
    ("one", "other", "conversion"),
    [
        (("x",), ("x",), {}),  # both layers from one tensor
        (("x.1",), ("x.3",), {}),  # another number than the layer's
        (("x.1",), ("y.2",), {}),
        (("x.1",), ("x.2", "x.3"), {}),
        (("x.1",), ("x.2.y",), {}),
        (("x.1",), ("x.2",), {"a.1.w": 0, "a.2.w": 1}),
        (("x.1",), None, {}),
        (None, ("x.2",), {}),
    ],
)
def test_layers_that_did_not_come_out_alike(one: Any, other: Any, conversion: dict[str, int]) -> None:
    sources = {name: keys for name, keys in (("a.1.w", one), ("a.2.w", other)) if keys is not None}
    assert not fill_in([FORM], sources, conversion)


def test_the_first_of_identical_layers_is_run_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though it finds out that the mask is as long as the text, which changes what is known of the second's."""
    runs: queue.SimpleQueue[int] = queue.SimpleQueue()  # a list would be put back as it was before the trace
    usual = LlamaDecoderLayer.forward
    monkeypatch.setattr(
        LlamaDecoderLayer, "forward", lambda self, *args, **more: runs.put(1) or usual(self, *args, **more)
    )
    model = tiny_model("llama", num_hidden_layers=6)
    assert len(trace_subgraphs(model, make_inputs(model, 3, 37), ["LlamaDecoderLayer"])) == 7
    assert runs.qsize() == 1


def test_modules_with_buffers_are_initialized(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters on the meta device need nothing; whatever else there is may be calculated there."""
    seen: list[str] = []
    usual = LlamaPreTrainedModel._init_weights

    def noted(self: Any, part: Any) -> None:
        seen.append(type(part).__name__)
        usual(self, part)

    monkeypatch.setattr(LlamaPreTrainedModel, "_init_weights", noted)
    config = tiny_config("llama")
    with without_weights():
        model = LlamaForCausalLM._from_config(config)
    assert "LlamaRotaryEmbedding" in seen
    assert "Linear" not in seen
    inv_freq = LlamaForCausalLM._from_config(config).model.rotary_emb.inv_freq
    assert torch.equal(model.model.rotary_emb.inv_freq, inv_freq)
    seen.clear()
    LlamaForCausalLM._from_config(config)
    assert "Linear" in seen, "and only while a model is built without weights"
