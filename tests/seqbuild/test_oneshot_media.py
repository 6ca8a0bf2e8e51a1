"""Rows with sounds in memory: decoded records and the tensors of a processor give the same checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

import seqbuild
from runtime.data.documents import as_document
from runtime.data.processor import load_processor
from seqbuild.modifiers import GPTQModifier
from tests.seqbuild.test_oneshot import GROUPS_OF_16, assert_equal
from tests.tiny_models import randomize

pytest.importorskip("PIL", reason="needs the extra media")


def test_sounds_in_memory(byte_tokenizer_dir: Path, tmp_path: Path) -> None:
    from tests.runtime.media_models import whisper

    model, processor = whisper(byte_tokenizer_dir)
    randomize(model).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    generator = np.random.default_rng(0)
    rows: list[dict[str, Any]] = [
        {"audio": {"array": generator.normal(size=size), "sampling_rate": 16000}, "text": text}
        for size, text in ((9000, "hello"), (5000, "so"), (7000, "a sound"))
    ]
    group = {"targets": ["re:.*(q|k|v)_proj$"], "weights": GROUPS_OF_16}
    options: dict[str, Any] = {
        "recipe": GPTQModifier(config_groups={"all": group}),
        "artifacts": tmp_path / "artifacts",
    }
    done = seqbuild.oneshot(model, rows, processor=processor, output_dir=tmp_path / "records", **options)
    assert done.modules[0].num_tokens > 0
    made = load_processor(tmp_path / "model")
    tensors = [made.sample(as_document(row, "row")) for row in rows]
    seqbuild.oneshot(tmp_path / "model", tensors, output_dir=tmp_path / "tensors", **options)
    assert_equal(
        load_file(tmp_path / "records" / "model.safetensors"), load_file(tmp_path / "tensors" / "model.safetensors")
    )
