"""Rewritten code computes the same bits as the code of the artifact: attention without masks, rows by parts."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import runtime
from runtime.errors import ArtifactError
from runtime.host import half_precision
from runtime.host.dispatch_modes import LeanDispatchMode
from runtime.language import tiles
from runtime.language.attention import attention, is_exactly_causal, repeated
from runtime.language.guards import guarded
from runtime.language.program import Program, Run, compile_program
from runtime.language.rewrite import rewrite
from runtime.planning.shapes import ShapeRun
from seqbuild.verify.running import with_weights
from tests.attacks.attack import program
from tests.conftest import CompileOnce
from tests.runtime.small import Small
from tests.sweep import sweep
from tests.tiny_models import ZOO, make_inputs, tiny_model

CPU = torch.device("cpu")
CALL = torch.ops.aten.scaled_dot_product_attention.default
S = 48


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Of floating point numbers, so that zeros of both signs and NaN count."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(tensor.element_size())
    return tensor.contiguous().view(integer) if tensor.is_floating_point() and integer else tensor


def assert_same_bits(got: Any, expected: Any) -> None:
    assert got.shape == expected.shape and got.dtype == expected.dtype and got.stride() == expected.stride()
    assert torch.equal(bits(got), bits(expected))


class Kernels(LeanDispatchMode):
    """Counts the calls of attention's kernel on the CPU.

    Attributes:
        causal: the calls without a mask.
        masked: those with one.
        heads: of the keys of each call.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.causal = self.masked = 0
        self.heads: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
            is_masked = (kwargs or {}).get("attn_mask") is not None
            self.causal += not is_masked
            self.masked += is_masked
            self.heads.append(args[1].shape[1])
        return func(*args, **(kwargs or {}))


def operands(
    dtype: torch.dtype = torch.bfloat16, size: int = S, heads: int = 4, kept: int = 4, width: int = 16, samples: int = 2
) -> tuple[torch.Tensor, ...]:
    """Query, key and value [B, H, S, D], with the strides that projections have."""
    generator = torch.Generator().manual_seed(0)
    counts = (heads, kept, kept)
    return tuple(
        (torch.randn(samples, size, count, width, generator=generator) * 3).to(dtype).transpose(1, 2)
        for count in counts
    )


def triangle(size: int = S) -> torch.Tensor:
    return torch.ones(size, size, dtype=torch.bool).tril()


def window(width: int) -> torch.Tensor:
    return triangle() & ~torch.ones(S, S, dtype=torch.bool).tril(-width)


def padded(side: str, *rows: int) -> torch.Tensor:
    """A mask [2, 1, S, S] of samples that are padded by so many tokens."""
    seen = torch.ones(2, 1, 1, S, dtype=torch.bool)
    for row, count in enumerate(rows):
        seen[row, ..., : count if side == "left" else S] &= side != "left"
        seen[row, ..., S - count :] &= side == "left"
    return triangle() & seen


def numbers(mask: torch.Tensor, fill: float, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, fill)


LOWEST = torch.finfo(torch.bfloat16).min
SLOPES = (
    -torch.tensor([0.5, 0.25, 0.125, 0.0625]).view(1, 4, 1, 1)
    * (torch.arange(S).view(S, 1) - torch.arange(S).view(1, S)).abs()
)
BY_HEAD = triangle().expand(1, 4, S, S).clone()
BY_HEAD[0, 2, 7, 3] = False
NOT_A_NUMBER = numbers(triangle(), -math.inf)
NOT_A_NUMBER[0, 1] = math.nan
CAUSAL = {
    "booleans": triangle()[None, None].expand(2, 1, S, S),
    "booleans of one sample": triangle()[None, None],
    "two dimensions": triangle(),
    "every head": triangle().expand(2, 4, S, S).clone(),
    "infinity": numbers(triangle(), -math.inf)[None, None],
    "the lowest number": numbers(triangle(), LOWEST).expand(2, 1, S, S),
    "the lowest number, in float32": numbers(triangle(), LOWEST, torch.float32)[None, None],
    "a window of the whole length": window(S)[None, None],
    "a longer window": window(3 * S)[None, None],
    "nothing padded": padded("right", 0, 0),
}
OTHER = {
    "a window": window(S - 1)[None, None],
    "padded left": padded("left", 3, 0),
    "padded right": padded("right", 0, 1),
    "everything": torch.ones(1, 1, S, S, dtype=torch.bool),
    "a prefix": (triangle() | (torch.arange(S) < 2))[None, None],
    "a bias by distance": (SLOPES + numbers(triangle(), -math.inf, torch.float32)).to(torch.bfloat16),
    "one head differs": BY_HEAD,
    "a weak fill": numbers(triangle(), -1e4)[None, None],
    "not a number": NOT_A_NUMBER[None, None],
    "a row for all": torch.ones(1, 1, 1, S, dtype=torch.bool),
    "bias below the diagonal": numbers(triangle(), -math.inf)[None, None] + 0.5,
}


@pytest.mark.parametrize("name", [*CAUSAL, *OTHER])
@torch.no_grad()
def test_only_an_exactly_causal_mask_is_left_out(name: str) -> None:
    mask = {**CAUSAL, **OTHER}[name]
    run = Run(device=CPU, dtype=torch.bfloat16)
    given = operands()
    with Kernels() as kernels:
        got = attention(run, *given, mask, scale=0.2)
    assert (kernels.causal, kernels.masked) == ((1, 0) if name in CAUSAL else (0, 1))
    assert_same_bits(got, CALL(*given, mask, scale=0.2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("size", "width", "kept"),
    sweep(
        [
            (size, width, kept)
            for size in (32, 33, 64, 127, 192, 257, 513, 769, 1100)
            for width in (8, 16, 64, 80, 128, 256)
            for kept in (1, 2, 4)
        ],
        (33, 16, 2),
        (257, 64, 1),
        (513, 8, 4),
    ),
)
@torch.no_grad()
def test_bits_are_those_of_the_recorded_call(dtype: torch.dtype, size: int, width: int, kept: int) -> None:
    query, key, value = operands(dtype, size, kept=kept, width=width)
    parts = [one[:, :, None].expand(2, kept, 4 // kept, size, width) for one in (key, value)]
    shape = [2, 4, size, width]
    whole = [one.reshape(shape) for one in parts]
    run = Run(device=CPU, dtype=dtype)
    for mask in (triangle(size).expand(2, 1, size, size), numbers(triangle(size), -math.inf, dtype), one_padded(size)):
        with Kernels() as kernels:
            got = attention(run, query, *(repeated(one, shape) for one in parts), mask)
        assert kernels.heads == [kept]
        assert_same_bits(got, CALL(query, *whole, mask))


def one_padded(size: int) -> torch.Tensor:
    mask = triangle(size).expand(2, 1, size, size).clone()
    mask[0, :, :, : size // 2] &= torch.eye(size, dtype=torch.bool)[:, : size // 2]
    return mask


@torch.no_grad()
def test_bits_are_the_same_where_halves_are_computed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half_precision, "slow_halves", lambda: (torch.bfloat16,))
    monkeypatch.setattr(half_precision, "NUMBERS_AT_A_TIME", 2**14)
    query, key, value = operands(size=300, kept=2, width=64)
    parts = [one[:, :, None].expand(2, 2, 2, 300, 64) for one in (key, value)]
    mask = triangle(300).expand(2, 1, 300, 300)
    run, shape = Run(device=CPU, dtype=torch.bfloat16), [2, 4, 300, 64]
    with half_precision.quick_halves("cpu"):
        got = attention(run, query, *(repeated(one, shape) for one in parts), mask)
        assert_same_bits(got, CALL(query, *(one.reshape(shape) for one in parts), mask))


@torch.no_grad()
def test_a_mask_is_compared_once_until_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[torch.Tensor] = []

    def compare(mask: torch.Tensor) -> bool:
        compared.append(mask)
        return is_exactly_causal(mask)

    monkeypatch.setattr("runtime.language.attention.is_exactly_causal", compare)
    run, mask = Run(device=CPU, dtype=torch.bfloat16), CAUSAL["every head"].clone()
    given = operands()
    for _ in range(3):
        attention(run, *given, mask)
    assert len(compared) == 1
    mask[:, :, 5, 2] = False
    assert_same_bits(attention(run, *given, mask), CALL(*given, mask))
    assert len(compared) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda given: (*given[:3], triangle(S)[None, None, :, : S - 1]),
        lambda given: (*given[:3], triangle(S).expand(3, 1, S, S)),
        lambda given: (given[0], given[1][:, :, 1:], given[2][:, :, 1:], triangle(S)[:, 1:]),
        lambda given: (given[0], given[1][:, :2], given[2][:, :2], triangle(S)),
        lambda given: (*given[:3], triangle(S).to(torch.int64)),
        lambda given: (*given[:3], numbers(triangle(S), -math.inf, torch.float64)),
        lambda given: (*(one[0] for one in given), triangle(S)),
    ],
)
@torch.no_grad()
def test_other_operands_are_taken_or_refused_as_recorded(change: Callable[[Any], Any]) -> None:
    given, run = change(operands()), Run(device=CPU, dtype=torch.bfloat16)
    try:
        expected = CALL(*given)
    except RuntimeError as error:
        with pytest.raises(RuntimeError) as caught:
            attention(run, *given)
        assert str(caught.value) == str(error)
    else:
        assert_same_bits(attention(run, *given), expected)


@pytest.mark.parametrize("is_repeated", [False, True])
@torch.no_grad()
def test_operands_that_torch_does_not_check_are_refused(is_repeated: bool) -> None:
    run = Run(device=CPU, dtype=torch.float32)
    query, key, value = operands(torch.float32, kept=2)
    longer = torch.randn(*value.shape[:2], 2 * S, value.shape[3])
    if is_repeated:
        key, value, longer = (
            repeated(one[:, :, None].expand(2, 2, 2, *one.shape[2:]), [2, 4, *one.shape[2:]])
            for one in (key, value, longer)
        )
    with pytest.raises(ArtifactError, match=rf"with {S} keys and {2 * S} values"):
        attention(run, query, key, longer)
    with pytest.raises(ArtifactError, match="mask in float32"):
        attention(run, query.double(), key, value, numbers(triangle(S), -math.inf, torch.float32))


def test_only_repeated_heads_are_left_to_attention() -> None:
    heads = torch.randn(2, 3, 1, 5, 8)
    assert type(repeated(heads.expand(2, 3, 2, 5, 8), [2, 6, 5, 8])) is not torch.Tensor
    assert type(repeated(heads.repeat(1, 1, 2, 1, 1), [2, 6, 5, 8])) is torch.Tensor
    assert type(repeated(heads.expand(2, 3, 2, 5, 8), [2, 3, 10, 8])) is torch.Tensor
    assert type(repeated(heads, [2, 3, 5, 8])) is torch.Tensor
    assert type(repeated(torch.randn(1, 3, 2, 5, 8).expand(2, 3, 2, 5, 8), [2, 6, 5, 8])) is torch.Tensor


class Counted(tiles.Tiles):
    """Counts the regions that are computed by parts."""

    count = 0

    def __call__(self, *args: Any) -> list[torch.Tensor] | None:
        found = super().__call__(*args)
        Counted.count += found is not None
        return found


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of few rows, and of small tensors as well."""
    monkeypatch.setattr(tiles, "SMALLEST", 0)
    monkeypatch.setattr(tiles, "NUMBERS_AT_A_TIME", 64)
    monkeypatch.setattr("runtime.language.rewrite.Tiles", Counted)
    monkeypatch.setattr(Counted, "count", 0)


def run_both(artifact: runtime.Artifact, model: torch.nn.Module, inputs: Mapping[str, Any]) -> None:
    """Run the chain by rewritten code, and every subgraph by the artifact's own as well."""
    values, run = dict(inputs), artifact.run(CPU, next(model.parameters()).dtype)
    plain: dict[str, Program] = {}
    for subgraph in artifact.subgraphs:
        given = {name: values[name] for name in subgraph.input_names}
        code = plain.setdefault(subgraph.entry.file, compile_program(subgraph.source, subgraph.entry.file))
        expected = subgraph.compute(model, given, run, code)
        got = subgraph.compute(model, given, run)
        assert list(got) == list(expected)
        for name, value in expected.items():
            if isinstance(value, torch.Tensor):
                assert_same_bits(got[name], value)
        values.update(got)


WIDE: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 64, "intermediate_size": 128},
    "gpt2": {"n_embd": 64},
    "mixtral": {"hidden_size": 64, "intermediate_size": 64},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", sweep(ZOO, "llama", "gemma2", "gpt2"))
@pytest.mark.usefixtures("small_parts")
def test_a_chain_of_rewritten_code_has_the_same_bits(name: str, dtype: torch.dtype, compiled: CompileOnce) -> None:
    changes = WIDE.get(name, {})
    artifact = runtime.load(compiled(name, config=changes))
    source = tiny_model(name, dtype=dtype, **changes)
    model = with_weights(artifact, source)
    with torch.no_grad(), Kernels() as kernels:
        for batch, length, padding in ((2, 40, ""), (3, 33, "left"), (1, 50, ""), (2, 60, "right")):
            run_both(artifact, model, make_inputs(source, batch, length, padding))
    assert Counted.count > 0
    if name == "llama":  # of three layers, the artifact's code has a mask in all batches, rewritten code in two
        assert (kernels.causal, kernels.masked) == (2 * 3, 6 * 3)
        assert kernels.heads.count(2) == 4 * 3


PARTS = """def forward(self, x, y, *, run):
    a = torch.ops.aten.to.dtype(x, torch.float32)
    b = torch.ops.aten.{first}
    c = torch.ops.aten.mul.Tensor(b, a)
    del b
    d = torch.ops.aten.{second}
    {last}
    return {{"c": c, "d": d}}
"""


_UNUSED = "z = torch.ops.aten.neg.default(d)"


def forwards(**parts: str) -> tuple[Program, Program]:
    text = PARTS.format(**{"second": "add.Tensor(c, y)", "last": _UNUSED, **parts})
    return compile_program(text, "code"), compile_program(text, "code", is_rewritten=True)


@pytest.mark.parametrize(
    ("parts", "is_tiled"),
    [
        ({"first": "pow.Tensor_Scalar(a, 2)"}, True),
        ({"first": "mean.dim(a, [-1], True)"}, True),
        ({"first": "softmax.int(a, -1)"}, True),
        ({"first": "exp.default(a)"}, True),
        ({"first": "softmax.int(a, 0)"}, False),  # across rows
        ({"first": "mean.dim(a, [0], True)"}, False),
        ({"first": "mul.Tensor(a, a)", "second": "to.dtype(x, torch.float32)"}, False),  # may be x itself
        ({"first": "mul.Tensor(a, a)", "last": "z = torch.ops.aten.neg_.default(d)"}, False),
        ({"first": "flip.default(a, [0])"}, False),
    ],
)
@pytest.mark.usefixtures("small_parts")
@torch.no_grad()
def test_what_is_computed_by_parts(parts: dict[str, str], is_tiled: bool) -> None:
    plain, quick = forwards(**parts)
    run = Run(device=CPU, dtype=torch.float32)
    for shape in ((2, 5, 64), (3, 1, 64), (1, 1, 64), (7, 128)):
        x, y = torch.randn(shape), torch.randn(shape)
        for name, value in plain(None, x.clone(), y, run=run).items():
            assert_same_bits(quick(None, x.clone(), y, run=run)[name], value)
    tree = guarded(PARTS.format(**{"second": "add.Tensor(c, y)", "last": _UNUSED, **parts}), "code")
    rewrite(tree, [])
    is_inside = any(f"aten.{parts['first']}" in ast.unparse(part) for part in tree.body[1:])
    assert (is_inside and Counted.count > 0) is is_tiled


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("small_parts")
@torch.no_grad()
def test_inverse_roots_of_halves_are_not_computed_by_parts(dtype: torch.dtype) -> None:
    """Torch rounds them twice where they do not fill a vector."""
    text = PARTS.replace("to.dtype(x, torch.float32)", "mul.Tensor(x, x)")
    text = text.format(first="mean.dim(a, [-1], True)", second="rsqrt.default(b)", last="").replace("del b", "")
    run, x, y = Run(device=CPU, dtype=dtype), torch.randn(5, 13, 64).to(dtype), torch.randn(64)
    expected = compile_program(text, "code")(None, x, y, run=run)
    for name, value in compile_program(text, "code", is_rewritten=True)(None, x, y, run=run).items():
        assert_same_bits(value, expected[name])


@pytest.mark.usefixtures("small_parts")
@torch.no_grad()
def test_a_slice_keeps_its_layout() -> None:
    plain, quick = forwards(first="mul.Tensor(a, y)", second="slice.Tensor(c, -1, 0, 63)", last="c = x")
    run, x, y = Run(device=CPU, dtype=torch.float32), torch.randn(5, 13, 64), torch.randn(5, 13, 64)
    for kind in (plain, quick):
        assert kind(None, x, y, run=run)["d"].stride() == (13 * 64, 64, 1)


@pytest.mark.usefixtures("small_parts")
@torch.no_grad()
def test_empty_tensors_run_as_recorded() -> None:
    _, quick = forwards(first="exp.default(a)")
    run, x = Run(device=CPU, dtype=torch.float32), torch.randn(4, 0, 256)
    assert quick(None, x, torch.randn(256), run=run)["d"].shape == x.shape


@pytest.mark.parametrize(
    "remade",
    [
        pytest.param("mul.Tensor(b, b)", id="computed"),
        pytest.param("unsqueeze.default(z, 0)", id="a view that could move before the region"),
    ],
)
@pytest.mark.usefixtures("small_parts")
@torch.no_grad()
def test_a_name_may_be_deleted_and_defined_again(remade: str) -> None:
    text = f"""def forward(self, x, y, z, *, run):
    a = torch.ops.aten.neg.default(y)
    b = torch.ops.aten.neg.default(a)
    del x
    x = torch.ops.aten.{remade}
    c = torch.ops.aten.mul.Tensor(b, a)
    d = torch.ops.aten.flip.default(c, [0])
    return {{"x": x, "c": c, "d": d}}
"""
    run, given = Run(device=CPU, dtype=torch.float32), [torch.randn(4, 8, 64) for _ in range(3)]
    expected = compile_program(text, "code")(None, *given, run=run)
    for name, value in compile_program(text, "code", is_rewritten=True)(None, *given, run=run).items():
        assert_same_bits(value, expected[name])
    assert Counted.count > 0


@pytest.mark.parametrize(
    "given",
    [
        pytest.param((torch.randn(4, 8, 63), torch.randn(4, 8, 63)), id="numbers that fill no vector"),
        pytest.param((torch.randn(8, 4, 64).transpose(0, 1), torch.randn(4, 8, 64)), id="strided"),
        pytest.param((torch.randn(4, 8, 64), torch.randn(4, 8, 1)), id="broadcast"),
    ],
)
@pytest.mark.usefixtures("small_parts")
@torch.no_grad()
def test_approximated_operators_are_computed_by_parts_of_whole_vectors(given: tuple[torch.Tensor, ...]) -> None:
    plain, quick = forwards(first="exp.default(a)")
    run = Run(device=CPU, dtype=torch.float32)
    for name, value in plain(None, *given, run=run).items():
        assert_same_bits(quick(None, *given, run=run)[name], value)
    assert Counted.count == 0


@pytest.mark.usefixtures("small_parts")
@torch.no_grad()
def test_bits_do_not_depend_on_threads() -> None:
    plain, quick = forwards(first="rsqrt.default(a)")
    run, x, y = Run(device=CPU, dtype=torch.float32), torch.rand(64, 40, 64) + 1, torch.rand(64, 40, 64)
    expected = plain(None, x, y, run=run)
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for name, value in quick(None, x, y, run=run).items():
                assert_same_bits(value, expected[name])
    finally:
        torch.set_num_threads(before)
    assert Counted.count == 3


@pytest.mark.usefixtures("small_parts")
def test_gradients_and_other_devices_run_as_recorded() -> None:
    _, quick = forwards(first="mul.Tensor(a, a)")
    x, y = torch.randn(4, 8, 64, requires_grad=True), torch.randn(4, 8, 64)
    quick(None, x, y, run=Run(device=CPU, dtype=torch.float32))["d"].sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        gpu = Run(device=torch.device("meta"), dtype=torch.float32, planned_for="cuda")
        quick(None, x.to("meta"), y.to("meta"), run=gpu)
    assert Counted.count == 0


@pytest.mark.usefixtures("small_parts")
@torch.no_grad()
def test_parts_take_less_memory_and_the_plan_knows(narrow_llama: Small) -> None:
    artifact = narrow_llama.load()
    model, meta = artifact.empty_model(), torch.device("meta")
    names = artifact.subgraphs[0].input_names
    inputs = {name: torch.ones(8, 10, dtype=torch.int64, device=meta) for name in names}
    working = {}
    for kind in ("cpu", "cuda"):
        with ShapeRun(artifact, model, torch.float32, kind) as shapes:
            footprint = shapes(artifact.subgraphs[0], inputs)
            assert footprint is not None
            working[kind] = footprint.working_bytes
    assert working["cpu"] < working["cuda"]


def test_hooked_values_are_computed_where_hooks_see_them() -> None:
    text = PARTS.format(first="mul.Tensor(a, a)", second="add.Tensor(c, y)", last="z = torch.ops.aten.neg.default(d)")
    seen: list[Any] = []
    run = Run(device=CPU, dtype=torch.float32, cached=lambda place, value: (seen.append(place), value + 1)[1])
    x, y = torch.randn(4, 8), torch.randn(4, 8)
    hooks = {"c": [(0, "c")]}
    plain = compile_program(text, "code", hooks)(None, x, y, run=run)
    quick = compile_program(text, "code", hooks, is_rewritten=True)(None, x, y, run=run)
    assert seen == [0, 0]
    assert_same_bits(quick["d"], plain["d"])


@pytest.mark.parametrize("name", ["__tiled", "__region_0", "__attention", "__repeated", "__found"])
def test_no_code_can_name_what_is_inserted(name: str, tmp_path: Path) -> None:
    for place, lines in enumerate(([f"y = {name}(x)"], [f"{name} = x + 1", f"y = {name} + 1"], [f"y = {name}"])):
        attack = program("inserted name", "", *lines)
        attack.make(tmp_path / str(place))
        with pytest.raises(ArtifactError, match=r"000\.py"):
            runtime.load(tmp_path / str(place))


@pytest.mark.parametrize(
    "call",
    [
        "pow.Tensor_Scalar(self=a, exponent=2)",
        "softmax.int(self=a, dim=-1)",
        "cat.default(tensors=[a], dim=-1)",
        "cat.default()",
        "pow.Tensor_Scalar()",
    ],
)
@pytest.mark.usefixtures("small_parts")
@torch.no_grad()
def test_arguments_may_be_given_by_name_or_be_missing(call: str) -> None:
    plain, quick = forwards(first=call, second="flip.default(c, [0])")
    given = (None, torch.randn(4, 8, 64), torch.randn(4, 8, 64))
    run = Run(device=CPU, dtype=torch.float32)
    try:
        expected = plain(*given, run=run)
    except RuntimeError:
        with pytest.raises(RuntimeError, match="missing value"):
            quick(*given, run=run)
    else:
        assert_same_bits(quick(*given, run=run)["d"], expected["d"])


def test_what_is_rewritten_still_deletes_every_value_once() -> None:
    """Names that a region deletes are deleted on both ways through it."""
    text = PARTS.format(first="mul.Tensor(a, a)", second="add.Tensor(c, y)", last="del a, x, y\n    e = c + d")
    tree = guarded(text, "code")
    rewrite(tree, [])
    (choice,) = [node for node in ast.walk(tree) if isinstance(node, ast.If)]
    deleted = [
        sorted(
            part.id
            for one in way
            for part in ast.walk(one)
            if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Del)
        )
        for way in (choice.body, choice.orelse)
    ]
    assert deleted == [["a", "b", "x", "y"], ["__found", "x", "y"]]


def test_long_programs_are_walked_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    walked: list[object] = []
    walk = ast.walk
    monkeypatch.setattr(ast, "walk", lambda node: (walked.append(node), walk(node))[1])
    calls = ("reshape.default(x, [1])", "exp.default(v)", "flip.default(v, [0])")
    for count in (100, 200):
        lines = [f"    v = torch.ops.aten.{call}\n" for _ in range(count) for call in calls]
        tree = guarded(f"def forward(self, x, *, run):\n{''.join(lines)}    return {{'y': v}}\n", "code")
        walked.clear()
        rewrite(tree, [])
        assert len(walked) < 10 * len(lines)
