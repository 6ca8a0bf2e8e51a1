"""Opaque steps: functions of the model's code that an artifact may call whole, and the arguments they may get.

A function is accepted if it is a `forward` or called by one, and if nothing it can reach does more than calculate. Both
are read from the source files of the libraries on this host (`runtime.language.reach`); nothing is imported.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Collection, Iterable, Iterator

from runtime.errors import ArtifactError
from runtime.language.library import ClassDefinition, find_path, methods, source
from runtime.language.reach import Reach
from runtime.language.reviewed import is_computing

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,200}\Z")
_PATH = re.compile(r"[A-Za-z0-9_.]{1,300}:_?[A-Za-z][A-Za-z0-9_]{0,200}(\._?[A-Za-z][A-Za-z0-9_]{0,200})?\Z")
# Keywords that a step accepts through `**kwargs`, only as the literals None, True and False: flags that the library's
# decorators read, and `image_sizes`, which in transformers 5.17 Llava's get_image_features takes from `**kwargs` and
# its forward passes as None. A literal flag can only select a branch of code that the step's check has followed.
FLAGS = frozenset(
    [
        "image_sizes",
        "is_causal",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "use_cache",
    ]
)
_LOOKUPS = frozenset(("get_submodule", "get_parameter", "get_buffer", "constant"))
# Strings that a step may be given, and only if the step's own code contains one of the same group: code often compares
# with one of two values, and does the other thing for any other string.
_ALTERNATIVES = (("block_sparse", "original_full"), ("default", "full"), ("image", "video"))
WORDS = frozenset(word for group in _ALTERNATIVES for word in group)


def is_opaque_path(path: str, own_modules: Collection[str] = ()) -> bool:
    """Whether `module:function` or `module:Class.method` names transformers' modeling code, or one of `own_modules`:
    the artifact's own code, which runs only if the user has allowed all of it.
    """
    module, _, qualified = path.partition(":")
    if module in own_modules:
        return all(_NAME.match(part) and not part.startswith("__") for part in qualified.split("."))
    return _PATH.match(path) is not None and is_computing(module)


def is_harmless(path: str, homes: Iterable[str], own_modules: Collection[str] = ()) -> bool:
    """Whether a function may be an opaque step; see `require_harmless`."""
    try:
        require_harmless(path, homes, own_modules)
    except ArtifactError:
        return False
    return is_opaque_path(path, own_modules)


def require_harmless(path: str, homes: Iterable[str], own_modules: Collection[str] = ()) -> None:
    """Require that an opaque step is part of a forward and does nothing but calculate.

    Args:
        path: of the step.
        homes: modules of the library whose forwards may call it, besides its own module.
        own_modules: modules of the artifact's own code, which the user has allowed; their functions are accepted.

    Raises:
        ArtifactError: naming the path and the problem.
    """
    if path.partition(":")[0] in own_modules:
        return
    problem = why_refused(path, tuple(dict.fromkeys(homes)))
    if problem:
        raise ArtifactError(
            f"opaque step {path!r} is not allowed: {problem}",
            hint="an opaque step must be called by a model's forward and only calculate",
        )


@functools.lru_cache(maxsize=1024)
def why_refused(path: str, homes: tuple[str, ...] = ()) -> str:
    """Say why a function of the library must not be an opaque step; empty when it may be one."""
    if not is_opaque_path(path):
        return "it does not name a function of transformers' modeling code"
    module = path.partition(":")[0]
    if source(module) is None:
        return f"the installed transformers has no module {module}"
    found = find_path(path)
    if not found:
        return f"{module} defines no such function"
    if not any(path in _called_by_forwards(home) for home in dict.fromkeys((module, *homes)) if is_computing(home)):
        return "no forward of the model's code calls it"
    return _first_problem(Reach(_classes(module)).follow(found))


def why_refused_for(path: str, kinds: Iterable[type]) -> str:
    """Say why a step must not be called with modules of these classes, which may override its methods; empty when it
    may.
    """
    module = path.partition(":")[0]
    found = find_path(path)
    name = path.rpartition(".")[2]
    more = [cls for kind in kinds if (cls := _class_of(kind)) is not None]
    overriding = [own[name] for cls in more if "." in path.partition(":")[2] and name in (own := methods(cls))]
    return _first_problem(Reach([*_classes(module), *more]).follow([*found, *overriding]))


def _first_problem(reach: Reach) -> str:
    return next((f"it can do more than calculate: {problem}" for problem in reach.problems), "")


def _class_of(kind: type) -> ClassDefinition | None:
    found = source(kind.__module__) if is_computing(kind.__module__) else None
    return found.classes.get(kind.__qualname__) if found is not None else None


def _classes(module: str) -> list[ClassDefinition]:
    found = source(module)
    return list(found.classes.values()) if found is not None else []


@functools.lru_cache(maxsize=64)
def _called_by_forwards(module: str) -> frozenset[str]:
    """Paths of the forwards in a module and of everything that they call, directly or indirectly."""
    classes = _classes(module)
    forwards = [own["forward"] for own in map(methods, classes) if "forward" in own]
    return frozenset(Reach(classes).follow(forwards).functions)


def step_call_problem(node: ast.Call, path: str) -> str:
    """Describe the forbidden argument in a call of an opaque step; empty when the call is allowed.

    `**kwargs` of the step accepts only flags, because the functions that it passes them to could give any other keyword
    a meaning.
    """
    functions = find_path(path)
    if not functions:
        return ""  # `require_harmless` refuses the step itself
    arguments = functions[0].node.args
    places = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    named = {*places[len(arguments.posonlyargs) :], *(argument.arg for argument in arguments.kwonlyargs)}
    if len(node.args) > len(places):
        return f"an opaque step with {len(node.args)} positional arguments"
    for keyword in node.keywords:
        is_flag = keyword.arg in FLAGS and arguments.kwarg is not None and _is_flag_value(keyword.value)
        if keyword.arg not in named and not is_flag:
            return f"the keyword {keyword.arg!r}, which is not in the signature of {path!r},"
    own = _strings(functions[0].node)
    words = {word for group in _ALTERNATIVES if own.intersection(group) for word in group}
    for argument in (*node.args, *(keyword.value for keyword in node.keywords)):
        for part in _parts(argument):
            if not isinstance(part, ast.Constant) or not isinstance(part.value, str):
                continue
            if part is not argument or part.value not in words:
                return f"the string {part.value[:40]!r} as an opaque step's argument"
    return ""


def _is_flag_value(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and (node.value is None or isinstance(node.value, bool))


def _parts(node: ast.AST) -> Iterator[ast.AST]:
    """Yield an expression and its parts, except the names in lookups of modules, weights and constants."""
    yield node
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _LOOKUPS:
        return
    for child in ast.iter_child_nodes(node):
        yield from _parts(child)


def _strings(node: ast.AST) -> set[object]:
    return {part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)}
