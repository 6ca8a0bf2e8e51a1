"""Tiny models that see or hear, with real processors built in the test, and images and sounds for them."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from PIL import Image
from transformers import PreTrainedTokenizerFast

from tests.tiny_models import randomize

RATE = 16000
_TEXT = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 14,
    "image_size": 56,
}
_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}IMAGE{% elif part.type == 'video' %}VIDEO{% elif part.type == 'audio' %}AUDIO"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
)
# As Llava's own: only text that is a part is printed.
_LLAVA_CHAT = (
    "{% for message in messages %}{{ message.role.upper() }}: "
    "{% for part in message.content | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
    "{% for part in message.content | selectattr('type', 'equalto', 'text') %}{{ part.text }} {% endfor %}{% endfor %}"
)
_VISUAL_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def _tokenizer(directory: Path, *special: str, **named: str) -> PreTrainedTokenizerFast:
    """The byte tokenizer with more special tokens; `named` become attributes of it."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    tokenizer.add_special_tokens({"additional_special_tokens": [*special, *named.values()]})
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<eos>",
        extra_special_tokens=named,
    )


def _images(kind: str, **config: Any) -> Any:
    """An image processor from its config, with torchvision or without, as transformers chooses."""
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": kind, **config}))
        try:
            return transformers.AutoImageProcessor.from_pretrained(directory)
        except ImportError:  # transformers 5.17 has no image processors without torchvision
            pytest.skip("needs torchvision")


def _qwen_ids(tokenizer: Any) -> dict[str, int]:
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    return dict(zip(names, tokenizer.convert_tokens_to_ids(list(_VISUAL_TOKENS)), strict=True))


def _qwen_chat() -> str:
    image, video = (f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video"))
    return _CHAT.replace("IMAGE", image).replace("VIDEO", video)


def qwen2_5_vl(bytes_dir: Path) -> tuple[Any, Any]:
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    tokenizer = _tokenizer(bytes_dir, "<|im_start|>", "<|im_end|>", *_VISUAL_TOKENS)
    size = {"shortest_edge": 4 * 28**2, "longest_edge": 16 * 28**2}
    images = _images("Qwen2VLImageProcessor", size=size)
    processor = transformers.Qwen2_5_VLProcessor(
        images, tokenizer, Qwen2VLVideoProcessor(size=size), chat_template=_qwen_chat()
    )
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 128}
    turning = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5]}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**_TEXT, "vocab_size": len(tokenizer), "rope_parameters": turning},
        vision_config={**vision, "fullatt_block_indexes": [1], "window_size": 56},
        **_qwen_ids(tokenizer),
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config), processor


def qwen3_vl(bytes_dir: Path) -> tuple[Any, Any]:
    tokenizer = _tokenizer(bytes_dir, "<|im_start|>", "<|im_end|>", *_VISUAL_TOKENS)
    size = {"shortest_edge": 4 * 32**2, "longest_edge": 16 * 32**2}
    images = _images("Qwen2VLImageProcessor", size=size, patch_size=16)
    videos = transformers.Qwen3VLVideoProcessor(size={"shortest_edge": 4096, "longest_edge": 64 * 32**2})
    processor = transformers.Qwen3VLProcessor(images, tokenizer, videos, chat_template=_qwen_chat())
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 128}
    turning = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    config = transformers.Qwen3VLConfig(
        text_config={**_TEXT, "vocab_size": len(tokenizer), "rope_parameters": turning},
        vision_config={**vision, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16},
        **_qwen_ids(tokenizer),
    )
    return transformers.Qwen3VLForConditionalGeneration(config), processor


def gemma3(bytes_dir: Path) -> tuple[Any, Any]:
    tokenizer = _tokenizer(
        bytes_dir,
        "<|im_start|>",
        "<|im_end|>",
        image_token="<image_soft_token>",
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
    )
    images = _images("Gemma3ImageProcessor", size={"height": 56, "width": 56})
    processor = transformers.Gemma3Processor(
        images,
        tokenizer,
        chat_template="{{ bos_token }}" + _CHAT.replace("IMAGE", "<start_of_image>"),
        image_seq_length=4,
    )
    config = transformers.Gemma3Config(
        text_config={**_TEXT, "vocab_size": len(tokenizer), "sliding_window": 16},
        vision_config=_VISION,
        mm_tokens_per_image=4,
        image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
    )
    return transformers.Gemma3ForConditionalGeneration(config), processor


def llava(bytes_dir: Path) -> tuple[Any, Any]:
    tokenizer = _tokenizer(bytes_dir, "<image>")
    images = _images("CLIPImageProcessor", size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    processor = transformers.LlavaProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_LLAVA_CHAT,
    )
    config = transformers.LlavaConfig(
        text_config={**_TEXT, "model_type": "llama", "vocab_size": len(tokenizer)},
        vision_config={**_VISION, "model_type": "clip_vision_model", "projection_dim": 32},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    return transformers.LlavaForConditionalGeneration(config), processor


def qwen2_audio(bytes_dir: Path) -> tuple[Any, Any]:
    tokenizer = _tokenizer(bytes_dir, "<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>")
    sounds = transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=1)
    chat = _CHAT.replace("AUDIO", "<|audio_bos|><|AUDIO|><|audio_eos|>")
    processor = transformers.Qwen2AudioProcessor(sounds, tokenizer, chat_template=chat)
    audio = {"num_mel_bins": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 48}
    config = transformers.Qwen2AudioConfig(
        text_config={**_TEXT, "model_type": "qwen2", "vocab_size": len(tokenizer)},
        audio_config={**audio, "d_model": 32, "max_source_positions": 50},
        audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
    )
    return transformers.Qwen2AudioForConditionalGeneration(config), processor


def whisper(bytes_dir: Path) -> tuple[Any, Any]:
    vocabulary = PreTrainedTokenizerFast.from_pretrained(bytes_dir).get_vocab()
    special = [
        "<|endoftext|>",
        "<|startoftranscript|>",
        "<|en|>",
        "<|transcribe|>",
        "<|translate|>",
        "<|notimestamps|>",
    ]
    for token in special:
        vocabulary[token] = len(vocabulary)
    tokenizer = transformers.WhisperTokenizer(vocab=vocabulary, merges=[], language="en", task="transcribe")
    sounds = transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=1)
    config = transformers.WhisperConfig(
        vocab_size=len(tokenizer),
        num_mel_bins=16,
        d_model=128,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        max_source_positions=50,
        max_target_positions=64,
        decoder_start_token_id=vocabulary["<|startoftranscript|>"],
        pad_token_id=vocabulary["<|endoftext|>"],
        bos_token_id=vocabulary["<|endoftext|>"],
        eos_token_id=vocabulary["<|endoftext|>"],
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return transformers.WhisperForConditionalGeneration(config), transformers.WhisperProcessor(sounds, tokenizer)


FAMILIES: dict[str, Callable[[Path], tuple[Any, Any]]] = {
    made.__name__: made for made in (qwen2_5_vl, qwen3_vl, gemma3, llava, whisper, qwen2_audio)
}


def save(family: str, bytes_dir: Path, directory: Path) -> Path:
    """Save a model with random weights and its processor."""
    model, processor = FAMILIES[family](bytes_dir)
    randomize(model).save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


def write_image(path: Path, width: int, height: int, seed: int = 0) -> Path:
    """A picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def write_sound(path: Path, seconds: float, rate: int = RATE, seed: int = 0) -> Path:
    """A sound of two tones and noise, in two channels."""
    import soundfile

    time_T = np.arange(int(seconds * rate)) / rate
    tones_T = np.sin(2 * np.pi * 440 * time_T) + np.sin(2 * np.pi * (700 + 100 * seed) * time_T)
    noise = np.random.default_rng(seed).normal(size=(len(time_T), 2)) * 0.1
    soundfile.write(path, (tones_T[:, None] + noise) * 0.2, rate)
    return path


def copy_without_processor(directory: Path, target: Path) -> Path:
    """A model directory whose processor is missing."""
    shutil.copytree(directory, target)
    for name in ("processor_config.json", "preprocessor_config.json"):
        (target / name).unlink(missing_ok=True)
    return target


def read_sound(path: Path) -> Any:
    """A sound as transformers reads it: the mean of the channels at the usual rate."""
    import soundfile
    import soxr

    channels, rate = soundfile.read(path, dtype="float32", always_2d=True)
    return channels.mean(axis=1) if rate == RATE else soxr.resample(channels.mean(axis=1), rate, RATE)


def write_video(path: Path, frames: int, width: int, height: int) -> Path:
    """A film of noise, 4 frames a second."""
    import av

    generator = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for _ in range(frames):
            pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def rows_of(family: str, folder: Path) -> Path:
    """Rows of data for a model: media of two sizes, one twice, and a text among them; Whisper takes no text alone."""
    write_image(folder / "a.png", 90, 60)
    write_image(folder / "b.jpg", 60, 130, seed=1)
    write_sound(folder / "a.wav", 0.7)
    write_sound(folder / "b.wav", 0.4, rate=8000, seed=1)
    kind, names = ("audio", ("a.wav", "b.wav")) if "audio" in family else ("image", ("a.png", "b.jpg"))
    question = [{"type": kind, kind: names[0]}, {"type": "text", "text": "What is it?"}]
    described: dict[str, Any] = {kind: names[1], "text": "Describe it."}
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "A cat."}]},
        {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day."}]},
        described,
        described,
    ]
    if family == "whisper":
        rows = [{"audio": "a.wav", "text": "hello"}, {"audio": "b.wav", "text": "so"}, {"audio": "a.wav", "text": "ho"}]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder / "rows.jsonl"
