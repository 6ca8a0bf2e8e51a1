"""Parameters that transformers does not save, or did not save once, have the values that it gives them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import runtime
import seqbuild.build
from runtime.checkpoint.reader import Checkpoint
from runtime.weights.parameters import Weights
from seqbuild.model.defaults import default_values
from tests.tiny_models import randomize, tiny_model

SIZES = {"vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 40}
HEADS = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
POSITIONS = ["model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight"]


def marian() -> Any:
    config = transformers.MarianConfig(**SIZES, **HEADS, pad_token_id=0, decoder_start_token_id=0)
    return randomize(transformers.MarianMTModel(config)).eval()


def compiled(model: Any, tmp_path: Path) -> runtime.Artifact:
    model.save_pretrained(tmp_path / "model")
    return runtime.load(seqbuild.build.build(tmp_path / "model", out=tmp_path / "artifacts").path)


def opened(artifact: runtime.Artifact, weights: Path) -> Weights:
    return Weights(artifact, Checkpoint(weights), torch.float32, artifact.empty_model(torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_positions_that_are_calculated(dtype: torch.dtype, tmp_path: Path) -> None:
    artifact = compiled(marian(), tmp_path)
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert not set(POSITIONS) & set(saved)
    loaded = transformers.MarianMTModel.from_pretrained(tmp_path / "model", dtype=dtype).state_dict()
    source = Weights(artifact, Checkpoint(tmp_path / "model"), dtype, artifact.empty_model(dtype))
    for name in artifact.manifest.parameters:
        assert torch.equal(source.read(name, torch.device("cpu")), loaded[name]), name


def test_those_that_were_saved_are_read(tmp_path: Path) -> None:
    artifact = compiled(marian(), tmp_path)
    file = tmp_path / "model" / "model.safetensors"
    own = {name: torch.randn(40, 32) for name in POSITIONS}
    save_file(load_file(file) | own, file, metadata={"format": "pt"})
    source = opened(artifact, tmp_path / "model")
    assert all(torch.equal(source.read(name, torch.device("cpu")), own[name]) for name in POSITIONS)


def test_a_bias_that_older_checkpoints_lack(tmp_path: Path) -> None:
    artifact = compiled(tiny_model("bart"), tmp_path)
    file, name = tmp_path / "model" / "model.safetensors", "final_logits_bias"
    tensors = load_file(file)
    bias = tensors.pop(name)
    save_file(tensors, file, metadata={"format": "pt"})
    found = opened(artifact, tmp_path / "model").read(name, torch.device("cpu"))
    assert torch.equal(found, torch.zeros_like(bias))


def test_others_must_be_there(tmp_path: Path) -> None:
    artifact = compiled(marian(), tmp_path)
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.encoder.layers.0.fc1.bias"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(runtime.WeightsError, match=r"missing tensor 'model\.encoder\.layers\.0\.fc1\.bias'"):
        opened(artifact, tmp_path / "model")


def test_a_calibrated_checkpoint_loads(tmp_path: Path) -> None:
    artifact = compiled(marian(), tmp_path)
    weights = "weights: {num_bits: 8, type: int, strategy: channel}"
    text = f"QuantizationModifier: {{config_groups: {{all: {{targets: [Linear], {weights}}}}}, ignore: [lm_head]}}"
    plan = runtime.Recipe.from_text(text, "recipe.yaml")
    runtime.calibrate(artifact, weights=tmp_path / "model", recipe=plan, batches=[], out=tmp_path / "out")
    loaded, info = transformers.MarianMTModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    before = transformers.MarianMTModel.from_pretrained(tmp_path / "model").get_parameter(POSITIONS[0])
    assert torch.equal(loaded.get_parameter(POSITIONS[0]), before)


class Drawn(transformers.PreTrainedModel):
    """Some of what may be missing is drawn at random, and is no default."""

    config_class = transformers.BertConfig
    _keys_to_ignore_on_load_missing = ("drawn", r"inner\.fixed", "buffer")

    def __init__(self) -> None:
        super().__init__(transformers.BertConfig())
        with torch.device("meta"):
            self.drawn = nn.Linear(2, 3)
            self.inner = nn.Module()
            self.inner.fixed, self.inner.other = nn.Parameter(torch.empty(2)), nn.Parameter(torch.empty(2))
        self.register_buffer("buffer", torch.arange(3))

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight)
        elif hasattr(module, "fixed"):
            nn.init.ones_(module.fixed)


def test_what_is_drawn_is_no_default() -> None:
    found = default_values(Drawn())
    assert sorted(found) == ["buffer", "inner.fixed"]
    assert torch.equal(found["buffer"], torch.arange(3)) and torch.equal(found["inner.fixed"], torch.ones(2))
