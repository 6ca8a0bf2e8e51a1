"""Which library source files an artifact says it relies on."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers

import seqbuild.cache.recall
from runtime.chain import read_manifest
from seqbuild.build import build
from tests.own_code_model import FILES, MODELING, write_own_code_model
from tests.tiny_models import save_config

FOLDER = Path(transformers.__file__).parent


Sources = Callable[..., dict[str, str]]


@pytest.fixture(scope="module")
def sources(compiled: Callable[..., Path]) -> Sources:
    return lambda name, **options: dict(read_manifest(compiled(name, leaves="target", **options)).sources)


def test_what_llama_relies_on(sources: Sources) -> None:
    found = sources("llama")
    assert list(found) == sorted(found)
    expected = {"activations", "masking_utils", "modeling_layers", "modeling_rope_utils", "integrations.sdpa_attention"}
    expected |= {"models.llama.modeling_llama", "models.llama.configuration_llama"}
    assert {f"transformers.{name}" for name in expected} <= set(found)
    others = set(found) - {f"transformers.{name}" for name in expected}
    assert others <= {"transformers.pytorch_utils", "transformers.integrations.moe"}
    for name, digest in found.items():
        path = FOLDER.joinpath(*name.split(".")[1:]).with_suffix(".py")
        assert digest == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_attention_that_is_not_used_is_no_matter(sources: Sources) -> None:
    assert "transformers.integrations.sdpa_attention" not in sources("llama", attn_implementation="eager")


@pytest.mark.parametrize(
    ("name", "expected"), [("mixtral", "integrations.moe"), ("gpt2", "pytorch_utils"), ("t5", "models.t5.modeling_t5")]
)
def test_what_others_rely_on(name: str, expected: str, sources: Sources) -> None:
    found = sources(name)
    assert f"transformers.{expected}" in found
    odd = re.compile(r"\.(auto|generation|modeling_utils|cache_utils|utils|configuration_utils)(\.|$)")
    assert [module for module in found if odd.search(module)] == []


def test_what_a_models_own_code_takes_from_transformers(tmp_path: Path) -> None:
    taken = (
        "from transformers.activations import ACT2FN\nfrom transformers.models.llama.modeling_llama import LlamaMLP\n"
    )
    directory = write_own_code_model(tmp_path / "toy", {**FILES, "modeling_toy.py": taken + MODELING})
    found = build(directory, out=tmp_path / "out", trust_remote_code=True, leaves="target").manifest.sources
    assert {"transformers.activations", "transformers.models.llama.modeling_llama"} <= set(found)
    assert not [name for name in found if "toy" in name]


def test_an_artifact_that_relies_on_other_sources_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = save_config("llama", tmp_path / "llama")
    assert not build(directory, out=tmp_path / "out", leaves="target").is_cached
    assert build(directory, out=tmp_path / "out", leaves="target").is_cached
    monkeypatch.setattr(seqbuild.cache.recall, "changed_sources", lambda recorded: list(recorded)[:1])
    assert not build(directory, out=tmp_path / "out", leaves="target").is_cached
