"""What the Python API says to arguments that it cannot work with: the right class of error, naming the argument."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import BatchEncoding

import runtime
import seqbuild
from runtime.errors import DataError, DeviceError, RecipeError, SeqbuildError, UsageError
from tests.runtime.small import NARROW_W4, Small, load_transformers, recipe, token_batches

(BATCH,) = token_batches([(2, 16)])
IDS, MASK = BATCH["input_ids"], BATCH["attention_mask"]
RTN = recipe(NARROW_W4.replace("16}", "16}, input_activations: {num_bits: 8, dynamic: false}", 1))


def exhausted() -> Iterable[Any]:
    batches = iter([BATCH])
    list(batches)
    return batches


def fake() -> torch.Tensor:
    with FakeTensorMode():
        return torch.empty(2, 16, dtype=torch.int64)


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "missing": (
        lambda: [BATCH, {"input_ids": IDS}],
        r"batch 1 has no attention_mask; it has input_ids \(.*int64 \[batch",
    ),
    "empty batch": (lambda: [{}], "batch 0 has no input_ids; it is empty"),
    "extra": (
        lambda: [{**BATCH, "position_ids": IDS}],
        "batch 0 has position_ids, which is not an input",
    ),
    "types": (lambda: [{**BATCH, "token_type_ids": MASK}], "batch 0 has token_type_ids, which"),
    "lists": (lambda: [{**BATCH, "input_ids": IDS.tolist()}], r"batch 0: input_ids is a list \(pass a tensor"),
    "numpy": (lambda: [{**BATCH, "input_ids": IDS.numpy()}], "batch 0: input_ids is a numpy.ndarray"),
    "none": (lambda: [{**BATCH, "input_ids": None}], "batch 0: input_ids is None"),
    "rank 1": (
        lambda: [{name: value[0] for name, value in BATCH.items()}],
        r"input_ids has the shape \[16\] \(expected",
    ),
    "rank 3": (lambda: [{**BATCH, "attention_mask": MASK[None]}], r"attention_mask has the shape \[1, 2, 16\]"),
    "lengths": (
        lambda: [BATCH, {**BATCH, "attention_mask": MASK[:, :7]}],
        r"batch 1 has attention_mask of shape \[2, 7\]",
    ),
    "rows": (lambda: [{**BATCH, "attention_mask": MASK[:1]}], r"batch 0 has attention_mask of shape \[1, 16\]"),
    "large": (lambda: [BATCH, {**BATCH, "input_ids": IDS + 258}], "batch 1: input_ids has the token id [0-9]+, but"),
    "negative": (lambda: [{**BATCH, "input_ids": IDS - 300}], "batch 0: input_ids has the token id -"),
    "long": (lambda: token_batches([(1, 257)]), "batch 0: input_ids has 257 tokens, but the model's config allows 256"),
    "float": (lambda: [{**BATCH, "input_ids": IDS.float()}], r"batch 0: input_ids is torch\.float32 \(expected int64"),
    "float mask": (lambda: [{**BATCH, "attention_mask": MASK.float()}], r"attention_mask is torch\.float32"),
    "meta": (lambda: [{**BATCH, "input_ids": IDS.to("meta")}], "batch 0: input_ids is a tensor without values"),
    "fake": (lambda: [{**BATCH, "input_ids": fake()}], "batch 0: input_ids is a tensor without values"),
    "sparse": (lambda: [{**BATCH, "input_ids": IDS.to_sparse()}], "input_ids is a tensor of layout torch.sparse_coo"),
    "no rows": (lambda: [{name: value[:0] for name, value in BATCH.items()}], r"input_ids has the shape \[0, 16\]"),
    "exhausted": (exhausted, "batches is a list_iterator that is exhausted"),
    "one mapping": (lambda: BATCH, r"batches is a dict \(put it into a list"),
    "text": (lambda: "batches", "batches is 'batches'"),
    "nothing": (lambda: None, "batches is None"),
    "number": (lambda: 3, "batches is 3"),
    "tensor": (lambda: IDS, "batches is a torch.Tensor"),
    "tensors": (lambda: [IDS], "batch 0 is a torch.Tensor"),
    "texts": (lambda: ["text"], "batch 0 is 'text'"),
    "keys": (lambda: [{0: IDS}], "batch 0: 0 is not the name of an input"),
    "nested": (
        lambda: [{**BATCH, "input_ids": torch.nested.as_nested_tensor([IDS[0], IDS[1, :3]], layout=torch.jagged)}],
        "batch 0: input_ids is a nested or quantized tensor",
    ),
    "fractions": (
        lambda: [BATCH, {**BATCH, "loss_mask": torch.rand(2, 16)}],
        r"batch 1: loss_mask is torch\.float32 \(expected integers",
    ),
    "lengths of a mask": (
        lambda: [BATCH, {**BATCH, "loss_mask": MASK[:, :7]}],
        r"batch 1: loss_mask has the shape \[2, 7\] for \[2, 16\] tokens",
    ),
}


def test_a_data_set_gives_samples(narrow_llama: Small) -> None:
    data_set = type("Dataset", (Rows,), {"__module__": "datasets.arrow_dataset"})()
    with pytest.raises(DataError, match=r"batches is a datasets.arrow_dataset.Dataset, .* samples, not batches"):
        runtime.evaluate(narrow_llama.load(), weights=narrow_llama.weights, batches=data_set)


def no_batch_runs(*_: object, **__: object) -> None:
    raise AssertionError("a batch runs")


@pytest.mark.parametrize("name", BAD)
def test_batches_that_are_not_the_models_inputs(narrow_llama: Small, tmp_path: Path, name: str) -> None:
    make, message = BAD[name]
    artifact = narrow_llama.load()
    with pytest.raises(DataError, match=message):
        runtime.evaluate(artifact, weights=narrow_llama.weights, batches=make())
    with pytest.raises(DataError, match=message):
        runtime.calibrate(
            artifact,
            weights=narrow_llama.weights,
            recipe=RTN,
            batches=make(),
            out=tmp_path / "out",
            progress=no_batch_runs,
        )
    assert list(tmp_path.iterdir()) == []


class Rows(torch.utils.data.Dataset[Any]):
    """Samples without a batch axis, as a DataLoader stacks them."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: value[index] for name, value in BATCH.items()}

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return (self[index] for index in range(len(self)))


GOOD: dict[str, Callable[[], Any]] = {
    "int32": lambda: [{name: value.int() for name, value in BATCH.items()}],
    "uint8": lambda: [{**BATCH, "attention_mask": MASK.to(torch.uint8)}],
    "bool mask": lambda: [{**BATCH, "attention_mask": MASK.bool()}],
    "types of zeros": lambda: [{**BATCH, "token_type_ids": torch.zeros_like(IDS)}],
    "labels": lambda: [{**BATCH, "labels": IDS}],
    "encoding": lambda: [BatchEncoding(dict(BATCH))],
    "loader": lambda: torch.utils.data.DataLoader(Rows(), batch_size=2),
    "generator": lambda: (batch for batch in [BATCH]),
    "tuple": lambda: (BATCH,),
}


@pytest.mark.parametrize("name", GOOD)
def test_batches_that_are_as_good(narrow_llama: Small, name: str) -> None:
    expected = runtime.evaluate(narrow_llama.load(), weights=narrow_llama.weights, batches=[BATCH])
    found = runtime.evaluate(narrow_llama.load(), weights=narrow_llama.weights, batches=GOOD[name]())
    assert found.perplexity == expected.perplexity


@pytest.mark.parametrize("name", ["int32", "bool mask", "loader", "generator"])
def test_a_calibration_with_batches_that_are_as_good(narrow_llama: Small, tmp_path: Path, name: str) -> None:
    for folder, batches in (("expected", [BATCH]), ("found", GOOD[name]())):
        runtime.calibrate(
            narrow_llama.load(),
            weights=narrow_llama.weights,
            recipe=recipe(NARROW_W4, modifier="GPTQModifier"),
            batches=batches,
            out=tmp_path / folder,
        )
    files = [sorted((tmp_path / folder).glob("*.safetensors")) for folder in ("expected", "found")]
    assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]]


CALLS: dict[str, tuple[dict[str, Any], type[SeqbuildError], str]] = {
    "artifact": ({"artifact": "artifacts/model"}, UsageError, "artifact is 'artifacts/model'.*runtime.load"),
    "recipe path": ({"recipe": "recipe.yaml"}, RecipeError, "recipe is 'recipe.yaml'.*from_file"),
    "recipe dict": ({"recipe": {"GPTQModifier": {}}}, RecipeError, "recipe is a dict"),
    "recipe": ({"recipe": object()}, RecipeError, "recipe is an object"),
    "device": ({"device": "gpu"}, DeviceError, "device 'gpu' is not available"),
    "device object": ({"device": torch.device("meta")}, DeviceError, "device 'meta' is not available"),
    "device number": ({"device": 0}, DeviceError, "device is 0"),
    "dtype": ({"dtype": torch.int8}, UsageError, "dtype is torch.int8"),
    "dtype name": ({"dtype": "half"}, UsageError, "dtype is 'half'"),
    "weights": ({"weights": None}, UsageError, "weights is None"),
    "weights bytes": ({"weights": b"model"}, UsageError, "weights is a bytes"),
    "out": ({"out": 3}, UsageError, "out is 3"),
    "shards": ({"max_shard_bytes": "5GB"}, UsageError, "max_shard_bytes is '5GB'"),
    "progress": ({"progress": True}, UsageError, "progress is True"),
    "every": ({"checkpoint_activations": -1}, UsageError, "checkpoint_activations is -1"),
    "budget": ({"activation_memory": "1GiB"}, UsageError, "activation_memory is '1GiB'"),
    "statistics": ({"statistics_memory": 1.5}, UsageError, "statistics_memory is 1.5"),
    "watchers": ({"watchers": [print]}, UsageError, "watchers is a list"),
    "modifiers": ({"own_modifiers": [3]}, UsageError, "own_modifiers is a list"),
}


@pytest.mark.parametrize("name", CALLS)
def test_arguments_of_calibrate(narrow_llama: Small, tmp_path: Path, name: str) -> None:
    changed, kind, message = CALLS[name]
    arguments = {
        "artifact": narrow_llama.load(),
        "weights": narrow_llama.weights,
        "recipe": RTN,
        "batches": [BATCH],
        "out": tmp_path / "out",
        **changed,
    }
    artifact = arguments.pop("artifact")
    with pytest.raises(kind, match=message):
        runtime.calibrate(artifact, **arguments)
    assert list(tmp_path.iterdir()) == []
    for_evaluate = {"weights", "device", "dtype", "progress"}
    if changed.keys() <= {*for_evaluate, "artifact"}:
        with pytest.raises(kind, match=message):
            runtime.evaluate(
                artifact, batches=[BATCH], **{key: arguments[key] for key in arguments if key in for_evaluate}
            )


@pytest.mark.parametrize("changed", ["bfloat16", "auto", torch.bfloat16])
def test_a_dtype_may_be_a_name(narrow_llama: Small, changed: Any) -> None:
    result = runtime.evaluate(narrow_llama.load(), weights=str(narrow_llama.weights), batches=[BATCH], dtype=changed)
    assert result.num_tokens == 30


@pytest.mark.parametrize(
    ("changed", "kind"),
    [
        ({"num_samples": "4"}, UsageError),
        ({"seq_len": 0}, UsageError),
        ({"batch_size": None}, UsageError),
        ({"device_type": "gpu"}, DeviceError),
        ({"dtype": "int4"}, UsageError),
        ({"recipe": "recipe.yaml"}, RecipeError),
        ({"sizes": [1]}, UsageError),
        ({"limits": "24GiB"}, UsageError),
        ({"budget": 3}, UsageError),
        ({"statistics_bytes": "1"}, UsageError),
    ],
)
def test_arguments_of_plan(narrow_llama: Small, changed: dict[str, Any], kind: type[SeqbuildError]) -> None:
    with pytest.raises(kind, match=next(iter(changed))):
        runtime.plan_artifact(narrow_llama.load(), **{"num_samples": 4, "seq_len": 16, "batch_size": 2, **changed})


@pytest.mark.parametrize("samples", [3, None, "abc", IDS, [IDS], [IDS[0].tolist()], [IDS[0].float()], [IDS[0][:0]]])
def test_samples_of_batches(samples: Any) -> None:
    with pytest.raises(DataError, match=r"sample"):
        runtime.batches(samples, 2)


def test_masks_of_batches() -> None:
    with pytest.raises(DataError, match=r"masks do not have the shapes of the samples"):
        runtime.batches([IDS[0]], 1, [MASK[0][:3]])


def test_inputs_of_a_loaded_subgraph(narrow_llama: Small) -> None:
    (first, *_) = narrow_llama.load().subgraphs
    model = torch.nn.Module()
    with pytest.raises(DataError, match=r"the subgraph is missing its input 'attention_mask'"):
        first.forward(model, input_ids=IDS)
    with pytest.raises(DataError, match=r"the subgraph has no input 'labels'"):
        first.forward(model, **BATCH, labels=IDS)


@pytest.mark.parametrize("path", [None, 3, b"artifact", ["artifact"]])
def test_paths(path: Any, tmp_path: Path) -> None:
    for call in (runtime.load, seqbuild.compile_model, runtime.load_tokens, seqbuild.verify_artifact):
        with pytest.raises(UsageError, match=r"must be a path"):
            call(path)
    with pytest.raises(RecipeError, match=r"the recipe must be the path of a file, not "):
        runtime.Recipe.from_file(path)
    with pytest.raises(UsageError, match=r"out is"):
        seqbuild.compile_model(tmp_path, out=path)


@pytest.mark.parametrize(
    "changed",
    [
        {"targets": 3},
        {"ignore": [None]},
        {"sample": {"input_ids": IDS}},
        {"targets_per_subgraph": "2"},
        {"leaves": None},
    ],
)
def test_options_of_compile(changed: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=next(iter(changed)).replace("_", " ")):
        seqbuild.compile_model(tmp_path, **changed)


def test_errors_survive_being_sent_to_another_process() -> None:
    error = DataError("batch 0 is None", hint="give a list")
    assert str(pickle.loads(pickle.dumps(error))).startswith("batch 0 is None")


@pytest.fixture(scope="module")
def t5(small: Callable[..., Small]) -> Small:
    sizes = {"d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8, "vocab_size": 258}
    return small("T5ForConditionalGeneration", "T5Config", {**sizes, "decoder_start_token_id": 0, "pad_token_id": 0})


LABELS = IDS[:, :5]
BAD_LABELS: dict[str, tuple[dict[str, Any], str]] = {
    "rank 3": ({"labels": LABELS[..., None]}, r"labels has the shape \[2, 5, 1\] \(expected"),
    "rank 1": ({"labels": LABELS[0]}, r"labels has the shape \[5\] \(expected"),
    "rows": ({"labels": LABELS[:1]}, r"labels has the shape \[1, 5\] for 2 samples"),
    "float": ({"labels": LABELS.float()}, r"labels is torch\.float32 \(expected"),
    "bool": ({"labels": LABELS.bool()}, r"labels is torch\.bool \(expected"),
    "large": ({"labels": LABELS * 0 + 258}, "labels has the token id 258, but the model's vocabulary has 258"),
    "negative": ({"labels": LABELS * 0 - 1}, r"labels has the token id -1 \(.*-100"),
    "lengths": (
        {"labels": LABELS, "decoder_input_ids": LABELS[:, :3]},
        r"labels has the shape \[2, 5\] for decoder_input_ids of \[2, 3\]",
    ),
    "list": ({"labels": LABELS.tolist()}, "labels is a list"),
}


@pytest.mark.parametrize("name", BAD_LABELS)
def test_labels_of_a_decoder_that_are_none(t5: Small, tmp_path: Path, name: str) -> None:
    entries, message = BAD_LABELS[name]
    bad = [{**BATCH, "labels": LABELS}, {**BATCH, **entries}]
    with pytest.raises(DataError, match="batch 1: " + message):
        runtime.evaluate(t5.load(), weights=t5.weights, batches=bad)
    with pytest.raises(DataError, match="batch 1: " + message):
        runtime.calibrate(t5.load(), weights=t5.weights, recipe=RTN, batches=bad, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_labels_of_another_width(t5: Small, dtype: torch.dtype) -> None:
    labels = LABELS.clamp(max=200)
    wide, narrow = ([{**BATCH, "labels": value}] for value in (labels, labels.to(dtype)))
    expected = runtime.evaluate(t5.load(), weights=t5.weights, batches=wide)
    assert runtime.evaluate(t5.load(), weights=t5.weights, batches=narrow).perplexity == expected.perplexity


def test_labels_of_which_none_counts(t5: Small) -> None:
    with pytest.raises(DataError, match="no label counts"):
        runtime.evaluate(t5.load(), weights=t5.weights, batches=[{**BATCH, "labels": LABELS * 0 - 100}])


def test_labels_of_a_causal_model_say_what_counts(narrow_llama: Small) -> None:
    """As in transformers' own loss; tokens of padding do not count in any case."""
    model = load_transformers(narrow_llama.weights)
    labels = IDS.clone()
    labels[0, :9] = labels[1, 3:5] = -100
    with torch.no_grad():
        expected = model(**BATCH, labels=labels).loss.double().exp().item()
    found = runtime.evaluate(narrow_llama.load(), weights=narrow_llama.weights, batches=[{**BATCH, "labels": labels}])
    assert found.num_tokens == int((labels[:, 1:] != -100).sum())
    assert found.perplexity == pytest.approx(expected, rel=1e-5)


def test_labels_of_a_causal_model_that_do_not_fit(narrow_llama: Small) -> None:
    for labels, message in (
        (LABELS, r"labels has the shape \[2, 5\] for \[2, 16\] tokens"),
        (IDS.float(), "labels is"),
    ):
        with pytest.raises(DataError, match=f"batch 0: {message}"):
            runtime.evaluate(narrow_llama.load(), weights=narrow_llama.weights, batches=[{**BATCH, "labels": labels}])


def test_labels_that_are_classes_do_not_matter_to_a_calibration(narrow_llama: Small, tmp_path: Path) -> None:
    batches = [{**BATCH, "labels": torch.tensor([-1.5, 1e6])}]
    runtime.calibrate(
        narrow_llama.load(), weights=narrow_llama.weights, recipe=RTN, batches=batches, out=tmp_path / "out"
    )
