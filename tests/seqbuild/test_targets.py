"""Which modules are targets, and which contain one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from runtime.errors import TargetError
from seqbuild import (
    get_sequential_ancestors,
    get_sequential_targets,
    match_modules,
    trace_subgraphs,
)
from seqbuild.chain.targets import as_names, candidate_targets, default_targets, outermost, require_targets
from tests.seqbuild import toys
from tests.tiny_models import make_inputs, tiny_model
from tests.zoo import cases, small_model

X = torch.zeros(2, 5, toys.WIDTH)


def names(model: nn.Module, modules: Any) -> list[str]:
    found = {module: name for name, module in model.named_modules()}
    return [found[module] for module in modules]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["Layer"], ["inner.layers.0", "inner.layers.1"]),
        (["inner.layers.1"], ["inner.layers.1"]),
        (["layers.1"], []),
        (["re:inner\\.layers\\.[01]$"], ["inner.layers.0", "inner.layers.1"]),
        (["re:layers"], []),  # matched from the start
        (
            ["re:.*layers"],
            ["inner.layers", "inner.layers.0", "inner.layers.0.linear", "inner.layers.1", "inner.layers.1.linear"],
        ),
        (["Linear"], ["inner.layers.0.linear", "inner.layers.1.linear", "head"]),
        (["head", "Layer"], ["inner.layers.0", "inner.layers.1", "head"]),  # the order of the module tree
        (["Layer", "inner.layers.0"], ["inner.layers.0", "inner.layers.1"]),  # each once
        (["layer"], []),
        ([], []),
    ],
)
def test_match_modules(patterns: list[str], expected: list[str]) -> None:
    model = toys.Nested()
    found = match_modules(model, patterns)
    assert names(model, found) == expected
    assert found == {model.get_submodule(name) for name in expected}


def test_match_modules_knows_base_classes_and_all_names_of_a_module() -> None:
    class Special(toys.Layer):
        pass

    model = toys.SharedUnderTwoNames()
    model.special = Special()
    assert names(model, match_modules(model, ["Layer"])) == ["one", "two", "special"]
    assert names(model, match_modules(model, ["Special"])) == ["special"]
    assert names(model, match_modules(model, ["again"])) == ["one"]


def test_a_bad_pattern_is_the_users_mistake() -> None:
    with pytest.raises(TargetError, match=r"'re:\(' is not a valid regular expression"):
        match_modules(toys.Nested(), ["re:("])


def test_ancestors() -> None:
    model = toys.Nested()
    for container in (set, list, lambda found: found):
        targets = container(match_modules(model, ["Layer"]))
        assert names(model, get_sequential_ancestors(model, targets)) == ["", "inner", "inner.layers"]
    assert names(model, get_sequential_ancestors(model, {model.head})) == [""]
    assert names(model, get_sequential_ancestors(model, {model.inner, model.inner.layers[0]})) == ["", "inner.layers"]
    assert list(get_sequential_ancestors(model, set())) == []
    assert list(get_sequential_ancestors(model, {model})) == []


def test_ancestors_of_a_shared_module_are_all_that_contain_it() -> None:
    model = nn.Module()
    model.left, model.right, model.other = nn.Module(), nn.Module(), nn.Module()
    model.left.inner = model.right.inner = toys.Layer()
    assert names(model, get_sequential_ancestors(model, {model.left.inner})) == ["", "left", "right"]


def test_outermost() -> None:
    model = toys.Nested()
    assert names(model, outermost(model, match_modules(model, ["re:inner", "Linear"]))) == ["inner", "head"]
    assert names(model, outermost(model, match_modules(model, ["Layer"]))) == ["inner.layers.0", "inner.layers.1"]


def test_nested_targets_are_cut_at_the_outermost() -> None:
    subgraphs = trace_subgraphs(toys.Toy(), {"x": X}, ["Linear", "Layer"])
    assert [subgraph.code.submodules for subgraph in subgraphs] == [("layers.0",), ("layers.1",)]


def test_require_targets_suggests() -> None:
    with pytest.raises(TargetError) as caught:
        require_targets(toys.Nested(), ["Lineal"])
    assert caught.value.message == "target 'Lineal' matches no module of Nested"
    assert caught.value.hint == "did you mean Linear? its classes are Nested, Toy, ModuleList, Layer, Linear"


@pytest.mark.parametrize("names", [[], [""], ["re:"], [3]])
def test_targets_that_name_nothing(names: list[Any]) -> None:
    with pytest.raises(TargetError, match=r"target"):
        require_targets(toys.Nested(), names)


class VisionLayer(nn.Linear):
    """A layer of its own kind."""

    def __init__(self) -> None:
        super().__init__(toys.WIDTH, toys.WIDTH)


class TwoTowers(toys.Toy):
    """A model that sees as well, whose part for images is left out where there are none."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = toys.Nested()
        self.vision.inner.layers = nn.ModuleList([VisionLayer(), VisionLayer()])


def test_targets_that_the_sample_does_not_reach_are_named_and_ignored() -> None:
    model = TwoTowers()
    with pytest.warns(UserWarning, match=r"2 of 4 sequential targets are never called .*: vision\.inner\.layers\.0, "):
        subgraphs = trace_subgraphs(model, {"x": X}, ["Layer", "VisionLayer"])
    assert [subgraph.code.submodules for subgraph in subgraphs] == [("layers.0",), ("layers.1",)]


def test_names_that_fit_nothing_are_named_and_ignored() -> None:
    with pytest.warns(UserWarning, match=r"target 'VisionLayer' matches no module of Toy; it is ignored"):
        subgraphs = trace_subgraphs(toys.Toy(), {"x": X}, ["Layer", "VisionLayer"])
    assert len(subgraphs) == 2


def test_targets_inside_of_one_that_is_never_called() -> None:
    class Bypassed(nn.Module):
        """Whose encoder is gone through, and never called."""

        def __init__(self) -> None:
            super().__init__()
            self.encoder = toys.Toy()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.encoder.layers:
                x = layer(x)
            return x

    with pytest.warns(UserWarning, match=r"never called .*: encoder$"):
        subgraphs = trace_subgraphs(Bypassed(), {"x": X}, ["Toy", "Layer"])
    assert [subgraph.code.submodules for subgraph in subgraphs] == [("encoder.layers.0",), ("encoder.layers.1",)]


def test_no_target_is_called() -> None:
    model = TwoTowers()
    with pytest.raises(TargetError, match=r"'vision.inner.layers.0' is never called by TwoTowers\.forward with this"):
        trace_subgraphs(model, {"x": X}, ["VisionLayer"])


def test_a_target_that_is_the_model_itself_is_one_step_too_many() -> None:
    model = toys.Toy()
    with pytest.raises(TargetError, match="target '' is never called by Toy"):
        trace_subgraphs(model, {"x": X}, ["Toy"])


def test_infer_targets() -> None:
    assert default_targets(tiny_model("llama")) == ("LlamaDecoderLayer",)
    assert default_targets(tiny_model("t5")) == ("T5Block",)
    assert default_targets(tiny_model("bart")) == ("BartEncoderLayer", "BartDecoderLayer")
    assert default_targets(toys.Nested()) == ("Layer",)  # the longest list
    with pytest.raises(TargetError, match=r"Linear names no layer classes and has no list of layers"):
        default_targets(nn.Linear(1, 1))


class TestSequentialTargets:
    def test_the_models_own(self) -> None:
        assert get_sequential_targets([], tiny_model("llama")) == ["LlamaDecoderLayer"]
        assert get_sequential_targets([], toys.Toy(), None) == ["Layer"]
        quiet = SimpleNamespace(sequential_targets=None)
        assert get_sequential_targets([quiet, object()], toys.Toy(), quiet) == ["Layer"]

    @pytest.mark.parametrize("wish", ["Linear", ["Linear"], ("Linear",)])
    def test_a_wish(self, wish: Any) -> None:
        modifier = SimpleNamespace(sequential_targets=wish)
        assert get_sequential_targets([modifier], toys.Toy()) == ["Linear"]
        assert get_sequential_targets([], toys.Toy(), modifier) == ["Linear"]
        assert get_sequential_targets([], toys.Toy(), {"sequential_targets": wish}) == ["Linear"]

    def test_agreement_is_no_conflict(self) -> None:
        modifiers = [SimpleNamespace(sequential_targets="Linear"), SimpleNamespace(sequential_targets=["Linear"])]
        assert get_sequential_targets(modifiers, toys.Toy(), {"sequential_targets": ["Linear"]}) == ["Linear"]

    def test_modifiers_in_conflict(self) -> None:
        class Gptq:
            sequential_targets = "Linear"

        class Awq:
            sequential_targets = ("Layer", "Toy")

        with pytest.raises(TargetError) as caught:
            get_sequential_targets([Gptq(), Awq()], toys.Toy())
        assert "Gptq for Linear; Awq for Layer, Toy" in caught.value.message

    def test_a_modifier_in_conflict_with_the_arguments(self) -> None:
        class Gptq:
            sequential_targets = "Linear"

        with pytest.raises(TargetError, match=r"Gptq for Linear; the arguments for Layer"):
            get_sequential_targets([Gptq()], toys.Toy(), {"sequential_targets": "Layer"})


def test_traces_at_modules_by_name_and_pattern() -> None:
    model = tiny_model("llama")
    inputs = make_inputs(model, 2, 6)
    by_name = trace_subgraphs(model, inputs, ["model.layers.1"])
    assert [s.code.submodules[-1] for s in by_name] == ["model.layers.1", "lm_head"]
    # what lies in layers.0 is a leaf of its own now: the layer contains no target
    assert by_name[0].code.submodules == ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1")
    by_pattern = trace_subgraphs(model, inputs, ["re:model\\.layers\\.\\d+\\.mlp$"])
    assert [s.code.submodules[-1] for s in by_pattern] == [*(f"model.layers.{i}.mlp" for i in range(3)), "lm_head"]
    assert "model.layers.1.self_attn" in by_pattern[1].code.submodules


def test_one_name_may_be_given_as_it_is() -> None:
    assert as_names("LlamaDecoderLayer") == ("LlamaDecoderLayer",)
    assert as_names(["a", "b"]) == ("a", "b")
    assert as_names(None) == ()


def test_layers_that_the_sample_does_not_reach_are_not_the_only_ones() -> None:
    """GIT names the layers of its image encoder alone, and reads text without images."""
    model = small_model(next(case for case in cases() if case.name == "causal LM/git"))
    first, *others = candidate_targets(model)
    assert first == ("GitVisionEncoderLayer",)
    assert ("GitLayer",) in others
