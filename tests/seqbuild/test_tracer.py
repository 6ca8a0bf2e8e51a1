"""What the tracer records, what it refuses, and that it leaves no trace on the model."""

from __future__ import annotations

import copy
import queue
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, init_empty_weights
from torch import nn

from runtime.errors import TargetError, TraceError
from seqbuild import (
    SequentialTracer,
    Subgraph,
    get_sequential_ancestors,
    match_modules,
    trace_subgraphs,
)
from tests.seqbuild import toys
from tests.sweep import sweep
from tests.tiny_models import assert_same, make_inputs, randomize, run_chain, run_model, tiny_model

X = torch.zeros(2, 5, toys.WIDTH)


def values(batch: int = 2, length: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, length, toys.WIDTH, generator=torch.Generator().manual_seed(seed))


def trace(model: nn.Module, *ignore: str) -> list[Subgraph]:
    return trace_subgraphs(model, {"x": X}, ["Layer"], ignore=ignore)


def check(model: nn.Module, *ignore: str, shapes: tuple[tuple[int, int], ...] = ((2, 5), (1, 7), (4, 3))) -> None:
    subgraphs = trace(model, *ignore)
    for seed, (batch, length) in enumerate(shapes):
        x = values(batch, length, seed)
        expected = run_model(model, {"x": x.clone()})
        assert_same(run_chain(subgraphs, model, {"x": x.clone()}), expected)


def refused(model: nn.Module) -> TraceError:
    """Why the model cannot be traced when no function may become opaque by itself."""
    with pytest.raises(TraceError) as caught:
        trace_subgraphs(model, {"x": X}, ["Layer"], auto_ignore=False)
    return caught.value


CONTAINERS = ["tuple", "list", "dict", "userdict", "namedtuple", "dataclass", "modeloutput"]


@pytest.mark.parametrize(
    "make",
    [
        toys.Toy,
        toys.Parameters,
        toys.PlainTensor,
        toys.GivesModule,
        toys.CalledTwice,
        toys.SharedUnderTwoNames,
        toys.Identity,
        toys.InPlace,
        toys.Literals,
        toys.Sizes,
        toys.ListFromData,
        toys.WholeFromData,
    ],
)
def test_toy_equals_its_chain(make: Callable[[], nn.Module]) -> None:
    check(randomize(make()).eval())


@pytest.mark.parametrize("kind", CONTAINERS)
def test_containers_of_leaves_are_taken_apart(kind: str) -> None:
    check(randomize(toys.Containers(kind)).eval())


def test_attributes_of_glue_keep_their_dotted_names() -> None:
    subgraphs = trace(toys.Parameters())
    assert subgraphs[0].code.attributes == ()
    assert subgraphs[1].code.attributes == ("gain", "offset", "phase", "layers.1.linear.weight")
    assert 'self.get_parameter("gain")' in subgraphs[1].code.source
    assert 'self.get_buffer("offset")' in subgraphs[1].code.source


def test_glue_follows_the_weights_of_the_model_it_is_given() -> None:
    subgraphs = trace(toys.Parameters())
    other = randomize(toys.Parameters(), seed=7)
    assert_same(run_chain(subgraphs, other, {"x": values()}), run_model(other, {"x": values()}))


def test_plain_tensors_become_constants() -> None:
    model = toys.PlainTensor()
    subgraphs = trace(model)
    assert [subgraph.code.constants for subgraph in subgraphs] == [(), ("constant_0", "constant_1")]
    assert subgraphs[1].constants["constant_0"].tolist() == [3.0, 1.0, 4.0, 1.0]
    assert subgraphs[1].constants["constant_1"].tolist() == [1, 0, 2, 3]
    model.table.zero_()
    assert subgraphs[1].constants["constant_0"].tolist() == [3.0, 1.0, 4.0, 1.0]


def test_a_leaf_that_is_given_a_module_is_traced_through() -> None:
    calls = [str(node.target) for s in trace(toys.GivesModule()) for node in s.graph.find_nodes(op="call_module")]
    assert calls == ["layers.0", "head.own", "layers.1"]


def test_a_tensor_without_value_is_refused() -> None:
    model = toys.PlainTensor()
    model.table = model.table.to("meta")
    assert "tensor of shape (4,) that is neither parameter, buffer nor result" in refused(model).message


def test_a_target_called_twice_lies_in_one_subgraph() -> None:
    subgraphs = trace(toys.CalledTwice())
    assert [subgraph.code.submodules for subgraph in subgraphs] == [("layer",), ("last",)]
    assert subgraphs[0].code.source.count('self.get_submodule("layer")') == 2


def test_a_module_with_two_names_is_one() -> None:
    subgraphs = trace(toys.SharedUnderTwoNames())
    assert [subgraph.code.submodules for subgraph in subgraphs] == [("one", "two")]


def test_a_leaf_that_hands_its_input_through_is_still_called() -> None:
    model = toys.Identity()
    subgraphs = trace(model)
    called = [name for subgraph in subgraphs for name in subgraph.code.submodules]
    assert called == ["layers.0", "dropout", "identity", "through", "layers.1"]


def test_sizes_are_not_burnt_in() -> None:
    source = trace(toys.Sizes())[1].code.source
    assert "sym_size" in source
    assert not re.search(r"\b(5|10|40)\b", source)  # 5, 2 * 5 and 2 * 5 * 4 are sizes of the sample


def test_nested_ancestors_and_bare_outputs() -> None:
    model = randomize(toys.Nested()).eval()
    subgraphs = trace_subgraphs(model, {"x": X, "bias": X[0, 0]}, ["Layer"])
    inputs = {"x": values(3, 4), "bias": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    with torch.no_grad():
        expected = model(**inputs)
    output = run_chain(subgraphs, model, inputs)
    assert list(output) == ["output_0", "output_1"]
    assert_same(output, {"output_0": expected[0], "output_1": expected[1]})
    assert list(run_chain(trace(toys.Toy()), toys.Toy(), {"x": X})) == ["output"]


def test_an_input_that_nothing_uses_is_freed_all_the_same() -> None:
    class Unused(toys.Toy):
        def forward(self, x: torch.Tensor, unused: torch.Tensor | None = None) -> Any:
            return super().forward(x)

    model = Unused()
    subgraphs = trace_subgraphs(model, {"x": X, "unused": X}, ["Layer"])
    assert_same(run_chain(subgraphs, model, {"x": values(), "unused": X}), run_model(model, {"x": values()}))


def test_values_that_are_no_tensors_are_part_of_the_program() -> None:
    class Scaled(toys.Toy):
        def forward(self, x: torch.Tensor, scale: float = 1.0, names: tuple[str, ...] = ()) -> Any:
            return self.layers[1](self.layers[0](x, scale=scale * len(names)))

    model = Scaled()
    subgraphs = trace_subgraphs(model, {"x": X, "scale": 0.5, "names": ("a", "b", "c")}, ["Layer"])
    assert subgraphs[0].input_names == ["x"]
    assert "scale=1.5" in subgraphs[0].code.source


def test_a_value_that_cannot_be_saved_is_named() -> None:
    class Odd(toys.Toy):
        def glue(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.layers[0](x, scale=object())
            return result

    assert "a step receives a value of type builtins.object" in refused(Odd()).message


class TestLeaves:
    def test_is_leaf_module(self) -> None:
        model = toys.Nested()
        targets = match_modules(model, ["Layer"])
        ancestors = set(get_sequential_ancestors(model, set(targets)))
        assert ancestors == {model, model.inner, model.inner.layers}
        tracer = SequentialTracer(ancestors, set())
        assert {name: tracer.is_leaf_module(module, name) for name, module in model.named_modules()} == {
            "": False,
            "inner": False,
            "inner.layers": False,
            "inner.layers.0": True,
            "inner.layers.0.linear": True,
            "inner.layers.1": True,
            "inner.layers.1.linear": True,
            "head": True,
        }

    def test_offloaded_modules_are_leaves_even_when_they_are_ancestors(self) -> None:
        model = toys.Nested()
        ancestors = set(get_sequential_ancestors(model, match_modules(model, ["Layer"])))
        tracer = SequentialTracer(ancestors, {model.inner})
        assert tracer.is_leaf_module(model.inner, "inner")
        graph = tracer.trace(model, {"x": X})
        assert [node.target for node in graph.find_nodes(op="call_module")] == ["inner", "head"]

    def test_an_empty_list_of_ancestors_traces_the_root_alone(self) -> None:
        graph = SequentialTracer([]).trace(toys.Nested(), {"x": X})
        assert [node.target for node in graph.find_nodes(op="call_module")] == ["inner", "head"]

    def test_hooks_of_leaves_run_once_when_the_chain_runs(self) -> None:
        model = randomize(toys.Toy()).eval()
        seen = []
        model.layers[0].register_forward_pre_hook(lambda module, args: (args[0] * 3,))
        model.layers[0].linear.register_forward_hook(lambda module, args, output: seen.append(type(output)))
        subgraphs = trace(model)
        assert seen == []  # a hook that collects statistics must not see fakes
        expected = run_model(model, {"x": values()})
        assert_same(run_chain(subgraphs, model, {"x": values()}), expected)
        assert seen == [torch.Tensor, torch.Tensor]


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that a trace could disturb, with identities where those matter."""
    state: dict[str, Any] = {}
    for name, module in model.named_modules():
        tensors = {
            kind: {
                key: (id(value), getattr(value, "_version", None)) for key, value in raw(module.__dict__[kind]).items()
            }
            for kind in ("_parameters", "_buffers")
        }
        state[name] = {
            **tensors,
            "dictionaries": (id(module._parameters), id(module._buffers), id(module._forward_hooks)),
            "attributes": {key: id(value) for key, value in module.__dict__.items() if key != "training"},
            "training": module.training,
            "hooks": [list(module.__dict__[kind]) for kind in module.__dict__ if kind.endswith("_hooks")],
            "class": dict(type(module).__dict__),
        }
        if hasattr(module, "config"):
            state[name]["config"] = (id(module.config), copy.deepcopy(module.config.to_dict()))
            state[name]["experts"] = getattr(module.config, "_experts_implementation", None)
            state[name]["attention"] = getattr(module.config, "_attn_implementation", None)
    return state


def raw(tensors: Any) -> Any:
    return {key: dict.get(tensors, key) for key in dict.keys(tensors)}


class Boom(toys.Toy):
    def glue(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no glue today")


class TestModelIsLeftAlone:
    @pytest.mark.parametrize(
        ("name", "is_training"),
        sweep(
            [(name, is_training) for name in ("llama", "mixtral", "t5") for is_training in (False, True)],
            ("mixtral", False),
            ("t5", True),
        ),
    )
    def test_on_success(self, name: str, is_training: bool) -> None:
        model = tiny_model(name).train(is_training)
        next(model.children()).eval()  # a mixture
        model.get_input_embeddings().weight.requires_grad_(False)
        before = snapshot(model)
        trace_subgraphs(model, make_inputs(model, 2, 6), model._no_split_modules)
        assert snapshot(model) == before
        inputs = make_inputs(model, 2, 6)
        assert all(value.requires_grad for value in list(model.parameters())[1:])
        assert bool(torch.isfinite(model.eval()(**inputs).logits).all())

    def test_on_meta(self) -> None:
        with init_empty_weights(include_buffers=True):
            model = tiny_model.__wrapped__("llama") if hasattr(tiny_model, "__wrapped__") else toys.Parameters()
        before = snapshot(model)
        subgraphs = trace(model)
        assert snapshot(model) == before
        assert all(parameter.is_meta for parameter in model.parameters())
        real = randomize(toys.Parameters())
        assert_same(run_chain(subgraphs, real, {"x": values()}), run_model(real, {"x": values()}))

    @pytest.mark.parametrize("kind", ["cpu", "disk"])
    def test_offloaded(self, kind: str, tmp_path: Path) -> None:
        model = tiny_model("llama", tie_word_embeddings=False)
        inputs = make_inputs(model, 2, 6, "left")
        expected = run_model(model, inputs)
        if kind == "cpu":
            cpu_offload(model, execution_device=torch.device("cpu"))
        else:
            disk_offload(model, tmp_path / "offload", execution_device=torch.device("cpu"))
        assert model.model.layers[0].mlp.up_proj.weight.is_meta
        before = snapshot(model)
        subgraphs = trace_subgraphs(model, inputs, ["LlamaDecoderLayer"])
        assert snapshot(model) == before
        assert [len(subgraph.submodules(model, recurse=False)) for subgraph in subgraphs] == [3, 1, 1, 2]
        assert_same(run_chain(subgraphs, model, inputs), expected)

    @pytest.mark.parametrize("make", [Boom, toys.BranchInForward, toys.NumberFromData])
    def test_on_failure(self, make: Callable[[], nn.Module]) -> None:
        model = make().train()
        before = snapshot(model)
        refused(model)
        assert snapshot(model) == before
        with pytest.raises(TargetError, match="NoSuchLayer"):
            trace_subgraphs(model, {"x": X}, ["NoSuchLayer"])
        assert snapshot(model) == before

    def test_what_the_model_keeps_for_itself_is_put_back(self) -> None:
        class Remembers(toys.Toy):
            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("last", torch.zeros(1))
                self.calls = 0

            def glue(self, x: torch.Tensor) -> torch.Tensor:
                self.last = x
                self.calls += 1
                self.seen = x.shape
                self.layers.register_forward_hook(print)
                return x

        model = Remembers()
        before = snapshot(model)
        trace(model)
        assert snapshot(model) == before
        assert model.last.tolist() == [0.0]

    def test_collecting_hidden_states_leaves_no_hooks(self) -> None:
        model = tiny_model("llama", output_hidden_states=True)
        before = snapshot(model)
        subgraphs = trace_subgraphs(model, make_inputs(model, 2, 6), ["LlamaDecoderLayer"])
        assert snapshot(model) == before
        inputs = make_inputs(model, 3, 5, "left")
        output = run_chain(subgraphs, model, inputs)
        assert len(output["hidden_states"]) == 4
        assert_same(output, run_model(model, inputs))

    def test_ignored_functions_are_put_back(self) -> None:
        spread, choose = toys.spread, toys.Branching.choose
        trace(toys.Branches(), "spread")
        trace(toys.BranchesInMethod(), "Branching.choose")
        with pytest.raises(TraceError, match="no glue today"):
            trace(Boom(), "spread", "Toy.glue")
        assert toys.spread is spread
        assert toys.Branching.choose is choose

    def test_the_sample_is_left_alone(self) -> None:
        sample = values()
        copied = sample.clone()
        trace_subgraphs(toys.InPlace(), {"x": sample}, ["Layer"])
        assert torch.equal(sample, copied)


class TestIgnore:
    @pytest.mark.parametrize(
        ("make", "function", "line"),
        [
            (toys.Branches, "tests.seqbuild.toys.spread", "if x.sum() > 0:"),
            (toys.BranchesInMethod, "Branching.choose", "(x[0, 0, 0] > 0).item()"),
            (toys.NumberFromData, "tests.seqbuild.toys.largest", ".item()"),
        ],
    )
    def test_error_names_the_function_and_ignoring_it_works(
        self, make: Callable[[], nn.Module], function: str, line: str
    ) -> None:
        model = randomize(make()).eval()
        error = refused(model)
        assert f"{function} cannot be traced" in error.message
        assert error.hint == f"make it one opaque step with --ignore {function}"
        found = re.search(r"\((\S+toys\.py), line (\d+)\)", error.message)
        assert found is not None
        text = Path(found[1]).read_text().splitlines()
        assert line in text[int(found[2]) - 1]
        for name in (function, function.rpartition(".")[2] if "tests" in function else function):
            check(model, name)

    def test_decisions_are_made_anew_by_each_run(self) -> None:
        model = randomize(toys.Branches()).eval()
        nn.init.zeros_(model.layers[0].linear.bias)
        subgraphs = trace(model, "spread")
        signs = []
        for seed in range(12):
            x = values(1, 1, seed=seed)
            expected = run_model(model, {"x": x})
            assert_same(run_chain(subgraphs, model, {"x": x}), expected)
            with torch.no_grad():
                signs.append(bool(model.layers[0](x).sum() > 0))
        assert set(signs) == {True, False}

    def test_a_number_from_data_is_never_a_constant(self) -> None:
        model = randomize(toys.NumberFromData()).eval()
        subgraphs = trace(model, "largest")
        numbers = []
        for seed in range(6):
            x = values(3, 6, seed=seed)
            assert_same(run_chain(subgraphs, model, {"x": x}), run_model(model, {"x": x}))
            with torch.no_grad():
                numbers.append(toys.largest(model.layers[0](x)))
        assert len(set(numbers)) > 1

    def test_a_loop_over_the_batch_is_refused(self) -> None:
        error = refused(toys.RowLoop())
        assert re.search(
            r"RowLoop\.glue \(.*\) depends on the size of x along axis 0 \(2 in the sample\), so", error.message
        )
        assert "--ignore RowLoop.glue" in error.hint
        check(randomize(toys.RowLoop()).eval(), "RowLoop.glue")

    def test_a_model_that_changes_its_own_weights_is_refused(self) -> None:
        with pytest.raises(TraceError) as caught:
            trace(toys.RescalesItself())
        assert "RescalesItself.glue (" in caught.value.message
        assert "changes its own layers.1.linear.weight in place" in caught.value.message

    def test_what_is_calculated_in_too_many_steps_is_decided_anew(self) -> None:
        error = refused(toys.SizesWithinSizes())
        assert "the expression of a size has more than 1000 terms (" in error.message
        assert "--ignore SizesWithinSizes.glue" in error.hint
        check(randomize(toys.SizesWithinSizes()).eval(), shapes=((2, 5), (1, 6), (3, 7), (1, 9)))

    def test_what_cannot_be_stated_of_sizes_is_decided_anew(self) -> None:
        error = refused(toys.PowerOfLength())
        assert re.search(r"PowerOfLength\.glue \(.*\) depends on .*, which no condition can express, so", error.message)
        check(randomize(toys.PowerOfLength()).eval(), shapes=((2, 5), (1, 2), (3, 9)))

    def test_a_branch_in_an_ancestors_forward_gets_other_advice(self) -> None:
        with pytest.raises(TraceError) as caught:
            trace(toys.BranchInForward())
        assert "BranchInForward.forward cannot be traced" in caught.value.message
        assert "--ignore BranchInForward.forward" not in caught.value.hint
        assert "separate function" in caught.value.hint

    def test_opaque_steps_are_recorded_by_path(self) -> None:
        subgraphs = trace(toys.Branches(), "spread")
        assert subgraphs[1].code.opaque == ("tests.seqbuild.toys:spread",)
        assert 'run.opaque["tests.seqbuild.toys:spread"](layers_0)' in subgraphs[1].code.source
        subgraphs = trace(toys.BranchesInMethod(), "Branching.choose")
        assert subgraphs[1].code.opaque == ("tests.seqbuild.toys:Branching.choose",)
        assert subgraphs[1].code.objects == ("branching",)

    def test_names_that_fit_nothing_are_remembered(self) -> None:
        model = toys.Toy()
        tracer = SequentialTracer(
            list(get_sequential_ancestors(model, match_modules(model, ["Layer"]))),
            ignore=["spread", "no_such_function", "Toy.glue", "No.such", "os.no_such"],
        )
        tracer.trace(model, {"x": X})
        assert tracer.unmatched_ignore == ("no_such_function", "No.such", "os.no_such")

    @pytest.mark.parametrize("make", [toys.DataDependentLeaf, toys.TokensOfABatch])
    def test_a_leaf_that_needs_values_is_tried_on_small_real_ones(self, make: Callable[[], nn.Module]) -> None:
        model = randomize(make()).eval()
        before = snapshot(model)
        check(model)
        assert snapshot(model) == before
        assert not re.search(r"\b(5|10)\b", trace(model)[1].code.source)

    def test_layers_that_look_the_same_are_tried_once(self) -> None:
        class Twin(toys.DataDependentLeaf):
            def __init__(self) -> None:
                super().__init__()
                self.twin = toys.Loop()

            def glue(self, x: torch.Tensor) -> torch.Tensor:
                return self.twin(super().glue(x))[0]

        runs = queue.SimpleQueue()  # a list in a closure would be put back as it was
        model = randomize(Twin()).eval()
        for loop in (model.leaf, model.twin):
            forward = loop.forward
            loop.forward = lambda x, forward=forward: runs.put(x.shape) or forward(x)
        subgraphs = trace(model)
        shapes = [runs.get_nowait() for _ in range(runs.qsize())]
        assert [list(shape) for shape in shapes if type(shape[0]) is int] == [[2, 5, 4], [4, 8, 4], [6, 15, 4]]
        assert_same(run_chain(subgraphs, model, {"x": values(3, 6)}), run_model(model, {"x": values(3, 6)}))

    def test_a_leaf_that_is_too_large_is_not_tried(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("seqbuild.trace.real.dry_run.LIMIT_BYTES", 79)  # its matrix and vector have 80
        with pytest.raises(TraceError, match="too large to be executed at compile time"):
            trace(toys.DataDependentLeaf())
        monkeypatch.setattr("seqbuild.trace.real.dry_run.LIMIT_BYTES", 80)
        check(randomize(toys.DataDependentLeaf()).eval())

    def test_a_result_whose_size_follows_from_values_has_a_size_of_its_own(self) -> None:
        class Picks(toys.Toy):
            def glue(self, x: torch.Tensor) -> torch.Tensor:
                return toys.positive_rows(x).sum() + x

        check(randomize(Picks()).eval(), "positive_rows")

    def test_a_function_of_transformers(self) -> None:
        model = tiny_model("llama")
        subgraphs = trace_subgraphs(
            model, make_inputs(model, 2, 12), ["LlamaDecoderLayer"], ignore=["create_causal_mask"]
        )
        assert subgraphs[0].code.opaque == ("transformers.masking_utils:create_causal_mask",)
        for batch, length, padding in [(2, 12, ""), (3, 7, "left")]:
            inputs = make_inputs(model, batch, length, padding)
            assert_same(run_chain(subgraphs, model, inputs), run_model(model, inputs))
