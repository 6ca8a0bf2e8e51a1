"""The output is a complete model directory, and nothing that would change what readers make of it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from runtime.checkpoint.companions import companion_files
from runtime.checkpoint.source_checks import ADAPTER_FILES
from seqbuild.ship.pack import pack
from tests.runtime.small import NARROW_W4, Small, calibrate, recipe

RTN = recipe(NARROW_W4)
COPIED = {
    "LICENSE": "the licence",
    "LICENSE.txt": "the licence",
    "LICENSE-CODE": "the licence",
    "LICENSE_AGREEMENT.md": "the licence",
    "Third_Party_Notices.txt": "others",
    "NOTICE.txt": "a notice",
    "USE_POLICY.md": "how to use it",
    "chat_template.jinja": "{{ messages }}",
    "chat_template.json": '{"chat_template": "{{ messages }}"}',
    "additional_chat_templates/tool_use.jinja": "{{ tools }}",
    "additional_chat_templates/rag.jinja": "{{ documents }}",
    "preprocessor_config.json": "{}",
    "processor_config.json": "{}",
    "video_preprocessor_config.json": "{}",
    "generation_config.json": "{}",
    "merges.txt": "#version: 0.2",
    "vocab.json": "{}",
    "source.spm": "pieces",
    "tokenizer.model.v3": "pieces",
    "tokenizer.model.v7m1": "pieces",
    "bpe.codes": "a b",
    "qwen.tiktoken": "AA== 0",
    "sentencepiece.bpe.model": "pieces",
    "modules.json": "[]",
    "config_sentence_transformers.json": "{}",
    "1_Pooling/config.json": '{"pooling_mode_lasttoken": true}',
    "qformer_tokenizer/tokenizer_config.json": "{}",
    "qformer_tokenizer/vocab.txt": "a",
}
LEFT_OUT = {
    "consolidated.00.pth": "weights",
    "consolidated.safetensors": "weights",
    "params.json": '{"dim": 32}',
    "trainer_state.json": "{}",
    "seqbuild.json": "{}",
    "README.md": "bf16 weights",
    "tokenizer.model.bin": "weights",
    "pytorch_model.bin": "weights",
    "pytorch_model.bin.index.json": "{}",
    "model.gguf": "weights",
    "adapter_config.json": "{}",
    "adapter_model.safetensors": "weights",
    "hf_quant_config.json": "{}",
    "quantize_config.json": "{}",
    "quant_config.json": "{}",
    "modeling_other.py": "raise SystemExit",
    "LICENSE.py": "raise SystemExit",
    ".cache/tokenizer_config.json": "{}",
    "original/params.json": "{}",
    "original/tokenizer.model": "pieces",
    "additional_chat_templates/code.py": "raise SystemExit",
    "1_Pooling/pooling.py": "raise SystemExit",
    "1_Pooling/pytorch_model.bin": "weights",
    "onnx/tokenizer_config.json": "{}",
    "onnx/model.onnx": "weights",
    "qformer_tokenizer/tokenizer.py": "raise SystemExit",
}


def fill(directory: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(text)


def names(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir()}


@pytest.fixture
def weights(narrow_llama: Small, tmp_path: Path) -> Path:
    """A copy of the model's directory, to which files may be added."""
    return Path(shutil.copytree(narrow_llama.weights, tmp_path / "weights"))


def test_the_output_is_a_complete_model_directory(narrow_llama: Small, weights: Path, tmp_path: Path) -> None:
    fill(weights, COPIED | LEFT_OUT)
    assert not set(LEFT_OUT) & {name for name, _ in companion_files(weights)}
    for name in ADAPTER_FILES:  # beside these nothing is quantized at all
        (weights / name).unlink(missing_ok=True)
    (weights / "2_Dense").mkdir()
    dense = {"linear.weight": torch.ones(4, 32)}
    save_file(dense, weights / "2_Dense" / "model.safetensors")
    calibrate(narrow_llama, RTN, tmp_path / "out", weights=weights)
    found = names(tmp_path / "out")
    assert set(COPIED) <= found
    own = {"README.md", "seqbuild.json"}  # the result has others
    assert not set(LEFT_OUT) & found - own
    assert not any((tmp_path / "out" / name).read_text() == LEFT_OUT[name] for name in own)
    for name, text in COPIED.items():
        assert (tmp_path / "out" / name).read_text() == text
    assert torch.equal(
        load_file(tmp_path / "out" / "2_Dense" / "model.safetensors")["linear.weight"], torch.ones(4, 32)
    )


def test_links_and_pipes_are_not_followed(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "tool.jinja").write_text("secret")
    (tmp_path / "outside" / "LICENSE").write_text("secret")
    (tmp_path / "outside" / "tokenizer_config.json").write_text("{}")
    (weights / "additional_chat_templates").symlink_to(tmp_path / "outside")
    (weights / "a_tokenizer").symlink_to(tmp_path / "outside")
    (weights / "LICENSE").symlink_to(tmp_path / "outside" / "LICENSE")
    (weights / "loop.json").symlink_to(weights / "loop.json")
    os.mkfifo(weights / "NOTICE")
    (weights / "1_Pooling").mkdir()
    os.mkfifo(weights / "1_Pooling" / "config.json")
    found = {name for name, _ in companion_files(weights)}
    assert not found & {"additional_chat_templates/tool.jinja", "a_tokenizer/tokenizer_config.json", "loop.json"}
    assert not found & {"LICENSE", "NOTICE", "1_Pooling/config.json"}


def test_folders_of_the_hubs_cache_are_copied_as_files(weights: Path, tmp_path: Path) -> None:
    hub = tmp_path / "models--owner--name"
    (hub / "blobs").mkdir(parents=True)
    (hub / "blobs" / "ab").write_text("{{ tools }}")
    snapshot = Path(shutil.copytree(weights, hub / "snapshots" / "0123"))
    (snapshot / "additional_chat_templates").mkdir()
    (snapshot / "additional_chat_templates" / "tool_use.jinja").symlink_to(hub / "blobs" / "ab")
    assert "additional_chat_templates/tool_use.jinja" in dict(companion_files(snapshot))


def test_a_resumed_run_has_the_same_companions(weights: Path) -> None:
    """What is copied is part of what a run is identified by."""
    from runtime.streaming.identity import _companions

    fill(weights, COPIED)
    before = [name for name, _ in _companions(weights)]
    assert set(COPIED) <= set(before)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # transformers leaves templates open
def test_tokenizer_and_processor_load_from_the_output(narrow_llama: Small, weights: Path, tmp_path: Path) -> None:
    from transformers import AutoProcessor, AutoTokenizer, Qwen2AudioProcessor, WhisperFeatureExtractor

    tokenizer = AutoTokenizer.from_pretrained(weights)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]})
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.chat_template = {"default": template, "tool_use": "tools " + template}
    processor = Qwen2AudioProcessor(WhisperFeatureExtractor(feature_size=20), tokenizer, tokenizer.chat_template)
    processor.save_pretrained(weights)
    calibrate(narrow_llama, RTN, tmp_path / "out", weights=weights)
    ours, theirs = (AutoProcessor.from_pretrained(path) for path in (tmp_path / "out", weights))
    assert type(ours) is type(theirs) is Qwen2AudioProcessor
    assert ours.to_dict() == theirs.to_dict()
    assert ours.chat_template == theirs.chat_template
    assert set(ours.chat_template) == {"default", "tool_use"}
    text = "some text <|AUDIO|> and more"
    for path in (tmp_path / "out", weights):
        assert AutoTokenizer.from_pretrained(path)(text).input_ids == tokenizer(text).input_ids
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template


def test_a_bundle_with_weights_has_them_too(narrow_llama: Small, weights: Path, tmp_path: Path) -> None:
    fill(weights, COPIED)
    (tmp_path / "r.yaml").write_text(f"QuantizationModifier: {{{NARROW_W4}}}\n")
    bundle = pack(narrow_llama.artifact, recipe=tmp_path / "r.yaml", weights=weights, out=tmp_path / "bundle")
    assert {f"weights/{name}" for name in COPIED} <= names(bundle)
