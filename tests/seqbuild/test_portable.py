"""Tracing through layers, down to what a host builds by itself."""

from __future__ import annotations

import queue
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

import runtime
from runtime.chain import Artifact, read_manifest
from runtime.errors import ArtifactError, UsageError
from runtime.weights.parameters import assign
from seqbuild.build import build
from seqbuild.trace.experts.learn import experts_leaf, is_experts
from seqbuild.trace.model import Trace, TraceOptions, trace_model
from seqbuild.trace.record.tracer import leaf_policy
from tests.seqbuild.toys import WIDTH
from tests.sweep import sweep
from tests.tiny_models import assert_near, assert_same, make_inputs, run_chain, run_model, save_config, tiny_model

SHAPES = [(2, 12, ""), (1, 7, "right"), (4, 31, "left")]


def twin_of(artifact: Artifact, model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The host's module tree with the weights of `model`."""
    twin = artifact.empty_model(dtype)
    for name, tensor in model.state_dict().items():
        if name in artifact.manifest.parameters:
            assign(twin, name, tensor.detach())
    return twin


Compiled = Callable[..., Path]


def deep(model: nn.Module, targets: list[str], sample: dict[str, Any], **options: Any) -> Trace:
    return trace_model(
        model, sample, targets, TraceOptions(leaves="linear", may_ignore=lambda function: True, **options)
    )


def calls(trace: Trace) -> list[str]:
    return [str(node.target) for node in trace.graph.find_nodes(op="call_module")]


class TestArtifacts:
    """Compiled, loaded and run with transformers' classes out of the game."""

    @pytest.mark.parametrize(
        "name",
        sweep(
            ["llama", "qwen3", "gemma2", "gpt2", "opt", "phi3", "mixtral", "bert", "t5"],
            *("gemma2", "gpt2", "mixtral", "bert"),
        ),
    )
    def test_equal_to_the_model_bit_for_bit(self, name: str, compiled: Compiled) -> None:
        artifact = runtime.load(compiled(name, attn_implementation="eager"))
        assert artifact.manifest.is_portable
        model = tiny_model(name)
        twin = twin_of(artifact, model)
        assert not [m for m in twin.modules() if "modeling" in type(m).__module__]
        for seed, (batch, length, padding) in enumerate(SHAPES):
            inputs = make_inputs(model, batch, length, padding, seed)
            if hasattr(model.config, "_experts_implementation"):
                model.config._experts_implementation = "eager"
            assert_same(run_chain(artifact.subgraphs, twin, inputs), run_model(model, inputs))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("name", sweep(["llama", "gemma2", "gpt2"], "gemma2"))
    def test_follows_the_dtype_of_the_run(self, name: str, dtype: torch.dtype, compiled: Compiled) -> None:
        artifact = runtime.load(compiled(name, attn_implementation="eager"))
        model = tiny_model(name, dtype=dtype)
        inputs = make_inputs(model, 2, 9, "left")
        assert_same(run_chain(artifact.subgraphs, twin_of(artifact, model, dtype), inputs), run_model(model, inputs))

    def test_attention_stays_one_operator(self, compiled: Compiled) -> None:
        artifact = runtime.load(compiled("llama", attn_implementation="sdpa"))
        for subgraph in artifact.subgraphs[:3]:
            assert subgraph.source.count("aten.scaled_dot_product_attention") == 1
        model = tiny_model("llama", attention="sdpa")
        inputs = make_inputs(model, 3, 11, "left")
        assert_near(run_chain(artifact.subgraphs, twin_of(artifact, model), inputs), run_model(model, inputs))

    def test_code_names_neither_device_nor_dropout(self, compiled: Compiled) -> None:
        artifact = compiled("gpt2", attn_implementation="eager")
        code = "".join(path.read_text() for path in sorted(artifact.glob("subgraphs/*.py")))
        assert "dropout" not in code
        assert "cpu" not in code
        assert "bfloat16" not in code

    def test_layers_that_do_the_same_share_their_code(self, tmp_path: Path) -> None:
        manifest = build(save_config("llama", tmp_path / "model", num_hidden_layers=9), out=tmp_path).manifest
        files = [entry.file for entry in manifest.subgraphs]
        assert len(files) == 10
        assert len(set(files)) == 3  # the first with the embedding, those between, and the head
        assert [entry.scope for entry in manifest.subgraphs[1:9]] == [f"model.layers.{i}" for i in range(1, 9)]
        assert manifest.subgraphs[4].submodules[0] == "model.layers.4.self_attn.q_proj"

    def test_layers_that_differ_do_not(self, tmp_path: Path) -> None:
        source = save_config("qwen3_moe", tmp_path / "model", num_hidden_layers=6, mlp_only_layers=[2, 4])
        manifest = build(source, out=tmp_path).manifest
        files = [entry.file for entry in manifest.subgraphs]
        assert files[1] == files[3] == files[5]
        assert files[2] == files[4] != files[1]

    def test_each_target_lies_in_one_subgraph_with_all_of_its_leaves(self, compiled: Compiled) -> None:
        manifest = read_manifest(compiled("t5", attn_implementation="eager"))
        assert sorted(name for entry in manifest.subgraphs for name in entry.targets) == sorted(manifest.targets)
        for entry in manifest.subgraphs:
            inside = [name for target in manifest.targets for name in entry.submodules if name.startswith(f"{target}.")]
            assert all(any(name.startswith(f"{target}.") for target in entry.targets) for name in inside)

    def test_the_default_stops_at_the_layers_where_something_is_foreign(self, compiled: Compiled) -> None:
        whole = compiled("mamba", attn_implementation="eager", leaves="linear")
        usual = compiled("mamba", attn_implementation="eager")
        assert read_manifest(usual).policy == ("linear" if read_manifest(whole).is_portable else "target")
        assert whole != usual

    def test_what_stays_at_the_layers(self, compiled: Compiled) -> None:
        manifest = read_manifest(compiled("llama", leaves="target"))
        assert (manifest.policy, manifest.leaves, manifest.is_portable) == ("target", {}, False)
        assert manifest.sources
        assert manifest.subgraphs[1].submodules == ("model.layers.1",)

    def test_a_portable_artifact_relies_on_no_source(self, compiled: Compiled) -> None:
        manifest = read_manifest(compiled("llama"))
        assert manifest.sources == {}
        assert manifest.limits == {"vocab_size": 128, "max_position_embeddings": 2048}

    def test_an_unknown_policy_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="--leaves must be one of auto, target, linear; got 'layer'"):
            build(save_config("llama", tmp_path / "model"), out=tmp_path, leaves="layer")

    def test_experts_have_a_program_for_one_of_them(self, compiled: Compiled) -> None:
        artifact = compiled("mixtral")
        manifest = read_manifest(artifact)
        (kind,) = [kind for kind in manifest.leaf_kinds if kind.kind == "Experts"]
        assert kind.options["num_experts"] == (4,)
        assert kind.options["stacked"] == ("gate_up_proj", "down_proj")
        code = (artifact / kind.program).read_text()
        assert code.count("aten.linear.default") == 2
        assert "def forward(self, hidden_states, weights, gate_up_proj, down_proj, *, run):" in code

    def test_a_wrong_table_of_leaves_is_refused(self, compiled: Compiled) -> None:
        artifact = runtime.load(compiled("llama"))
        manifest = artifact.manifest
        entry = manifest.parameters["model.layers.0.mlp.up_proj.weight"]
        object.__setattr__(entry, "shape", (48, 32, 1))
        with pytest.raises(ArtifactError, match=r"describes model\.layers\.0\.mlp\.up_proj as a Linear that cannot"):
            artifact.empty_model()


class TestLeaves:
    def test_kinds(self) -> None:
        policy = leaf_policy()
        for module, kind in [
            (nn.Linear(3, 4, bias=False), "Linear"),
            (Conv1D(4, 3), "Conv1D"),
            (nn.Embedding(5, 4, padding_idx=0), "Embedding"),
            (nn.Conv2d(3, 4, (2, 3), stride=2, padding=1, groups=1), "Conv2d"),
            (nn.Conv1d(4, 4, 3, groups=2, padding_mode="circular", padding=1, dilation=2), "Conv1d"),
        ]:
            leaf = policy.leaf(module)
            assert leaf is not None
            assert (leaf.kind.kind, leaf.source) == (kind, "")
        for module in (nn.LayerNorm(3), nn.ReLU(), nn.Embedding(5, 4, max_norm=1.0), nn.MultiheadAttention(4, 2)):
            assert policy.leaf(module) is None

    def test_a_linear_that_calculates_in_its_own_way_has_a_program(self) -> None:
        class Halved(nn.Linear):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return (x @ self.weight.T) / 2 + self.bias

        leaf = leaf_policy().leaf(Halved(3, 4))
        assert leaf is not None
        assert leaf.kind.arguments == ("x",)
        assert leaf.kind.attributes == ("weight", "bias")
        assert "torch.ops.aten.matmul" in leaf.source

    def test_more_than_a_matrix_has_none(self) -> None:
        class Routed(nn.Linear):
            def forward(self, x: torch.Tensor) -> Any:
                return super().forward(x), x.argmax(-1)

        class Scaled(nn.Linear):
            def __init__(self) -> None:
                super().__init__(3, 4)
                self.scale = nn.Parameter(torch.ones(4))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return super().forward(x) * self.scale

        assert leaf_policy().leaf(Routed(3, 4)) is None
        assert leaf_policy().leaf(Scaled()) is None

    def test_a_falcon_is_run_by_such_programs(self, tmp_path: Path) -> None:
        sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 128}
        config = transformers.FalconConfig(**sizes, architectures=["FalconForCausalLM"])
        config.save_pretrained(tmp_path / "model")
        artifact = runtime.load(build(tmp_path / "model", out=tmp_path, attn_implementation="eager").path)
        (kind,) = [kind for kind in artifact.manifest.leaf_kinds if kind.program]
        assert kind.kind == "Linear"
        torch.manual_seed(0)
        model = transformers.FalconForCausalLM._from_config(config, attn_implementation="eager").eval()
        twin = twin_of(artifact, model)
        assert isinstance(twin.get_submodule("transformer.h.0.mlp.dense_h_to_4h"), nn.Linear)
        inputs = make_inputs(model, 2, 9, "left")
        assert_same(run_chain(artifact.subgraphs, twin, inputs), run_model(model, inputs))

    def test_experts_that_do_something_else_are_no_leaf(self) -> None:
        model = tiny_model("mixtral")
        experts = next(module for module in model.modules() if is_experts(module))
        assert experts_leaf(experts) is not None

        class Odd(type(experts)):  # type: ignore[misc]
            def forward(self, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
                return hidden_states * top_k_weights.sum()

        experts.__class__ = Odd
        assert experts_leaf(experts) is None


class LoopingMixer(nn.Module):
    """Loops over the length of its input: right for one length only, if it were traced through."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = x[:, 0]
        index = 1
        while index < x.shape[1]:
            total = self.linear(total) + x[:, index]
            index += 1
        return x + total[:, None]


class Choice(nn.Module):
    """Does one thing with long inputs and another with short ones."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) if x.shape[1] > 8 else x


class Wrapper(nn.Module):
    """A layer around a module that does not hold for every size."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.inner(x))


class Two(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Wrapper(kind()), Wrapper(kind())])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class TestForeignLeaves:
    @pytest.mark.parametrize("kind", [LoopingMixer, Choice])
    def test_what_holds_for_some_sizes_only_stays_a_module(self, kind: type[nn.Module]) -> None:
        torch.manual_seed(0)
        model = Two(kind).eval()
        trace = deep(model, ["Wrapper"], {"x": torch.randn(3, 12, WIDTH)})
        assert calls(trace) == ["layers.0.inner", "layers.1.inner"]
        for length in (12, 5, 20):
            x = torch.randn(2, length, WIDTH)
            assert_same(run_chain(trace.subgraphs, model, {"x": x}), {"output": model(x)})

    def test_without_leave_it_is_an_error(self) -> None:
        with pytest.raises(
            runtime.TraceError,
            match=re.compile("Choice.forward.*depends on.*so the graph would only be valid", re.DOTALL),
        ):
            trace_model(Two(Choice), {"x": torch.randn(3, 12, WIDTH)}, ["Wrapper"], TraceOptions(leaves="linear"))


class Layered(nn.Module):
    """Layers of two kinds, one of which hands its input on."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(index % 2 == 0) for index in range(6))

    def forward(self, x: torch.Tensor) -> Any:
        residual = x
        for layer in self.layers:
            x, residual = layer(x, residual)
        return x + residual


class Block(nn.Module):
    def __init__(self, is_wide: bool) -> None:
        super().__init__()
        self.is_wide = is_wide
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 8 if is_wide else WIDTH)
        self.down = nn.Linear(8 if is_wide else WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.down(torch.relu(self.up(self.norm(x)))), residual


def _by_name(layer: Any) -> int:
    return int(layer.layer_idx)


def _by_vars(layer: Any) -> int:
    return int(vars(layer)["layer_idx"])


def _by_dictionary(layer: Any) -> int:
    return int(layer.__dict__["layer_idx"])


def _by_getattr(layer: Any) -> int:
    return int(object.__getattribute__(layer, "layer_idx"))


def _by_counting(layer: Any) -> int:
    """How many layers of the class have run before."""
    type(layer).count += 1
    return int(type(layer).count)


class TestSections:
    """Layers that are like an earlier one are not traced again, and that makes no difference."""

    def test_copies_equal_the_model(self, monkeypatch: pytest.MonkeyPatch) -> None:
        torch.manual_seed(0)
        model = Layered().eval()
        runs: queue.SimpleQueue[Any] = queue.SimpleQueue()  # a list would be put back as it was before the trace
        plain = Block.forward

        def counted(self: Block, *args: torch.Tensor) -> Any:
            runs.put(self)
            return plain(self, *args)

        monkeypatch.setattr(Block, "forward", counted)
        trace = deep(model, ["Block"], {"x": torch.randn(3, 12, WIDTH)})
        # Two kinds; the first layer of all gets the same tensor twice, which makes a third.
        assert runs.qsize() == 3
        x = torch.randn(2, 5, WIDTH)
        assert_same(run_chain(trace.subgraphs, model, {"x": x}), {"output": model(x)})
        assert calls(trace) == [f"layers.{index}.{name}" for index in range(6) for name in ("up", "down")]

    @pytest.mark.parametrize("way", [_by_name, _by_vars, _by_dictionary, _by_getattr, _by_counting])
    def test_a_layer_that_knows_which_it_is_is_traced_by_itself(self, way: Callable[[Any], int]) -> None:
        class Numbered(Block):
            count = 0

            def __init__(self, layer_idx: int) -> None:
                super().__init__(False)
                self.layer_idx = layer_idx

            def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                return self.down(x) * (way(self) + 1), residual

        torch.manual_seed(0)
        model = Layered().eval()
        model.layers = nn.ModuleList(Numbered(index) for index in range(4))
        trace = deep(model, ["Numbered"], {"x": torch.randn(3, 12, WIDTH)})
        x = torch.randn(2, 5, WIDTH)
        Numbered.count = 0
        assert_same(run_chain(trace.subgraphs, model, {"x": x}), {"output": model(x)})


class TestDtypes:
    def test_limits_of_the_weights_dtype_are_those_of_the_run(self) -> None:
        class Limited(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(WIDTH, WIDTH)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                limits = torch.finfo(x.dtype)
                x = self.linear(x).clamp(limits.eps, limits.max)
                return (x / (x.sum(-1, keepdim=True) + limits.tiny)).masked_fill(x < 0.0078125, limits.min)

        model = nn.Sequential(Limited())
        sample = {"input": torch.randn(3, 12, WIDTH, dtype=torch.bfloat16)}
        trace = deep(model.to(torch.bfloat16), ["Limited"], sample, dtype=torch.bfloat16)
        code = trace.subgraphs[0].emit(torch.bfloat16).source
        for name in ("run.eps", "run.highest", "run.tiny", "run.lowest", "0.0078125"):
            assert name in code
        assert torch.finfo(torch.bfloat16).eps == 0.0078125
