"""The small part of Python that an artifact may use: what is accepted, and a collection of attacks."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from runtime.errors import ArtifactError
from runtime.language.grammar import LOOP_LIMIT, NESTING_LIMIT, SOURCE_LIMIT_BYTES, Allowed, check_program
from runtime.language.opaque import is_opaque_path
from seqbuild import trace_subgraphs
from seqbuild.chain.targets import default_targets
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
        more = refuses(source, replace(allowed, **{kind: listed[1:]}))  # it uses more than is listed
        assert listed[0] in more and "the manifest does not list" in more
        message = refuses(source, replace(allowed, **{kind: [*listed, "another"]}))  # or less
        assert message == f"here.py uses other {kind} than its manifest lists"


@pytest.mark.parametrize("name", sweep(ZOO, "llama", "qwen3_moe", "mamba", "t5"))
def test_everything_that_is_emitted_is_accepted(name: str) -> None:
    model = tiny_model(name)
    for subgraph in trace_subgraphs(model, make_inputs(model, 2, 6), default_targets(model)):
        code = subgraph.code
        kinds = ("submodules", "attributes", "objects", "constants", "opaque", "output_names")
        allowed = Allowed(input_names=subgraph.input_names, **{kind: getattr(code, kind) for kind in kinds})
        check_program(code.source.encode("ascii"), allowed, "here.py")


# Each is one statement; x and y are inputs, and "layers.0", "gain", "constant_0" and one opaque step are listed.
HOSTILE: list[tuple[str, str]] = [
    # names that are not there
    ("z = w", "the name 'w'"),
    ("z = __builtins__", "the name '__builtins__'"),
    ("z = torch", "the name 'torch'"),
    ("z = self", "the name 'self'"),
    ("z = run", "the name 'run'"),
    ("z = forward", "the name 'forward'"),
    ("z = slice", "the name 'slice'"),
    ("z = open('/etc/passwd')", "a call of open"),
    ("z = eval('1')", "a call of eval"),
    ("z = exec('import os')", "a call of exec"),
    ("z = getattr(x, 'data')", "a call of getattr"),
    ("z = print(x)", "a call of print"),
    ("z = __import__('os').system('true')", "a call of Attribute"),
    # the inside of objects
    ("z = x.__class__", "the attribute '__class__'"),
    ("z = x._backward_hooks", "the attribute '_backward_hooks'"),
    ("z = x.__class__.__mro__[1].__subclasses__()", "a call of Attribute"),
    ("z = x.numpy()", "a call of x.numpy"),
    ("z = x.shape.numel()", "a call of x.shape.numel"),
    ("z = 'a'.join(x)", "a call of Attribute"),
    ("z = ''.format(x)", "a call of Attribute"),
    ("z = [].__class__", "the attribute '__class__'"),
    ("z = (1).__class__", "the attribute '__class__'"),
    ("z = x[0].__class__", "the attribute '__class__'"),
    ("z = (x + y).__dict__", "the attribute '__dict__'"),
    # torch, but more of it
    ("z = torch.load(x)", "a call of torch.load"),
    ("z = torch.save(x, 'f')", "a call of torch.save"),
    ("z = torch.tensor([1])", "a call of torch.tensor"),
    ("z = torch.os", "torch.os"),
    ("z = torch.os.system('true')", "a call of torch.os.system"),
    ("z = torch.ops", "torch.ops"),
    ("z = torch.ops.load_library('evil.so')", "a call of torch.ops.load_library"),
    ("z = torch.ops.aten", "the attribute 'aten'"),
    ("z = torch.ops.aten.neg", "the attribute 'neg'"),
    ("z = torch.ops.aten.neg(x)", "a call of torch.ops.aten.neg"),
    ("z = torch.ops.aten.neg.default.__class__(x)", "a call of torch.ops.aten.neg.default.__class__"),
    ("z = torch.ops.aten.__class__.mro(x)", "the operator __class__"),
    ("z = torch.ops.aten.__init__.__globals__(x)", "the operator __init__"),
    ("z = torch.ops.prim.device.default(x)", "a call of torch.ops.prim.device.default"),
    (
        "z = torch.ops.profiler._record_function_enter.default(x)",
        "a call of torch.ops.profiler._record_function_enter.default",
    ),
    ("z = torch.ops.aten.from_file.default('f')", "the operator from_file"),
    ("z = torch.ops.aten.save.default(x, 'f')", "the operator save"),
    ("z = torch.ops.aten.set_.source_Storage(x, y)", "the operator set_"),
    ("z = torch.ops.aten.record_stream.default(x, y)", "the operator record_stream"),
    ("z = torch.sym_sum(x)", "a call of torch.sym_sum"),
    ("z = torch.serialization.load(x)", "a call of torch.serialization.load"),
    ("z = torch.hub.load(x)", "a call of torch.hub.load"),
    ("z = torch.int64.__class__", "the attribute '__class__'"),
    # the model and the run
    ("z = self.config", "the name 'self'"),
    ("z = self.forward(x)", "a call of self.forward"),
    ("z = self.load_state_dict(x)", "a call of self.load_state_dict"),
    ("z = self.get_submodule('layers.1')(x)", "'layers.1', which the manifest does not list among submodules,"),
    ("z = self.get_submodule(x)(x)", "a lookup of anything but one literal name"),
    ("z = self.get_submodule('layers.0').forward(x)", "a call of Attribute"),
    ("z = self.get_submodule('layers.0').weight", "the attribute 'weight'"),
    ("z = self.get_submodule('layers.0').__class__", "the attribute '__class__'"),
    ("z = self.get_submodule('layers.0')[0]", "access to a part of a module, config or list"),
    ("z = self.get_submodule('layers.0', 'x')(x)", "a lookup of anything but one literal name"),
    ("z = self.get_submodule(target='layers.0')(x)", "a lookup of anything but one literal name"),
    ("z = self.get_submodule('layers' + '.0')(x)", "a lookup of anything but one literal name"),
    ("z = self.get_submodule(f'layers.0')(x)", "a lookup of anything but one literal name"),
    ("z = self.get_submodule('layers.0')(x)(x)", "a call of Call"),
    ("z = self.get_parameter('other')", "'other', which the manifest does not list among attributes,"),
    ("z = self.get_parameter(x)", "a lookup of anything but one literal name"),
    ("z = self.get_buffer('gain', 1)", "a lookup of anything but one literal name"),
    ("z = self.register_buffer('gain', x)", "a call of self.register_buffer"),
    ("z = run.constants", "run.constants"),
    ("z = run.constant(x)", "a lookup of anything but one literal name"),
    ("z = run.constant('other')", "'other', which the manifest does not list among constants,"),
    ("z = run.opaque", "run.opaque"),
    ("z = run.opaque['os:system']('true')", "the opaque step 'os:system'"),
    (f"z = run.opaque['{STEP}']", "run.opaque"),
    (f"z = run.opaque['{STEP}'].__globals__", "the attribute '__globals__'"),
    (f"z = run.opaque['{STEP}'].func(x)", "a call of Attribute"),
    ("z = run.opaque[x](y)", "the opaque step None"),
    ("z = run.opaque.get('os:system')(x)", "a call of Call"),
    ("z = run.__class__", "run.__class__"),
    # other syntax
    ("import os", "kind Import"),
    ("from os import system", "kind ImportFrom"),
    ("z = lambda: 1", "assignment of anything but a result"),
    ("z = [x for x in y]", "assignment of anything but a result"),
    ("z = {x for x in y}", "assignment of anything but a result"),
    ("z = (x for x in y)", "assignment of anything but a result"),
    ("z = {**x}", "assignment of anything but a result"),
    ("z = {x: 1}", "assignment of anything but a result"),
    ("z = {1.5: 1}", "assignment of anything but a result"),
    ("z = {1, 2}", "assignment of anything but a result"),
    ("z = x if y else x", "assignment of anything but a result"),
    ("z = x and y", "assignment of anything but a result"),
    ("z = not x", "the operator Not"),
    ("z = ~x", "the operator Invert"),
    ("z = +x", "the operator UAdd"),
    ("z = x @ y", "the operator MatMult"),
    ("z = x ** 100000", "a power other than a small literal float"),
    ("z = x ** 3", "a power other than a small literal float"),
    ("z = x ** y", "a power other than a small literal float"),
    ("z = x ** 1e9", "a power other than a small literal float"),
    ("z = x ** -9.0", "a power other than a small literal float"),
    ("z = x ** 'a'", "a power other than a small literal float"),
    ("z = x ** True", "a power other than a small literal float"),
    ("z = x << 100000", "the operator LShift"),
    ("z = x ^ y", "the operator BitXor"),
    ("z = x in y", "this comparison"),
    ("z = x is y", "this comparison"),
    ("z = x < y < x", "this comparison"),
    ("z = f'{x}'", "assignment of anything but a result"),
    ("z = 'a' * 1000000000", "arithmetic on anything but numbers"),
    ("z = '%s' % x", "arithmetic on anything but numbers"),
    ("z = [0] * 1000000000", "arithmetic on anything but numbers"),
    ("z = (0,) + (0,)", "arithmetic on anything but numbers"),
    ("z = b'bytes'", "assignment of anything but a result"),
    ("z = 1j", "assignment of anything but a result"),
    ("z = ...", "assignment of anything but a result"),
    ("z = 99999999999999999999", "assignment of anything but a result"),
    ("z = x[:]", "kind Slice"),
    ("z = x[1:2]", "kind Slice"),
    ("z = (w := x)", "assignment of anything but a result"),
    ("z = await x", "assignment of anything but a result"),
    ("z = yield", "assignment of anything but a result"),
    ("z = yield from x", "assignment of anything but a result"),
    ("z: int = x", "kind AnnAssign"),
    ("z += x", "kind AugAssign"),
    ("z = w = x", "assignment to anything but one name"),
    ("z, w = x", "assignment to anything but one name"),
    ("[z] = x", "assignment to anything but one name"),
    ("*z, w = x", "assignment to anything but one name"),
    ("x.data = y", "assignment to anything but one name"),
    ("x[0] = y", "assignment to anything but one name"),
    ("self.weight = x", "assignment to anything but one name"),
    ("torch.load = x", "assignment to anything but one name"),
    ("z = (x, y)", "assignment of anything but a result"),
    ("z = 1", "assignment of anything but a result"),
    ("del self", "deletion of anything but a value"),
    ("del run", "deletion of anything but a value"),
    ("del torch", "deletion of anything but a value"),
    ("del w", "deletion of anything but a value"),
    ("del x.data", "deletion of anything but a value"),
    ("del x[0]", "deletion of anything but a value"),
    ("global z", "kind Global"),
    ("assert x", "kind Assert"),
    ("raise x", "kind Raise"),
    ("pass", "kind Pass"),
    ("x", "kind Expr"),
    ("torch.ops.aten.neg_.default(x)", "kind Expr"),
    ("return x", "kind Return"),
    ("if x: z = y", "kind If"),
    ("while x: z = y", "kind While"),
    ("for z in x: pass", "a loop over anything but one new name"),
    ("with x: pass", "kind With"),
    ("try: pass\n    except: pass", "kind Try"),
    ("def z(): pass", "kind FunctionDef"),
    ("class z: pass", "kind ClassDef"),
    ("match x:\n        case 1: pass", "kind Match"),
    ("z = torch.ops.aten.neg.default(*x)", "an unpacked argument"),
    ("z = torch.ops.aten.neg.default(**x)", "this keyword"),
    ("z = torch.ops.aten.neg.default(__class__=x)", "this keyword"),
    ("z = torch.ops.aten.neg.default(x, out=y, out=y)", "this keyword"),
    ("self = x", "the name 'self'"),
    ("run = x", "the name 'run'"),
    ("torch = x", "the name 'torch'"),
    ("slice = x", "the name 'slice'"),
    ("__builtins__ = x", "the name '__builtins__'"),
    ("__class__ = x", "the name '__class__'"),
    # text that is not what it seems
    ("z = x + 1\f", "control characters"),
    ("z = \u0445", "ascii"),  # a Cyrillic x
    ("z = '\u202e'", "ascii"),
]


@pytest.mark.parametrize(("statement", "reason"), HOSTILE)
def test_hostile_statements_are_refused(statement: str, reason: str) -> None:
    allowed = replace(NAMES, submodules=["layers.0"], attributes=["gain"], constants=["constant_0"], opaque=[STEP])
    uses = (
        'a = self.get_submodule("layers.0")(x)',
        'b = self.get_parameter("gain")',
        'c = run.constant("constant_0")',
        f'd = run.opaque["{STEP}"](x)',
        "z = x + y",
    )
    accepts(program(*uses), allowed)
    assert reason in refuses(program(*uses, statement), allowed)


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
        "@staticmethod\ndef forward(self, x, y, *, run):",
    ],
)
def test_other_signatures_are_refused(head: str) -> None:
    accepts(program("z = x + y"))
    assert "a signature that differs from" in refuses(program("z = x + y", head=head))


@pytest.mark.parametrize("before", ["async ", "import os\n", "'a docstring'\n"])
def test_anything_but_one_function_is_refused(before: str) -> None:
    assert "anything but one function" in refuses(before.encode() + program("z = x + y"))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        *(
            (name, f"the name '{name}'")
            for name in ("self", "run", "torch", "slice", "__builtins__", "__import__", "a" * 300)
        ),
        *((name, "is not a valid artifact program") for name in ("a b", "1a", "")),
        ("é", "ascii"),
    ],
)
def test_inputs_with_other_names_are_refused(name: str, reason: str) -> None:
    allowed = Allowed(input_names=[name], output_names=["z"])
    source = program("z = torch.ops.aten.neg.default(1)", head=f"def forward(self, {name}, *, run):")
    assert reason in refuses(source, allowed)


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        *((result, "a last statement other than") for result in ("z", "None", "dict(z=z)", "[z]")),
        *(
            (result, "a result that differs from")
            for result in ("{}", '{"w": z}', '{"z": z, "w": z}', '{"z": z, "z": z}')
        ),
        *((result, "a result that differs from") for result in ("{**z}", "{z: z}")),
        ('{"z": w}', "the name 'w'"),
    ],
)
def test_other_results_are_refused(result: str, reason: str) -> None:
    assert reason in refuses(program("z = x + y", result=result))


def test_more_after_the_function_is_refused() -> None:
    good = program("z = x + y")
    for more in (b"import os\n", b"forward(1)\n", good, b"x = 1\n", b"'text'\n"):
        assert "anything but one function" in refuses(good + more)
    assert "anything but one function" in refuses(b"")
    assert "anything but one function" in refuses(b"\n# nothing\n")


def test_nothing_comes_after_the_return() -> None:
    assert "kind Return" in refuses(program('return {"z": x}', "z = x + y"))


def test_deleted_values_are_gone() -> None:
    accepts(program("z = x + y", "del x, y"))
    assert "the name 'x'" in refuses(program("z = x + y", "del x", "w = x + 1"))
    assert "the name 'z'" in refuses(program("z = x + y", "del z"))
    assert "deletion" in refuses(program("z = x + y", "del x, x"))
    accepts(program("z = x + y", "del x", "x = z + 1", "w = x + 1"))


def test_modules_stay_whole_under_any_name() -> None:
    allowed = replace(NAMES, objects=["layers.0"])
    good = ['m = self.get_submodule("layers.0")', "z = x + y"]
    accepts(program(*good), allowed)
    for bad, reason in (
        ("w = m.weight", "access to a part of a module"),
        ("w = m[0]", "access to a part of a module"),
        ("w = m(x)", "a call of m"),
        ("w = m.state_dict()", "a call of m.state_dict"),
        ("w = m", "a module or config anywhere but"),
    ):
        assert reason in refuses(program(*good, bad), allowed)
    accepts(program(*good, "m = x + 1", "w = m.real"), allowed)  # the name is another value's now


def test_odd_text_is_refused() -> None:
    good = program("z = x + y")
    accepts(b"# a comment\n" + good)
    assert "encoding declaration" in refuses(b"# -*- coding: utf-7 -*-\n" + good)
    assert "encoding declaration" in refuses(b"# vim: set fileencoding=utf-16 :\n" + good)
    assert "ascii" in refuses(b"\xef\xbb\xbf" + good)
    assert "control characters" in refuses(good.replace(b"\n", b"\r"))
    assert "control characters" in refuses(good + b"\0")
    assert "ascii" in refuses(good.decode().encode("utf-16"))


def test_size_is_limited() -> None:
    comment = b"#" * (SOURCE_LIMIT_BYTES - len(program("z = x + y")) - 1) + b"\n"
    accepts(comment + program("z = x + y"))
    assert f"more than the {SOURCE_LIMIT_BYTES} allowed" in refuses(b"#" + comment + program("z = x + y"))


@pytest.mark.parametrize("depth", [NESTING_LIMIT + 1, 90, 1000, 100_000])
def test_depth_is_limited(depth: int) -> None:
    """Python's own parser gives up first where there is far too much."""
    too_deep = r"nesting deeper than \d+|is not a valid artifact program"
    for value in (f"{'(' * depth}x{',)' * depth}", f"x{' + 1' * depth}", f"{'-' * depth}x", f"x{'[0]' * depth}"):
        assert re.search(too_deep, refuses(program(f"z = torch.ops.aten.neg.default({value})")))
    assert re.search(
        r"a call of torch\.ops\.ops|is not a valid artifact program", refuses(program(f"z = torch{'.ops' * depth}(x)"))
    )


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


HOSTILE_LOOPS: list[tuple[str, tuple[str, ...]]] = [
    # over something else
    ("a loop over anything but range(size)", ("z = x", "for i in x:", "    z = x")),
    ("a loop over anything but range(size)", ("z = x", "for i in range(3):", "    z = x")),
    ("a loop over anything but range(size)", ("z = x", "for i in range(y + 1):", "    z = x")),
    ("a loop over anything but range(size)", ("z = x", "for i in range(0, y):", "    z = x")),
    ("a loop over anything but range(size)", ("z = x", "for i in range(y, step=1):", "    z = x")),
    ("a loop over anything but range(size)", ("z = x", "for i in range(*y):", "    z = x")),
    ("the name 'w'", ("z = x", "for i in range(w):", "    z = x")),
    ("the name 'range'", ("z = x", "for i in range(range):", "    z = x")),
    ("a loop over anything but range(size)", ("z = x", "for i in enumerate(y):", "    z = x")),
    ("a loop over anything but range(size)", ("z = x", "for i in torch.range(y):", "    z = x")),
    ("a loop over anything but range(size)", ("z = x", "for i in a:", "    z = x")),
    ("a module or config anywhere but as an argument of an opaque step", ("z = x", "for i in range(a):", "    z = x")),
    ("the name 'z'", ("z = []", "for i in range(z):", "    z.append(x)")),
    # with another head
    ("a loop over anything but one new name", ("z = x", "for i, j in range(y):", "    z = x")),
    ("a loop over anything but one new name", ("z = x", "for x in range(y):", "    z = x")),
    ("the name 'self'", ("z = x", "for self in range(y):", "    z = x")),
    ("the name 'range'", ("z = x", "for range in range(y):", "    z = x")),
    ("a loop over anything but one new name", ("z = x", "for z.i in range(y):", "    z = x")),
    ("an else of a loop", ("z = x", "for i in range(y):", "    z = x", "else:", "    z = y")),
    # what is in it
    ("kind Pass", ("z = x", "for i in range(y):", "    pass")),
    ("kind Break", ("z = x", "for i in range(y):", "    break")),
    ("kind Continue", ("z = x", "for i in range(y):", "    continue")),
    ("kind Return", ("z = x", "for i in range(y):", '    return {"z": z}')),
    ("assignment to the loop variable", ("z = x", "for i in range(y):", "    i = x")),
    ("deletion inside a loop of a value from outside", ("z = x", "for i in range(y):", "    del x")),
    ("deletion inside a loop of a value from outside", ("z = x", "for i in range(y):", "    del y")),
    ("the name 'w'", ("z = x", "for i in range(y):", "    z = w", "    w = x")),
    (
        "deletion inside a loop of a value from outside",
        ("z = x", "for i in range(y):", "    w = x", "    for j in range(y):", "        del w"),
    ),
    ("kind While", ("z = x", "while y:", "    z = x")),
    ("kind If", ("z = x", "if y:", "    z = x")),
    # what comes after it
    ("the name 'z'", ("for i in range(y):", "    z = x")),
    ("the name 'w'", ("z = x", "for i in range(y):", "    w = x", "z = w")),
    ("the name 'i'", ("z = x", "for i in range(y):", "    z = x", "z = i")),
    # lists
    ("kind Expr", ("z = []", "z.append(x)")),
    ("kind Expr", ("z = x", "for i in range(y):", "    z.append(x)")),
    ("assignment of or to a list, module or config inside a loop", ("z = x", "for i in range(y):", "    w = []")),
    ("assignment of or to a list, module or config inside a loop", ("z = []", "for i in range(y):", "    z = []")),
    ("assignment of or to a list, module or config inside a loop", ("z = []", "for i in range(y):", "    z = x")),
    ("an append of anything but a value", ("z = []", "for i in range(y):", "    z.append(x, y)")),
    (
        "a module or config anywhere but as an argument of an opaque step",
        ("z = []", "for i in range(y):", "    z.append(a)"),
    ),
    ("the name 'z'", ("z = []", "for i in range(y):", "    z.append(z)")),
    ("an append of anything but a value", ("z = []", "for i in range(y):", "    z.append(x[0])")),
    ("kind Expr", ("z = []", "for i in range(y):", "    z.extend(x)")),
    ("kind Expr", ("z = []", "for i in range(y):", "    z.append.append(x)")),
    ("a call of z.append", ("z = []", "for i in range(y):", "    w = z.append(x)")),
    ("assignment of anything but a result", ("z = [x]", "for i in range(y):", "    z.append(x)")),
    ("the name 'w'", ("w = []", "z = w")),
    ("access to a part of a module, config or list", ("w = []", "z = w[0]")),
    ("access to a part of a module, config or list", ("w = []", "z = w.append")),
    # a part of a module
    ("a module or config anywhere but as an argument of an opaque step", ("z = a",)),
    (
        "assignment of or to a list, module or config inside a loop",
        ("z = x", "for i in range(y):", '    z = self.get_submodule("layers.0")'),
    ),
    ("a module or config anywhere but as an argument of an opaque step", ("z = x", "for i in range(y):", "    z = a")),
    ("assignment of or to a list, module or config inside a loop", ("z = x", "for i in range(y):", "    a = x")),
]


@pytest.mark.parametrize(("reason", "statements"), HOSTILE_LOOPS)
def test_hostile_loops_are_refused(reason: str, statements: tuple[str, ...]) -> None:
    allowed = replace(NAMES, objects=["layers.0"], opaque=[STEP])
    uses = ('a = self.get_submodule("layers.0")', f'b = run.opaque["{STEP}"](a)')
    accepts(program(*uses, "z = x"), allowed)
    assert reason in refuses(program(*uses, *statements), allowed)


def test_loops_are_nested_to_a_limit() -> None:
    def nested(depth: int) -> bytes:
        lines = [f"{'    ' * level}for i{level} in range(y):" for level in range(depth)]
        return program("z = x", *lines, f"{'    ' * depth}z = x")

    accepts(nested(LOOP_LIMIT))
    assert "loops" in refuses(nested(LOOP_LIMIT + 1))
