"""Find the parts of an artifact's code that can be computed by parts of rows, and rewrite them.

A norm, a rotation or a softmax is a chain of operators that each read and write a whole tensor, so every number travels
to memory and back several times. In a region, all operators work on each row by itself: pointwise, or along the last
dimension. `runtime.language.tiles` calls them on as many rows as stay in the processor's cache, which gives the same
bits. The statements of a region are kept for all other cases:

    found = __tiled(0, __region_0, run, (x, weight))
    if found is None:
        <the statements of the region>
    else:
        (y,) = found
        del found, <names that the region deletes>

A region's results are new tensors, as recorded.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from runtime.language.syntax import literal_of, names_in, operator_of, target_of

TILED, _REGION = "__tiled", "__region_"  # no program can define these names

# Operators by `name.overload`. The first ones round each result once, so it does not depend on the kernel's loop;
# rsqrt of 16-bit numbers does not (see `runtime.language.twice_rounded`).
_ROUNDED = """
    abs.default add.Scalar add.Tensor clamp.default clamp_max.default clamp_min.default div.Scalar div.Tensor eq.Scalar
    eq.Tensor ge.Scalar ge.Tensor gt.Scalar gt.Tensor le.Scalar le.Tensor logical_and.default logical_not.default
    logical_or.default lt.Scalar lt.Tensor masked_fill.Scalar maximum.default minimum.default mul.Scalar mul.Tensor
    ne.Scalar ne.Tensor neg.default reciprocal.default relu.default rsqrt.default rsub.Scalar sqrt.default
    square.default sub.Scalar sub.Tensor where.self
"""
# These have one implementation for whole vectors and another one for the rest.
_APPROXIMATED = """
    cos.default erf.default exp.default gelu.default log.default mish.default pow.Tensor_Scalar sigmoid.default
    silu.default sin.default softplus.default tanh.default
"""
_OF_ROWS = "amax.default amin.default layer_norm.default mean.dim softmax.int sum.dim_IntList"
_MOVES = "cat.default slice.Tensor to.dtype"
_MAY_ALIAS = frozenset(("slice.Tensor", "to.dtype"))
_KINDS: Mapping[str, str] = {
    **dict.fromkeys(_ROUNDED.split(), "rounded"),
    **dict.fromkeys(_APPROXIMATED.split(), "approximated"),
    **dict.fromkeys(_OF_ROWS.split(), "rows"),
    **dict.fromkeys(_MOVES.split(), "moves"),
}
_KEYWORDS = frozenset(("dtype", "approximate", "keepdim"))
# Operators that only make another view of a value, and may run before a region that does not compute that value.
_VIEWS = frozenset(
    ("expand.default", "select.int", "slice.Tensor", "transpose.int", "unsqueeze.default", "sym_size.int")
)
_FEWEST = 2  # operators that make a new tensor
_WITH_FACTOR = frozenset(("add.Scalar", "add.Tensor", "sub.Scalar", "sub.Tensor", "rsub.Scalar"))  # a third argument
_END = 2**63 - 1  # the end of a slice that goes to the end
_LISTS = (ast.List, ast.Tuple)


@dataclass(kw_only=True)
class Region:
    """Statements that are computed by parts of rows.

    Attributes:
        arguments: names of values from outside.
        results: names of values that are used afterwards.
        last: the literal dimensions that must be the last one of every tensor.
        is_approximated: whether an operator has another implementation for the numbers that do not fill a vector.
        has_rows: whether an operator reads whole rows.
    """

    arguments: list[str] = field(default_factory=list)
    results: list[str] = field(default_factory=list)
    last: list[int] = field(default_factory=list)
    is_approximated: bool = False
    has_rows: bool = False


def _kind(call: ast.expr | None) -> str:
    """What a call of an operator needs to run by parts of rows; empty if it cannot."""
    if not isinstance(call, ast.Call) or not call.args:
        return ""
    operator = operator_of(call)
    if operator == "pow.Tensor_Scalar" and literal_of(call.args[-1]) == 2:
        return "rounded"  # torch multiplies
    return _KINDS.get(operator, "")


def find_regions(tree: ast.Module, hooked: Collection[str]) -> list[Region]:
    """Rewrite the regions of a guarded program in place, and return them.

    Args:
        tree: of a program that changes no value in place.
        hooked: names whose values a hook gets or replaces; no region computes them.
    """
    return _Finder(tree, hooked).run()


class _Finder:
    """Collects the statements of a function into regions."""

    def __init__(self, tree: ast.Module, hooked: Collection[str]) -> None:
        assert isinstance(tree.body[0], ast.FunctionDef), "a checked program is one function"
        self._tree, self._function, self._hooked = tree, tree.body[0], hooked
        self._body: list[ast.stmt] = []
        self._inside: list[ast.stmt] = []
        self._hoisted: list[ast.stmt] = []
        self._own: dict[str, str] = {}  # names that the open region assigns, and the values whose memory they may share
        self._region = Region()
        self._regions: list[Region] = []
        self._last_use: dict[str, int] = {}  # of each name, the place of the last statement that reads or deletes it

    def run(self) -> list[Region]:
        statements = self._function.body
        for place, statement in enumerate(statements):
            used = (*names_in(statement, ast.Load), *names_in(statement, ast.Del))
            self._last_use.update(dict.fromkeys(used, place))
        for place, statement in enumerate(statements):
            if isinstance(statement, ast.Delete):
                (self._inside if self._inside else self._body).append(statement)
            elif self._fits(statement):
                self._add(statement)
            elif self._inside and self._is_before(statement):
                self._hoisted.append(statement)
            else:
                self._close(place)
                if self._fits(statement):
                    self._add(statement)
                else:
                    self._body.append(statement)
        self._close(len(statements))
        self._function.body = self._body
        return self._regions

    def _fits(self, statement: ast.stmt) -> bool:
        """Whether a statement may be the next one of the open region."""
        name, call = target_of(statement), statement.value if isinstance(statement, ast.Assign) else None
        kind = _kind(call)
        if not kind or not isinstance(call, ast.Call) or self._is_taken(name):
            return False
        if not all(_is_plain(part) for part in (*call.args, *(keyword.value for keyword in call.keywords))):
            return False
        last = _last_of(call)
        if last is None or any(keyword.arg not in _KEYWORDS for keyword in call.keywords):
            return False
        region, narrows = self._region, kind == "moves" and operator_of(call) != "to.dtype"
        if kind == "approximated":
            return not region.has_rows and not region.last
        return not (region.is_approximated and (kind == "rows" or narrows))

    def _add(self, statement: ast.stmt) -> None:
        assert isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Call)
        operator, region = operator_of(statement.value), self._region
        read = names_in(statement.value, ast.Load)
        region.arguments += [name for name in read if name not in self._own and name not in region.arguments]
        shared = read[0] if operator in _MAY_ALIAS and read else ""
        self._own[target_of(statement)] = self._own.get(shared, shared) or shared if shared else ""
        region.last += [dim for dim in _last_of(statement.value) or () if dim not in region.last]
        region.is_approximated |= _kind(statement.value) == "approximated"
        region.has_rows |= _kind(statement.value) == "rows"
        self._inside.append(statement)

    def _is_before(self, statement: ast.stmt) -> bool:
        """Whether a statement may move before the open region: it reads a parameter, or makes a view of a value from
        outside.
        """
        call = statement.value if isinstance(statement, ast.Assign) else None
        if not isinstance(call, ast.Call) or self._is_taken(target_of(statement)):
            return False
        is_tensor = isinstance(call.func, ast.Attribute) and ast.unparse(call.func) in (
            "self.get_parameter",
            "self.get_buffer",
        )
        unknown = (*self._own, *_deleted(self._inside))
        return (is_tensor or operator_of(call) in _VIEWS) and not any(
            name in unknown for name in names_in(call, ast.Load)
        )

    def _is_taken(self, name: str) -> bool:
        """Whether a hook or the open region uses or deletes another value of this name."""
        return name in (*self._hooked, *self._own, *self._region.arguments, *_deleted(self._inside))

    def _close(self, place: int) -> None:
        """End the open region before the statement at a place."""
        inside, region, own, hoisted = self._inside, self._region, self._own, self._hoisted
        self._inside, self._region, self._own, self._hoisted = [], Region(), {}, []
        self._body += hoisted
        known = (*own, *region.arguments)
        deleted = _deleted(inside)
        others = [name for name in deleted if name not in known]  # of other values
        num_new = sum(operator_of(one.value) not in _MAY_ALIAS for one in inside if isinstance(one, ast.Assign))
        region.results = [name for name in own if self._last_use.get(name, -1) >= place and name not in deleted]
        # A result must not share memory with a value from outside or with another result.
        roots = [own[name] or name for name in region.results]
        is_new = all(own.get(root) == "" for root in roots) and len(set(roots)) == len(roots)
        if num_new >= _FEWEST and region.results and is_new:
            inside = [one for one in (_without(one, others) for one in inside) if one is not None]
            self._body += ast.parse(f"del {', '.join(others)}").body if others else []
            inside = self._emit(region, inside, [name for name in deleted if name in region.arguments])
        self._body += inside

    def _emit(self, region: Region, inside: list[ast.stmt], deleted: Sequence[str]) -> list[ast.stmt]:
        index = len(self._regions)
        self._regions.append(region)
        name, given, results = f"{_REGION}{index}", ", ".join(region.arguments), f"({', '.join(region.results)},)"
        text = (
            f"def {name}(run, {given}):\n    return {results}\n"
            f"__found = {TILED}({index}, {name}, run, ({given},))\n"
            "if __found is None:\n    pass\n"
            f"else:\n    {results} = __found\n    del {', '.join(['__found', *deleted])}\n"
        )
        part, first, choice = ast.parse(text).body
        assert isinstance(part, ast.FunctionDef) and isinstance(choice, ast.If)
        for node in (*ast.walk(part), *ast.walk(first), *ast.walk(choice)):
            ast.copy_location(node, inside[0])
        part.body[:0] = inside
        choice.body = inside
        self._tree.body.append(part)
        return [first, choice]


def _deleted(statements: Sequence[ast.stmt]) -> list[str]:
    return names_in([one for one in statements if isinstance(one, ast.Delete)], ast.Del)


def _without(statement: ast.stmt, others: Collection[str]) -> ast.stmt | None:
    """Return a statement that deletes only the names that are not in `others`; None if it would delete nothing."""
    if not isinstance(statement, ast.Delete):
        return statement
    kept: list[ast.expr] = [one for one in statement.targets if isinstance(one, ast.Name) and one.id not in others]
    return ast.copy_location(ast.Delete(kept), statement) if kept else None


def _is_plain(node: ast.expr) -> bool:
    """Whether an argument is a name, a literal, a dtype, or a list of such."""
    if isinstance(node, (ast.List, ast.Tuple)):
        return all(map(_is_plain, node.elts))
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant)
    if isinstance(node, ast.Attribute):
        return isinstance(node.value, ast.Name) and node.value.id in ("run", "torch") and node.attr != "device"
    return isinstance(node, (ast.Name, ast.Constant))


def _last_of(call: ast.Call) -> list[int] | None:
    """The literal dimensions that must be the last for a call to work on each row by itself; None if it does not."""
    operator, values = operator_of(call), [literal_of(argument) for argument in call.args]
    if operator == "slice.Tensor":
        if not all(isinstance(value, int) for value in values[1:]):
            return None
        return [] if values[2:] == [0, _END] else values[1:2] or None
    if operator in ("cat.default", "softmax.int"):
        return values[1:2] if isinstance(call.args[0], _LISTS) is (operator == "cat.default") and values[1:2] else None
    if operator in ("mean.dim", "sum.dim_IntList", "amax.default", "amin.default"):
        return [-1] if values[1:] == [[-1], True] else None
    if operator == "layer_norm.default":
        return [-1] if len(values) > 1 and isinstance(values[1], list) and len(values[1]) == 1 else None
    if operator in _WITH_FACTOR and len(values) > 2:
        return None
    return []
