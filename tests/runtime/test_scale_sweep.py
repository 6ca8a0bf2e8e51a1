"""Every preset, on models of every dtype with extreme numbers: stored scales are sound, or the run names a module."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import runtime
from runtime.formats.presets import PRESETS
from tests.runtime.small import Small, load_transformers, make_small, token_batches

pytestmark = pytest.mark.wide

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 258,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
ASYM = {
    f"W{bits}_ASYM": f"config_groups: {{a: {{targets: [Linear], weights: {{num_bits: {bits}, type: int, "
    "symmetric: false, strategy: group, group_size: 32}}}"
    for bits in range(2, 9)
}
STATIC_INT8 = (
    "config_groups: {a: {targets: [Linear], weights: {num_bits: 8, type: int, symmetric: true, strategy: channel}, "
    "input_activations: {num_bits: 8, type: int, symmetric: false, strategy: tensor, dynamic: false}}}"
)
CACHE = "kv_cache_scheme: {num_bits: 8, type: float, strategy: tensor, symmetric: true, dynamic: false}"
SCHEMES = {
    **{name: f"targets: Linear, scheme: {name}" for name in PRESETS},
    **ASYM,
    "static INT8": STATIC_INT8,
    "FP8 with cache": f"targets: Linear, scheme: FP8, {CACHE}",
    "W4A16 with cache": f"targets: Linear, scheme: W4A16, {CACHE}",
}
LAYER = "model.layers.1"


def overflow(tensors: dict[str, torch.Tensor]) -> None:
    """The product of gate and up leaves the dtype."""
    for name in ("up_proj", "gate_proj"):
        weight = tensors[f"{LAYER}.mlp.{name}.weight"]
        weight *= 400 if weight.dtype == torch.float16 else 1e20


def dead_value(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{LAYER}.self_attn.v_proj.weight"].zero_()


def dead_group(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{LAYER}.mlp.down_proj.weight"][:5, 32:64] = 0
    tensors[f"{LAYER}.mlp.up_proj.weight"][7] = 0
    tensors[f"{LAYER}.mlp.gate_proj.weight"][:, 3] = 0


def tiny(tensors: dict[str, torch.Tensor]) -> None:
    for name in ("self_attn.v_proj", "mlp.up_proj", "mlp.down_proj"):
        weight = tensors[f"{LAYER}.{name}.weight"]
        weight.copy_(weight.float() / weight.float().abs().max() * 1e-7)


def huge(tensors: dict[str, torch.Tensor]) -> None:
    weight = tensors[f"{LAYER}.self_attn.k_proj.weight"]
    weight.copy_(weight.float() / weight.float().abs().max() * 6e4)


FAULTS: dict[str, Callable[[dict[str, torch.Tensor]], None]] = {
    "overflow": overflow,
    "dead value": dead_value,
    "dead group": dead_group,
    "tiny": tiny,
    "huge": huge,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Small, torch.Tensor]]:
    """A model with a fault, and the logits that transformers computes."""
    made: dict[tuple[str, str], tuple[Small, torch.Tensor]] = {}

    def find(dtype: str, fault: str) -> tuple[Small, torch.Tensor]:
        if (dtype, fault) not in made:
            root = tmp_path_factory.mktemp("model")
            small = make_small(root, "LlamaForCausalLM", "LlamaConfig", SIZES, dtype=DTYPES[dtype])
            tensors = load_file(small.weights / "model.safetensors")
            FAULTS[fault](tensors)
            save_file(tensors, small.weights / "model.safetensors", metadata={"format": "pt"})
            made[dtype, fault] = small, logits(load_transformers(small.weights))
        return made[dtype, fault]

    return find


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**token_batches([(2, 17)], seed=5)[0], use_cache=False).logits
    return found.float()


def require_sound(tensors: dict[str, torch.Tensor]) -> None:
    """By hand: no NaN, infinity, zero or negative scale in its stored dtype."""
    for name, tensor in tensors.items():
        if name.endswith("_scale"):
            if tensor.dtype == torch.uint8:
                assert int(tensor.min()) > 0, name
                assert int(tensor.max()) < 255, name
            else:
                assert torch.isfinite(tensor.float()).all(), name
                assert (tensor.float() > 0).all(), name


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("modifier", ["QuantizationModifier", "GPTQModifier"])
def test_what_is_stored_is_sound(
    models: Callable[[str, str], tuple[Small, torch.Tensor]],
    tmp_path: Path,
    modifier: str,
    scheme: str,
    dtype: str,
    fault: str,
) -> None:
    run(models(dtype, fault), tmp_path, f"{modifier}: {{{SCHEMES[scheme]}, ignore: [lm_head]}}", scheme, dtype, fault)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", ["W4A16", "W4_ASYM", "FP8", "NVFP4", "W8A8"])
@pytest.mark.parametrize("modifier", ["SmoothQuantModifier", "AWQModifier"])
def test_what_is_stored_is_sound_after_rescaling(
    models: Callable[[str, str], tuple[Small, torch.Tensor]],
    tmp_path: Path,
    modifier: str,
    scheme: str,
    dtype: str,
    fault: str,
) -> None:
    text = f"{modifier}: {{}}\nQuantizationModifier: {{{SCHEMES[scheme]}, ignore: [lm_head]}}"
    run(models(dtype, fault), tmp_path, text, scheme, dtype, fault)


def run(made: tuple[Small, torch.Tensor], tmp_path: Path, text: str, scheme: str, dtype: str, fault: str) -> None:
    small, expected = made
    plan = runtime.Recipe.from_text(text, "recipe.yaml")
    try:
        runtime.calibrate(
            small.load(), weights=small.weights, recipe=plan, batches=token_batches(), out=tmp_path / "out"
        )
    except runtime.SeqbuildError as error:
        assert fault == "overflow" or (dtype == "float16" and fault == "huge"), error
        assert LAYER in str(error)
        assert not (tmp_path / "out").exists()
        return
    require_sound(load_file(tmp_path / "out" / "model.safetensors"))
    if not torch.isfinite(expected).all():
        return  # a recipe that measures nothing cannot know
    # transformers makes small floats bfloat16, whatever the rest of the model is.
    model = readable(tmp_path / "out", torch.bfloat16 if scheme.startswith(("NV", "MX")) else "auto")
    if model is not None:
        found = logits(model)
        assert torch.isfinite(found).all()
        assert float((found - expected).norm() / expected.norm()) < bound(scheme)


def bound(scheme: str) -> float:
    if scheme.startswith(("W2", "W3")):
        return 3.0
    return 0.9 if "4" in scheme else 0.6


def readable(weights: Path, dtype: torch.dtype | str) -> Any:
    """The model that transformers loads, or None for what no reader takes (key-value scales in 5.24)."""
    try:
        return load_transformers(weights, dtype)
    except (RuntimeError, ValueError, NotImplementedError, KeyError, AttributeError) as error:
        assert "scale" in str(error) or "zero_point" in str(error), error
        return None
