"""Products of halves in float32: what they are, to the rounding, and that they are made so where it is quicker."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional

import runtime
from runtime import chain
from runtime.host import half_precision as half_products
from runtime.host.half_precision import quick_halves, slow_halves
from runtime.planning.request import plan_artifact
from tests.runtime.small import NARROW_W4, RECIPES, Small, calibrate, recipe, token_batches
from tests.sweep import sweep

HALVES = (torch.bfloat16, torch.float16)
Product = Callable[..., torch.Tensor]


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A processor that multiplies neither."""
    monkeypatch.setattr(half_products, "slow_halves", lambda: HALVES)
    return


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The products of two matrices that are made from here on."""
    made: list[Any] = []
    real = half_products._PRODUCTS[torch.ops.aten.mm.default]
    record = {torch.ops.aten.mm.default: lambda *args: made.append(args) or real(*args)}
    monkeypatch.setattr(half_products, "_PRODUCTS", half_products._PRODUCTS | record)
    return made


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *mask: torch.Tensor) -> torch.Tensor:
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask[0] if mask else None, scale=0.3)


def attend_causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return functional.scaled_dot_product_attention(query, key, value, is_causal=True)


def attend_in_heads(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """As models do it: heads are split off the features, and joined by a view of the result."""
    parts = [part.view(3, -1, 4, 8).transpose(1, 2) for part in (query, key, value)]
    return functional.scaled_dot_product_attention(*parts).transpose(1, 2).view(3, -1, 32)


CASES: dict[str, tuple[Product, list[torch.Tensor]]] = {
    "mm": (torch.mm, [random(7, 40), random(40, 9, seed=1)]),
    "mm, transposed": (lambda a, b: a.t() @ b.t(), [random(40, 7), random(9, 40, seed=1)]),
    "mm, no rows": (torch.mm, [random(0, 40), random(40, 9)]),
    "mm, nothing to sum": (torch.mm, [random(7, 0), random(0, 9)]),
    "linear": (functional.linear, [random(2, 3, 40), random(9, 40, seed=1)]),
    "linear with bias": (functional.linear, [random(2, 3, 40), random(9, 40, seed=1), random(9, seed=2)]),
    "addmm": (lambda c, a, b: torch.addmm(c, a, b, beta=0.5, alpha=2), [random(7, 1), random(7, 40), random(40, 9)]),
    "addmm, nothing of one": (
        lambda c, a, b: torch.addmm(c, a, b, beta=0, alpha=2),
        [torch.full((9,), math.inf), random(7, 40), random(40, 9)],
    ),
    "baddbmm, nothing of one": (
        lambda c, a, b: torch.baddbmm(c, a, b, beta=0, alpha=0.5),
        [torch.full((5, 7, 9), math.nan), random(5, 7, 40), random(5, 40, 9)],
    ),
    "bmm": (torch.bmm, [random(5, 7, 40), random(5, 40, 9, seed=1)]),
    "matmul with heads": (torch.matmul, [random(2, 3, 7, 40), random(2, 3, 40, 9, seed=1)]),
    "baddbmm": (
        lambda c, a, b: torch.baddbmm(c, a, b, beta=2, alpha=0.5),
        [random(1, 7, 9), random(5, 7, 40), random(5, 40, 9)],
    ),
    "einsum": (lambda a, b: torch.einsum("bsi,bti->bst", a, b), [random(2, 3, 40), random(2, 5, 40, seed=1)]),
    "mv": (torch.mv, [random(7, 40), random(40, seed=1)]),
    "conv1d": (functional.conv1d, [random(2, 6, 20), random(4, 6, 3, seed=1), random(4, seed=2)]),
    "conv2d in groups": (
        lambda x, w: functional.conv2d(x, w, groups=2, padding=1),
        [random(2, 6, 8, 8), random(4, 3, 3, 3)],
    ),
    "attention": (attend, [random(3, 4, 6, 8), random(3, 4, 11, 8, seed=1), random(3, 4, 11, 8, seed=2)]),
    "attention, mask": (
        attend,
        [
            random(3, 4, 6, 8),
            random(3, 4, 11, 8, seed=1),
            random(3, 4, 11, 8, seed=2),
            random(3, 1, 6, 11, seed=3),
        ],
    ),
    "attention, one mask": (
        attend,
        [random(3, 4, 6, 8), random(3, 4, 11, 8, seed=1), random(3, 4, 11, 8, seed=2), random(6, 11, seed=3)],
    ),
    "attention, mask of heads": (
        attend,
        [random(3, 4, 6, 8), random(3, 4, 11, 8), random(3, 4, 11, 8, seed=2), random(1, 4, 6, 11, seed=3)],
    ),
    "attention, mask for all queries": (
        attend,
        [random(3, 4, 6, 8), random(3, 4, 11, 8), random(3, 4, 11, 8, seed=2), random(3, 1, 1, 11, seed=3)],
    ),
    "attention, grouped": (
        lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        [random(3, 4, 6, 8), random(3, 2, 11, 8, seed=1), random(3, 2, 11, 8, seed=2)],
    ),
    "attention, a slice": (
        lambda q, k, v: attend(q[:, 1:, ::2], k, v),
        [random(3, 5, 6, 8), random(3, 4, 11, 8, seed=1), random(3, 4, 11, 8, seed=2)],
    ),
    "attention, no samples": (attend, [random(0, 4, 6, 8), random(0, 4, 6, 8), random(0, 4, 6, 8)]),
    "attention, causal": (attend_causal, [random(3, 4, 6, 8), random(3, 4, 6, 8, seed=1), random(3, 4, 6, 8, seed=2)]),
    "attention, heads": (attend_in_heads, [random(3, 6, 32), random(3, 11, 32, seed=1), random(3, 11, 32, seed=2)]),
}


PARTS = (64, half_products.NUMBERS_AT_A_TIME)


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize(
    ("name", "dtype", "numbers"),
    sweep(
        itertools.product(CASES, HALVES, PARTS),
        *((name, *way) for name, way in zip(CASES, itertools.cycle(itertools.product(HALVES, PARTS)), strict=False)),
    ),
)
def test_it_is_the_product_rounded_once(
    name: str, dtype: torch.dtype, numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(half_products, "NUMBERS_AT_A_TIME", numbers)
    product, tensors = CASES[name]
    halves = [tensor.to(dtype) for tensor in tensors]
    exact = product(*(half.double() for half in halves))
    with torch.no_grad(), quick_halves("cpu"):
        found = product(*halves)
    plain = product(*halves)
    assert found.dtype == dtype and found.shape == exact.shape
    assert found.stride() == plain.stride()
    rounding = torch.finfo(dtype).eps / 2
    assert torch.allclose(found.double(), exact, rtol=rounding * 1.01, atol=1e-5)


@pytest.mark.usefixtures("slow")
def test_what_torch_refuses_is_refused() -> None:
    half = random(7, 40).bfloat16()
    sparse = torch.mm(half.to_sparse(), half.t())
    with torch.no_grad(), quick_halves("cpu"):
        with pytest.raises(RuntimeError, match="dtype"):
            torch.mm(half, random(40, 9))
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            torch.mm(half, random(41, 9).bfloat16())
        assert torch.equal(torch.mm(half.to_sparse(), half.t()), sparse)


@pytest.mark.usefixtures("slow")
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_higher_order_operators_go_through() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    query = random(1, 2, 16, 16)
    with torch.no_grad(), quick_halves("cpu"):
        found = flex_attention(query, query, query)
    assert torch.allclose(found, functional.scaled_dot_product_attention(query, query, query), atol=1e-5)


@pytest.mark.usefixtures("slow")
def test_whole_numbers_are_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randint(-3, 4, shape, generator=generator).bfloat16() for shape in ((50, 30), (30, 20)))
    with quick_halves("cpu"):
        found = first @ second
    assert torch.equal(found, (first.double() @ second.double()).bfloat16())


def test_nothing_is_changed_where_the_processor_multiplies_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half_products, "slow_halves", lambda: (torch.float16,))
    made = recorded(monkeypatch)
    first, second = random(7, 40).bfloat16(), random(40, 9).bfloat16()
    with quick_halves("cpu"):
        assert torch.equal(first @ second, torch.mm(first, second))
        assert not made
        assert torch.mm(first.half(), second.half()).dtype == torch.float16
        assert made
    made.clear()
    with quick_halves("cuda"):
        torch.mm(first.half(), second.half())
    assert not made


@pytest.mark.parametrize("numbers", [None, lambda: False, lambda: True])
def test_the_processor_is_asked(numbers: Callable[[], bool] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", numbers, raising=False)
    monkeypatch.setattr(torch._C, "_has_mkldnn", True)
    slow_halves.cache_clear()
    try:
        assert (torch.bfloat16 in slow_halves()) == (numbers is None or not numbers())
    finally:
        slow_halves.cache_clear()


@pytest.mark.usefixtures("slow")
def test_runs_use_it(sharded_llama: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both passes of a calibration, and an evaluation; the result is nearly the same, and quantized as well."""
    made = recorded(monkeypatch)
    one = calibrate(sharded_llama, recipe(RECIPES["W4A16"], modifier="GPTQModifier"), tmp_path / "quick")
    measured = 3 * (7 + 6 + 6)  # the first batch tells which module is the last one
    assert len(made) == measured + 2 * 3 * 7
    quick = runtime.evaluate(sharded_llama.load(), weights=sharded_llama.weights, batches=token_batches())
    monkeypatch.setattr(half_products, "slow_halves", lambda: ())
    plain = runtime.evaluate(sharded_llama.load(), weights=sharded_llama.weights, batches=token_batches())
    assert quick.perplexity == pytest.approx(plain.perplexity, rel=1e-2)
    other = calibrate(sharded_llama, recipe(RECIPES["W4A16"], modifier="GPTQModifier"), tmp_path / "plain")
    for quickly, plainly in zip(one.modules, other.modules, strict=True):
        assert quickly.error == pytest.approx(plainly.error, rel=0.05)


def test_the_plan_counts_its_copies(sharded_llama: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    text = recipe(NARROW_W4, modifier="GPTQModifier")
    working = []
    for slow in ((), HALVES):
        monkeypatch.setattr(half_products, "slow_halves", lambda slow=slow: slow)
        plan, _, _ = plan_artifact(sharded_llama.load(), recipe=text, num_samples=8, seq_len=40, batch_size=4)
        working.append(plan.steps[0].working)
    widest = 4 * 40 * 256 * 4  # the input of down_proj, in float32
    assert widest <= working[1] - working[0] <= 3 * widest + 4 * math.prod((256, 128))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, ()),
        ({"sources": ["torch.ops.aten.to.dtype(x, torch.float16)"]}, ("float16",)),
        ({"sources": ["torch.bfloat16, torch.float32"]}, ("bfloat16",)),
        ({"constants": {"c": torch.zeros(1, dtype=torch.float16)}}, ("float16",)),
        ({"parameters": "bfloat16"}, ("bfloat16",)),
        ({"inputs": "float32"}, ("bfloat16", "float16")),  # takes any floating point tensor
    ],
)
def test_halves_that_code_may_compute_in(change: dict[str, Any], expected: tuple[str, ...], llama: Small) -> None:
    artifact = llama.load()
    manifest = artifact.manifest
    artifact.constants |= change.get("constants", {})
    if "parameters" in change:
        name, entry = next(iter(manifest.parameters.items()))
        entries = {**manifest.parameters, name: replace(entry, dtype=change["parameters"])}
        artifact.manifest = replace(manifest, parameters=entries)
    if "inputs" in change:
        inputs = tuple(replace(entry, dtype=change["inputs"]) for entry in manifest.inputs)
        artifact.manifest = replace(manifest, inputs=inputs)
    sources = change.get("sources", [subgraph.source for subgraph in artifact.subgraphs])
    other: Any = SimpleNamespace(manifest=SimpleNamespace(is_portable=False, inputs=manifest.inputs))
    assert chain._named_halves(other, sources) == {"bfloat16", "float16"}
    artifact.named_halves = chain._named_halves(artifact, sources)
    assert artifact.named_halves == frozenset(expected)
    for dtype in (torch.float32, *HALVES):
        halves = artifact.subgraphs[0].halves(artifact.empty_model(dtype))
        known = {name.removeprefix("torch.") for name in map(str, (*halves, dtype))}
        assert known == {*expected, str(dtype).removeprefix("torch.")}


def test_a_run_without_slow_halves_has_no_mode(
    sharded_llama: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every operator of a run costs some microseconds more if a mode sees it."""
    made = recorded(monkeypatch)
    monkeypatch.setattr(half_products, "slow_halves", lambda: (torch.float16,))
    entered: list[Any] = []
    monkeypatch.setattr(half_products, "_InFloat32", entered.append)
    calibrate(sharded_llama, recipe(RECIPES["W4A16"], modifier="GPTQModifier"), tmp_path / "out")
    runtime.evaluate(sharded_llama.load(), weights=sharded_llama.weights, batches=token_batches())
    assert (made, entered) == ([], [])
