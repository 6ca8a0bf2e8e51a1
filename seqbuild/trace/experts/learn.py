"""What one expert of a mixture does, learned from the class that holds them all.

Their forward takes hidden states, indices and weights of each token's experts, and its own, eager code is a loop over
the experts that are used: transformers marks most such classes, others are known by what their forward calls. That loop
is run once, for one expert, on tensors without values, and recorded up to where the expert's result is added to the
sum: the rest is the same for all (`runtime.model.experts`). That it is the same is looked at, too, where nothing
marks the class (`seqbuild.trace.experts.loop`), and what is learned is executed (`seqbuild.trace.experts.proof`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from runtime.artifact.manifest import LeafKind
from seqbuild.chain.emit import EmittedCode, emit
from seqbuild.trace.experts.loop import ExpertLoop, replaced_parameters, watched_loop
from seqbuild.trace.experts.proof import is_proven
from seqbuild.trace.experts.signature import signature
from seqbuild.trace.experts.watch import HIDDEN, WEIGHTS
from seqbuild.trace.real.replay import for_real

_ONE_EXPERT = 0
_MARKS = ("has_gate", "has_bias", "is_transposed", "_apply_gate")  # what transformers gives such classes
_CALLED = ("one_hot", "where", "index_add_")  # what the forward of such a class calls where nothing marks it
# What is learned of one layer's experts holds for those of all layers like it.
_learned_before: dict[Any, tuple[LeafKind, EmittedCode] | None] = {}
_RESHAPES = (torch.ops.aten.view.default, torch.ops.aten.reshape.default)


class _AddedError(Exception):
    """Carries an expert's result away from where it would be added to the sum."""

    def __init__(self, target: torch.Tensor, source: torch.Tensor) -> None:
        super().__init__()
        self.target = target
        self.source = source


class _UntilAdded(TorchFunctionMode):
    """Stop at `index_add_`, and do not record what is done with indices: they have values, states and weights none."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.index_add_:
            raise _AddedError(args[0], args[3])
        kwargs = kwargs or {}
        if any(isinstance(value, torch.Tensor) and value.is_meta for value in pytree.tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        with disable_proxy_modes_tracing():
            return func(*args, **kwargs)


def is_marked(module: nn.Module) -> bool:
    """Whether a module holds the experts of a mixture in the form that transformers marks."""
    return all(hasattr(module, name) for name in _MARKS)


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds the experts of a mixture, and is called with states, indices and weights."""
    if is_marked(module):
        return True
    forward = inspect.unwrap(type(module).forward)
    called = getattr(getattr(forward, "__code__", None), "co_names", ())
    has_stacks = sum(1 for _ in module.parameters()) > 1
    return has_stacks and set(_CALLED) <= set(called) and len(inspect.signature(forward).parameters) == 4


def experts_leaf(module: nn.Module) -> tuple[LeafKind, EmittedCode] | None:
    """A kind of leaf that does what these experts do, and the program of a single one.

    Args:
        module: see `is_experts`.

    Returns:
        None when their code is not a loop of this kind.
    """
    key = signature(module)
    if key is not None and key in _learned_before:
        return _learned_before[key]
    with for_real():
        found = _learned(module)
    if key is not None:
        _learned_before[key] = found
    return found


def _learned(module: nn.Module) -> tuple[LeafKind, EmittedCode] | None:
    try:
        loop = ExpertLoop() if is_marked(module) else watched_loop(module, _width(module))
        found = [_recorded(module, loop, num_tokens) for num_tokens in (2, 3)]
        codes = [emit(graph, traced_dtype=HIDDEN, scope="") for graph, _ in found]
    except Exception:  # whatever it does, it is not that loop: it stays a module of its own class
        return None
    code, (_, options) = codes[0], found[0]
    if code.source != codes[1].source or code.opaque or code.constants or code.submodules:
        return None
    kind = LeafKind(kind="Experts", options=options, arguments=code.arguments, attributes=code.attributes)
    return (kind, code) if is_proven(module, loop, _width(module), kind, code) else None


def _recorded(module: nn.Module, loop: ExpertLoop, num_tokens: int) -> tuple[fx.Graph, dict[str, tuple[Any, ...]]]:
    """One expert's graph: its placeholders are hidden states, weights and its parts of stacked parameters."""
    forward = inspect.unwrap(type(module).forward)
    _, *arguments = inspect.signature(forward).parameters
    if len(arguments) != 3:
        raise ValueError("other arguments than hidden states, indices and weights")
    names = [name for name, _ in module.named_parameters()]
    meta = {name: torch.empty(p.shape, dtype=HIDDEN, device="meta") for name, p in module.named_parameters()}
    num_experts = loop.num_experts or int(next(iter(meta.values())).shape[0])
    traced, sum_dtype = _traced(module, loop, num_tokens, _ONE_EXPERT)
    graph, own, is_column = _body(traced, module, names, sum_dtype, num_experts)
    if loop.num_identity:
        idle, _ = _traced(module, loop, num_tokens, num_experts)
        if not is_column or not _is_identity(*_body(idle, module, names, sum_dtype, num_experts)):
            raise ValueError("experts without weights do more than to hand on their tokens")
    options: dict[str, tuple[Any, ...]] = {
        "num_experts": (num_experts,),
        "stacked": tuple(own),
        "inputs": tuple(arguments),
        "accumulator": ({HIDDEN: "hidden", WEIGHTS: "weights", torch.float32: "float32"}[sum_dtype],),
        "is_column": (int(is_column),),
    }
    others: dict[str, tuple[Any, ...]] = {
        "num_identity": (loop.num_identity,) if loop.num_identity else (),
        "num_dims": (loop.num_dims,) if loop.num_dims != 2 else (),
        "flat": tuple(name for name, is_flat in own.items() if is_flat),
    }
    return graph, options | {name: values for name, values in others.items() if values}


def _traced(module: nn.Module, loop: ExpertLoop, num_tokens: int, expert: int) -> tuple[fx.Graph, torch.dtype]:
    """What the module does when all tokens are one expert's, up to the sum; and the dtype of that."""
    forward = inspect.unwrap(type(module).forward)
    names = [name for name, _ in module.named_parameters()]
    meta = [torch.empty(p.shape, dtype=HIDDEN, device="meta") for p in module.parameters()]
    shape = (num_tokens,) if loop.num_dims == 2 else (num_tokens, 2)
    states = torch.empty(*shape, _width(module), dtype=HIDDEN, device="meta")
    index = torch.full((torch.Size(shape).numel(), 2), expert)  # some forwards need more than one for each token
    weights = torch.empty(index.shape, dtype=WEIGHTS, device="meta")
    sums: list[torch.dtype] = []

    def run(states: torch.Tensor, weights: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        with replaced_parameters(module, dict(zip(names, values, strict=True))), _UntilAdded():
            try:
                forward(module, states, index, weights)
            except _AddedError as added:
                sums[:] = [added.target.dtype]
                return added.source
        raise ValueError("nothing is added to a sum")

    with torch.no_grad():
        traced = make_fx(run, pre_dispatch=True)(states, weights, *meta)
    return traced.graph, sums[0]


def _width(module: nn.Module) -> int:
    for name in ("hidden_dim", "hidden_size"):
        value = getattr(module, name, None)
        if type(value) is int:
            return value
    config: Any = getattr(module, "config", None)
    return int(config.hidden_size)


def _body(
    traced: fx.Graph, module: nn.Module, names: Sequence[str], sum_dtype: torch.dtype, num_experts: int
) -> tuple[fx.Graph, dict[str, bool], bool]:
    """What is done between the choice of an expert's tokens and the sum.

    Returns:
        The graph, the stacked parameters with whether they are flat, and whether weights are a column.
    """
    states, weights, *parameters = traced.find_nodes(op="placeholder")
    named = dict(zip(parameters, names, strict=True))
    (output,) = traced.find_nodes(op="output")
    result = output.args[0]
    if result.target is torch.ops.aten.to.dtype and result.args[1] == sum_dtype:
        result = result.args[0]
    needed = _needed(result)
    graph = fx.Graph()
    graph.owning_module = module  # type: ignore[assignment]
    copies: dict[fx.Node, fx.Node] = {}
    chosen = {states: graph.placeholder("hidden_states"), weights: graph.placeholder("weights")}
    flat = {
        node: node.args[0]
        for node in traced.nodes
        if node.op == "call_function" and node.args and node.args[0] in named and _is_unflattened(node, num_experts)
    }
    own = {
        node: named[flat.get(node.args[0], node.args[0])]
        for node in traced.nodes
        if node in needed and node.op == "call_function" and node.args and _is_choice(node)
        if node.args[0] in named or node.args[0] in flat
    }
    stacked = {name: node.args[0] in flat for node, name in own.items()}
    parts = {name: graph.placeholder(name.replace(".", "_")) for name in stacked}
    is_column = False
    for node in traced.nodes:
        if node not in needed or node.op in ("placeholder", "get_attr"):
            continue  # other tensors are indices, which choices alone may use
        origin = _origin(node)
        if node in own:
            copies[node] = parts[own[node]]
        elif node.target is torch.ops.aten.index.Tensor and origin in chosen:
            copies[node] = chosen[origin]
            is_column = is_column or (origin is weights and node.meta["val"].dim() == 2)
        elif origin in chosen and (_is_view(node) or _is_rows(node)):
            continue  # on the way to a choice
        elif node in flat and all(user in own for user in node.users):
            continue
        else:
            for source in node.all_input_nodes:
                if source in named and source not in copies:
                    copies[source] = graph.get_attr(named[source])
            copies[node] = graph.node_copy(node, lambda source: copies[source])
    graph.output({"output": copies[result]})
    return graph, stacked, is_column


def _is_identity(graph: fx.Graph, stacked: Mapping[str, bool], is_column: bool) -> bool:
    """Whether all that is done is to multiply states by weights."""
    calls = graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)
    places = graph.find_nodes(op="placeholder")
    (output,) = graph.find_nodes(op="output")
    is_all = len(graph.nodes) == len(calls) + len(places) + 1 == 4
    return (
        is_all
        and is_column
        and not stacked
        and calls[0].args == tuple(places)
        and output.args[0] == {"output": calls[0]}
    )


def _needed(result: fx.Node) -> dict[fx.Node, None]:
    found: dict[fx.Node, None] = {}
    pending = [result]
    while pending:
        node = pending.pop()
        if node not in found:
            found[node] = None
            pending.extend(node.all_input_nodes)
    return found


def _is_choice(node: fx.Node) -> bool:
    """Whether a node takes the chosen expert's part of a stacked parameter."""
    if node.target is torch.ops.aten.select.int:
        return node.args[1:] == (0, _ONE_EXPERT)
    return node.target is torch.ops.aten.index.Tensor and len(node.args[1]) == 1  # type: ignore[arg-type]


def _is_unflattened(node: fx.Node, num_experts: int) -> bool:
    """Whether a node gives a parameter [E * R, ...] an axis for experts, [E, R, ...]."""
    if node.target not in _RESHAPES:
        return False
    whole: torch.Size = node.args[0].meta["val"].shape  # type: ignore[union-attr]
    shape: torch.Size = node.meta["val"].shape
    return len(whole) > 1 and shape[0] == num_experts and shape[0] * shape[1] == whole[0] and shape[2:] == whole[1:]


def _is_rows(node: fx.Node) -> bool:
    """Whether a node puts the tokens of hidden states in one axis."""
    if node.target not in _RESHAPES:
        return False
    whole: torch.Size = node.args[0].meta["val"].shape  # type: ignore[union-attr]
    shape: torch.Size = node.meta["val"].shape
    return len(shape) == 2 and shape[-1] == whole[-1]


def _is_view(node: fx.Node) -> bool:
    return node.target in (torch.ops.aten.unsqueeze.default, torch.ops.aten.slice.Tensor, torch.ops.aten.alias.default)


def _origin(node: fx.Node) -> fx.Node | None:
    """The input that a node is a view or a choice of."""
    while node.op != "placeholder":
        is_first = node.op == "call_function" and bool(node.args) and isinstance(node.args[0], fx.Node)
        if not is_first or not (_is_view(node) or node.target is torch.ops.aten.index.Tensor or _is_rows(node)):
            return None
        node = node.args[0]  # type: ignore[assignment]
    return node
