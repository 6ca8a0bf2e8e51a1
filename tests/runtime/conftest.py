"""Small models that many tests of the runtime share; each is built and compiled once a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import runtime.cli.app
from tests.runtime.place import Place, Run
from tests.runtime.small import EXPERTS, NARROW, WIDTHS, Small, make_small


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer_dir: Path) -> Callable[..., Small]:
    """Build a model: class name, config class, sizes and options of `save_pretrained`."""

    def make(class_name: str, config_class: str, sizes: dict[str, Any], **options: Any) -> Small:
        root = tmp_path_factory.mktemp(class_name)
        return make_small(root, class_name, config_class, sizes, byte_tokenizer_dir, **options)

    return make


@pytest.fixture(scope="session")
def llama(small: Callable[..., Small]) -> Small:
    """Three layers, wide enough for groups of 128."""
    return small("LlamaForCausalLM", "LlamaConfig", WIDTHS)


@pytest.fixture(scope="session")
def sharded_llama(small: Callable[..., Small]) -> Small:
    """In bfloat16 and several shards, embeddings tied."""
    sizes = {**WIDTHS, "tie_word_embeddings": True}
    return small("LlamaForCausalLM", "LlamaConfig", sizes, dtype=torch.bfloat16, max_shard_size="200KB")


@pytest.fixture(scope="session")
def narrow_llama(small: Callable[..., Small]) -> Small:
    """Three layers of width 32, for what would be slow on wider ones."""
    return small("LlamaForCausalLM", "LlamaConfig", NARROW)


@pytest.fixture(scope="session")
def gemma2(small: Callable[..., Small]) -> Small:
    """Tied embeddings, logits capped, every other layer with a sliding window."""
    sizes = {**NARROW, "head_dim": 8, "sliding_window": 8}
    return small("Gemma2ForCausalLM", "Gemma2Config", sizes)


@pytest.fixture(scope="session")
def qwen3_moe(small: Callable[..., Small]) -> Small:
    """Experts that are single matrices in the checkpoint and one stack in the model."""
    sizes = {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8}
    return small("Qwen3MoeForCausalLM", "Qwen3MoeConfig", sizes)


@pytest.fixture(scope="session")
def mixtral(small: Callable[..., Small]) -> Small:
    """Experts under another name in the checkpoint than in the model."""
    return small("MixtralForCausalLM", "MixtralConfig", {**EXPERTS, "num_local_experts": 4})


@pytest.fixture
def place(tmp_path: Path, llama: Small) -> Place:
    (tmp_path / "place").mkdir()
    return Place(tmp_path / "place", llama)


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process: exit code, what it printed, what it complained about."""

    def call(arguments: list[str], main: Callable[[list[str]], int] = runtime.cli.app.main) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main(arguments)
        return code, *capfd.readouterr()

    return call
