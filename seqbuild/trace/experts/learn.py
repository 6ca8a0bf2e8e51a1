"""Derive the program of one expert from the class that contains all experts of a mixture.

The forward of such a class takes hidden states and, for each token, the indices and weights of its experts; its eager
code is a loop over the used experts. transformers marks most such classes; others are recognized by the functions that
their forward calls. The loop is run once on meta tensors, for one expert, and recorded up to the point where the
expert's result is added to the sum; the rest is the same for all mixtures (`runtime.model.experts`). For unmarked
classes the loop itself is checked (`seqbuild.trace.experts.loop`), and the derived leaf is compared with the module by
execution (`seqbuild.trace.experts.proof`).
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
from seqbuild.trace.experts.loop import ExpertLoop, analyze_loop, replaced_parameters
from seqbuild.trace.experts.proof import is_proven
from seqbuild.trace.experts.signature import signature
from seqbuild.trace.experts.watch import HIDDEN, WEIGHTS
from seqbuild.trace.real.replay import plain_execution

_ONE_EXPERT = 0
_MARKS = ("has_gate", "has_bias", "is_transposed", "_apply_gate")  # attributes that transformers gives such classes
_CALLED = ("one_hot", "where", "index_add_")  # functions that the forward of an unmarked class calls
# Results by signature: layers with the same signature share one.
_results: dict[Any, tuple[LeafKind, EmittedCode] | None] = {}
_RESHAPES = (torch.ops.aten.view.default, torch.ops.aten.reshape.default)


class _AddedError(Exception):
    """Carries an expert's result out of the forward at the point where it would be added to the sum."""

    def __init__(self, target: torch.Tensor, source: torch.Tensor) -> None:
        super().__init__()
        self.target = target
        self.source = source


class _UntilAdded(TorchFunctionMode):
    """Stop at `index_add_`, and do not record operations on indices, the only tensors with values."""

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
    """Return whether a module contains the experts of a mixture in the form that transformers marks."""
    return all(hasattr(module, name) for name in _MARKS)


def is_experts(module: nn.Module) -> bool:
    """Return whether a module contains the experts of a mixture and is called with states, indices and weights."""
    if is_marked(module):
        return True
    forward = inspect.unwrap(type(module).forward)
    called = getattr(getattr(forward, "__code__", None), "co_names", ())
    has_stacks = sum(1 for _ in module.parameters()) > 1
    return has_stacks and set(_CALLED) <= set(called) and len(inspect.signature(forward).parameters) == 4


def experts_leaf(module: nn.Module) -> tuple[LeafKind, EmittedCode] | None:
    """Return a kind of leaf with the same computation, and the program of one expert.

    Args:
        module: a module for which `is_experts` is true.

    Returns:
        None if its code is not a loop of this kind.
    """
    key = signature(module)
    if key is not None and key in _results:
        return _results[key]
    with plain_execution():
        found = _learned(module)
    if key is not None:
        _results[key] = found
    return found


def _learned(module: nn.Module) -> tuple[LeafKind, EmittedCode] | None:
    try:
        loop = ExpertLoop() if is_marked(module) else analyze_loop(module, _width(module))
        found = [_recorded(module, loop, num_tokens) for num_tokens in (2, 3)]
        codes = [emit(graph, traced_dtype=HIDDEN, scope="") for graph, _ in found]
    except Exception:  # not such a loop; the module keeps its own class
        return None
    code, (_, options) = codes[0], found[0]
    if code.source != codes[1].source or code.opaque or code.constants or code.submodules:
        return None
    kind = LeafKind(kind="Experts", options=options, arguments=code.arguments, attributes=code.attributes)
    return (kind, code) if is_proven(module, loop, _width(module), kind, code) else None


def _recorded(module: nn.Module, loop: ExpertLoop, num_tokens: int) -> tuple[fx.Graph, dict[str, tuple[Any, ...]]]:
    """Record one expert's graph and options; its inputs are states, weights and slices of stacked parameters."""
    forward = inspect.unwrap(type(module).forward)
    _, *arguments = inspect.signature(forward).parameters
    if len(arguments) != 3:
        raise ValueError("the arguments are not hidden states, indices and weights")
    names = [name for name, _ in module.named_parameters()]
    meta = {name: torch.empty(p.shape, dtype=HIDDEN, device="meta") for name, p in module.named_parameters()}
    num_experts = loop.num_experts or int(next(iter(meta.values())).shape[0])
    traced, sum_dtype = _traced(module, loop, num_tokens, _ONE_EXPERT)
    graph, own, is_column = _body(traced, module, names, sum_dtype, num_experts)
    if loop.num_identity:
        idle, _ = _traced(module, loop, num_tokens, num_experts)
        if not is_column or not _is_identity(*_body(idle, module, names, sum_dtype, num_experts)):
            raise ValueError("an expert without weights does not return its tokens unchanged")
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
    """Trace the module up to the sum with all tokens routed to one expert; also return the dtype of the sum."""
    forward = inspect.unwrap(type(module).forward)
    names = [name for name, _ in module.named_parameters()]
    meta = [torch.empty(p.shape, dtype=HIDDEN, device="meta") for p in module.parameters()]
    shape = (num_tokens,) if loop.num_dims == 2 else (num_tokens, 2)
    states = torch.empty(*shape, _width(module), dtype=HIDDEN, device="meta")
    index = torch.full((torch.Size(shape).numel(), 2), expert)  # some forwards need more than one expert per token
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
    """Extract the operations between the selection of an expert's tokens and the sum.

    Returns:
        The graph, whether each stacked parameter is flat, and whether the weights are a column.
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
            continue  # other tensors are indices, which only selections may use
        origin = _origin(node)
        if node in own:
            copies[node] = parts[own[node]]
        elif node.target is torch.ops.aten.index.Tensor and origin in chosen:
            copies[node] = chosen[origin]
            is_column = is_column or (origin is weights and node.meta["val"].dim() == 2)
        elif origin in chosen and (_is_view(node) or _is_rows(node)):
            continue  # part of a selection
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
    """Return whether the only operation is the product of states and weights."""
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
    """Return whether a node selects the expert's part of a stacked parameter."""
    if node.target is torch.ops.aten.select.int:
        return node.args[1:] == (0, _ONE_EXPERT)
    return node.target is torch.ops.aten.index.Tensor and len(node.args[1]) == 1  # type: ignore[arg-type]


def _is_unflattened(node: fx.Node, num_experts: int) -> bool:
    """Return whether a node reshapes a parameter [E * R, ...] to [E, R, ...]."""
    if node.target not in _RESHAPES:
        return False
    whole: torch.Size = node.args[0].meta["val"].shape  # type: ignore[union-attr]
    shape: torch.Size = node.meta["val"].shape
    return len(whole) > 1 and shape[0] == num_experts and shape[0] * shape[1] == whole[0] and shape[2:] == whole[1:]


def _is_rows(node: fx.Node) -> bool:
    """Return whether a node flattens the token axes of hidden states."""
    if node.target not in _RESHAPES:
        return False
    whole: torch.Size = node.args[0].meta["val"].shape  # type: ignore[union-attr]
    shape: torch.Size = node.meta["val"].shape
    return len(shape) == 2 and shape[-1] == whole[-1]


def _is_view(node: fx.Node) -> bool:
    return node.target in (torch.ops.aten.unsqueeze.default, torch.ops.aten.slice.Tensor, torch.ops.aten.alias.default)


def _origin(node: fx.Node) -> fx.Node | None:
    """Return the input that a node is a view or a selection of."""
    while node.op != "placeholder":
        is_first = node.op == "call_function" and bool(node.args) and isinstance(node.args[0], fx.Node)
        if not is_first or not (_is_view(node) or node.target is torch.ops.aten.index.Tensor or _is_rows(node)):
            return None
        node = node.args[0]  # type: ignore[assignment]
    return node
