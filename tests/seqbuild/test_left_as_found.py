"""A trace leaves the process as it found it: nothing that is remembered meanwhile outlives it."""

from __future__ import annotations

import gc
import os
import random
import signal
import sys
import threading
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme

from runtime.errors import TraceError
from seqbuild import trace_subgraphs
from tests.seqbuild import remembering
from tests.tiny_models import make_inputs, randomize, run_chain, tiny_model

X = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))


ALL = tuple(remembering.PLACES)
LAYERS = [r"re:layers\.\d+$"]


def fresh(places: tuple[str, ...], *, is_glue: bool = True) -> remembering.Model:
    torch.manual_seed(0)
    return remembering.Model(places, is_glue=is_glue).eval()


def tables(model: remembering.Model) -> dict[tuple[int, str], torch.Tensor]:
    """What the model's code gets when it asks for its tables."""
    owners = (*model.layers, model.glue)
    return {(number, place): owner.table(place) for number, owner in enumerate(owners) for place in owner.places}


def forget() -> None:
    """As in a new process."""
    for cache in (remembering.unbounded, remembering.bounded, remembering.pair, remembering.Holder.method):
        cache.cache_clear()
    for kept in (remembering.TABLES, remembering.ORDERED, remembering.DEFAULT, remembering.LIST, remembering.DEQUE):
        kept.clear()


def test_what_runs_on_real_values_meanwhile_remembers_apart() -> None:
    forget()
    torch.manual_seed(0)
    opaque = ("local of a thread", "context")  # no step can be handed these
    places = tuple(place for place in ALL if not place.startswith("attribute") and place not in opaque)
    model = remembering.DecidingModel(places).eval()
    chain = trace_subgraphs(model, {"x": X}, LAYERS)
    assert remembering.TABLES == {}
    assert remembering.bounded.cache_info().currsize == remembering.unbounded.cache_info().currsize == 0
    for x in (X, torch.randn(3, 7, 4)):
        with torch.no_grad():
            assert torch.equal(run_chain(chain, model, {"x": x})["output"], model(x))


@pytest.mark.parametrize("is_glue", [True, False], ids=["glue", "layers"])
def test_what_is_remembered_does_not_outlive_the_trace(is_glue: bool) -> None:
    forget()
    model = fresh(ALL, is_glue=is_glue)
    for _ in range(2):  # again, with what the plain call remembers
        chain = trace_subgraphs(model, {"x": X}, LAYERS)
        expected = remembering.calculate()
        assert all(
            type(table) is torch.Tensor and torch.equal(table / table[0], expected) for table in tables(model).values()
        )
        with torch.no_grad():
            plain = model(X)
        assert torch.equal(run_chain(chain, model, {"x": X})["output"], plain)


def test_what_was_remembered_before_the_trace_is_there_afterwards() -> None:
    model = fresh(ALL)
    before = tables(model)
    trace_subgraphs(model, {"x": X}, LAYERS)
    after = tables(model)
    made_anew = [key for key, table in before.items() if after[key] is not table]
    assert {place for _, place in made_anew} <= {"nested dictionaries"}  # a sum of two


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_trace_that_ends_early_leaves_nothing_behind(kind: type[BaseException]) -> None:
    forget()

    class Failing(remembering.Model):
        is_failing = True

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = super().forward(x)
            if self.is_failing:
                raise kind("no luck")
            return x

    model = Failing(ALL).eval()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    with pytest.raises((kind, TraceError), match=r"no luck|sets remembered"):
        trace_subgraphs(model, {"x": X}, LAYERS)
    assert {name: vars(module) for name, module in model.named_modules()} == before
    model.is_failing = False
    assert all(type(table) is torch.Tensor for table in tables(model).values())
    assert type(model(X)) is torch.Tensor


def test_a_model_that_compressed_tensors_has_been_applied_to() -> None:
    """Its functions keep ranges of integers in a cache."""
    scheme = preset_name_to_scheme("W8A8", ["Linear"])
    config = QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"])
    model = randomize(tiny_model("llama")).eval()
    apply_quantization_config(model, config)
    for name, parameter in model.named_parameters():
        if name.endswith("_scale"):
            parameter.data.fill_(0.05)
    for cache in (item for item in gc.get_objects() if type(item) is type(remembering.unbounded)):
        if cache.__module__.startswith("compressed_tensors"):
            cache.cache_clear()
    inputs = make_inputs(model, 2, 7)
    for _ in range(2):
        chain = trace_subgraphs(model, inputs, ["LlamaDecoderLayer"])
        with torch.no_grad():
            expected = model(**inputs).logits
        assert type(expected) is torch.Tensor
        assert torch.equal(run_chain(chain, model, inputs)["logits"], expected)


def test_what_is_not_the_models_is_put_back_as_well() -> None:
    class Meddling(remembering.Model):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            os.environ["MEDDLED"] = "1"
            torch.manual_seed(1)
            random.seed(1)
            np.random.seed(1)
            torch.set_default_dtype(torch.float64)
            torch.use_deterministic_algorithms(True)
            warnings.simplefilter("ignore")
            self.training = True
            return super().forward(x)

    def look() -> list[Any]:
        return [
            torch.get_rng_state().tolist(),
            random.getstate(),
            np.random.get_state()[1].tolist(),
            torch.get_default_dtype(),
            torch.are_deterministic_algorithms_enabled(),
            list(warnings.filters),
            dict(os.environ),
            sys.path.copy(),
            model.training,
            signal.getsignal(signal.SIGINT),
            gc.get_threshold(),
        ]

    model = Meddling(()).eval()
    before = look()
    trace_subgraphs(model, {"x": X}, LAYERS)
    assert look() == before


def test_a_class_without_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    created = type("Created", (), {"__module__": None, "table": {}})
    monkeypatch.setattr(remembering, "CREATED", created(), raising=False)
    model = fresh(())
    model.created = created()
    assert len(trace_subgraphs(model, {"x": X}, LAYERS)) > 1


def test_two_threads_trace_one_after_the_other() -> None:
    models = [fresh(("cache", "globals", "attribute of another module")) for _ in range(2)]
    found: list[torch.Tensor] = [torch.empty(0)] * 2

    def work(number: int) -> None:
        chain = trace_subgraphs(models[number], {"x": X}, LAYERS)
        with torch.no_grad():
            found[number] = run_chain(chain, models[number], {"x": X})["output"]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with torch.no_grad():
        assert all(torch.equal(models[number](X), found[number]) for number in range(2))
