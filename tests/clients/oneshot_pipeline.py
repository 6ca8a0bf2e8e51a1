"""Quantize small models with llm-compressor twice, by its sequential pipeline and by ours, and compare every tensor.

    python tests/clients/oneshot_pipeline.py FOLDER

Runs in the environment of llmcompressor-0.14.txt, with this repository on the path. Each line of the output is JSON:
the model, the recipe, the names of differing tensors, whether the first layer returned the same in each pipeline as in
a plain call of the model, and the seconds that each pipeline took to get its subgraphs.

Where a model's code passes its config to a function, the sequential pipeline of 0.14 makes the config again without the
implementation of attention, and the layers get no causal mask (Qwen3-MoE). There it is run once more with a config
that states it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}

import torch
import transformers
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from llmcompressor.pipelines.sequential import pipeline as sequential
from loguru import logger

import seqbuild.llmcompressor  # noqa: F401 - registers the pipeline
from seqbuild.peer import pipeline

DEMO = Path(__file__).resolve().parents[2] / "demo" / "model"
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "head_dim": 32,
}
NO_HEADS = {name: size for name, size in SIZES.items() if name != "head_dim"}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "decoder_sparse_step": 1}
LATENT = {
    **{name: size for name, size in NO_HEADS.items() if name != "num_key_value_heads"},
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 128,
    "q_lora_rank": 128,
    "moe_intermediate_size": 128,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", SIZES),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**SIZES, "dtype": "bfloat16"}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**SIZES, "sliding_window": 16}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**SIZES, "sliding_window": 16}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {**NO_HEADS, "pad_token_id": 0}),
    "granite": ("GraniteForCausalLM", "GraniteConfig", NO_HEADS),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", LATENT),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**SIZES, "num_local_experts": 4}),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", {**NO_HEADS, "num_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**SIZES, **EXPERTS}),
}
LINEAR = {"targets": "Linear", "ignore": ["lm_head", "re:.*mlp.gate$"]}
RECIPES: dict[str, tuple[Callable[[], list[Any]], dict[str, Any]]] = {
    "GPTQ W4A16": (lambda: [GPTQModifier(scheme="W4A16", **LINEAR)], {}),
    "GPTQ W4A16, error not propagated": (lambda: [GPTQModifier(scheme="W4A16", **LINEAR)], {"propagate_error": False}),
    "AWQ W4A16": (lambda: [AWQModifier(), QuantizationModifier(scheme="W4A16_ASYM", **LINEAR)], {}),
    "SmoothQuant and GPTQ W8A8": (
        lambda: [SmoothQuantModifier(smoothing_strength=0.8), GPTQModifier(scheme="W8A8", **LINEAR)],
        {"sequential_targets_per_subgraph": 2},
    ),
}
# AWQ of 0.14 has no mapping that fits the first layer, which has no experts.
WITHOUT_MAPPING = (("deepseek_v3", "AWQ W4A16"),)


def main(folder: Path) -> None:
    """Compare all models and recipes."""
    logger.remove()
    if not torch.accelerator.is_available():  # AWQ of 0.14 pins memory, which needs one
        IntermediatesCache.pin_memory = lambda *_: None
    os.environ["SEQBUILD_CACHE"] = str(folder)
    for name, (model_class, config_class, sizes) in MODELS.items():
        directory = make(folder / name, model_class, config_class, sizes)
        for recipe, (modifiers, options) in RECIPES.items():
            if (name, recipe) in WITHOUT_MAPPING:
                continue
            print(json.dumps({"model": name, "recipe": recipe, **compared(directory, modifiers, options)}), flush=True)


def make(directory: Path, model_class: str, config_class: str, sizes: dict[str, Any]) -> Path:
    """Save a model with random weights from a fixed seed."""
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**sizes)
    model = getattr(transformers, model_class)(config).to(config.dtype)
    model.save_pretrained(directory)
    return directory


def compared(directory: Path, modifiers: Callable[[], list[Any]], options: dict[str, Any]) -> dict[str, Any]:
    """Quantize a model with both pipelines."""
    plain = plain_outputs(directory)
    theirs = quantized(directory, "sequential", modifiers(), options, sequential, "trace_subgraphs")
    # The first run compiles, unless an earlier recipe had the same cut.
    compiled = quantized(directory, "seqbuild", modifiers(), options, pipeline, "load_subgraphs")
    ours = quantized(directory, "seqbuild", modifiers(), options, pipeline, "load_subgraphs")
    is_plain = all(map(torch.equal, plain, theirs.outputs))
    if not is_plain:
        with stated_attention(directory):
            theirs = quantized(directory, "sequential", modifiers(), options, sequential, "trace_subgraphs")
    names = sorted(theirs.tensors.keys() | ours.tensors.keys())
    return {
        "tensors": len(names),
        "differing": [name for name in names if not same(theirs.tensors.get(name), ours.tensors.get(name))],
        "sequential_is_plain": is_plain,
        "compared_with_plain": all(map(torch.equal, plain, theirs.outputs)),
        "seqbuild_is_plain": all(map(torch.equal, plain, ours.outputs)),
        "traced_s": round(theirs.seconds, 3),
        "compiled_s": round(compiled.seconds, 3),
        "loaded_s": round(ours.seconds, 3),
    }


@dataclass(frozen=True, kw_only=True)
class Oneshot:
    """A run: the tensors of the quantized model, what its first layer returned, and the time to get the subgraphs."""

    tensors: dict[str, torch.Tensor]
    outputs: list[torch.Tensor]
    seconds: float


def plain_outputs(directory: Path) -> list[torch.Tensor]:
    """Return what the first layer returns for each batch in a plain call of the model."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    outputs = kept_outputs(model.model.layers[0])
    with torch.no_grad():
        for ids, mask in zip(*rows(), strict=True):
            model(input_ids=torch.tensor([ids]), attention_mask=torch.tensor([mask]))
    return outputs


def stated_attention(directory: Path) -> Any:
    """Make a model's config state eager attention when it is converted to a dictionary."""
    config_class = type(transformers.AutoConfig.from_pretrained(directory))
    to_dict = config_class.to_dict
    return patch.object(config_class, "to_dict", lambda config: {**to_dict(config), "attn_implementation": "eager"})


def kept_outputs(layer: torch.nn.Module) -> list[torch.Tensor]:
    """Keep what a layer returns from now on."""
    outputs: list[torch.Tensor] = []

    def keep(module: Any, inputs: Any, output: Any) -> None:
        outputs.append((output if isinstance(output, torch.Tensor) else output[0]).clone())

    layer.register_forward_hook(keep)
    return outputs


def same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    """Whether two tensors have the same dtype, shape and values."""
    return one is not None and other is not None and one.dtype == other.dtype and torch.equal(one, other)


def quantized(
    directory: Path, name: str, modifiers: list[Any], options: dict[str, Any], module: Any, function: str
) -> Oneshot:
    """Quantize a model, and measure the time of a function of a module meanwhile."""
    seconds, real = [], getattr(module, function)

    def timed(*arguments: Any, **named: Any) -> Any:
        start = time.perf_counter()
        found = real(*arguments, **named)
        seconds.append(time.perf_counter() - start)
        return found

    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    outputs = kept_outputs(model.model.layers[0])
    with patch.object(module, function, timed):
        oneshot(
            model=model,
            processor=transformers.AutoTokenizer.from_pretrained(DEMO),
            dataset=Dataset.from_dict(dict(zip(("input_ids", "attention_mask"), rows(), strict=True))),
            recipe=modifiers,
            pipeline=name,
            max_seq_length=48,
            num_calibration_samples=12,
            shuffle_calibration_samples=False,
            **options,
        )
    tensors = {key: value.detach().clone() for key, value in model.state_dict().items()}
    return Oneshot(tensors=tensors, outputs=outputs, seconds=sum(seconds))


def rows() -> Iterator[list[list[int]]]:
    """Yield random tokens, and masks that pad two rows."""
    tokens = torch.randint(3, 512, (12, 48), generator=torch.Generator().manual_seed(1))
    masks = torch.ones_like(tokens)
    masks[3, :8] = masks[7, 40:] = 0
    yield tokens.tolist()
    yield masks.tolist()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
