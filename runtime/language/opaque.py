"""Which functions of the model's code an artifact may name, to be called whole.

A function may be one if it is a `forward`, or one that a forward calls, and if nothing that it can reach does anything
but calculate. Both are read in the source files of the libraries on this host (`runtime.language.reach`); none is
imported.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Collection, Iterable, Iterator

from runtime.errors import ArtifactError
from runtime.language.library import Class, find_path, methods, source
from runtime.language.reach import Reach
from runtime.language.reviewed import is_computing

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,200}\Z")
_PATH = re.compile(r"[A-Za-z0-9_.]{1,300}:_?[A-Za-z][A-Za-z0-9_]{0,200}(\._?[A-Za-z][A-Za-z0-9_]{0,200})?\Z")
# Keywords that `**kwargs` of a step admits with None, True or False alone: flags that decorators of the library read,
# and image_sizes, which Llava's get_image_features takes that way in transformers 5.17.
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
# Words that steps are handed: only where the step's own code states the word, too.
WORDS = frozenset(["block_sparse", "default", "full", "image", "original_full", "video"])


def is_opaque_path(path: str, own_modules: Collection[str] = ()) -> bool:
    """Whether `module:function` or `module:Class.method` is the name of something where transformers keeps what models
    calculate, or of something in one of `own_modules`: the code that the artifact brings, which runs only if all of it
    has been allowed.
    """
    module, _, qualified = path.partition(":")
    if module in own_modules:
        return all(_NAME.match(part) and not part.startswith("__") for part in qualified.split("."))
    return _PATH.match(path) is not None and is_computing(module)


def is_harmless(path: str, homes: Iterable[str], own_modules: Collection[str] = ()) -> bool:
    """Whether a function may be an opaque step, see `require_harmless`."""
    try:
        require_harmless(path, homes, own_modules)
    except ArtifactError:
        return False
    return is_opaque_path(path, own_modules)


def require_harmless(path: str, homes: Iterable[str], own_modules: Collection[str] = ()) -> None:
    """Refuse the path of an opaque step that is no part of a forward, or that can do more than calculate.

    Args:
        path: of the step.
        homes: modules of the library whose forwards may call it, besides those of its own module.
        own_modules: of the model's own code, whose functions whoever runs it has allowed.

    Raises:
        ArtifactError: naming the path, and what is wrong with it.
    """
    if path.partition(":")[0] in own_modules:
        return
    problem = why_refused(path, tuple(dict.fromkeys(homes)))
    if problem:
        raise ArtifactError(
            f"opaque step {path!r} is not allowed: {problem}", hint="an opaque step must be a calculation of a forward"
        )


@functools.lru_cache(maxsize=1024)
def why_refused(path: str, homes: tuple[str, ...] = ()) -> str:
    """Why a function of the library must not be an opaque step; empty where it may be one."""
    if not is_opaque_path(path):
        return "it does not name a function of transformers' modeling code"
    module = path.partition(":")[0]
    if source(module) is None:
        return f"this host's transformers has no {module}"
    found = find_path(path)
    if not found:
        return f"{module} defines no such function"
    if not any(path in _called_by_forwards(home) for home in dict.fromkeys((module, *homes)) if is_computing(home)):
        return "no forward of the model's code calls it"
    return _first_problem(Reach(_classes(module)).follow(found))


def why_refused_for(path: str, kinds: Iterable[type]) -> str:
    """The same once it is known which modules a step is handed: their classes may have methods of their own."""
    module = path.partition(":")[0]
    found = find_path(path)
    name = path.rpartition(".")[2]
    more = [cls for kind in kinds if (cls := _class_of(kind)) is not None]
    overriding = [own[name] for cls in more if "." in path.partition(":")[2] and name in (own := methods(cls))]
    return _first_problem(Reach([*_classes(module), *more]).follow([*found, *overriding]))


def _first_problem(reach: Reach) -> str:
    return next((f"it can do more than calculate: {problem}" for problem in reach.problems), "")


def _class_of(kind: type) -> Class | None:
    found = source(kind.__module__) if is_computing(kind.__module__) else None
    return found.classes.get(kind.__qualname__) if found is not None else None


def _classes(module: str) -> list[Class]:
    found = source(module)
    return list(found.classes.values()) if found is not None else []


@functools.lru_cache(maxsize=64)
def _called_by_forwards(module: str) -> frozenset[str]:
    """Paths of the forwards in a module, and of what they call, directly or not."""
    classes = _classes(module)
    forwards = [own["forward"] for own in map(methods, classes) if "forward" in own]
    return frozenset(Reach(classes).follow(forwards).functions)


def wrong_call(node: ast.Call, path: str) -> str:
    """Why a program may not call this step with these positions, keywords and words; empty where it may.

    `**kwargs` of the step admits nothing but flags: a keyword that it hands on could mean anything further down.
    """
    functions = find_path(path)
    if not functions:
        return ""  # it is refused as a whole
    arguments = functions[0].node.args
    places = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    named = {*places[len(arguments.posonlyargs) :], *(argument.arg for argument in arguments.kwonlyargs)}
    if len(node.args) > len(places):
        return f"an opaque step with {len(node.args)} positional arguments"
    for keyword in node.keywords:
        is_flag = keyword.arg in FLAGS and arguments.kwarg is not None and _is_switch(keyword.value)
        if keyword.arg not in named and not is_flag:
            return f"the keyword {keyword.arg!r}, which the signature of {path!r} does not name,"
    words = _words(functions[0].node)
    for argument in (*node.args, *(keyword.value for keyword in node.keywords)):
        for part in _parts(argument):
            if not isinstance(part, ast.Constant) or not isinstance(part.value, str):
                continue
            if part is not argument or part.value not in WORDS & words:
                return f"the text {part.value[:40]!r} for an opaque step"
    return ""


def _is_switch(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and (node.value is None or isinstance(node.value, bool))


def _parts(node: ast.AST) -> Iterator[ast.AST]:
    """An expression and its parts, but for the names of modules, weights and constants that are looked up in it."""
    yield node
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _LOOKUPS:
        return
    for child in ast.iter_child_nodes(node):
        yield from _parts(child)


def _words(node: ast.AST) -> set[object]:
    return {part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)}
