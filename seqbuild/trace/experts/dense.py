"""Dense experts: a class that multiplies the hidden states of all experts by stacked matrices at once.

Such a class has only stacked matrices, and its forward takes hidden states alone: all tokens for each expert, with
zeros for tokens that are not routed to it. The forward is recorded on meta tensors for two numbers of tokens, and both
must give the same code.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from runtime.artifact.manifest import LeafKind
from seqbuild.chain.emit import EmittedCode, emit
from seqbuild.trace.experts.learn import is_experts
from seqbuild.trace.experts.loop import replaced_parameters

_DTYPE = torch.bfloat16


def is_dense_experts(module: nn.Module) -> bool:
    """Return whether a module has only stacked matrices, one per expert, and is called with hidden states alone."""
    num_experts = getattr(module, "num_experts", None)
    own = list(module._parameters.values())
    if type(num_experts) is not int or is_experts(module) or len(own) < 2:
        return False
    are_stacks = all(p is not None and p.dim() == 3 and p.shape[0] == num_experts for p in own)
    has_others = any(True for child in module.children() for _ in child.parameters())
    return are_stacks and not has_others and len(inspect.signature(type(module).forward).parameters) == 2


def dense_experts_leaf(module: nn.Module) -> tuple[LeafKind, EmittedCode] | None:
    """Return a kind of leaf with the same computation, and its program; None if the module is no dense mixture."""
    try:
        codes = [emit(_recorded(module, num_tokens), traced_dtype=_DTYPE, scope="") for num_tokens in (2, 3)]
    except Exception:  # not such a product; the module is traced through
        return None
    code = codes[0]
    if code.source != codes[1].source or code.opaque or code.constants or code.submodules:
        return None
    options: dict[str, tuple[Any, ...]] = {
        "num_experts": (int(getattr(module, "num_experts")),),  # noqa: B009 - a Module's attribute is a tensor to mypy
        "stacked": tuple(dict.fromkeys(code.attributes)),
    }
    kind = LeafKind(kind="DenseExperts", options=options, arguments=code.arguments, attributes=code.attributes)
    return kind, code


def _recorded(module: nn.Module, num_tokens: int) -> fx.Graph:
    names = [name for name, _ in module.named_parameters()]
    meta = [torch.empty(p.shape, dtype=_DTYPE, device="meta") for p in module.parameters()]
    num_experts, width, _ = meta[0].shape
    states = torch.empty(num_experts * num_tokens, width, dtype=_DTYPE, device="meta")
    forward = type(module).forward

    def run(states: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        with replaced_parameters(module, dict(zip(names, values, strict=True))):
            result: torch.Tensor = forward(module, states)
        return result

    with torch.no_grad():
        traced = make_fx(run, pre_dispatch=True)(states, *meta).graph
    hidden, *parameters = traced.find_nodes(op="placeholder")
    named = dict(zip(parameters, names, strict=True))
    graph = fx.Graph()
    graph.owning_module = module  # type: ignore[assignment]
    copies: dict[fx.Node, fx.Node] = {hidden: graph.placeholder("hidden_states")}
    for node in traced.nodes:
        if node.op == "output":
            graph.output({"output": copies[node.args[0]]})
        elif node.op != "placeholder":
            for source in node.all_input_nodes:
                if source in named and source not in copies:
                    copies[source] = graph.get_attr(named[source])
            copies[node] = graph.node_copy(node, lambda source: copies[source])
    return graph
