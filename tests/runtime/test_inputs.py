from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from runtime.artifact.manifest import DimEntry, InputEntry
from runtime.data.inputs import model_inputs, require_decoder, require_in_range, require_length
from runtime.errors import DataError
from runtime.streaming.activations import Activations

BATCH = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.int64)}


class Inputs:
    """The part of a manifest that is looked at."""

    def __init__(
        self,
        shapes: dict[str, tuple[int | str, ...]],
        dims: tuple[DimEntry, ...] = (),
        absent: Mapping[str, int] | None = None,
        decoder: Mapping[str, int] | None = None,
    ) -> None:
        self.inputs = tuple(
            InputEntry(name=name, dtype="int64", shape=shape, absent=(absent or {}).get(name, -1))
            for name, shape in shapes.items()
        )
        self.dims = dims
        self.conditions: tuple[str, ...] = ()
        self.decoder = decoder or {}
        self.model = SimpleNamespace(class_name="SomeModel")


def make(*names: str, **options: Any) -> Any:
    return Inputs(dict.fromkeys(names, ("batch", "sequence")), **options)


def test_inputs_come_in_the_order_of_the_model() -> None:
    made = model_inputs(make("attention_mask", "input_ids"), BATCH)
    assert list(made) == ["attention_mask", "input_ids"]
    assert made["input_ids"] is BATCH["input_ids"]


def test_what_stands_for_absence_is_filled_in() -> None:
    shapes: dict[str, tuple[int | str, ...]] = {
        "input_ids": ("batch", "sequence"),
        "token_type_ids": ("batch", "sequence"),
        "bbox": ("batch", "sequence", 2),
        "lang_ids": ("batch",),
        "decoder_input_ids": ("batch", "decoder_input_ids_1"),
        "decoder_attention_mask": ("batch", "decoder_input_ids_1"),
    }
    absent = {"token_type_ids": 0, "bbox": 0, "lang_ids": 4, "decoder_attention_mask": 1}
    manifest: Any = Inputs(shapes, absent=absent, decoder={"start": 9, "pad": 0})
    made = model_inputs(manifest, BATCH | {"labels": torch.tensor([[8, 4]])})
    assert {name: tensor.tolist() for name, tensor in made.items()} == {
        "input_ids": [[5, 6, 7]],
        "token_type_ids": [[0, 0, 0]],
        "bbox": [[[0, 0]] * 3],
        "lang_ids": [4],
        "decoder_input_ids": [[9, 8]],
        "decoder_attention_mask": [[1, 1]],
        "labels": [[8, 4]],
    }
    assert {tensor.dtype for tensor in made.values()} == {torch.int64}


def test_what_data_gives_is_not_replaced() -> None:
    types = torch.tensor([[0, 1, 1]])
    made = model_inputs(
        make("input_ids", "token_type_ids", absent={"token_type_ids": 0}), BATCH | {"token_type_ids": types}
    )
    assert made["token_type_ids"] is types


@pytest.mark.parametrize("name", ["token_type_ids", "bbox", "lang_ids", "position_ids", "cache_position"])
def test_zeros_are_not_filled_in_where_they_may_mean_something(name: str) -> None:
    with pytest.raises(DataError, match=f"has an input '{name}', which is missing in the data, and SomeModel may"):
        model_inputs(make("input_ids", name), BATCH)


def test_a_text_without_a_target_is_to_be_written_as_it_is() -> None:
    manifest = make("input_ids", "attention_mask", "decoder_input_ids", decoder={"start": 9, "pad": 0})
    ids, mask = torch.tensor([[5, 6, 7], [5, 6, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    made = model_inputs(manifest, {"input_ids": ids, "attention_mask": mask})
    assert made["labels"].tolist() == [[5, 6, 7], [5, 6, -100]]
    assert made["decoder_input_ids"].tolist() == [[9, 5, 6], [9, 5, 6]]


def test_a_decoder_without_a_rule() -> None:
    with pytest.raises(DataError, match="does not state how decoder_input_ids of SomeModel follow"):
        model_inputs(make("input_ids", "decoder_input_ids"), BATCH)
    given = {"decoder_input_ids": torch.tensor([[1, 2]])}
    assert model_inputs(make("input_ids", "decoder_input_ids"), BATCH | given).keys() == {"input_ids", *given}


def test_padding_is_handed_on_to_whoever_counts_tokens() -> None:
    padded = {"input_ids": BATCH["input_ids"], "attention_mask": torch.tensor([[0, 1, 1]])}
    assert list(model_inputs(make("input_ids"), BATCH)) == ["input_ids"]
    assert list(model_inputs(make("input_ids"), padded)) == ["input_ids", "attention_mask"]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[1, 2]], "labels of list"),
        (torch.ones(1, 2), r"labels of torch.float32 \[1, 2\]"),
        (torch.ones(2, dtype=torch.int64), r"labels of torch.int64 \[2\]"),
    ],
)
def test_labels_that_are_none(labels: Any, message: str) -> None:
    manifest = make("input_ids", "decoder_input_ids", decoder={"start": 9, "pad": 0})
    with pytest.raises(DataError, match=message):
        model_inputs(manifest, BATCH | {"labels": labels})


def test_pairs_are_for_models_with_a_decoder() -> None:
    targets = [torch.tensor([1])]
    require_decoder(make("input_ids"), None)
    require_decoder(make("input_ids", "decoder_input_ids"), targets)
    with pytest.raises(DataError, match="SomeModel is not an encoder-decoder model"):
        require_decoder(make("input_ids"), targets)


@pytest.mark.parametrize("dtype", ["model", "float32"])
def test_an_input_that_is_no_text(dtype: str) -> None:
    manifest = make("input_ids", "image_sizes")
    manifest.inputs += (InputEntry(name="pixel_values", dtype=dtype, shape=("images", 3)),)
    with pytest.raises(DataError, match=r"'image_sizes', which cannot be made from text .*--text-only"):
        model_inputs(manifest, BATCH)


@pytest.mark.parametrize(
    ("dims", "shape", "message"),
    [
        ([("sequence", 1, 512)], (2, 513), "a sequence of 1 to 512"),
        ([("sequence", 4, -1)], (2, 3), "a sequence of 4 or more"),
        ([("batch", 1, 1)], (2, 3), "a batch of 1 to 1"),
        ([("sequence", 1, 512), ("batch", 1, -1)], (9, 512), ""),
        ([], (9, 512), ""),
    ],
)
def test_sizes_for_which_the_trace_holds(
    dims: list[tuple[str, int, int]], shape: tuple[int, int], message: str
) -> None:
    entries = tuple(DimEntry(name=name, min=low, max=high) for name, low, high in dims)
    manifest: Any = Inputs({"input_ids": ("batch", "sequence")}, entries)
    batches = [{"input_ids": torch.zeros(shape, dtype=torch.int64)}]
    if message:
        with pytest.raises(DataError) as caught:
            require_in_range(manifest, batches)
        assert str(list(shape)) in str(caught.value)
        assert message in str(caught.value)
    else:
        require_in_range(manifest, batches)


def test_a_size_that_the_trace_fixed() -> None:
    manifest: Any = Inputs({"input_ids": ("batch", 16)})
    require_in_range(manifest, [{"input_ids": torch.zeros(3, 16)}])
    with pytest.raises(DataError, match=r"shape \[3, 17\]"):
        require_in_range(manifest, [{"input_ids": torch.zeros(3, 17)}])


def test_longest_sample() -> None:
    samples = [torch.zeros(5), torch.zeros(9)]
    require_length(samples, None)
    require_length(samples, 9)
    with pytest.raises(DataError, match=r"has 9 tokens, but the model's config allows 8 .*--seq-len 8 or less"):
        require_length(samples, 8)


# The values between subgraphs.


def test_activations_keep_each_batch_apart_and_forget_what_is_dropped() -> None:
    activations = Activations([{"x": torch.tensor([1])}, {"x": torch.tensor([2])}], torch.device("cpu"))
    activations.store(0, {"y": (torch.tensor([3]), "text", None)})
    assert len(activations) == 2
    assert activations.fetch(1, ["x"])["x"].tolist() == [2]
    assert activations.fetch(0, ["y"])["y"][1:] == ("text", None)
    activations.drop(0, ["x"])
    with pytest.raises(KeyError):
        activations.fetch(0, ["x"])
    with pytest.raises(KeyError):
        activations.fetch(1, ["y"])


def test_activations_leave_the_callers_batches_alone() -> None:
    batch = {"x": torch.tensor([1])}
    activations = Activations([batch], torch.device("cpu"))
    activations.store(0, {"y": torch.tensor([2])})
    activations.drop(0, ["x"])
    assert list(batch) == ["x"]


def test_copies_reach_into_containers() -> None:
    original = {"a": torch.tensor([1]), "b": [torch.tensor([2]), "text", (torch.tensor([3]),)]}
    activations = Activations([{"x": original}], torch.device("cpu"))
    copy: Any = activations.fetch(0, ["x"], private=True)["x"]
    copy["a"].add_(1)
    copy["b"][0].add_(1)
    copy["b"][2][0].add_(1)
    assert original["a"].tolist() == [1]
    assert original["b"][0].tolist() == [2]
    assert original["b"][2][0].tolist() == [3]
    assert copy["b"][1] == "text"
