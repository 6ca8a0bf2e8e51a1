"""The small part of Python that an artifact may use: what is accepted, and a collection of attacks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from runtime.errors import ArtifactError
from runtime.language.grammar import LOOP_LIMIT, NESTING_LIMIT, SOURCE_LIMIT_BYTES, Allowed, check_program
from runtime.language.opaque import is_opaque_path
from seqbuild import trace_subgraphs
from seqbuild.chain.targets import infer_targets
from tests.runtime.artifacts import FIRST
from tests.sweep import sweep
from tests.tiny_models import ZOO, make_inputs, tiny_model

NAMES = Allowed(input_names=["x", "y"], output_names=["z"])
STEP = "transformers.models.llama.modeling_llama:rotate_half"
ATTENTION = "transformers.models.llama.modeling_llama:eager_attention_forward"


def program(*statements: str, result: str = '{"z": z}', head: str = "def forward(self, x, y, *, run):") -> bytes:
    return "\n".join([head, *(f"    {line}" for line in statements), f"    return {result}", ""]).encode()


def accepts(source: bytes, allowed: Allowed = NAMES) -> tuple[str, ...]:
    return check_program(source, allowed, "here.py")


def refuses(source: bytes, allowed: Allowed = NAMES) -> str:
    with pytest.raises(ArtifactError) as caught:
        accepts(source, allowed)
    assert caught.value.message.startswith("here.py")
    return caught.value.message


ACCEPTED = [
    "z = torch.ops.aten.add.Tensor(x, y, alpha=2)",
    "z = torch.ops.aten.__and__.Tensor(x, y)",
    "z = torch.ops.aten._softmax.default(x, -1, False)",
    "z = torch.ops.aten.arange.default(x, dtype=torch.int64, layout=torch.strided, device=run.device)",
    "z = torch.ops.aten.full.default([], run.lowest, dtype=run.dtype)",
    "z = torch.ops.aten.full.default([], -torch.inf)",
    "z = torch.ops.aten.index.Tensor(x, [None, y, slice(None, 3, None)])",
    "z = x",
    "z = x[0]",
    "z = x[(0, slice(1, y))]",
    'z = x["key"]',
    "z = x.last_hidden_state",
    "z = x + 1",
    "z = -x",
    "z = 1 - x // 2 * y % 3 / 7",
    "z = x <= y",
    "z = x & y | x",
    "z = torch.sym_max(x, 9223372036854775807)",
    "z = torch.sym_ite(x, y, 1)",
    "z = torch.sym_sqrt(x)",
    "z = x ** 0.5",
    "z = x ** -0.5",
    "z = torch.ops.aten.neg.default(x); del x, y",
]


@pytest.mark.parametrize("statement", ACCEPTED)
def test_what_is_accepted(statement: str) -> None:
    accepts(program(statement))


def test_operators_are_reported_each_once() -> None:
    source = program(
        "a = torch.ops.aten.neg.default(x)", "b = torch.ops.aten.add.Tensor(a, y)", "z = torch.ops.aten.neg.default(b)"
    )
    assert accepts(source) == ("neg.default", "add.Tensor")


def test_lookups_that_the_manifest_lists() -> None:
    allowed = replace(
        NAMES,
        submodules=["layers.0"],
        attributes=["gain", "offset"],
        objects=["layers.0", "config"],
        constants=["constant_0"],
        opaque=[ATTENTION],
    )
    source = program(
        'a = self.get_submodule("layers.0")(x, mask={"full": y, 0: (None,), True: [1.5]})',
        'b = self.get_parameter("gain")',
        'c = self.get_buffer("offset")',
        'd = self.get_submodule("layers.0")',
        'e = self.get_submodule("").config',
        'f = run.constant("constant_0")',
        f'z = run.opaque["{ATTENTION}"](d, e, f, value=a, attention_mask=b, scaling=c)',
    )
    accepts(source, allowed)
    for kind in ("submodules", "attributes", "objects", "constants", "opaque"):
        listed = list(getattr(allowed, kind))
        refuses(source, replace(allowed, **{kind: listed[1:]}))  # it uses more than is listed
        message = refuses(source, replace(allowed, **{kind: [*listed, "another"]}))  # or less
        assert message == f"here.py uses other {kind} than its manifest states"


@pytest.mark.parametrize("name", sweep(ZOO, "llama", "qwen3_moe", "mamba", "t5"))
def test_everything_that_is_emitted_is_accepted(name: str) -> None:
    model = tiny_model(name)
    for subgraph in trace_subgraphs(model, make_inputs(model, 2, 6), infer_targets(model)):
        code = subgraph.code
        kinds = ("submodules", "attributes", "objects", "constants", "opaque", "output_names")
        allowed = Allowed(input_names=subgraph.input_names, **{kind: getattr(code, kind) for kind in kinds})
        check_program(code.source.encode("ascii"), allowed, "here.py")


# Each is one statement; x and y are inputs, and "layers.0", "gain", "constant_0" and one opaque step are listed.
HOSTILE = [
    # names that are not there
    "z = w",
    "z = __builtins__",
    "z = torch",
    "z = self",
    "z = run",
    "z = forward",
    "z = slice",
    "z = open('/etc/passwd')",
    "z = eval('1')",
    "z = exec('import os')",
    "z = getattr(x, 'data')",
    "z = print(x)",
    "z = __import__('os').system('true')",
    # the inside of objects
    "z = x.__class__",
    "z = x._backward_hooks",
    "z = x.__class__.__mro__[1].__subclasses__()",
    "z = x.numpy()",
    "z = x.shape.numel()",
    "z = 'a'.join(x)",
    "z = ''.format(x)",
    "z = [].__class__",
    "z = (1).__class__",
    "z = x[0].__class__",
    "z = (x + y).__dict__",
    # torch, but more of it
    "z = torch.load(x)",
    "z = torch.save(x, 'f')",
    "z = torch.tensor([1])",
    "z = torch.os",
    "z = torch.os.system('true')",
    "z = torch.ops",
    "z = torch.ops.load_library('evil.so')",
    "z = torch.ops.aten",
    "z = torch.ops.aten.neg",
    "z = torch.ops.aten.neg(x)",
    "z = torch.ops.aten.neg.default.__class__(x)",
    "z = torch.ops.aten.__class__.mro(x)",
    "z = torch.ops.aten.__init__.__globals__(x)",
    "z = torch.ops.prim.device.default(x)",
    "z = torch.ops.profiler._record_function_enter.default(x)",
    "z = torch.ops.aten.from_file.default('f')",
    "z = torch.ops.aten.save.default(x, 'f')",
    "z = torch.ops.aten.set_.source_Storage(x, y)",
    "z = torch.ops.aten.record_stream.default(x, y)",
    "z = torch.sym_sum(x)",
    "z = torch.serialization.load(x)",
    "z = torch.hub.load(x)",
    "z = torch.int64.__class__",
    # the model and the run
    "z = self.config",
    "z = self.forward(x)",
    "z = self.load_state_dict(x)",
    "z = self.get_submodule('layers.1')(x)",
    "z = self.get_submodule(x)(x)",
    "z = self.get_submodule('layers.0').forward(x)",
    "z = self.get_submodule('layers.0').weight",
    "z = self.get_submodule('layers.0').__class__",
    "z = self.get_submodule('layers.0')[0]",
    "z = self.get_submodule('layers.0', 'x')(x)",
    "z = self.get_submodule(target='layers.0')(x)",
    "z = self.get_submodule('layers' + '.0')(x)",
    "z = self.get_submodule(f'layers.0')(x)",
    "z = self.get_submodule('layers.0')(x)(x)",
    "z = self.get_parameter('other')",
    "z = self.get_parameter(x)",
    "z = self.get_buffer('gain', 1)",
    "z = self.register_buffer('gain', x)",
    "z = run.constants",
    "z = run.constant(x)",
    "z = run.constant('other')",
    "z = run.opaque",
    "z = run.opaque['os:system']('true')",
    f"z = run.opaque['{STEP}']",
    f"z = run.opaque['{STEP}'].__globals__",
    f"z = run.opaque['{STEP}'].func(x)",
    "z = run.opaque[x](y)",
    "z = run.opaque.get('os:system')(x)",
    "z = run.__class__",
    # other syntax
    "import os",
    "from os import system",
    "z = lambda: 1",
    "z = [x for x in y]",
    "z = {x for x in y}",
    "z = (x for x in y)",
    "z = {**x}",
    "z = {x: 1}",
    "z = {1.5: 1}",
    "z = {1, 2}",
    "z = x if y else x",
    "z = x and y",
    "z = not x",
    "z = ~x",
    "z = +x",
    "z = x @ y",
    "z = x ** 100000",
    "z = x ** 3",
    "z = x ** y",
    "z = x ** 1e9",
    "z = x ** -9.0",
    "z = x ** 'a'",
    "z = x ** True",
    "z = x << 100000",
    "z = x ^ y",
    "z = x in y",
    "z = x is y",
    "z = x < y < x",
    "z = f'{x}'",
    "z = 'a' * 1000000000",
    "z = '%s' % x",
    "z = [0] * 1000000000",
    "z = (0,) + (0,)",
    "z = b'bytes'",
    "z = 1j",
    "z = ...",
    "z = 99999999999999999999",
    "z = x[:]",
    "z = x[1:2]",
    "z = (w := x)",
    "z = await x",
    "z = yield",
    "z = yield from x",
    "z: int = x",
    "z += x",
    "z = w = x",
    "z, w = x",
    "[z] = x",
    "*z, w = x",
    "x.data = y",
    "x[0] = y",
    "self.weight = x",
    "torch.load = x",
    "z = (x, y)",
    "z = 1",
    "del self",
    "del run",
    "del torch",
    "del w",
    "del x.data",
    "del x[0]",
    "global z",
    "assert x",
    "raise x",
    "pass",
    "x",
    "torch.ops.aten.neg_.default(x)",
    "return x",
    "if x: z = y",
    "while x: z = y",
    "for z in x: pass",
    "with x: pass",
    "try: pass\n    except: pass",
    "def z(): pass",
    "class z: pass",
    "match x:\n        case 1: pass",
    "z = torch.ops.aten.neg.default(*x)",
    "z = torch.ops.aten.neg.default(**x)",
    "z = torch.ops.aten.neg.default(__class__=x)",
    "z = torch.ops.aten.neg.default(x, out=y, out=y)",
    "self = x",
    "run = x",
    "torch = x",
    "slice = x",
    "__builtins__ = x",
    "__class__ = x",
    # text that is not what it seems
    "z = x + 1\f",
    "z = \u0445",  # a Cyrillic x
    "z = '\u202e'",
]


@pytest.mark.parametrize("statement", HOSTILE)
def test_hostile_statements_are_refused(statement: str) -> None:
    allowed = replace(NAMES, submodules=["layers.0"], attributes=["gain"], constants=["constant_0"], opaque=[STEP])
    uses = (
        'a = self.get_submodule("layers.0")(x)',
        'b = self.get_parameter("gain")',
        'c = run.constant("constant_0")',
        f'd = run.opaque["{STEP}"](x)',
        "z = x + y",
    )
    accepts(program(*uses), allowed)
    refuses(program(*uses, statement), allowed)


@pytest.mark.parametrize(
    "head",
    [
        "def forward(self, x, *, run):",
        "def forward(self, y, x, *, run):",
        "def forward(x, y, *, run):",
        "def forward(self, x, y, run):",
        "def forward(self, x, y, *, run, more):",
        "def forward(self, x, y, *, run=None):",
        "def forward(self, x, y=1, *, run):",
        "def forward(self, x: int, y, *, run):",
        "def forward(self, x, y, *, run) -> None:",
        "def forward(self, x, y, *rest, run):",
        "def forward(self, x, y, *, run, **rest):",
        "def forward(self, x, /, y, *, run):",
        "def backward(self, x, y, *, run):",
        "async def forward(self, x, y, *, run):",
        "@staticmethod\ndef forward(self, x, y, *, run):",
        "import os\ndef forward(self, x, y, *, run):",
        "'a docstring'\ndef forward(self, x, y, *, run):",
    ],
)
def test_other_signatures_are_refused(head: str) -> None:
    accepts(program("z = x + y"))
    refuses(program("z = x + y", head=head))


@pytest.mark.parametrize(
    "name", ["self", "run", "torch", "slice", "__builtins__", "__import__", "a b", "1a", "", "é", "a" * 300]
)
def test_inputs_with_other_names_are_refused(name: str) -> None:
    allowed = Allowed(input_names=[name], output_names=["z"])
    refuses(program("z = torch.ops.aten.neg.default(1)", head=f"def forward(self, {name}, *, run):"), allowed)


@pytest.mark.parametrize(
    "result",
    [
        "z",
        "None",
        "{}",
        '{"w": z}',
        '{"z": z, "w": z}',
        '{"z": z, "z": z}',
        "{**z}",
        "{z: z}",
        '{"z": w}',
        "dict(z=z)",
        "[z]",
    ],
)
def test_other_results_are_refused(result: str) -> None:
    refuses(program("z = x + y", result=result))


def test_more_after_the_function_is_refused() -> None:
    good = program("z = x + y")
    for more in (b"import os\n", b"forward(1)\n", good, b"x = 1\n", b"'text'\n"):
        refuses(good + more)
    refuses(b"")
    refuses(b"\n# nothing\n")


def test_nothing_comes_after_the_return() -> None:
    refuses(program('return {"z": x}', "z = x + y"))


def test_deleted_values_are_gone() -> None:
    accepts(program("z = x + y", "del x, y"))
    refuses(program("z = x + y", "del x", "w = x + 1"))
    refuses(program("z = x + y", "del z"))
    refuses(program("z = x + y", "del x, x"))
    accepts(program("z = x + y", "del x", "x = z + 1", "w = x + 1"))


def test_modules_stay_whole_under_any_name() -> None:
    allowed = replace(NAMES, objects=["layers.0"])
    good = ['m = self.get_submodule("layers.0")', "z = x + y"]
    accepts(program(*good), allowed)
    for bad in ("w = m.weight", "w = m[0]", "w = m(x)", "w = m.state_dict()", "w = m"):
        refuses(program(*good, bad), allowed)
    accepts(program(*good, "m = x + 1", "w = m.real"), allowed)  # the name is another value's now


def test_odd_text_is_refused() -> None:
    good = program("z = x + y")
    accepts(b"# a comment\n" + good)
    refuses(b"# -*- coding: utf-7 -*-\n" + good)
    refuses(b"# vim: set fileencoding=utf-16 :\n" + good)
    refuses(b"\xef\xbb\xbf" + good)
    refuses(good.replace(b"\n", b"\r"))
    refuses(good + b"\0")
    refuses(good.decode().encode("utf-16"))


def test_size_is_limited() -> None:
    comment = b"#" * (SOURCE_LIMIT_BYTES - len(program("z = x + y")) - 1) + b"\n"
    accepts(comment + program("z = x + y"))
    assert f"more than the {SOURCE_LIMIT_BYTES} allowed" in refuses(b"#" + comment + program("z = x + y"))


@pytest.mark.parametrize("depth", [NESTING_LIMIT + 1, 90, 1000, 100_000])
def test_depth_is_limited(depth: int) -> None:
    refuses(program(f"z = torch.ops.aten.neg.default({'(' * depth}x{',)' * depth})"))
    refuses(program(f"z = x{' + 1' * depth}"))
    refuses(program(f"z = {'-' * depth}x"))
    refuses(program(f"z = x{'[0]' * depth}"))
    refuses(program(f"z = torch{'.ops' * depth}(x)"))


def test_messages_name_file_and_line() -> None:
    assert refuses(program("a = x + y", "b = a + 1", "z = print(b)")).startswith(
        "here.py, line 4: a call of print is not"
    )


def test_the_example_of_the_artifact_tests() -> None:
    allowed = Allowed(input_names=["x"], output_names=["layers_0"], submodules=["layers.0"], constants=["constant_0"])
    assert accepts(FIRST.encode(), allowed) == ("add.Tensor",)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (STEP, True),
        ("transformers.models.llama.modeling_llama:LlamaRotaryEmbedding.forward", True),
        ("transformers.masking_utils:create_causal_mask", True),
        ("transformers.models.bart.modeling_bart:_expand", True),
        ("transformers.models.llama.modeling_llama:__class__", False),
        ("transformers.models.llama.modeling_llama:f.__globals__", False),
        ("transformers.models.llama.modeling_llama.os:system", False),
        ("transformers.models.llama.configuration_llama:LlamaConfig", False),
        ("transformers.models.auto.modeling_auto:AutoModel.from_pretrained", False),
        ("transformers.modeling_utils:PreTrainedModel.save_pretrained", False),
        ("transformers.utils.hub:PushToHubMixin.push_to_hub", False),
        ("transformers.dynamic_module_utils:get_class_in_module", False),
        ("os:system", False),
        (STEP + "\n", False),
        ("", False),
    ],
)
def test_paths_of_opaque_steps(path: str, expected: bool) -> None:
    assert is_opaque_path(path) is expected


@pytest.mark.parametrize(
    "operator",
    [
        "_reshape_alias.default",
        "_sparse_coo_tensor_unsafe.default",
        "set_data.default",
        "_print.default",
        "_resize_output_.default",
        "from_file.default",
        "_cufft_clear_plan_cache.default",
        "resize_.default",
        "add.out",
        "arange.start_out",
        "__class__.default",
    ],
)
def test_operators_outside_of_the_closed_list_are_refused(operator: str) -> None:
    source = f"def forward(self, x, *, run):\n    y = torch.ops.aten.{operator}(x)\n    return {{'y': y}}\n"
    with pytest.raises(ArtifactError, match="line 2: the operator"):
        check_program(source.encode(), Allowed(input_names=["x"], output_names=["y"]), "program")


LOOPS = [
    ("z = x", "for i in range(y):", "    w = torch.ops.aten.select.int(x, 0, i)", "    z = w", "    del w"),
    ("z = []", "for i in range(y):", "    z.append(x)"),
    ("z = x", "for i in range(y):", "    for j in range(i):", "        z = x"),
    ("z = x", "for i in range(y):", "    z = x", "for i in range(y):", "    z = x"),
]


@pytest.mark.parametrize("statements", LOOPS)
def test_loops_over_a_size(statements: tuple[str, ...]) -> None:
    accepts(program(*statements))


HOSTILE_LOOPS = [
    # over something else
    ("z = x", "for i in x:", "    z = x"),
    ("z = x", "for i in range(3):", "    z = x"),
    ("z = x", "for i in range(y + 1):", "    z = x"),
    ("z = x", "for i in range(0, y):", "    z = x"),
    ("z = x", "for i in range(y, step=1):", "    z = x"),
    ("z = x", "for i in range(*y):", "    z = x"),
    ("z = x", "for i in range(w):", "    z = x"),
    ("z = x", "for i in range(range):", "    z = x"),
    ("z = x", "for i in enumerate(y):", "    z = x"),
    ("z = x", "for i in torch.range(y):", "    z = x"),
    ("z = x", "for i in a:", "    z = x"),
    ("z = x", "for i in range(a):", "    z = x"),
    ("z = []", "for i in range(z):", "    z.append(x)"),
    # with another head
    ("z = x", "for i, j in range(y):", "    z = x"),
    ("z = x", "for x in range(y):", "    z = x"),
    ("z = x", "for self in range(y):", "    z = x"),
    ("z = x", "for range in range(y):", "    z = x"),
    ("z = x", "for z.i in range(y):", "    z = x"),
    ("z = x", "for i in range(y):", "    z = x", "else:", "    z = y"),
    # what is in it
    ("z = x", "for i in range(y):", "    pass"),
    ("z = x", "for i in range(y):", "    break"),
    ("z = x", "for i in range(y):", "    continue"),
    ("z = x", "for i in range(y):", '    return {"z": z}'),
    ("z = x", "for i in range(y):", "    i = x"),
    ("z = x", "for i in range(y):", "    del x"),
    ("z = x", "for i in range(y):", "    del y"),
    ("z = x", "for i in range(y):", "    z = w", "    w = x"),
    ("z = x", "for i in range(y):", "    w = x", "    for j in range(y):", "        del w"),
    ("z = x", "while y:", "    z = x"),
    ("z = x", "if y:", "    z = x"),
    # what comes after it
    ("for i in range(y):", "    z = x"),
    ("z = x", "for i in range(y):", "    w = x", "z = w"),
    ("z = x", "for i in range(y):", "    z = x", "z = i"),
    # lists
    ("z = []", "z.append(x)"),
    ("z = x", "for i in range(y):", "    z.append(x)"),
    ("z = x", "for i in range(y):", "    w = []"),
    ("z = []", "for i in range(y):", "    z = []"),
    ("z = []", "for i in range(y):", "    z = x"),
    ("z = []", "for i in range(y):", "    z.append(x, y)"),
    ("z = []", "for i in range(y):", "    z.append(a)"),
    ("z = []", "for i in range(y):", "    z.append(z)"),
    ("z = []", "for i in range(y):", "    z.append(x[0])"),
    ("z = []", "for i in range(y):", "    z.extend(x)"),
    ("z = []", "for i in range(y):", "    z.append.append(x)"),
    ("z = []", "for i in range(y):", "    w = z.append(x)"),
    ("z = [x]", "for i in range(y):", "    z.append(x)"),
    ("w = []", "z = w"),
    ("w = []", "z = w[0]"),
    ("w = []", "z = w.append"),
    # the inside of a module
    ("z = a",),
    ("z = x", "for i in range(y):", '    z = self.get_submodule("layers.0")'),
    ("z = x", "for i in range(y):", "    z = a"),
    ("z = x", "for i in range(y):", "    a = x"),
]


@pytest.mark.parametrize("statements", HOSTILE_LOOPS)
def test_hostile_loops_are_refused(statements: tuple[str, ...]) -> None:
    allowed = replace(NAMES, objects=["layers.0"], opaque=[STEP])
    uses = ('a = self.get_submodule("layers.0")', f'b = run.opaque["{STEP}"](a)')
    accepts(program(*uses, "z = x"), allowed)
    refuses(program(*uses, *statements), allowed)


def test_loops_are_nested_to_a_limit() -> None:
    def nested(depth: int) -> bytes:
        lines = [f"{'    ' * level}for i{level} in range(y):" for level in range(depth)]
        return program("z = x", *lines, f"{'    ' * depth}z = x")

    accepts(nested(LOOP_LIMIT))
    assert "loops" in refuses(nested(LOOP_LIMIT + 1))
