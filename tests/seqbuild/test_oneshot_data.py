"""Data sets in memory: all kinds of them give the same samples."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import AutoTokenizer, LlamaForCausalLM

from runtime.errors import DataError, UsageError
from seqbuild.onecall.arguments import parse_arguments
from seqbuild.onecall.in_python import _batches_in_memory, _data_options
from seqbuild.onecall.row_tensors import Batch, RowReader
from seqbuild.onecall.rows import chosen_rows, require_dataset

TEXTS = ["One text.", "A second, longer text.", "Text 3...", "   ", "The last text, the longest of all."]
IDS = [[5, 6, 7, 8], [9, 10, 11, 12, 13, 14], [3, 4, 5, 6], [7, 8, 9, 10, 11, 12]]
INPUTS = ("input_ids", "attention_mask", "labels", "pixel_values")


@pytest.fixture(scope="module")
def tokenizer(byte_tokenizer_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(byte_tokenizer_dir)


def options_of(dataset: Any, **changes: Any) -> Any:
    return parse_arguments({"model": "m", "recipe": "r", "output_dir": "o", "dataset": dataset, **changes}, {}, ())


def read(dataset: Any, tokenizer: Any = None, length: int = 24, **changes: Any) -> list[Batch]:
    options = options_of(dataset, **changes)

    def no_processor() -> Any:
        raise AssertionError("the rows have no media")

    reader = RowReader(
        options=options,
        load_tokenizer=lambda: tokenizer,
        load_processor=no_processor,
        length=length,
        inputs=INPUTS,
    )
    found = reader.batches(chosen_rows(require_dataset(options), options))
    assert isinstance(found, list)
    return found


def assert_same(one: list[Batch], other: list[Batch]) -> None:
    assert len(one) == len(other)
    for mine, theirs in zip(one, other, strict=True):
        assert mine.keys() == theirs.keys()
        for name, tensor in mine.items():
            assert tensor.dtype == theirs[name].dtype
            assert torch.equal(tensor, theirs[name]), name


class Indexed(Dataset[Any]):
    """A data set of torch with a length."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


class Stream(IterableDataset[Any]):
    """A data set of torch that states a length, but has no index."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


CONTAINERS: dict[str, Callable[[list[Any]], Any]] = {
    "list": list,
    "tuple": tuple,
    "generator": lambda items: (item for item in items),
    "iterator": iter,
    "data set of torch": Indexed,
    "stream of torch": Stream,
}
ROWS: dict[str, Callable[[list[int]], Any]] = {
    "list": lambda ids: ids,
    "tensor": torch.tensor,
    "batch of one": lambda ids: torch.tensor([ids]),
    "array": lambda ids: torch.tensor(ids).numpy(),
    "mapping of lists": lambda ids: {"input_ids": ids, "attention_mask": [1] * len(ids)},
    "mapping of tensors": lambda ids: {"input_ids": torch.tensor([ids])},
    "with other columns": lambda ids: {"input_ids": ids, "id": 3, "text": "a", "words": ["a", "b"], "empty": None},
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("row", ROWS)
def test_tokenized_rows_of_every_kind_give_the_same_batches(container: str, row: str) -> None:
    expected = [
        {"input_ids": torch.tensor([IDS[1], IDS[3]]), "attention_mask": torch.ones(2, 6, dtype=torch.int64)},
        {"input_ids": torch.tensor([IDS[0], IDS[2]]), "attention_mask": torch.ones(2, 4, dtype=torch.int64)},
    ]
    assert_same(read(CONTAINERS[container]([ROWS[row](ids) for ids in IDS]), batch_size=8), expected)


@pytest.mark.parametrize("container", CONTAINERS)
def test_texts_of_every_kind_are_tokenized_alike(container: str, tokenizer: Any) -> None:
    texts = [text for text in TEXTS if text.strip()]
    ids = [tokenizer(text, truncation=True, max_length=24)["input_ids"] for text in texts]
    expected = read(ids)
    make = CONTAINERS[container]
    assert_same(read(make(TEXTS), tokenizer), expected)
    assert_same(read(make([{"text": text} for text in TEXTS]), tokenizer), expected)
    assert_same(read(make([{"words": text, "text": 3} for text in TEXTS]), tokenizer, text_column="words"), expected)
    assert_same(read(make(TEXTS), tokenizer, preprocessing_func=lambda row: {"text": row}), expected)


def test_conversations_are_rendered_by_the_chat_template(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]
    expected = read([tokenizer("u:hello<eos>a:yes<eos>", add_special_tokens=False)["input_ids"]])
    assert_same(read([{"messages": messages}], tokenizer), expected)
    assert_same(read([messages], tokenizer), expected)


def test_pairs_of_source_and_target_become_labels(tokenizer: Any) -> None:
    (batch,) = read([{"source": "hello", "target": "yes"}], tokenizer)
    assert batch["labels"].tolist() == [tokenizer("yes")["input_ids"]]
    with pytest.raises(DataError, match="cannot be joined"):
        read([{"source": "hello", "target": "yes"}], tokenizer, concatenate_data=True)


def test_joined_texts_are_cut_into_windows(tokenizer: Any) -> None:
    joined = [token for text in TEXTS if text.strip() for token in tokenizer(text)["input_ids"]]
    windows = [joined[start : start + 8] for start in range(0, len(joined) - 7, 8)]
    assert_same(read(TEXTS, tokenizer, length=8, concatenate_data=True), read(windows))
    assert_same(
        read(iter(TEXTS), tokenizer, length=8, concatenate_data=True, num_calibration_samples=2), read(windows[:2])
    )
    with pytest.raises(DataError, match="less than 500 tokens"):
        read(TEXTS, tokenizer, length=500, concatenate_data=True)


def test_no_more_rows_are_read_than_needed(tokenizer: Any) -> None:
    def endless() -> Iterator[str]:
        for number in itertools.count():
            assert number < 3
            yield f"Text {number}"

    assert sum(len(batch["input_ids"]) for batch in read(endless(), tokenizer, num_calibration_samples=3)) == 3


def test_rows_are_chosen_by_the_seed_and_keep_their_order() -> None:
    rows = [[number, 5] for number in range(100)]

    def first_ids(**changes: Any) -> list[int]:
        return [int(batch["input_ids"][0, 0]) for batch in read(rows, num_calibration_samples=10, **changes)]

    assert first_ids() == sorted(first_ids())
    assert first_ids() == first_ids(seed=0) != first_ids(seed=1)
    assert first_ids(shuffle_calibration_samples=False) == list(range(10))


def test_padding_loss_masks_and_lengths_of_tokenized_rows_are_kept() -> None:
    row = {"input_ids": [3, 4, 5, 6], "attention_mask": [0, 1, 1, 1], "loss_mask": [0, 0, 1, 1], "labels": [1, 2, 3, 4]}
    (batch,) = read([row], max_seq_length=3)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        name: [values[:3]] for name, values in row.items()
    }


def test_rows_with_other_inputs_are_batches_of_their_own() -> None:
    row = {"input_ids": [3, 4], "pixel_values": torch.ones(2, 3)}
    batches = read([row, row], batch_size=8)
    assert [batch["pixel_values"].shape for batch in batches] == [(1, 2, 3)] * 2


def test_a_function_can_make_the_batches() -> None:
    def collate(rows: list[Any]) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([row["ids"][:3] for row in rows])}

    batches = read([{"ids": ids} for ids in IDS], data_collator=collate, batch_size=3, num_calibration_samples=4)
    assert [batch["input_ids"].tolist() for batch in batches] == [[ids[:3] for ids in IDS[:3]], [IDS[3][:3]]]


class Own(DataLoader[Any]):
    """A subclass, as trainers have."""


def test_a_loader_is_used_as_it_is() -> None:
    def loaded(rows: list[Any], kind: type[DataLoader[Any]] = DataLoader) -> Any:
        opened: Any = SimpleNamespace(kind=LlamaForCausalLM, source=None)
        loader = kind(Indexed(rows), batch_size=3)
        return _batches_in_memory(loader, options_of(loader, num_calibration_samples=1), opened)

    rows = [{"input_ids": torch.tensor(ids[:4]), "id": number, "text": "a"} for number, ids in enumerate(IDS)]
    for kind in (DataLoader, Own):
        batches = loaded(rows, kind)
        assert [list(batch) for batch in batches] == [["input_ids"]] * 2
        assert [batch["input_ids"].tolist() for batch in batches] == [[ids[:4] for ids in IDS[:3]], [IDS[3][:4]]]
    with pytest.raises(DataError, match="batch 0 is a list"):
        loaded([(torch.tensor(ids[:4]), 0) for ids in IDS])
    with pytest.raises(DataError, match="no batches"):
        loaded([])


def test_names_become_data_options() -> None:
    options = options_of("owner/name", splits={"calibration": "train[:9]"}, dataset_config_name="en", seed=3)
    found = _data_options(options)
    assert (found.sources, found.split, found.config) == (("owner/name",), "train[:9]", "en")
    assert (found.default_samples, found.shuffle, found.seed, found.pack) == (512, True, 3, False)
    found = _data_options(options_of(Path("a.jsonl"), text_column="words", shuffle_calibration_samples=False))
    assert (found.sources, found.columns, found.shuffle, found.seed) == (("a.jsonl",), ("words",), False, None)
    assert _data_options(options_of(None)).pack


def test_data_sets_of_the_datasets_library(tokenizer: Any) -> None:
    datasets = pytest.importorskip("datasets")
    texts = datasets.Dataset.from_list([{"text": text} for text in TEXTS])
    expected = read(TEXTS, tokenizer)
    splits = datasets.DatasetDict({"train": texts, "test": texts.select([0])})
    streams = datasets.IterableDatasetDict({"train": texts.to_iterable_dataset()})
    for dataset in (texts, texts.to_iterable_dataset(), splits, streams):
        assert_same(read(dataset, tokenizer), expected)
    assert_same(read(splits, tokenizer, splits="test"), read(TEXTS[:1], tokenizer))
    assert_same(read(splits, tokenizer, splits="train[:40%]"), read(TEXTS[:2], tokenizer))
    assert_same(read(splits, tokenizer, splits="train[1:3]"), read(TEXTS[1:3], tokenizer))
    tokenized = datasets.Dataset.from_list([{"input_ids": ids, "id": 3} for ids in IDS])
    for dataset in (tokenized, tokenized.with_format("torch"), tokenized.to_iterable_dataset()):
        assert_same(read(dataset), read(IDS))
    for split, message in (("valid", "has no split 'valid'"), ("train[x]", "train")):
        with pytest.raises(UsageError, match=message):
            read(splits, tokenizer, splits=split)
    with pytest.raises(DataError, match="no rows"):
        read(splits, tokenizer, splits="train[:0]")
    with pytest.raises(UsageError, match="part of a stream"):
        read(streams, tokenizer, splits="train[:2]")
