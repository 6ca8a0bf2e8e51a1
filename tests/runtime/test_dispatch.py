from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from torch import nn

import runtime
from runtime.host import dispatch
from runtime.host.devices import resolve_device
from tests.tiny_models import make_inputs, tiny_model


@pytest.fixture
def no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "resolve_device", lambda name: torch.device("cpu"))


@pytest.mark.usefixtures("no_accelerator")
def test_without_an_accelerator_the_model_rests_and_runs_on_the_cpu() -> None:
    model = tiny_model("llama")
    inputs = make_inputs(model, 2, 7)
    with torch.no_grad():
        expected = model(**inputs).logits
        assert runtime.dispatch_for_sequential(model) is model
        assert torch.equal(model(**inputs).logits, expected)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert not any(hasattr(module, "_hf_hook") for module in model.modules())


@pytest.mark.usefixtures("no_accelerator")
def test_what_accelerate_had_moved_away_comes_back() -> None:
    model = tiny_model("llama")
    inputs = make_inputs(model, 2, 7)
    with torch.no_grad():
        expected = model(**inputs).logits
        cpu_offload(model, execution_device=torch.device("cpu"))
        assert all(parameter.is_meta for parameter in model.parameters())
        runtime.dispatch_for_sequential(model)
        assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
        assert torch.equal(model(**inputs).logits, expected)
    assert not any(hasattr(module, "_hf_hook") for module in model.modules())


@pytest.mark.usefixtures("no_accelerator")
def test_hooks_of_a_dispatched_model_are_taken_away() -> None:
    model = dispatch_model(tiny_model("llama"), {"": "cpu"}, force_hooks=True)
    assert hasattr(model, "_hf_hook")
    runtime.dispatch_for_sequential(model)
    assert not any(hasattr(module, "_hf_hook") for module in model.modules())


@pytest.mark.usefixtures("no_accelerator")
def test_a_model_without_weights_stays_without() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 2))
    assert runtime.dispatch_for_sequential(model)[0].weight.is_meta


def test_with_an_accelerator_weights_are_offloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(dispatch, "resolve_device", lambda name: torch.device("cuda:0"))
    monkeypatch.setattr(dispatch, "cpu_offload", lambda model, execution_device: calls.append(execution_device))
    runtime.dispatch_for_sequential(nn.Linear(2, 2))
    assert calls == [torch.device("cuda:0")]


# Names of devices.


def pretend(monkeypatch: pytest.MonkeyPatch, cuda: int = 0, xpu: int = 0) -> None:
    for name, count in (("cuda", cuda), ("xpu", xpu)):
        monkeypatch.setattr(getattr(torch, name), "is_available", lambda count=count: count > 0)
        monkeypatch.setattr(getattr(torch, name), "device_count", lambda count=count: count)


@pytest.mark.parametrize(
    ("cuda", "xpu", "name", "expected"),
    [
        (0, 0, "auto", "cpu"),
        (0, 0, "cpu", "cpu"),
        (2, 0, "auto", "cuda:0"),
        (2, 0, "cuda", "cuda:0"),
        (2, 0, "cuda:1", "cuda:1"),
        (2, 0, "cpu", "cpu"),
        (0, 1, "auto", "xpu:0"),
        (1, 1, "xpu", "xpu:0"),
    ],
)
def test_names(monkeypatch: pytest.MonkeyPatch, cuda: int, xpu: int, name: str, expected: str) -> None:
    pretend(monkeypatch, cuda, xpu)
    assert str(resolve_device(name)) == expected


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:-1", "gpu", "", "cpu:1", "meta", "mps", "cuda:x"])
def test_devices_that_are_not_there(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    pretend(monkeypatch)
    with pytest.raises(runtime.DeviceError) as caught:
        resolve_device(name)
    assert str(caught.value) == f"device {name!r} is not available (available: cpu; or use auto)"
