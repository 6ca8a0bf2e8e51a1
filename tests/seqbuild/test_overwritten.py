"""Buffers that a model's code fills anew whenever it runs: the chain has what is filled in, and changes nothing."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import runtime
import seqbuild.build
from runtime.errors import TraceError
from seqbuild.trace.model import TraceOptions, trace_model
from tests.seqbuild.toys import WIDTH, Toy
from tests.tiny_models import assert_same, randomize, run_chain, run_model


class Scaled(Toy):
    """Glue that scales by a buffer, which has numbers of its own before."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.full((WIDTH,), 7.0), persistent=False)

    def found(self, x: torch.Tensor) -> torch.Tensor:
        return x.abs().amax(dim=(0, 1))

    def glue(self, x: torch.Tensor) -> torch.Tensor:
        self.scale.copy_(self.found(x))
        return x * self.scale


class Broadcast(Scaled):
    def found(self, x: torch.Tensor) -> torch.Tensor:
        return x.abs().amax()


class InHalf(Scaled):
    """What is written takes the buffer's dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = self.scale.to(torch.float16)


class Twice(Scaled):
    def glue(self, x: torch.Tensor) -> torch.Tensor:
        return super().glue(super().glue(x) + 1)


class InLayers(nn.Module):
    """Layers that fill buffers of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("scale", torch.full((WIDTH,), 7.0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.scale.copy_(x.abs().amax(dim=(0, 1)))
        return torch.tanh(self.linear(x)) * self.scale


class ReadBefore(Scaled):
    """What the last run has left is used."""

    def glue(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale + super().glue(x)


class Running(Scaled):
    def found(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * 0.5 + x.abs().amax(dim=(0, 1))


class Part(Scaled):
    """Some of it stays."""

    def glue(self, x: torch.Tensor) -> torch.Tensor:
        self.scale[:2].copy_(self.found(x)[:2])
        return x * self.scale


class AsResult(Scaled):
    """An operator is told to put its result there."""

    def glue(self, x: torch.Tensor) -> torch.Tensor:
        torch.add(self.scale, 1, out=self.scale)
        return x * self.scale


class Shared(Scaled):
    """Another buffer has the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("other", self.scale.view(2, 2), persistent=False)

    def glue(self, x: torch.Tensor) -> torch.Tensor:
        return super().glue(x) + self.other.sum()


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("scale", torch.full((WIDTH,), 7.0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear(x) * self.scale
        return out


class OfAStep(Toy):
    """The buffer is that of a module which is called as one step."""

    def __init__(self) -> None:
        super().__init__()
        self.holder = Holder()

    def glue(self, x: torch.Tensor) -> torch.Tensor:
        self.holder.scale.copy_(x.abs().amax(dim=(0, 1)))
        out: torch.Tensor = self.holder(x)
        return out


class OfAnArgument(Toy):
    """A function that is one step gets the module."""

    def __init__(self) -> None:
        super().__init__()
        self.holder = Holder()

    def glue(self, x: torch.Tensor) -> torch.Tensor:
        self.holder.scale.copy_(x.abs().amax(dim=(0, 1)))
        return scaled_by(self.holder, x)


def scaled_by(holder: Holder, x: torch.Tensor) -> torch.Tensor:
    return x * holder.scale


def traced(model: nn.Module, leaves: str, ignore: tuple[str, ...] = ()) -> Any:
    sample = {"x": torch.zeros(2, 5, WIDTH)}
    return trace_model(
        model, sample, ["Layer"], TraceOptions(ignore=ignore, leaves=leaves, is_batch_only=False)
    ).subgraphs


@pytest.mark.parametrize("leaves", ["target", "linear"])
@pytest.mark.parametrize("kind", [Scaled, Broadcast, InHalf, Twice, InLayers])
def test_what_is_filled_in_is_used(kind: Any, leaves: str) -> None:
    model = randomize(kind()).eval()
    subgraphs = traced(model, leaves)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for seed in range(3):
        x = torch.randn(2 + seed, 4 + seed, WIDTH, generator=torch.Generator().manual_seed(seed)) * 10**seed
        got = run_chain(subgraphs, model, {"x": x})
        if kind is not InLayers or leaves == "linear":
            assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
        assert_same(got, run_model(model, {"x": x}))
        for name, buffer in model.named_buffers():
            buffer.copy_(before[name])


@pytest.mark.parametrize("kind", [ReadBefore, Running, Part, AsResult, Shared, OfAStep])
def test_what_outlives_a_run_is_refused(kind: Any) -> None:
    with pytest.raises(TraceError, match=r"changes its own .* in place while the model runs"):
        traced(randomize(kind()).eval(), "target")


def test_steps_would_see_what_was_there_before() -> None:
    with pytest.raises(TraceError, match=r"OfAnArgument\.glue .* changes its own holder\.scale in place"):
        traced(randomize(OfAnArgument()).eval(), "linear", ("scaled_by",))


SIZES = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
ORIGINAL = 16
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "long_factor": [1.5 + 0.1 * place for place in range(8)],
    "short_factor": [1.0 + 0.05 * place for place in range(8)],
    "original_max_position_embeddings": ORIGINAL,
    "factor": 4.0,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
# Older transformers decide by the length, and put one buffer in the other's place.
IS_BY_TURNS = ".copy_(" not in inspect.getsource(transformers.modeling_rope_utils.dynamic_rope_update)
LENGTHS = (8, ORIGINAL, ORIGINAL + 1, 40, 64, 9)  # in this order: what a long one has changed must not stay


def rotating(name: str, rope: dict[str, Any]) -> Any:
    more = {"original_max_position_embeddings": ORIGINAL} if name == "Phi3" else {}
    config = getattr(transformers, f"{name}Config")(**SIZES, **HEADS, **more, rope_parameters=dict(rope))
    return randomize(getattr(transformers, f"{name}ForCausalLM")(config).eval())


def assert_all_lengths(name: str, rope: dict[str, Any], leaves: str, tmp_path: Path) -> runtime.Artifact:
    rotating(name, rope).save_pretrained(tmp_path / "model")
    artifact = runtime.load(seqbuild.build.build(tmp_path / "model", out=tmp_path / "artifacts", leaves=leaves).path)
    model = rotating(name, rope)
    for length in LENGTHS:
        ids = torch.randint(1, 128, (2, length), generator=torch.Generator().manual_seed(length))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        expected = run_model(rotating(name, rope), inputs)  # a fresh one, that has seen no other length
        assert_same(run_chain(artifact.subgraphs, model, inputs), expected)
    return artifact


@pytest.mark.parametrize("leaves", ["auto", "target"])
@pytest.mark.parametrize("name", ["Llama", "Phi3"])
def test_frequencies_that_follow_the_length(name: str, leaves: str, tmp_path: Path) -> None:
    """Phi 3 and 4, MiniCPM: one set of frequencies for short texts, and one for long ones."""
    artifact = assert_all_lengths(name, LONGROPE, leaves, tmp_path)
    assert artifact.manifest.is_portable == (leaves == "auto" and not IS_BY_TURNS)


def test_frequencies_that_grow_are_their_modules_matter(tmp_path: Path) -> None:
    """They are kept for the next batch, so the module itself is called; the function is a decorator's."""
    artifact = assert_all_lengths("Llama", DYNAMIC, "linear", tmp_path)
    assert not artifact.manifest.is_portable


def test_why_layers_stay_whole_is_said(tmp_path: Path) -> None:
    rotating("Llama", DYNAMIC).save_pretrained(tmp_path / "model")
    done = seqbuild.build.build(tmp_path / "model", out=tmp_path / "artifacts")
    (remark,) = done.remarks
    assert remark.startswith("layers are not traced through: LlamaRotaryEmbedding.dynamic_frequency_update cannot")
