"""Attacks by code: everything in Python that leads out of a few tensor operations."""

from __future__ import annotations

import sys

from tests.attacks.attack import Attack, program, raw_program
from tests.attacks.steps import MODULES, STEPS

_RUN = "__import__('os').system('touch owned')"
_OPAQUE = "transformers.models.llama.modeling_llama"
# The parser of Python 3.10 reads it, those of later versions do not.
_TOO_DEEP = "nesting deeper than 32" if sys.version_info < (3, 11) else "is not a valid artifact program"


def opaque(path: str, reason: str = "", argument: str = '"touch owned"') -> Attack:
    reason = reason or f"opaque step '{path}'"
    return program(f"opaque step {path}", reason, f'y = run.opaque["{path}"]({argument})', opaque=(path,))


IMPORTS = [
    program("import", "a statement of kind Import", "import os", "y = x + 1"),
    program("import from", "a statement of kind ImportFrom", "from os import system", "y = x + 1"),
    program("star import in a function", "kind ImportFrom", "from os import *", "y = x + 1"),
    raw_program(
        "import before the function",
        "anything but one function",
        b"import os\ndef forward(self, x, *, run):\n    y = x + 1\n    return {'y': y}\n",
    ),
    raw_program("star import", "anything but one function", b"from os import *\n"),
    program("__import__", "a call of Attribute", f"y = {_RUN}"),
    program("builtin open", "a call of open", "y = open('owned', 'w')"),
    program("eval", "a call of eval", "y = eval('1')"),
    program("exec", "a call of exec", "y = exec('1')"),
    program("print", "a call of print", "y = print(x)"),
]

TRAVERSAL = [
    program("dunder traversal", "the attribute '__globals__'", "y = self.__class__.__init__.__globals__"),
    program("dunder of an input", "the attribute '__class__'", "y = x.__class__"),
    program("dunder of a result", "a call of a.__reduce__", "a = x + 1", "y = a.__reduce__()"),
    program("subclasses", "a call of Attribute", "y = ().__class__.__base__.__subclasses__()[0]"),
    program("private attribute", "the attribute '_backward_hooks'", "y = x._backward_hooks"),
    program("attribute of self", "the name 'self'", "y = self.config"),
    program("method of self", "a call of self.state_dict", "y = self.state_dict()"),
    program("attribute of an attribute", "the attribute 'grad'", "y = x.data.grad"),
    program("getattr", "a call of getattr", "y = getattr(x, '__class__')"),
    program("getattr by another name", "a call of torch.getattr", "y = torch.getattr(x, 'y')"),
    program("run's inside", "run.opaque is not allowed", "y = run.opaque"),
    program("run's constants", "run.constants is not allowed", "y = run.constants"),
    program("run's dunder", "run.__class__", "y = run.__class__"),
    program("torch's module", "torch.serialization is not allowed", "y = torch.serialization"),
    program("a frame of a generator", "the attribute 'gi_frame'", "y = x.gi_frame"),
    program("a frame's builtins", "the attribute 'f_builtins'", "y = x.f_builtins"),
    program("a traceback", "the attribute 'tb_frame'", "y = x.tb_frame"),
    program("a function's code", "the attribute 'func_globals'", "y = x.func_globals"),
    program("calling a method of a value", "a call of x.tofile", "y = x.tofile('owned')"),
    program("calling a value", "a call of x", "y = x(1)"),
    program("calling a result", "a call of Subscript", "y = x[0](1)"),
    program(
        "a part of a module",
        "access to a part of",
        'a = self.get_submodule("layers.0")',
        "y = a.forward",
        objects=("layers.0",),
    ),
    program(
        "a module out of a tuple",
        "a subscript of a literal",
        'a = (self.get_submodule("layers.0"),)[0]',
        "y = a.forward",
        objects=("layers.0",),
    ),
    program(
        "a module out of a copied dictionary",
        "a module or config anywhere but",
        'a = run.copied({"m": self.get_submodule("layers.0")})["m"]',
        "y = a.forward",
        objects=("layers.0",),
    ),
    program(
        "a module as a result",
        "a module or config anywhere but",
        'a = self.get_submodule("layers.0")',
        tail='    return {"y": a}',
        objects=("layers.0",),
    ),
]

SYNTAX = [
    program("f-string", "kind JoinedStr", "y = torch.ops.aten.neg.default(f'{x.__class__}')"),
    program("format", "a call of Attribute", "y = '{0.__class__}'.format(x)"),
    program("text formatting", "arithmetic on anything but numbers", "y = '%1000000000d' % 5"),
    program("text out of a tuple", "a subscript of a literal", "a = ('%1000000000d',)[0]", "y = a % 5"),
    program("comprehension", "kind ListComp", "y = torch.ops.aten.cat.default([a for a in x])"),
    program("generator", "assignment of anything but a result", "y = (a for a in x)"),
    program("set comprehension", "kind SetComp", "y = x[{a for a in x}]"),
    program("lambda", "kind Lambda", "y = torch.ops.aten.neg.default(lambda: x)"),
    program("lambda that is called", "a call of Lambda", f"y = (lambda: {_RUN})()"),
    program("walrus", "kind NamedExpr", "y = torch.ops.aten.neg.default((a := x))"),
    program("await", "kind Await", "y = torch.ops.aten.neg.default(await x)"),
    program("yield", "kind Yield", "y = torch.ops.aten.neg.default((yield x))"),
    program("conditional expression", "kind IfExp", "y = x[x if x else 0]"),
    program("boolean operators", "kind BoolOp", "y = x[x and 1]"),
    program("starred argument", "an unpacked argument", "y = torch.ops.aten.neg.default(*x)"),
    program("double starred argument", "this keyword", "y = torch.ops.aten.neg.default(**x)"),
    program("set", "kind Set", "y = x[{1}]"),
    program("ellipsis", "a literal of type ellipsis", "y = x[...]"),
    program("bytes", "a literal of type bytes", "y = x[b'a']"),
    program("complex number", "a literal of type complex", "y = x[1j]"),
    program("assert", "kind Assert", f"assert {_RUN}", "y = x + 1"),
    program("if", "kind If", f"if {_RUN}: pass", "y = x + 1"),
    program("while", "kind While", "while True: pass", "y = x + 1"),
    program("try", "kind Try", "try: y = x + 1\n    except Exception: y = x + 2"),
    program("with", "kind With", "with x: pass", "y = x + 1"),
    program("raise", "kind Raise", "raise x", "y = x + 1"),
    program("global", "kind Global", "global forward", "y = x + 1"),
    program("inner function", "kind FunctionDef", "def a(): pass", "y = x + 1"),
    program("inner class", "kind ClassDef", "class A: pass", "y = x + 1"),
    program("annotated assignment", "kind AnnAssign", f"y: {_RUN} = x + 1"),
    program("augmented assignment", "kind AugAssign", "x += 1", "y = x + 1"),
    program("assignment to an attribute", "assignment to anything but one name", "x.data = x + 1", "y = x + 1"),
    program("assignment to an item", "assignment to anything but one name", "x[0] = x + 1", "y = x + 1"),
    program("assignment to self", "the name 'self'", "self = x + 1", "y = x + 1"),
    program("assignment to run", "the name 'run'", "run = x + 1", "y = x + 1"),
    program("assignment to torch", "the name 'torch'", "torch = x + 1", "y = x + 1"),
    program("assignment to slice", "the name 'slice'", "slice = x + 1", "y = x + 1"),
    program("assignment to range", "the name 'range'", "range = x + 1", "y = x + 1"),
    program("assignment to a guard", "the name '__calculate'", "__calculate = x + 1", "y = x + 1"),
    program("a name of builtins", "which is not defined there", "y = x + __builtins__"),
    program("a guard by its name", "which is not defined there", "y = x + __field"),
    program("decorator", "a signature", "y = x + 1", head=f"@{_RUN}\ndef forward(self, x, *, run):"),
    program("default argument", "a signature", "y = x + 1", head=f"def forward(self, x={_RUN}, *, run):"),
    program("keyword default", "a signature", "y = x + 1", head=f"def forward(self, x, *, run={_RUN}):"),
    program("annotation", "a signature", "y = x + 1", head=f"def forward(self, x: {_RUN}, *, run):"),
    program("result annotation", "a signature", "y = x + 1", head=f"def forward(self, x, *, run) -> {_RUN}:"),
    program("variable arguments", "a signature", "y = x + 1", head="def forward(self, x, *args, run):"),
    program("another function", "a signature", "y = x + 1", head="def __getattr__(self, x, *, run):"),
    program(
        "asynchronous function", "anything but one function", "y = x + 1", head="async def forward(self, x, *, run):"
    ),
    program(
        "one input twice",
        "a second input",
        "y = x + 1",
        head="def forward(self, x, x, *, run):",
        input_names=("x", "x"),
    ),
    program("code after the return", "a statement of kind Return", "return {'y': x}", "y = x + 1"),
    program(
        "a result that is not stated", "a result that differs from", "y = x + 1", tail="    return {'y': y, 'z': y}"
    ),
]

TEXT = [
    raw_program(
        "encoding declaration", "encoding declaration", b"# -*- coding: utf-7 -*-\ndef forward(self, x, *, run):\n"
    ),
    raw_program("vim's encoding declaration", "encoding declaration", b"#\n# vim: set fileencoding=rot13 :\n"),
    raw_program(
        "null bytes", "control characters", b"def forward(self, x, *, run):\n    y = x + 1\0\n    return {'y': y}\n"
    ),
    raw_program("carriage returns", "control characters", b"# a comment\rimport os\n"),
    raw_program("form feeds", "control characters", b"def forward(self, x, *, run):\n\x0c    return {'y': x}\n"),
    raw_program(
        "terminal sequences", "control characters", b"# \x1b[2J\ndef forward(self, x, *, run):\n    return {'y': x}\n"
    ),
    program("homoglyph of self", "ascii", "y = ѕelf.get_parameter('w')"),
    program("homoglyph that Python normalizes", "ascii", "y = x.__ｃlass__"),
    raw_program("byte order mark", "ascii", "\ufeffdef forward(self, x, *, run):\n    return {'y': x}\n".encode()),
    raw_program("UTF-16", "ascii", "def forward(self, x, *, run):\n    return {'y': x}\n".encode("utf-16")),
    raw_program("no text at all", "ascii", bytes(range(256))),
    raw_program("byte code", "ascii", b"\xcb\x0d\x0d\x0a" + bytes(64)),
    program("line continuation to an import", "kind Import", "y = x + 1; import \\\n os"),
]

BOMBS = [
    program("a huge integer", "a literal of type int", f"y = x + {'9' * 4000}"),
    program("an integer of a million digits", "is not a valid artifact program", f"y = x + {'9' * 1_000_000}"),
    program("an exponent", "a power other than", "y = 9 ** 9 ** 9 ** 9"),
    program("an exponent of a value", "a power other than", "y = x ** x"),
    program("an exponent without end", "a power other than", "y = 9 ** 1e999"),
    program("a shift", "the operator LShift", "y = 1 << 9999999999"),
    program("text that is repeated", "arithmetic on anything but numbers", "y = 'a' * 9223372036854775807"),
    program("a list that is repeated", "arithmetic on anything but numbers", "y = [0] * 9223372036854775807"),
    program("matrix product by the sign", "the operator MatMult", "y = x @ x"),
    program("deep nesting of parentheses", "is not a valid artifact program", f"y = {'(' * 5000}x{')' * 5000}"),
    program("deep nesting of calls", "nesting deeper", f"y = {'torch.ops.aten.neg.default(' * 60}x{')' * 60}"),
    program("deep nesting of signs", "is not a valid artifact program", f"y = {'-' * 50_000}x"),
    program("deep nesting of subscripts", "nesting deeper", f"y = x{'[0]' * 500}"),
    program("a long sum", _TOO_DEEP, f"y = x{' + 1' * 100_000}"),
    program("a terabyte", "a literal size", "y = torch.ops.aten.empty.memory_format([1099511627776])"),
    program("a terabyte in two factors", "a literal size", "y = torch.ops.aten.zeros.default([1048576, 1048576])"),
    program("a terabyte by repeating", "a literal size", "y = torch.ops.aten.repeat.default(x, [1048576, 1048576])"),
    program("a terabyte by expanding", "a literal size", "y = torch.ops.aten.expand.default(x, [4611686018427387904])"),
    raw_program("five megabytes of code", "more than the", b"# " + b"a" * (5 * 2**20)),
    program(
        "loops in loops",
        "nesting of more than",
        *(f"{'    ' * i}for i{i} in range(x):" for i in range(6)),
        "    " * 6 + "y = x + 1",
    ),
    program("a loop over text", "a loop over anything but", "for a in 'abc':", "    y = x + 1", "y = x + 1"),
    program(
        "a loop over a literal number",
        "a loop over anything but",
        "for a in range(9999999999):",
        "    b = x + 1",
        "y = x + 1",
    ),
]

OPERATORS = [
    program(f"operator {call}", reason, f"y = {call}")
    for call, reason in (
        ("torch.ops.aten.from_file.default('owned', True, 8)", "the operator from_file"),
        ("torch.ops.aten.save.default(x, 'owned')", "the operator save"),
        ("torch.ops.aten._print.default('owned')", "the operator _print"),
        ("torch.ops.aten.set_.source_Storage(x, x)", "the operator set_"),
        ("torch.ops.aten.resize_.default(x, [10])", "the operator resize_"),
        ("torch.ops.aten._foreach_add_.Scalar([x], 1)", "the operator _foreach_add_"),
        ("torch.ops.aten._index_put_impl_.default(x, [x], x, False, True)", "the operator _index_put_impl_"),
        ("torch.ops.aten._unsafe_index.Tensor(x, [x])", "the operator _unsafe_index"),
        ("torch.ops.aten._sparse_coo_tensor_unsafe.default(x, x, [1])", "the operator _sparse_coo_tensor_unsafe"),
        (
            "torch.ops.aten._native_batch_norm_legit_no_training.default(x, x, x, x, x, 1.0, 1.0)",
            "the operator _native_batch_norm",
        ),
        ("torch.ops.aten.native_batch_norm.default(x, x, x, x, x, True, 1.0, 1.0)", "the operator native_batch_norm"),
        ("torch.ops.aten.add.out(x, x, out=x)", "the operator add"),
        ("torch.ops.aten.max.dim_max(x, 0)", "the operator max"),
        ("torch.ops.aten.sort.values_stable(x)", "the operator sort"),
        ("torch.ops.aten.topk.values(x, 1)", "the operator topk"),
        ("torch.ops.aten.add.Tensor(x, x, out=x)", "the argument 'out'"),
        ("torch.ops.aten.mul.left_t([1], 9999999)", "torch.ops.aten.mul.left_t"),
        ("torch.ops.aten.add.str('a', 'b')", "torch.ops.aten.add.str"),
        ("torch.ops.aten.neg.op(x)", "which torch"),
        ("torch.ops.aten.neg.__call__(x)", "which torch"),
        ("torch.ops.aten.__class__.default(x)", "the operator __class__"),
        ("torch.ops.prim.Print.default(x)", "a call of torch.ops.prim"),
        ("torch.ops.profiler._record_function_enter.default('x')", "a call of torch.ops.profiler"),
        ("torch.ops.my_library.pwn.default(x)", "a call of torch.ops.my_library"),
        ("torch.ops.load_library('owned.so')", "a call of torch.ops.load_library"),
        ("torch.ops.aten.neg(x)", "a call of torch.ops.aten.neg"),
        ("torch.load('owned')", "torch.load"),
        ("torch.hub.load('a', 'b')", "a call of torch.hub.load"),
        ("torch.save(x, 'owned')", "a call of torch.save"),
        ("torch._C._jit_set_profiling_executor(x)", "a call of torch._C._jit_set_profiling_executor"),
        ("torch.ops.aten.zeros.default([1], device='cuda:1')", "a device other than run.device"),
        ("torch.ops.aten.to.device(x, 'privateuseone:0', torch.float32)", "the string 'privateuseone:0'"),
        ("torch.ops.aten.zeros.default([1], pin_memory=True)", "pinned memory"),
        ("torch.ops.aten.einsum.default('%s', [x])", "the string '%s'"),
        ("torch.ops.aten.div.Tensor_mode(x, x, rounding_mode='/etc/passwd')", "the string '/etc/passwd'"),
    )
]

IN_PLACE = [
    program(
        "changing a weight in place",
        "in place",
        'w = self.get_parameter("w")',
        "y = torch.ops.aten.mul_.Tensor(w, x)",
        attributes=("w",),
    ),
    program(
        "changing a weight through views of it",
        "in place",
        'w = self.get_parameter("w")',
        "a = torch.ops.aten.detach.default(torch.ops.aten.t.default(w))",
        "y = torch.ops.aten.zero_.default(a)",
        attributes=("w",),
    ),
    program(
        "changing a constant in place",
        "in place",
        'y = torch.ops.aten.fill_.Scalar(run.constant("constant_0"), 0)',
        constants=("constant_0",),
    ),
    program(
        "changing a weight in the second turn of a loop",
        "in place",
        'w = self.get_parameter("w")',
        "n = x + 1",
        "y = x + 1",
        "for i in range(n):",
        "    a = torch.ops.aten.zero_.default(y)",
        "    y = w",
        attributes=("w",),
    ),
]

NAMES = [
    program("a submodule that is not stated", "which the manifest does not list", 'y = self.get_submodule("a")(x)'),
    program("a parameter that is not stated", "which the manifest does not list", 'y = self.get_parameter("a")'),
    program("a constant that is not stated", "which the manifest does not list", 'y = run.constant("a")'),
    program("a lookup by a calculated name", "one literal name", "y = self.get_parameter(x)"),
    program("a lookup by text that is joined", "one literal name", 'y = self.get_parameter("a" + "b")'),
    program("a stated submodule that is not called", "uses other submodules", "y = x + 1", submodules=("a",)),
    program("setting an attribute", "a call of self.register_buffer", 'y = self.register_buffer("a", x)'),
    program("loading weights", "a call of self.load_state_dict", "y = self.load_state_dict(x)"),
]

OPAQUE = [
    *(
        opaque(path)
        for path in ("os:system", "os:popen", "posix:system", "subprocess:run", "builtins:exec", "nt:system")
    ),
    opaque("torch:load"),
    opaque("torch.hub:load"),
    opaque("pickle:loads"),
    opaque("transformers:AutoModel.from_pretrained"),
    opaque("transformers.dynamic_module_utils:get_class_in_module"),
    opaque("transformers.utils.hub:cached_file"),
    opaque("transformers.models.wav2vec2.modeling_wav2vec2:Wav2Vec2ForCTC.load_adapter"),
    opaque(
        "transformers.models.timm_wrapper.modeling_timm_wrapper:_create_timm_model_with_error_handling",
        "no forward of the model's code calls it",
        "x",
    ),
    opaque("transformers.models.timm_wrapper.modeling_timm_wrapper:timm.create_model"),
    opaque(f"{_OPAQUE}:LlamaModel.__init__.__globals__"),
    opaque(f"{_OPAQUE}:LlamaModel.__class__"),
    opaque(f"{_OPAQUE}:__builtins__.exec"),
    opaque(f"{_OPAQUE}:torch.load"),
    opaque(f"{_OPAQUE}:torch.ops"),
    opaque(f"{_OPAQUE}:nn.Module.share_memory"),
    opaque(f"{_OPAQUE}:LlamaModel.from_pretrained"),
    opaque("transformers.pytorch_utils:apply_chunking_to_forward", "no forward of the model's code calls it", "x"),
    opaque("seqbuild_modeling_0123456789abcdef.modeling_evil:run"),
    opaque("../evil:run"),
    opaque("transformers.models.llama.modeling_llama.:f"),
]

PROGRAMS = [
    *(*IMPORTS, *TRAVERSAL, *SYNTAX, *TEXT, *BOMBS),
    *(*OPERATORS, *IN_PLACE, *NAMES, *OPAQUE, *STEPS, *MODULES),
]
