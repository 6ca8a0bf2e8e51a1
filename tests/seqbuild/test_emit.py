"""Generated source: literal by literal, and that a host's check accepts it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import fx, nn

from runtime.errors import TraceError
from runtime.language.grammar import Allowed, check_program
from runtime.language.program import Run, compile_program
from seqbuild.chain.emit import EmittedCode, emit
from seqbuild.manifest.describe import Symbols
from seqbuild.trace.model import Trace, TraceOptions, trace_model
from tests.seqbuild import toys
from tests.tiny_models import randomize

X = torch.zeros(2, 5, toys.WIDTH)
MARKER = torch.bfloat16


def one(target: Any, *args: Any, **kwargs: Any) -> str:
    """The source of the single statement that calls `target`; `"x"` and `"y"` stand for the inputs."""
    graph = fx.Graph()
    graph.owning_module = nn.Module()
    inputs = {name: graph.placeholder(name) for name in ("x", "y")}

    def put(value: Any) -> Any:
        return fx.node.map_aggregate(value, lambda item: inputs.get(item, item) if isinstance(item, str) else item)

    node = graph.call_function(target, put(args), put(kwargs))
    graph.output({"result": node})
    code = emit(graph, traced_dtype=MARKER)
    check(code, ["x", "y"])
    (line,) = [line for line in code.source.splitlines() if f"{node.name} = " in line]
    return line.split(" = ", 1)[1]


def check(code: EmittedCode, input_names: list[str]) -> None:
    kinds = ("submodules", "attributes", "objects", "constants", "opaque", "output_names")
    allowed = Allowed(input_names=input_names, **{kind: getattr(code, kind) for kind in kinds})
    check_program(code.source.encode("ascii"), allowed, "here.py")


FULL = torch.ops.aten.full.default


@pytest.mark.parametrize(
    ("value", "source"),
    [
        (1, "1"),
        (-7, "-7"),
        (2**63 - 1, "9223372036854775807"),
        (True, "True"),
        (0.1, "0.1"),
        (-1e-300, "-1e-300"),
        (float("inf"), "torch.inf"),
        (float("-inf"), "-torch.inf"),
        (float("nan"), "torch.nan"),
        (torch.finfo(MARKER).min, "run.lowest"),
        (torch.finfo(torch.float32).min, "-3.4028234663852886e+38"),
    ],
)
def test_numbers(value: Any, source: str) -> None:
    assert one(FULL, [1], value) == f"torch.ops.aten.full.default([1], {source})"


@pytest.mark.parametrize(
    ("kwargs", "source"),
    [
        ({"dtype": torch.bool}, "dtype=torch.bool"),
        ({"dtype": torch.float32}, "dtype=torch.float32"),
        ({"dtype": MARKER}, "dtype=run.dtype"),
        ({"device": torch.device("cpu")}, "device=run.device"),
        ({"device": torch.device("cuda", 3)}, "device=run.device"),
        ({"layout": torch.strided}, "layout=torch.strided"),
        ({"memory_format": torch.contiguous_format}, "memory_format=torch.contiguous_format"),
        ({"dtype": None}, "dtype=None"),
    ],
)
def test_what_a_run_chooses(kwargs: dict[str, Any], source: str) -> None:
    assert one(FULL, [], 0, **kwargs) == f"torch.ops.aten.full.default([], 0, {source})"


@pytest.mark.parametrize(
    ("target", "args", "source"),
    [
        (torch.ops.aten.index.Tensor, ("x", [None, "y"]), "torch.ops.aten.index.Tensor(x, [None, y])"),
        (torch.ops.aten.cat.default, (["x", "y"], -1), "torch.ops.aten.cat.default([x, y], -1)"),
        (operator.getitem, ("x", 0), "x[0]"),
        (operator.getitem, ("x", "key"), 'x["key"]'),
        (operator.getitem, ("x", (slice(None), slice(1, "y", 2))), "x[(slice(None, None, None), slice(1, y, 2))]"),
        (operator.getitem, ("x", (None,)), "x[(None,)]"),
        (getattr, ("x", "shape"), "x.shape"),
        (operator.add, ("x", 1), "x + 1"),
        (operator.sub, (2, "x"), "2 - x"),
        (operator.mul, ("x", -3), "x * -3"),
        (operator.floordiv, ("x", "y"), "x // y"),
        (operator.truediv, ("x", 2), "x / 2"),
        (operator.mod, ("x", 2), "x % 2"),
        (operator.neg, ("x",), "-x"),
        (operator.pow, ("x", 2), "x * x"),
        (operator.pow, ("x", 3), "x * x * x"),
        (operator.pow, ("x", 2.0), "x ** 2.0"),
        (operator.pow, ("x", 0.5), "x ** 0.5"),
        (operator.pow, ("x", -0.5), "x ** -0.5"),
        (operator.pow, ("x", -1), "x ** -1.0"),
        (operator.le, ("x", "y"), "x <= y"),
        (operator.and_, ("x", "y"), "x & y"),
        (torch.sym_max, ("x", 3), "torch.sym_max(x, 3)"),
        (torch.sym_not, ("x",), "torch.sym_not(x)"),
    ],
)
def test_expressions(target: Any, args: tuple[Any, ...], source: str) -> None:
    assert one(target, *args) == source


@pytest.mark.parametrize("key", ['a"b', "a'b", "back\\slash", "line\nfeed", "snow \u2603", '"""', "{}"])
def test_text_is_quoted(key: str) -> None:
    source = one(operator.getitem, "x", key)
    assert source.isascii()
    assert eval(source, {"x": {key: "found"}}) == "found"


@pytest.mark.parametrize("name", ["plain", 'a"b', "a'b", "snow \u2603"])
def test_output_names_and_values_are_quoted(name: str) -> None:
    graph = fx.Graph()
    graph.output({name: 'it\'s "so"'})
    code = emit(graph)
    check(code, [])
    run = Run(device=torch.device("cpu"), dtype=torch.float32)
    assert compile_program(code.source, "here.py")(None, run=run) == {name: 'it\'s "so"'}


@pytest.mark.parametrize("value", [object(), 1j, b"bytes", torch.Generator()])
def test_what_cannot_be_written_is_refused(value: Any) -> None:
    graph = fx.Graph()
    node = graph.call_function(FULL, ([], 0))
    node._update_args_kwargs(([], value), {})
    graph.output({"result": node})
    with pytest.raises(TraceError, match=f"a value of type {type(value).__qualname__} cannot be written"):
        emit(graph)


@pytest.mark.parametrize("target", [print, operator.matmul, operator.xor, len, torch.neg, operator.pow])
def test_functions_that_cannot_be_saved_are_named(target: Any) -> None:
    with pytest.raises(TraceError, match=f"{target.__name__} .*cannot be saved|{target.__name__}"):
        one(target, "x", "y")


def test_private_fields_are_refused() -> None:
    with pytest.raises(TraceError, match=r"getattr .*cannot be saved"):
        one(getattr, "x", "__class__")


@pytest.mark.parametrize("name", ["self", "run", "torch", "slice"])
def test_inputs_must_not_take_the_codes_own_names(name: str) -> None:
    graph = fx.Graph()
    graph.placeholder(name)
    graph.output({})
    with pytest.raises(TraceError, match=f"an input of the model is named '{name}'"):
        emit(graph)


def test_values_are_deleted_after_their_last_use() -> None:
    graph = fx.Graph()
    graph.owning_module = nn.Module()
    x, y, z = (graph.placeholder(name) for name in "xyz")
    total = graph.call_function(torch.ops.aten.add.Tensor, (x, y))
    graph.call_function(torch.ops.aten.neg_.default, (total,))
    twice = graph.call_function(torch.ops.aten.mul.Tensor, (total, total))
    graph.output({"twice": twice, "y": y})
    assert emit(graph).source == (
        "def forward(self, x, y, z, *, run):\n"
        "    add_tensor = torch.ops.aten.add.Tensor(x, y)\n"
        "    del x\n"
        "    neg__default = torch.ops.aten.neg_.default(add_tensor)\n"
        "    del neg__default\n"
        "    mul_tensor = torch.ops.aten.mul.Tensor(add_tensor, add_tensor)\n"
        "    del add_tensor\n"
        "    return {\n"
        '        "twice": mul_tensor,\n'
        '        "y": y,\n'
        "    }\n"
    )
    assert z.users == {}


@cache
def traced(make: Callable[[], nn.Module]) -> Trace:
    return trace_model(make(), {"x": X.to(MARKER)}, ["Layer"], TraceOptions(dtype=MARKER))


class TestNeutralCode:
    """Traced once in the marker dtype, run in others."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize(
        "make",
        [toys.Toy, toys.Parameters, toys.PlainTensor, toys.Literals, toys.Sizes, toys.InPlace, toys.Identity],
    )
    def test_equals_the_model_in_every_dtype(self, make: Callable[[], nn.Module], dtype: torch.dtype) -> None:
        trace = traced(make)
        model = randomize(make()).to(dtype).eval()
        x = torch.randn(3, 4, toys.WIDTH).to(dtype)
        values = {"x": x.clone()}
        run = Run(device=torch.device("cpu"), dtype=dtype, constants=trace.tracer.constants)
        with torch.no_grad():
            for subgraph in trace.subgraphs:
                code = subgraph.emit(MARKER)
                check(code, subgraph.input_names)
                inputs = {name: values[name] for name in subgraph.input_names}
                values |= compile_program(code.source, "here.py")(model, **inputs, run=run)
            expected = model(x.clone())
        assert values["output"].dtype == expected.dtype
        assert torch.equal(values["output"], expected)

    def test_a_plain_tensor_in_the_weights_dtype_is_refused(self) -> None:
        model = toys.PlainTensor()
        model.table = model.table.to(MARKER)  # as when it is made while the model is, in the dtype of the trace
        trace_model(model, {"x": X.to(MARKER)}, ["Layer"])  # a run in that very dtype is right
        with pytest.raises(TraceError, match="in the dtype of the weights"):
            trace_model(model, {"x": X.to(MARKER)}, ["Layer"], TraceOptions(dtype=MARKER))


def test_sizes_that_the_code_decides_by_limit_the_dims() -> None:
    class Decides(toys.Toy):
        def glue(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if x.shape[1] > 4 and x.shape[0] <= 20 else x

    trace = trace_model(Decides(), {"x": X}, ["Layer"])
    dims = {dim.name: (dim.min, dim.max) for dim in Symbols(trace, None).dims()}
    assert dims["batch"] == (1, 20)
    assert dims["x_1"] == (5, -1)
