"""docs/migrate.md: every command and every call of it, with a small model of the same architecture."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers

from seqbuild.cli.app import main
from tests.runtime.media_models import rows_of, save
from tests.runtime.small import read_tensors, save_model

DOCUMENT = Path(__file__).parents[2] / "docs" / "migrate.md"
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 384,
    "max_position_embeddings": 128,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "norm_topk_prob": True}
MODELS = {
    "meta-llama/Llama-3.1-8B-Instruct": ("LlamaConfig", _SIZES, "LlamaForCausalLM"),
    "Qwen/Qwen3-0.6B": ("Qwen3Config", {**_SIZES, "tie_word_embeddings": True}, "Qwen3ForCausalLM"),
    "Qwen/Qwen3-Reranker-0.6B": ("Qwen3Config", _SIZES, "Qwen3ForCausalLM"),
    "Qwen/Qwen3-30B-A3B": ("Qwen3MoeConfig", {**_SIZES, **_EXPERTS}, "Qwen3MoeForCausalLM"),
}
# The model, the file of its rows, and the package that its processor needs.
MEDIA = {
    "Qwen/Qwen2.5-VL-3B-Instruct": ("qwen2_5_vl", "images.jsonl", "torchvision"),
    "openai/whisper-large-v3": ("whisper", "sounds.jsonl", "soxr"),
}
# The defaults of the call, which are llm-compressor's.
AS_CALLED = ("--no-pack", "--shuffle", "--batch-size", "1")
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Section:
    """A kind of example: the recipe file, the commands and the call that stand under its heading."""

    title: str
    recipe: str
    commands: tuple[str, ...]
    call: str


def sections() -> list[Section]:
    """Read the sections that have a command."""
    found = []
    for part in DOCUMENT.read_text(encoding="utf-8").split("\n## ")[1:]:
        blocks = [(kind, text) for kind, text in _BLOCK.findall(part) if not text.startswith("# llm-compressor")]
        texts = dict(blocks)
        assert len(texts) == len(blocks), f"two blocks of one kind in {part[:40]!r}"
        if "sh" in texts:
            commands = tuple(texts["sh"].strip().splitlines())
            found.append(Section(part.partition("\n")[0], texts.get("yaml", ""), commands, texts["python"]))
    return found


def test_every_kind_of_example_is_there() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    kinds = (
        *("quantization_w4a16", "quantization_w8a8_int8", "quantization_w8a8_fp8", "awq", "quantizing_moe"),
        *("multimodal_vision", "multimodal_audio", "quantization_kv_cache", "model_free_ptq", "disk_offloading"),
        *("big_models_with_sequential_onloading", "quantization_multiple_modifiers", "quantization_non_uniform"),
        *("transform", "autoround", "sparsity", "reap_expert_pruning", "quantization_embedding"),
        *("quantization_attention", "imatrix", "quantization_w4a4_fp4", "compressed_inference", "_ddp"),
    )
    assert [kind for kind in kinds if kind not in text] == []


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer_dir: Path) -> Mapping[str, Path]:
    """Directories of small models by the ids of the document."""
    root = tmp_path_factory.mktemp("models")
    made = {}
    for number, (name, (config_class, sizes, class_name)) in enumerate(MODELS.items()):
        torch.manual_seed(number)
        model = getattr(transformers, class_name)(getattr(transformers, config_class)(**sizes))
        directory = save_model(model.to(torch.bfloat16), root / name.replace("/", "--"), byte_tokenizer_dir)
        (directory / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
        made[name] = directory
    for name, (family, _, package) in MEDIA.items():
        if find_spec(package):
            made[name] = save(family, byte_tokenizer_dir, root / name.replace("/", "--"))
    return made


def write_chats(path: Path) -> None:
    """Write conversations in the form of a calibration set."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(12):
            question, answer = f"What is {number} times {number}? " * 2, f"It is {number * number}, a square. " * 3
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")


@pytest.mark.parametrize("section", sections(), ids=lambda section: section.title)
def test_command_and_call_give_the_same_checkpoint(
    section: Section, models: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SEQBUILD_CACHE", str(next(iter(models.values())).parent / "artifacts"))  # compiled once
    write_chats(tmp_path / "chats.jsonl")
    for family, name, package in MEDIA.values():
        if name in section.call:
            pytest.importorskip(package)
            rows_of(family, tmp_path).rename(tmp_path / name)
    (tmp_path / "recipe.yaml").write_text(section.recipe, encoding="utf-8")
    outputs = []
    for command in section.commands:
        words = [str(models.get(word, word)) for word in shlex.split(command)]
        assert words[:2] == ["seqbuild", "quantize"]
        assert main([*words[1:], "--no-evaluate", *AS_CALLED]) == 0, command
        outputs.append(tmp_path / words[words.index("-o") + 1])
    code = section.call
    for name, directory in models.items():
        code = code.replace(f'"{name}"', repr(str(directory)))
    exec(compile(code, section.title, "exec"), {})
    first, called = read_tensors(outputs[0]), read_tensors(tmp_path / f"{outputs[0].name}-call")
    assert first.keys() == called.keys()
    assert [name for name, tensor in first.items() if not torch.equal(tensor, called[name])] == []
    for output in outputs:
        assert "quantization_config" in json.loads((output / "config.json").read_text(encoding="utf-8"))
