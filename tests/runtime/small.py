"""Small models on disk with their artifacts, and what tests do with them again and again."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import runtime
from runtime.calibration import Calibration
from runtime.chain import LoadedSubgraph
from runtime.checkpoint.reader import Checkpoint
from runtime.data.token_file import DataOrigin, save_tokens
from runtime.experts.split import split_experts
from runtime.formats.rounded_inputs import input_quantization
from runtime.provenance.card import card_text
from runtime.provenance.record import encode_record, read_record
from runtime.weights.parameters import Weights
from seqbuild.build import build
from seqbuild.verify.running import EAGER_EXPERTS, configured
from tests.tiny_models import randomize

VOCABULARY = 258  # that of the byte tokenizer
WIDTHS = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
NARROW = {**WIDTHS, "hidden_size": 32, "intermediate_size": 48}
EXPERTS = {**NARROW, "num_experts_per_tok": 2}
# DeepSeek's way to route, and its heads.
GROUPED_EXPERTS = {
    "n_routed_experts": 4,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
LATENT_HEADS = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
DEEPSEEK = {
    **{key: value for key, value in EXPERTS.items() if key != "num_key_value_heads"},
    **GROUPED_EXPERTS,
    **LATENT_HEADS,
}

# Insides of recipes.
_GROUPS_OF_16 = "{num_bits: 4, type: int, symmetric: true, strategy: group, group_size: 16}"
NARROW_W4 = f"config_groups: {{a: {{targets: [Linear], weights: {_GROUPS_OF_16}}}}}, ignore: [lm_head]"
_W3 = "{num_bits: 3, type: int, symmetric: true, strategy: group, group_size: 64}"
RECIPES = {
    "W4A16": "targets: Linear, scheme: W4A16, ignore: [lm_head]",
    "W4A16_ASYM": "targets: Linear, scheme: W4A16_ASYM, ignore: [lm_head]",
    "W8A8": "targets: Linear, scheme: W8A8, ignore: [lm_head]",
    "FP8_DYNAMIC": "targets: Linear, scheme: FP8_DYNAMIC, ignore: [lm_head]",
    "W3": f"config_groups: {{a: {{targets: [Linear], weights: {_W3}}}}}, ignore: [lm_head]",
    "with head": "targets: Linear, scheme: W4A16",
}


@dataclass(frozen=True)
class Small:
    """A model directory, weights and tokenizer included, and its artifact."""

    weights: Path
    artifact: Path

    def load(self) -> runtime.Artifact:
        return runtime.load(self.artifact)


def save_model(model: Any, directory: Path, tokenizer: Path | None = None, **options: Any) -> Path:
    """Save a model with random weights, and a tokenizer beside it."""
    randomize(model).save_pretrained(directory, **options)
    if tokenizer is not None:
        shutil.copytree(tokenizer, directory, dirs_exist_ok=True)
    return directory


def make_small(
    root: Path, class_name: str, config_class: str, sizes: Mapping[str, Any], tokenizer: Path | None = None, **save: Any
) -> Small:
    """Build, save and compile a model under `root`."""
    if not hasattr(transformers, config_class):
        pytest.skip(f"transformers {transformers.__version__} has no {config_class}")
    dtype, text_only = save.pop("dtype", torch.float32), save.pop("text_only", False)
    config = getattr(transformers, config_class)(**sizes)
    config.dtype = dtype
    model = getattr(transformers, class_name)(config).to(dtype)
    directory = save_model(model, root / "model", tokenizer, **save)
    return Small(weights=directory, artifact=build(directory, out=root / "artifacts", text_only=text_only).path)


def recipe(text: str, *, modifier: str = "QuantizationModifier") -> runtime.Recipe:
    """A recipe of one modifier, from the inside of its braces."""
    return runtime.Recipe.from_text(f"{modifier}: {{{text}}}", "recipe.yaml")


class Stop(BaseException):
    """Nobody catches it: what a power cut is to a process."""


_FORWARD = LoadedSubgraph.forward


def stop_at(patch: pytest.MonkeyPatch, number: int, kind: type[BaseException] = Stop) -> list[int]:
    """Stop at the n-th time that a subgraph runs; 0 never does. The list counts how often one ran."""
    calls = [0]

    def forward(self: LoadedSubgraph, model: nn.Module, **inputs: Any) -> dict[str, Any]:
        calls[0] += 1
        if calls[0] == number:
            raise kind
        return _FORWARD(self, model, **inputs)

    patch.setattr(LoadedSubgraph, "forward", forward)
    return calls


def token_batches(
    sizes: Iterable[tuple[int, int]] = ((4, 40), (4, 40), (2, 23)), seed: int = 1
) -> list[dict[str, Any]]:
    """Random token ids of the given [batch, sequence] sizes, as the runtime makes them."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for size in sizes:
        ids_BS = torch.randint(2, VOCABULARY, size, generator=generator)
        batches.append({"input_ids": ids_BS, "attention_mask": torch.ones_like(ids_BS)})
    return batches


def write_token_file(path: Path, num_samples: int = 6, length: int = 40, largest: int = VOCABULARY - 1) -> Path:
    """A file of random token ids; the last one is `largest`."""
    generator = torch.Generator().manual_seed(1)
    samples = [torch.randint(2, VOCABULARY, (length,), generator=generator) for _ in range(num_samples)]
    samples[-1][-1] = largest
    origin = DataOrigin(tokenizer="bytes", tokenizer_digest="", vocab_size=largest + 1, sources=())
    save_tokens(path, samples, seq_len=length, origin=origin)
    return path


def calibrate(small: Small, plan: runtime.Recipe, out: Path, **options: Any) -> Calibration:
    """Calibrate on the usual tokens."""
    defaults = {"weights": small.weights, "batches": token_batches()}
    return runtime.calibrate(small.load(), recipe=plan, out=out, **{**defaults, **options})


def run_weights(small: Small, weights: Path, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What the runtime computes with the weights of a checkpoint, all loaded at once."""
    artifact, checkpoint = small.load(), Checkpoint(weights)
    if checkpoint.is_quantized:
        artifact = split_experts(artifact, checkpoint)
    model = artifact.empty_model()
    dtype = getattr(torch, artifact.manifest.model.dtype)
    source = Weights(artifact, checkpoint, dtype, model)
    source.load(model, artifact.manifest.parameters, torch.device("cpu"))
    values, outputs = dict(inputs), {}
    with torch.no_grad(), input_quantization(model, source.schemes):
        for subgraph in artifact.subgraphs:
            outputs = subgraph.forward(model, **{name: values[name] for name in subgraph.input_names})
            values.update(outputs)
    return outputs


def run_transformers(weights: Path, inputs: Mapping[str, Any]) -> torch.Tensor:
    """The logits of the model that transformers loads; experts run one after the other, as ours do."""
    model = load_transformers(weights)
    with torch.no_grad(), configured(model, EAGER_EXPERTS):
        logits: torch.Tensor = model(**inputs, use_cache=False).logits
    return logits


class StopError(Exception):
    """Raised by `Stopping`."""


class Stopping:
    """A watcher that ends a run with its second subgraph."""

    def tell(self, kind: str, **facts: Any) -> None:
        if kind == "subgraph" and facts["index"] == 1:
            raise StopError


def load_transformers(weights: Path, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """The model as anybody would load it, with the checkpoint's dtype.

    transformers 5.23 lays out packed zero points wrongly before it reads them; it loads them when it is told to
    dequantize at once.
    """
    named = json.loads((weights / "config.json").read_text()).get("architectures")
    is_causal = not named or named[0] in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    auto: Any = transformers.AutoModelForCausalLM if is_causal else transformers.AutoModelForImageTextToText
    model: PreTrainedModel
    try:
        model = auto.from_pretrained(weights, dtype=dtype)
    except RuntimeError:
        with safe_open(weights / "model.safetensors", framework="pt") as file:
            assert any(key.endswith(".weight_zero_point") for key in file.keys())  # noqa: SIM118 - it is no dict
        config = transformers.CompressedTensorsConfig(dequantize=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = auto.from_pretrained(weights, dtype=dtype, quantization_config=config)
    return model.eval()


def read_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, by plain safetensors."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return found


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """A tensor's memory."""
    return bytes(tensor.contiguous().view(torch.uint8).numpy().tobytes())


def directory_bytes(directory: Path) -> dict[str, bytes]:
    """Every file of a directory."""
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def nameless_bytes(directory: Path, **changes: Any) -> dict[str, bytes]:
    """Every file of an output as if its inputs had no names, which depend on how they were given. Without a perplexity,
    too, and without the card, which follows from the record; `changes` are those of the record.
    """
    record = read_record(directory)
    card = (directory / "README.md").read_text()
    assert card == card_text(record)
    model = msgspec.structs.replace(record.model, name="", hub_id="", revision="")
    data = None if record.data is None else msgspec.structs.replace(record.data, sources=(), settings={})
    changes = {"model": model, "data": data, "command": "", "evaluation": None, **changes}
    nameless = msgspec.structs.replace(record, **changes)
    return directory_bytes(directory) | {"seqbuild.json": encode_record(nameless), "README.md": b""}


def unpacked(tensors: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    """A 4 bit weight, taken apart by hand: eight numbers in an int32, the first lowest, each with 8 added."""
    packed, scale = tensors[f"{module}.weight_packed"], tensors[f"{module}.weight_scale"]
    rows, columns = tensors[f"{module}.weight_shape"].tolist()
    integers = torch.stack([(packed >> (4 * place)) & 15 for place in range(8)], dim=-1).reshape(rows, -1) - 8
    return integers[:, :columns] * scale.repeat_interleave(columns // scale.shape[1], dim=1)
