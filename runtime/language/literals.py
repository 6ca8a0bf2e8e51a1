"""Checks of the literals and field names in an artifact's code: numbers, sizes, strings, keywords."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterator

ELEMENTS_LIMIT = 2**34  # of a literal size; a model's real sizes come from its inputs and weights
_LARGEST_EXPONENT = 8.0
_WORD = re.compile(r"[A-Za-z_., >()-]{0,200}\Z")
_DEVICE = re.compile(
    r"(cpu|cuda|ipu|xpu|mkldnn|opengl|opencl|ideep|hip|ve|fpga|maia|xla|lazy|vulkan|mps|meta|hpu|mtia"
    r"|privateuseone)(:.*)?\Z"
)
# Keywords that transformers' decorators read from `**kwargs`: they write a module's results to files.
FORBIDDEN_KEYWORDS = frozenset(("debug_io", "debug_io_dir", "prune_layers"))
_KIND = re.compile(r"[a-z][a-z0-9_]{0,60}\Z")
# Attributes of generators, coroutines, frames, tracebacks, code objects and functions, and of tensors: writing to
# `tensor.data` changes a tensor without increasing its version counter.
_INTROSPECTION = re.compile(r"(gi|cr|ag|f|tb|co|func|im)_|(mro|grad_fn|grad|data)\Z")


def is_field(name: str) -> bool:
    """Whether a program may read a field of this name from a result."""
    return not name.startswith("_") and _INTROSPECTION.match(name) is None


def is_power(exponent: object) -> bool:
    """Whether this literal may be an exponent: a small float, because integer powers can grow without bound."""
    return type(exponent) is float and abs(exponent) <= _LARGEST_EXPONENT


def argument_problem(node: ast.expr, keyword: str | None) -> str:
    """Describe the forbidden part of an operator's argument; empty when it is allowed."""
    if keyword == "device" and not (_is_run_device(node) or _is_literal(node, None)):
        return "a device other than run.device"
    if keyword == "pin_memory" and not (_is_literal(node, None) or _is_literal(node, False)):
        return "pinned memory"
    if keyword in ("out", "generator"):
        return f"the argument {keyword!r}"
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            if _WORD.match(part.value) is None or _DEVICE.match(part.value) is not None:
                return f"the string {part.value[:40]!r} as an operator's argument"
        elif isinstance(part, (ast.List, ast.Tuple)) and math.prod(_sizes(part)) > ELEMENTS_LIMIT:
            return f"a literal size of more than {ELEMENTS_LIMIT} elements"
    return ""


def submodule_call_problem(node: ast.Call) -> str:
    """Describe the forbidden keyword or string in a call of a module; empty when the call is allowed.

    Allowed strings are kinds of layers, such as `full_attention`, and keys of tables by kind.
    """
    for keyword in node.keywords:
        if keyword.arg in FORBIDDEN_KEYWORDS:
            return f"the keyword {keyword.arg!r}"
    for argument in (*node.args, *(keyword.value for keyword in node.keywords)):
        for part in ast.walk(argument):
            if not isinstance(part, ast.Constant) or not isinstance(part.value, str):
                continue
            if _KIND.match(part.value) is None or part.value in FORBIDDEN_KEYWORDS:
                return f"the string {part.value[:40]!r} as a module's argument"
    return ""


def _sizes(node: ast.List | ast.Tuple) -> Iterator[int]:
    for item in node.elts:
        if isinstance(item, ast.Constant) and type(item.value) is int and item.value > 0:
            yield item.value


def _is_run_device(node: ast.expr) -> bool:
    return isinstance(node, ast.Attribute) and ast.unparse(node) == "run.device"


def _is_literal(node: ast.expr, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value
