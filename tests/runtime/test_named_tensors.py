"""Token files of version 2: named tensors for each sample, and the batches made from them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from runtime.artifact.manifest import DimEntry, InputEntry
from runtime.data.named_batches import named_batches
from runtime.data.named_tensors import NamedSamples, Sample, chosen, save_named
from runtime.data.options import DataOptions
from runtime.data.origin import METADATA_KEY, DataOrigin
from runtime.data.samples import load_tokens
from runtime.data.token_file import read_token_file
from runtime.errors import DataError

ORIGIN = DataOrigin(tokenizer="bytes", tokenizer_digest="d", vocab_size=50, sources=(("x.jsonl", "e"),))
MEDIUM = 40


def row(length: int, images: int = 1, first: int = 1) -> Sample:
    ids = torch.arange(first, first + length)[None]
    ids[0, 1 : 1 + images] = MEDIUM
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.masked_fill(ids == MEDIUM, -100)}
    return made | ({"pixel_values": torch.randn(images, 3, 2, 2)} if images else {})


def named(*samples: Sample, **changes: Any) -> NamedSamples:
    made = NamedSamples(
        samples=samples, origin=ORIGIN, media_tokens=(MEDIUM,), padding_token=0, is_joinable=True, seq_len=None
    )
    return replace(made, **changes)


def inputs(*entries: InputEntry, dims: tuple[DimEntry, ...] = ()) -> Any:
    """The part of a manifest that batches depend on."""
    return SimpleNamespace(inputs=entries, dims=dims, conditions=(), decoder={})


def entry(name: str, *shape: Any, dtype: str = "int64") -> InputEntry:
    return InputEntry(name=name, dtype=dtype, shape=shape)


@pytest.fixture
def seeing(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An artifact with an image input, one symbol for rows and another for images."""
    monkeypatch.setattr("runtime.data.named_batches.with_single_sizes", lambda manifest: manifest)
    tokens = (entry("input_ids", "b", "s"), entry("attention_mask", "b", "s"))
    dims = tuple(DimEntry(name=name, min=1, max=-1) for name in "bsn")
    return inputs(*tokens, entry("pixel_values", "n", 3, 2, 2, dtype="model"), dims=dims)


def test_a_file_has_what_was_saved_and_always_the_same_bytes(tmp_path: Path) -> None:
    data = named(row(5), row(4, images=0), row(7, images=2), seq_len=9, is_joinable=False)
    save_named(tmp_path / "a.safetensors", data)
    save_named(tmp_path / "b.safetensors", data)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    found = read_token_file(tmp_path / "a.safetensors")
    assert isinstance(found, NamedSamples)
    assert str(replace(found, samples=())) == str(replace(data, samples=(), path=tmp_path / "a.safetensors"))
    for sample, expected in zip(found.samples, data.samples, strict=True):
        assert sample.keys() == expected.keys()
        assert all(torch.equal(sample[name], expected[name]) for name in sample)
    with pytest.raises(DataError, match="has images, sounds or videos"):
        load_tokens(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_samples": 3}, "sample 2 has no tensors"),
        ({"num_samples": 1}, "'1.attention_mask', which is of none of its 1 samples"),
        ({"num_samples": True}, "num_samples is True"),
        ({"num_samples": 10**9}, "num_samples is 1000000000"),
        ({"media_tokens": [-1]}, "media_tokens is not a list of ids"),
        ({"padding_token": 50}, "padding_token is 50"),
        ({"is_joinable": 1}, "is_joinable is 1"),
        ({"seq_len": 4}, "0.input_ids has 5 tokens, but seq_len is 4"),
        ({"vocab_size": 40}, "token id 40 of 0.input_ids is outside its vocabulary of 40"),
        ({"version": "3.0"}, "version 3.0, but this release reads 1.2 and 2.0"),
    ],
)
def test_wrong_metadata_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "x.safetensors"
    save_named(path, named(row(5), row(4)))
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    fields = json.loads(header["__metadata__"][METADATA_KEY]) | changes
    path.write_bytes(save(load(content), metadata={METADATA_KEY: json.dumps(fields)}))
    with pytest.raises(DataError, match=message):
        read_token_file(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x.input_ids": torch.ones(1, 2)}, "'x.input_ids', which is of none"),
        ({"00.input_ids": torch.ones(1, 2)}, "'00.input_ids', which is of none"),
        ({f"{'9' * 300}.input_ids": torch.ones(1, 2)}, "'9999.*, which is of none"),
        ({"0.a-b": torch.ones(1, 2)}, "'0.a-b', which is of none"),
        ({"0.a.b": torch.ones(1, 2)}, "'0.a.b', which is of none"),
        ({"0.empty": torch.ones(0, 2)}, "0.empty is empty"),
        ({"0.input_ids": torch.ones(1, 2)}, r"0.input_ids is torch.float32 of shape \(1, 2\)"),
        ({"0.input_ids": torch.ones(2, dtype=torch.int64)}, r"0.input_ids is torch.int64 of shape \(2,\)"),
        ({"0.input_ids": torch.full((1, 2), -5)}, "token id -5"),
        ({"0.labels": torch.full((1, 2), -101)}, "token id -101 of 0.labels"),
    ],
)
def test_wrong_tensors_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "x.safetensors"
    save_named(path, named(row(5)))
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    path.write_bytes(save(load(content) | changes, metadata=header["__metadata__"]))
    with pytest.raises(DataError, match=message):
        read_token_file(path)


def test_samples_of_equal_shapes_are_joined(seeing: Any) -> None:
    samples = [row(5, first=1), row(6, first=2), row(5, first=3), row(5, first=4), row(5, images=2)]
    batches = named_batches(seeing, named(*samples), 2)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(1, 5), (1, 6), (2, 5), (1, 5)]
    assert torch.equal(batches[2]["pixel_values"], torch.cat([samples[0]["pixel_values"], samples[2]["pixel_values"]]))
    alone = named_batches(seeing, named(*samples, is_joinable=False), 2)
    assert [len(batch["input_ids"]) for batch in alone] == [1] * 5


def test_texts_are_padded_beside_images_and_each_sample_runs_once(seeing: Any) -> None:
    samples = [row(5), row(7), row(4, images=0, first=10), row(9, images=0, first=20)]
    batches = named_batches(seeing, named(*samples), 2)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 9), (2, 5)]
    tokens = torch.cat([batch["input_ids"][batch["attention_mask"] != 0] for batch in batches])
    assert sorted(tokens.tolist()) == sorted(torch.cat([sample["input_ids"][0] for sample in samples]).tolist())
    for batch in batches:
        padded = batch["attention_mask"] == 0
        assert bool((batch["input_ids"][padded] == 0).all()) and bool((batch["labels"][padded] == -100).all())


def test_images_run_with_videos(seeing: Any) -> None:
    both = inputs(
        *seeing.inputs, entry("videos", "v", 5, dtype="model"), dims=(*seeing.dims, DimEntry(name="v", min=1, max=-1))
    )
    videos = [row(length, images=0) | {"videos": torch.randn(2, 5)} for length in (6, 8)]
    samples = [row(5), *videos, row(7), row(4, images=0), row(9)]
    batches = named_batches(both, named(*samples), 3)
    assert [len(batch["input_ids"]) for batch in batches] == [3, 3]
    assert sorted(len(batch["pixel_values"]) for batch in batches) == [1, 2]
    assert [len(batch["videos"]) for batch in batches] == [2, 2]


def test_samples_that_cannot_run_are_named(seeing: Any) -> None:
    text, image = row(4, images=0), row(4)
    with pytest.raises(DataError, match=r"sample 0 has no pixel_values.* no sample has it .*--text-only"):
        named_batches(seeing, named(text, text), 8)
    with pytest.raises(DataError, match=r"3 samples have no pixel_values .* only 1 .*--batch-size 4"):
        named_batches(seeing, named(text, text, text, image), 2)
    named_batches(seeing, named(text, text, text, image), 4)
    extra = image | {"image_sizes": torch.ones(1, 2)}
    with pytest.raises(DataError, match=r"sample 1 has image_sizes \[1, 2\].*seqbuild compile MODEL --sample"):
        named_batches(seeing, named(image, extra), 2)
    types = image | {"token_type_ids": torch.zeros_like(image["input_ids"])}
    assert "token_type_ids" not in named_batches(seeing, named(types), 2)[0]
    by_row = inputs(*seeing.inputs[:2], entry("pixel_values", "b", 3, 2, 2, dtype="model"), dims=seeing.dims)
    with pytest.raises(DataError, match=r"for every sample .*file of their own"):
        named_batches(by_row, named(text, image), 8)


def test_samples_are_chosen_and_cut() -> None:
    data = named(*(row(length) for length in (4, 5, 6, 7)), seq_len=8)
    some = chosen(data, DataOptions(num_samples=2, seq_len=4), "x")
    assert [tuple(sample["input_ids"].shape) for sample in some.samples] == [(1, 4), (1, 4)]
    assert some.samples[0]["pixel_values"].shape == (1, 3, 2, 2)
    sounds = [{"input_values": torch.ones(1, 9)}]
    assert [list(sample) for sample in chosen(named(*sounds), DataOptions(seq_len=4), "x").samples] == [
        ["input_values"]
    ]
    with pytest.raises(DataError, match="x has 4 samples, but 5 are required"):
        chosen(data, DataOptions(num_samples=5), "x")
    with pytest.raises(DataError, match="were cut at 8 tokens, but 9 are required"):
        chosen(data, DataOptions(seq_len=9), "x")
    with pytest.raises(DataError, match="sample 0 has 6 tokens with its media, and --seq-len 2 would cut the media"):
        chosen(named(row(6, images=3)), DataOptions(seq_len=2), "x")
