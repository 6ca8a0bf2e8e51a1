"""A layer's number that is handed to a cache which keeps nothing is not looked at; any other use is."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from seqbuild.build import build
from seqbuild.trace.record.number_reads import NumberReads, passed_to_cache
from seqbuild.trace.record.sections import Sections


class Layer:
    reads: NumberReads

    @property
    def layer_idx(self) -> int:
        self.reads.note("layer_idx", sys._getframe(1))
        return 3


def update(*args: Any, **kwargs: Any) -> None:
    passed_to_cache(sys._getframe(1))


def directly(layer: Layer) -> None:
    update(1, layer.layer_idx, more={})


def kept(layer: Layer) -> None:
    number = layer.layer_idx
    update(number)


def calculated(layer: Layer) -> None:
    update(str(layer.layer_idx))


def decided(layer: Layer) -> None:
    update(1 if layer.layer_idx else 0)


def elsewhere(layer: Layer) -> None:
    if layer.layer_idx:
        update(layer.layer_idx)


@pytest.mark.parametrize(
    ("use", "is_looked_at"), [(directly, False), (kept, True), (calculated, True), (decided, True), (elsewhere, True)]
)
def test_what_counts_as_a_look(use: Callable[[Layer], None], is_looked_at: bool) -> None:
    layer = Layer()
    with NumberReads() as layer.reads:
        use(layer)
    assert bool(layer.reads) is is_looked_at


def test_layers_that_keep_a_cache_are_recorded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repeated: list[str] = []
    original = Sections._repeat

    def repeat(self: Sections, section: Any, name: str, look: Any) -> Any:
        repeated.append(name)
        return original(self, section, name, look)

    monkeypatch.setattr(Sections, "_repeat", repeat)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=4, vocab_size=64
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path / "model")
    made = build(tmp_path / "model", out=tmp_path / "artifacts")
    assert "model.layers.3" in repeated
    assert len(made.manifest.cached) == 3 * 4
