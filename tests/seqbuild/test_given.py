"""What the Python API says to a model, a sample or a subgraph's inputs that it cannot work with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BatchEncoding

from runtime.errors import DataError, SeqbuildError, TargetError, UsageError
from seqbuild import Subgraph, match_modules, trace_subgraphs
from tests.tiny_models import make_inputs, tiny_model

MODEL = tiny_model("llama")
SAMPLE = make_inputs(MODEL, 2, 7)
IDS = SAMPLE["input_ids"]
LAYERS = ["LlamaDecoderLayer"]


@pytest.fixture(scope="module")
def chain() -> list[Subgraph]:
    return trace_subgraphs(MODEL, BatchEncoding(dict(SAMPLE)), LAYERS)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (
            None,
            r"the sample is None \(give a dict from input names to tensors; forward takes input_ids, attention_mask",
        ),
        ("text", "the sample is 'text'"),
        ({}, "the sample is empty"),
        (IDS, "the sample is a torch.Tensor"),
        ([SAMPLE], "the sample is a list"),
        ({0: IDS}, "the sample has 0, which LlamaForCausalLM.forward does not take"),
        ({"input_ids": IDS.tolist()}, "input_ids of the sample is a list"),
        ({"input_ids": IDS.numpy()}, "input_ids of the sample is a numpy.ndarray"),
        ({"input_ids": "text"}, "input_ids of the sample is 'text'"),
        ({"input_ids": IDS[:0]}, r"input_ids of the sample is a tensor of shape \[0, [0-9]+\], which is empty"),
        ({"input_ids": IDS.to_sparse()}, "input_ids of the sample is a tensor of layout torch.sparse_coo"),
        ({"input_ids": IDS[0]}, r"input_ids of the sample is torch.int64 \[[0-9]+\] \(give token ids"),
        ({"input_ids": IDS.float()}, "input_ids of the sample is torch.float32"),
    ],
)
def test_samples(sample: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        trace_subgraphs(MODEL, sample, LAYERS)


def test_a_sample_of_a_model_that_names_its_arguments() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(DataError, match=r"the sample has 'x', which Sequential.forward does not take"):
        trace_subgraphs(layer, {"x": torch.zeros(2, 2)}, ["Linear"])
    with pytest.raises(DataError, match=r"the sample has no input, which _Two.forward requires"):
        trace_subgraphs(_Two(), {"one": torch.zeros(2, 2)}, ["Linear"])


class _Two(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(2, 2)

    def forward(self, one: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
        return self.linear(one) + self.linear(input)


@pytest.mark.parametrize("model", ["name", None, 3, {"model": MODEL}])
def test_models(model: Any, chain: list[Subgraph]) -> None:
    for call in (lambda: trace_subgraphs(model, SAMPLE, LAYERS), lambda: chain[0].forward(model, **SAMPLE)):
        with pytest.raises(UsageError, match=r"model is .*must be a torch.nn.Module"):
            call()


@pytest.mark.parametrize(
    ("options", "kind", "reason"),
    [
        ({"sequential_targets": None}, TargetError, "the list of sequential targets is empty"),
        ({"sequential_targets": 3}, TargetError, "3 is not a name"),
        ({"sequential_targets": [3]}, TargetError, "target is 3"),
        ({"ignore": 3}, TargetError, "3 is not a name"),
        ({"targets_per_subgraph": "1"}, UsageError, "targets per subgraph is '1'"),
        ({"targets_per_subgraph": 0}, UsageError, "targets per subgraph is 0"),
    ],
)
def test_options(options: dict[str, Any], kind: type[SeqbuildError], reason: str) -> None:
    with pytest.raises(kind, match=reason):
        trace_subgraphs(MODEL, SAMPLE, **{"sequential_targets": LAYERS, **options})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"input_ids": None}, "the subgraph's input input_ids is None"),
        ({"input_ids": IDS.tolist()}, "the subgraph's input input_ids is a list"),
        (
            {"input_ids": IDS[0]},
            r"the subgraph's input input_ids is torch.int64 \[[0-9]+\] \(expected torch.int64 \[\*, ",
        ),
        ({"input_ids": IDS.float()}, "the subgraph's input input_ids is torch.float32"),
        ({"position_ids": IDS}, "the subgraph has no input 'position_ids'"),
    ],
)
def test_inputs_of_a_subgraph(chain: list[Subgraph], changed: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        chain[0].forward(MODEL, **{**SAMPLE, **changed})


def test_a_subgraph_without_an_input(chain: list[Subgraph]) -> None:
    with pytest.raises(DataError, match=r"the subgraph's input 'input_ids' is missing"):
        chain[0].forward(MODEL)


def test_one_name_is_as_good_as_a_list_of_one() -> None:
    assert list(match_modules(MODEL, "LlamaMLP")) == list(match_modules(MODEL, ["LlamaMLP"]))
