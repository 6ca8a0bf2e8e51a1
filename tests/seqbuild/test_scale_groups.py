"""Scale groups: what they are on known architectures, and that they keep their promise on all."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from runtime.artifact.manifest import MANIFEST_NAME, Manifest, ScaledParameter, ScaleGroup
from runtime.artifact.scale_groups import numbers_of, wrong_groups
from runtime.chain import check, read_manifest
from runtime.errors import ArtifactError
from seqbuild.manifest.assemble import _programs
from seqbuild.manifest.scale_groups import scale_groups
from seqbuild.trace.attempts import Traced
from seqbuild.trace.model import TraceOptions, trace_model
from tests.scaling import scaled
from tests.sweep import sweep
from tests.tiny_models import ZOO, make_inputs, run_model, tiny_model

ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
# What llm-compressor's tables say of these, within one layer: the producer and those that make up for it.
USUAL = [
    ("input_layernorm", ATTENTION),
    ("self_attn.v_proj", ["self_attn.o_proj"]),
    ("post_attention_layernorm", ["mlp.gate_proj", "mlp.up_proj"]),
    ("mlp.up_proj", ["mlp.down_proj"]),
]
PEERS: dict[str, list[tuple[str, list[str]]]] = {
    "llama": USUAL,
    "qwen3": USUAL,
    "mistral": USUAL,
    "gemma2": [(name.replace("post_attention", "pre_feedforward"), modules) for name, modules in USUAL],
    "phi3": [
        ("input_layernorm", ["self_attn.qkv_proj"]),
        ("self_attn.qkv_proj", ["self_attn.o_proj"]),
        ("post_attention_layernorm", ["mlp.gate_up_proj"]),
        ("mlp.gate_up_proj", ["mlp.down_proj"]),
    ],
    # Its experts are one stack and no Linear modules, and what the table says of those finds nothing.
    "mixtral": USUAL[:2],
}


Compiled = Callable[[str], Manifest]


@pytest.fixture(scope="module")
def manifest_of(compiled: Callable[..., Path]) -> Compiled:
    return lambda name: read_manifest(compiled(name))


@pytest.mark.parametrize("name", PEERS)
def test_equal_to_the_tables_of_llm_compressor(name: str, manifest_of: Compiled) -> None:
    manifest = manifest_of(name)
    for layer in range(3):
        prefix = f"model.layers.{layer}."
        groups = [group for group in manifest.scale_groups if group.modules[0].startswith(prefix)]
        found = [(group.producer, list(group.modules), group.others) for group in groups]
        expected = [
            (f"{prefix}{producer}.weight", [prefix + module for module in modules], ())
            for producer, modules in PEERS[name]
        ]
        assert found == expected


def test_the_layout_of_heads_is_found(manifest_of: Compiled) -> None:
    """Four heads of eight features share two heads of values."""
    group = next(g for g in manifest_of("llama").scale_groups if g.modules[0].endswith("o_proj"))
    heads = [list(range(8)), list(range(8)), list(range(8, 16)), list(range(8, 16))]
    assert numbers_of(group.channels) == [channel for head in heads for channel in head]


def test_norms_that_store_their_distance_from_one(manifest_of: Compiled) -> None:
    offsets = {g.producer: g.offset for g in manifest_of("gemma2").scale_groups if "norm" in g.producer}
    assert set(offsets.values()) == {1}


def test_a_norm_that_is_also_the_residual_is_no_producer(manifest_of: Compiled) -> None:
    groups = manifest_of("bert").scale_groups
    by_first = {group.modules[0].partition("layer.0.")[2]: group for group in groups if "layer.0." in group.modules[0]}
    assert by_first["attention.self.query"].producer == ""
    assert by_first["attention.output.dense"].producer == "encoder.layer.0.attention.self.value.weight"
    assert by_first["output.dense"].producer == ""  # GELU is not proportional


def test_artifacts_that_stop_at_the_targets_have_none(compiled: Callable[..., Path]) -> None:
    assert read_manifest(compiled("llama", leaves="target")).scale_groups == ()


# gpt2's layers are no Linear modules, mamba's fold into its scan; gemma2 has no SDPA.
@pytest.mark.parametrize(
    ("name", "attention"),
    sweep(
        [
            (name, attention)
            for name in ZOO
            for attention in ("eager", "sdpa")
            if name not in ("mamba", "gpt2") and (name, attention) != ("gemma2", "sdpa")
        ],
        *(("llama", "sdpa"), ("gemma2", "eager"), ("opt", "eager"), ("phi3", "eager"), ("qwen3_moe", "eager")),
        *(("bert", "sdpa"), ("t5", "eager")),
    ),
)
def test_scaling_by_powers_of_two_changes_nothing(name: str, attention: str, compiled: Callable[..., Path]) -> None:
    manifest = read_manifest(compiled(name, attn_implementation=attention))
    assert manifest.policy == "linear"
    groups = [group for group in manifest.scale_groups if group.producer]
    assert groups
    model = tiny_model(name, attention=attention)
    inputs = make_inputs(model, 2, 9, "left", 0)
    before = run_model(model, inputs)
    generator = torch.Generator().manual_seed(0)
    parameters = dict(model.named_parameters())
    for group in groups:
        with torch.no_grad():
            for changed, tensor in scaled(parameters, group, generator).items():
                assert not torch.equal(parameters[changed], tensor)
                parameters[changed].copy_(tensor)
    tolerance = {"rtol": 2e-3, "atol": 2e-4} if any(group.offset for group in groups) else {"rtol": 0, "atol": 0}
    after = run_model(model, inputs)
    for key, value in before.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(after[key], value, **tolerance)  # type: ignore[arg-type]


class Gated(nn.Module):
    """Two branches of one Linear multiply each other, so that it is met twice."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Linear(8, 16, bias=False)
        self.up = nn.Linear(8, 8)
        self.down = nn.Linear(8, 8)
        self.out = nn.Linear(8, 8)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        gate, other = self.both(states).chunk(2, dim=-1)
        product = gate * other
        up = self.up(product)
        return self.down(torch.relu(up)) + self.out(up * 2).sigmoid()


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Gated()

    def forward(self, states: torch.Tensor) -> Any:
        return {"states": self.layer(states)}


def test_what_is_met_in_two_tensors_has_no_siblings_and_squares_no_producer() -> None:
    model = Toy()
    trace = trace_model(model, {"states": torch.randn(2, 3, 8)}, ["Gated"], TraceOptions(leaves="linear"))
    traced = Traced(trace=trace, patterns=("Gated",), fixed_dtype=torch.float32, leaves="linear")
    groups = scale_groups(model, trace.subgraphs, _programs(model, traced)[1])
    assert [(g.modules, g.producer, g.others) for g in groups] == [
        (("layer.both",), "", ()),
        (("layer.up",), "", ()),
        (("layer.down",), "layer.up.weight", (ScaledParameter(name="layer.out.weight", axis=1),)),
        (("layer.out",), "", ()),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modules": ()}, "has the modules"),
        ({"subgraph": 99}, "in subgraph 99"),
        ({"modules": ("model.layers.1.self_attn.q_proj",)}, "its subgraph does not use"),
        ({"producer": "nothing"}, "names 'nothing'"),
        ({"producer": ""}, "channels and no producer"),
        ({"channels": (0, 64)}, "channels that .* does not have"),
        ({"channels": (-1, 32)}, "channels that .* does not have"),
        ({"channels": (0,)}, "channels that .* does not have"),
        ({"channels": (0, 16)}, "has 16 channels, and .* the shape"),
        ({"others": (ScaledParameter(name="model.layers.0.self_attn.q_proj.weight", axis=1),)}, "a parameter twice"),
        ({"others": (ScaledParameter(name="model.layers.0.mlp.up_proj.weight", axis=7),)}, "has 32 channels"),
        ({"bias": "model.layers.0.mlp.up_proj.weight"}, "does not fit its producer"),
    ],
)
def test_unsound_groups_are_refused(change: dict[str, Any], message: str, manifest_of: Compiled) -> None:
    manifest = manifest_of("llama")
    first = dataclasses.replace(manifest.scale_groups[0], **change)
    (wrong, *_) = wrong_groups(dataclasses.replace(manifest, scale_groups=(first,)))
    assert re.search(message, wrong)
    again = dataclasses.replace(manifest, scale_groups=(manifest.scale_groups[0],) * 2)
    assert "is in two scale groups" in next(wrong_groups(again))


def test_a_reader_refuses_unsound_groups(compiled: Callable[..., Path], tmp_path: Path) -> None:
    path = shutil.copytree(compiled("llama"), tmp_path / "artifact")
    manifest, *_ = check(path)
    odd = ScaleGroup(subgraph=0, modules=("lm_head",))
    (path / MANIFEST_NAME).write_bytes(dataclasses.replace(manifest, scale_groups=(odd,)).to_bytes())
    with pytest.raises(ArtifactError, match="its subgraph does not use"):
        check(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modules": ("model.layers.0.self_attn.q_proj",)}, "has modules, or no producer or experts"),
        ({"producer": ""}, "has modules, or no producer or experts"),
        ({"others": (ScaledParameter(name="model.layers.0.mlp.gate.weight", axis=1),)}, "or no producer or experts"),
        ({"subgraph": 7}, "in subgraph 7"),
        ({"channels": (0, 16)}, "has 16 channels, and .* the shape"),
        ({"others": (ScaledParameter(name="model.layers.0.mlp.experts.gate_up_proj", axis=1),)}, "has 32 channels"),
    ],
)
def test_unsound_groups_of_mixtures_are_refused(change: dict[str, Any], message: str, manifest_of: Compiled) -> None:
    manifest = manifest_of("mixtral")
    first = manifest.mixture_groups[0]
    assert [(other.name.removeprefix("model.layers.0.mlp."), other.axis) for other in first.others] == [
        ("gate.weight", 1),
        ("experts.gate_up_proj", 2),
    ]
    wrong = wrong_groups(dataclasses.replace(manifest, mixture_groups=(dataclasses.replace(first, **change),)))
    assert re.search(message, next(wrong))
    twice = wrong_groups(dataclasses.replace(manifest, mixture_groups=(first, first)))
    assert "is in two mixture groups" in next(twice)
