"""Sample inputs: defaults of the signature, the default sample, symbolic sizes."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers import LlamaConfig, LlamaForCausalLM

from runtime.errors import TraceError
from seqbuild import populate_concrete_args
from seqbuild.sample.inputs import default_sample, symbolic_inputs
from seqbuild.sample.shape import SampleShape
from tests import zoo
from tests.tiny_models import tiny_model


class Everything(nn.Module):
    def forward(
        self,
        input_ids: Any,
        *rest: Any,
        scale: float = 2.0,
        use_cache: bool | None = None,
        labels: Any = None,
        **kwargs: Any,
    ) -> None: ...


def test_populate_concrete_args() -> None:
    concrete = populate_concrete_args(Everything(), {"input_ids": torch.zeros(1), "labels": 3})
    assert concrete == {"rest": [], "scale": 2.0, "use_cache": False, "kwargs": {}}
    assert list(concrete) == ["rest", "scale", "use_cache", "kwargs"]


def test_a_required_argument_that_the_sample_lacks() -> None:
    concrete = populate_concrete_args(Everything(), {})
    assert concrete["input_ids"] is inspect.Parameter.empty


def test_the_signature_is_read_through_decorators() -> None:
    class Decorated(nn.Module):
        def forward(self, x: Any, use_cache: bool = True) -> None: ...

    plain = Decorated.forward

    @functools.wraps(plain)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return plain(*args, **kwargs)

    Decorated.forward = wrapper  # type: ignore[method-assign]
    assert populate_concrete_args(Decorated(), {"x": 1}) == {"use_cache": False}
    llama = populate_concrete_args(tiny_model("llama"), {"input_ids": 1})
    assert llama["use_cache"] is False
    assert llama["kwargs"] == {}
    assert llama["labels"] is None


def test_default_sample() -> None:
    expected = {
        "llama": ["input_ids", "attention_mask"],
        "bert": ["input_ids", "attention_mask", "token_type_ids"],
        "t5": ["input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask"],
    }
    for name, inputs in expected.items():
        sample = default_sample(tiny_model(name))
        assert list(sample) == inputs
        for key, value in sample.items():
            assert (value.dtype, value.device.type) == (torch.int64, "cpu")
            assert value.shape == (3, 31 if key.startswith("decoder_") else 37)
        assert len(sample["input_ids"].unique()) > 30
        assert bool((sample["attention_mask"] == 1).all())


def test_the_default_sample_needs_no_weights() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1))
    assert {value.device.type for value in default_sample(model).values()} == {"cpu"}


def test_the_sample_has_the_shape_that_is_asked_for() -> None:
    model = tiny_model("llama")
    sample = default_sample(model, SampleShape(batch=2, sequence=9, padding="left", seed=1))
    assert sample["attention_mask"].tolist() == [[0] * 3 + [1] * 6, [0] * 2 + [1] * 7]
    other = default_sample(model, SampleShape(batch=2, sequence=9, padding="right", seed=2))
    assert other["attention_mask"].tolist() == [[1] * 6 + [0] * 3, [1] * 7 + [0] * 2]
    assert other["input_ids"].shape == sample["input_ids"].shape
    assert not torch.equal(other["input_ids"], sample["input_ids"])
    again = default_sample(model, SampleShape(batch=2, sequence=9, seed=1))
    assert torch.equal(again["input_ids"], sample["input_ids"])


def test_only_text_and_sounds_have_a_default_sample() -> None:
    with pytest.raises(TraceError, match="cannot create sample inputs for Linear \\(input\\)"):
        default_sample(nn.Linear(1, 1))


def small(name: str) -> Any:
    return zoo.small_model(next(case for case in zoo.cases() if case.name == name))


def test_types_of_seven_kinds() -> None:
    assert default_sample(small("masked LM/tapas"))["token_type_ids"].shape == (3, 37, 7)


def test_boxes_on_a_page() -> None:
    boxes = default_sample(small("masked LM/layoutlm"))["bbox"]
    assert (boxes.shape, boxes.dtype) == ((3, 37, 4), torch.int64)
    left, top, right, bottom = boxes.unbind(dim=-1)
    assert bool(((left <= right) & (top <= bottom) & (boxes >= 0).all(-1) & (boxes < 1000).all(-1)).all())


def test_a_language_for_each_row() -> None:
    assert default_sample(small("masked LM/xmod"))["lang_ids"].tolist() == [0, 0, 0]


def test_codes_of_sounds() -> None:
    assert default_sample(small("speech seq2seq/dia"))["decoder_input_ids"].shape == (3, 31, 9)
    assert default_sample(small("speech seq2seq/kyutai_speech_to_text"))["input_ids"].shape == (3, 37, 33)
    music = default_sample(small("causal LM/musicgen"))
    assert (music["input_ids"].shape, music["attention_mask"].shape) == ((3 * 4, 37), (3, 37))


def symbolic(**inputs: Any) -> dict[str, Any]:
    return symbolic_inputs(inputs, FakeTensorMode(shape_env=ShapeEnv()))


def hints(tensor: torch.Tensor) -> list[int | str]:
    return [f"s{size.node.hint}" if isinstance(size, torch.SymInt) else size for size in tensor.shape]


def test_sizes_become_symbols() -> None:
    inputs = symbolic(ids=torch.ones(2, 5, dtype=torch.int32), scale=torch.tensor(1.0), flag=True, name="x", none=None)
    assert hints(inputs["ids"]) == ["s2", "s5"]
    assert inputs["ids"].dtype == torch.int32
    assert inputs["ids"].device.type == "cpu"
    assert hints(inputs["scale"]) == []
    assert (inputs["flag"], inputs["name"], inputs["none"]) == (True, "x", None)


def test_a_batch_of_one_is_traced_as_a_larger_one() -> None:
    inputs = symbolic(ids=torch.ones(1, 5), mask=torch.ones(1, 1, 5))
    assert hints(inputs["ids"]) == ["s3", "s5"]
    assert hints(inputs["mask"]) == ["s3", 1, "s5"]


def test_a_batch_of_one_is_the_same_for_all_inputs() -> None:
    inputs = symbolic(ids=torch.ones(1, 3), mask=torch.ones(1, 4), other=torch.ones(1, 7))
    leading = {hints(tensor)[0] for tensor in inputs.values()}
    assert leading == {"s5"}  # 3 and 4 are taken


def test_a_size_of_one_among_larger_batches_stays() -> None:
    inputs = symbolic(ids=torch.ones(2, 5), bias=torch.ones(1, 5))
    assert hints(inputs["bias"]) == [1, "s5"]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_values_are_never_looked_at(device: str) -> None:
    assert hints(symbolic(x=torch.empty(2, 4, device=device))["x"]) == ["s2", "s4"]
