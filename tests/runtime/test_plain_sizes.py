"""Operators on the meta device, with and without torch's compiler and sympy."""

from __future__ import annotations

import builtins
import sys
import threading
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from runtime.host.plain_sizes import _ANSWERS, _Numbers, plain_sizes
from runtime.host.stand_ins import StandIn, standing_in
from tests.runtime.place import Place
from tests.runtime.test_lean_imports import python

# Calls of operators whose shapes torch computes in Python, some of which fail.
CALLS = """
lambda: aten.embedding.default(m(9, 4), m(2, 3, dtype=torch.int64))
lambda: aten.add.Tensor(m(5, dtype=torch.int64), 0)
lambda: aten.add.Tensor(m(2, 1, 4), m(3, 1, dtype=torch.bfloat16))
lambda: aten.add.Tensor(m(2, 3), m(4))
lambda: aten.le.Tensor(m(3, 1), m(1, 4))
lambda: aten.where.self(m(3, 4, dtype=torch.bool), m(4), m(3, 1))
lambda: aten._softmax.default(m(2, 5, 5), -1, False)
lambda: aten.masked_fill.Scalar(m(2, 2), m(2, 2, dtype=torch.bool), 1.0)
lambda: aten.mean.dim(m(2, 3, 4), [-1], True)
lambda: aten.cumsum.default(m(2, 3, dtype=torch.bool), 1)
lambda: aten.bmm.default(m(2, 3, 4), m(2, 4, 5))
lambda: aten.bmm.default(m(2, 3, 4), m(2, 3, 5))
lambda: aten.addmm.default(m(5), m(3, 4), m(4, 5))
lambda: aten.addmm.default(m(5), m(3, 4), m(3, 5))
lambda: aten.convolution.default(m(1, 2, 8), m(4, 2, 3), None, [1], [1], [1], False, [0], 1)
lambda: aten.convolution.default(m(1, 2, 8), m(4, 3, 3), None, [1], [1], [1], False, [0], 1)
lambda: aten.cat.default([m(2, 3), m(1, 3)])
lambda: aten.cat.default([m(2, 3), m(1, 4)])
lambda: aten.stack.default([m(2, 3), m(2, 3)], 1)
lambda: aten.index.Tensor(m(4, 5), [m(3, dtype=torch.int64)])
lambda: aten.index_put.default(m(4, 5), [m(3, dtype=torch.int64)], m(3, 5))
lambda: aten.index_add_.default(m(4, 5), 0, m(3, dtype=torch.int64), m(3, 5))
lambda: aten.scatter.src(m(4, 5), 1, m(4, 2, dtype=torch.int64), m(4, 2))
lambda: aten.gather.default(m(4, 5), 1, m(4, 2, dtype=torch.int64))
lambda: aten.topk.default(m(4, 5), 2)
lambda: aten.topk.default(m(4, 5), 9)
lambda: aten.sort.default(m(4, 5))
lambda: aten.arange.start_step(0, 9, 2, device="meta")
lambda: aten.view.default(m(4, 6), [2, -1])
lambda: aten.view.default(m(4, 6), [5, -1])
lambda: aten.expand.default(m(4, 1), [-1, 3])
lambda: aten.constant_pad_nd.default(m(4, 5), [1, 2])
lambda: aten.repeat_interleave.self_int(m(4, 5), 2, 1)
lambda: aten.unfold.default(m(9), 0, 3, 2)
lambda: aten.native_layer_norm.default(m(2, 4), [4], m(4), None, 1e-5)
lambda: aten.rsqrt.default(m(2, 4, dtype=torch.int32))
lambda: aten.pow.Tensor_Scalar(m(2, 4, dtype=torch.float16), 2)
lambda: aten.fft_rfft.default(m(2, 8))
lambda: aten.avg_pool2d.default(m(1, 2, 8, 8), [2, 2])
lambda: aten.upsample_nearest2d.default(m(1, 2, 4, 4), [8, 8])
lambda: aten.nonzero.default(m(3))
lambda: aten.linalg_vector_norm.default(m(2, 4))
lambda: aten.silu_.default(m(2, 4))
lambda: aten.clamp.default(m(2, 4), 0, 1)
lambda: aten.baddbmm.default(m(2, 3, 5), m(2, 3, 4), m(2, 4, 5))
lambda: aten.tril.default(m(4, 4))
lambda: aten.one_hot.default(m(3, dtype=torch.int64), 5)
lambda: torch.nn.functional.scaled_dot_product_attention(m(1, 2, 3, 4), m(1, 2, 3, 4), m(1, 2, 3, 4))
"""
PROGRAM = f"""
import sys
import torch
from torch.utils import _pytree as pytree
from runtime.host.plain_sizes import plain_sizes

aten = torch.ops.aten

def m(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")

def described(call):
    try:
        found = pytree.tree_leaves(call())
    except Exception as error:
        return type(error), str(error)
    return [(tuple(t.shape), t.stride(), t.dtype, t.device.type, t.storage_offset()) for t in found]

calls = [eval(line) for line in {CALLS!r}.splitlines() if line]
"""
LEAN = f"""{PROGRAM}
with plain_sizes():
    for call in calls:
        print(described(call))
assert not {{"torch._dynamo", "sympy"}} & set(sys.modules)
"""


def test_shapes_and_errors_are_those_of_torch() -> None:
    usual: dict[str, Any] = {}
    exec(PROGRAM, usual)
    expected = [str(usual["described"](call)) for call in usual["calls"]]
    assert len(expected) == CALLS.strip().count("\n") + 1
    assert 5 < sum(one.startswith("(") for one in expected) < 20, "calls that fail"
    assert python(LEAN).strip() == "\n".join(expected)


def test_a_plan_imports_no_compiler(place: Place) -> None:
    program = (
        "import sys\n"
        "from runtime.host import own_process\n"
        "own_process.claim()\n"
        "from runtime.cli.app import main\n"
        "code = main(sys.argv[1:])\n"
        "heavy = ('torch._dynamo', 'torch._inductor', 'sympy', 'triton', 'transformers', 'huggingface_hub')\n"
        "print('heavy', *(name for name in heavy if name in sys.modules))\n"
        "sys.exit(code)\n"
    )
    said = python(program, "plan", place.artifact, "--samples", "2", "--seq-len", "16")
    assert said.splitlines()[-1] == "heavy", said


def test_torch_is_left_as_it_was() -> None:
    imports = builtins.__import__
    function = torch._disable_dynamo(lambda: 1)  # type: ignore[no-untyped-call]
    before = set(sys.modules)
    with pytest.raises(ZeroDivisionError), plain_sizes():
        assert builtins.__import__ is not imports
        assert function() == 1
        raise ZeroDivisionError
    assert builtins.__import__ is imports
    assert set(sys.modules) == before
    assert not hasattr(function.__wrapped__, "__dynamo_disable") or "torch._dynamo" in before


@pytest.mark.parametrize("name", _ANSWERS)
def test_answers_are_those_of_symbolic_shapes(name: str) -> None:
    from torch.fx.experimental import symbolic_shapes

    of_bools = [(True,), (False,), (True, False), (True, True), (False, False, True)]
    of_sizes = [((2, 3), [2, 3]), ((2, 3), (2, 4)), ((2,), (2, 3)), (3, 3), (3, 4)]
    given = {"sym_and": of_bools, "sym_or": of_bools, "sym_eq": of_sizes}
    numbers = [(3,), (0,)] if name in ("is_nested_int", "has_guarding_hint", "guarding_hint_or_throw") else of_bools[:2]
    if not hasattr(symbolic_shapes, name):
        pytest.skip(f"torch {torch.__version__} has no {name}")
    for values in given.get(name, numbers):
        answer = getattr(_Numbers(symbolic_shapes.__name__), name)(*values)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of functions that torch will remove
            real = getattr(symbolic_shapes, name)(*values)
        assert (type(answer), answer) == (type(real), real), values


def test_anything_else_is_asked_of_the_real_module() -> None:
    from torch.fx.experimental import symbolic_shapes

    shapes = _Numbers(symbolic_shapes.__name__)
    assert shapes.ShapeEnv is symbolic_shapes.ShapeEnv
    with pytest.raises(AssertionError):
        shapes.sym_eq("a", "b")
    with pytest.raises(AttributeError):
        _ = shapes.nonsense


@pytest.mark.parametrize("importer", ["package", "package.module", "module", "module.other", "packages", ""])
def test_only_the_named_importers_get_a_stand_in(importer: str) -> None:
    stand_in = StandIn(SimpleNamespace(name="it"), packages=("package",), modules=("module",))
    scope = {"__name__": importer}
    with standing_in({"calendar.nothing": stand_in}):
        if importer in ("package", "package.module", "module"):
            exec("from calendar.nothing import name", scope)
            assert scope["name"] == "it"
        else:
            with pytest.raises(ModuleNotFoundError):
                exec("from calendar.nothing import name", scope)


def test_blocks_of_several_threads_do_not_leave_a_stand_in() -> None:
    """They end in another order than they began, and a thread without a block gets the real module."""
    imports = builtins.__import__
    stand_ins = {"calendar.nothing": StandIn(SimpleNamespace(name="it"), modules=("module",))}
    is_open, may_end = threading.Event(), threading.Event()

    def first() -> None:
        with standing_in(stand_ins):
            is_open.set()
            may_end.wait(10)

    thread = threading.Thread(target=first)
    thread.start()
    assert is_open.wait(10)
    with pytest.raises(ModuleNotFoundError):
        exec("from calendar.nothing import name", {"__name__": "module"})
    with standing_in(stand_ins):
        may_end.set()
        thread.join()
        exec("from calendar.nothing import name", {"__name__": "module"})
    assert builtins.__import__ is imports
