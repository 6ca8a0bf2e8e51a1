"""A host that knows nothing of the architecture: the whole run from a portable artifact's own tables and code."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import runtime
from runtime.artifact.manifest import LeafKind
from runtime.artifact.tables import check_tables
from runtime.errors import ArtifactError, VersionError
from runtime.model.experts import Branch
from seqbuild.build import build
from tests.runtime.small import EXPERTS, NARROW, Small, make_small
from tests.sweep import sweep


@pytest.fixture(scope="module", params=sweep(["llama", "mixtral"], "mixtral"))
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Small:
    root = tmp_path_factory.mktemp("portable")
    if request.param == "llama":
        return make_small(root, "LlamaForCausalLM", "LlamaConfig", NARROW)
    return make_small(root, "MixtralForCausalLM", "MixtralConfig", {**EXPERTS, "num_local_experts": 4})


def test_the_tree_has_the_models_names_and_no_code(small: Small) -> None:
    tree = small.load().empty_model()
    ours = ("runtime.model.tree", "runtime.model.leaves", "runtime.model.experts")
    assert all(type(m).__module__.startswith("torch.nn") or type(m).__module__ in ours for m in tree.modules())
    assert isinstance(tree.get_submodule("model.layers.1"), Branch)
    assert type(tree.get_submodule("model.layers.1.self_attn.q_proj")) is nn.Linear
    assert all(parameter.is_meta for parameter in tree.parameters())
    manifest = small.load().manifest
    assert {name for name, _ in tree.named_parameters()} == set(manifest.parameters)
    inv_freq = tree.get_buffer("model.rotary_emb.inv_freq")
    assert (inv_freq.dtype, inv_freq.device.type) == (torch.float32, "cpu")


def test_another_version_of_transformers_is_no_matter(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_layers = build(small.weights, out=tmp_path, leaves="target").path
    monkeypatch.setattr("runtime.language.library_sources.source_digest", lambda module: "of another version")
    assert runtime.load(small.artifact).manifest.is_portable
    with pytest.raises(VersionError, match="source files it relies on differ"):
        runtime.load(at_layers)


@pytest.mark.parametrize("name", ["forward", "training", "model.layers.0.mlp", "_parameters", "run_dtype"])
def test_names_that_a_module_has_already_make_no_tree(small: Small, name: str) -> None:
    artifact = small.load()
    entry = next(iter(artifact.manifest.parameters.values()))
    artifact.manifest = replace(artifact.manifest, parameters={**artifact.manifest.parameters, name: entry})
    with pytest.raises(ArtifactError, match="cannot build a module tree"):
        artifact.empty_model()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"padding": ("bogus",)}, "has the invalid padding"),
        ({"stride": (-1,)}, "has the invalid stride"),
        ({"dilation": (2**40,)}, "has the invalid dilation"),
        ({"groups": ("1",)}, "has the invalid groups"),
        ({"extra": (1,)}, "has the invalid options"),
    ],
)
def test_options_that_no_convolution_has_are_refused(small: Small, options: dict[str, Any], why: str) -> None:
    usual = {"stride": (1,), "padding": (0,), "dilation": (1,), "groups": (1,), "padding_mode": ("zeros",)}
    kind = LeafKind(kind="Conv1d", options={**usual, **options})
    manifest = replace(small.load().manifest, leaf_kinds=(*small.load().manifest.leaf_kinds, kind))
    with pytest.raises(ArtifactError, match=why):
        check_tables(manifest)
