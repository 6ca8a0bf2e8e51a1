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

from runtime.errors import TraceError
from seqbuild import populate_concrete_args
from seqbuild.sample import default_sample, symbolic_inputs
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
        assert {(value.dtype, value.dim(), value.device.type) for value in sample.values()} == {
            (torch.int64, 2, "meta")
        }


def test_only_text_models_have_a_default_sample() -> None:
    with pytest.raises(TraceError, match="Linear takes no input_ids but input"):
        default_sample(nn.Linear(1, 1))


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
