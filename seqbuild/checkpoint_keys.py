"""Work out, from names alone, which checkpoint tensors make each parameter and how.

transformers renames, splits and fuses tensors while it loads a checkpoint. Its own rules are applied here to the
checkpoint's names; where a rule computes (stacking experts, splitting a fused projection), it runs once on fake
tensors and what it did is kept as a program, so that the host needs neither the rule nor transformers for it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from runtime.errors import WeightsError
from seqbuild.emit import emit

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyTable:
    """Where parameters come from.

    Attributes:
        sources: parameter name to the checkpoint keys it is made from.
        conversion: parameter name to an index into `programs`; a name that is not in it is taken as it is.
        programs: source code, each a `forward(self, source_0, ..., *, run)` that returns `{"value": tensor}`.
        num_sources: how many tensors each program takes.
    """

    sources: Mapping[str, tuple[str, ...]]
    conversion: Mapping[str, int]
    programs: tuple[str, ...]
    num_sources: tuple[int, ...]


def key_table(model: PreTrainedModel, checkpoint: Mapping[str, tuple[int, ...]] | None) -> KeyTable:
    """Map a checkpoint's tensors to the model's parameters and persistent buffers.

    Args:
        model: without weights.
        checkpoint: names and shapes of the checkpoint's tensors; None takes the names under which transformers would
            save the model.

    Raises:
        WeightsError: when the checkpoint lacks what a parameter needs, naming the first.
    """
    shapes = dict(checkpoint) if checkpoint is not None else _saved_shapes(model)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict(keep_vars=True).items()}
    simple, grouped = _assign(model, shapes, wanted)
    sources: dict[str, tuple[str, ...]] = {name: (key,) for name, key in simple.items()}
    conversion: dict[str, int] = {}
    programs: dict[str, int] = {}
    counts: list[int] = []
    for first_name, converter in grouped.items():
        for name, (program, keys) in _run_converter(model, first_name, converter, shapes, wanted).items():
            if program not in programs:
                programs[program] = len(programs)
                counts.append(len(keys))
            sources[name], conversion[name] = keys, programs[program]
    return KeyTable(sources=sources, conversion=conversion, programs=tuple(programs), num_sources=tuple(counts))


def _assign(
    model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, str], dict[str, Any]]:
    """Apply transformers' renamings: parameter to key, and the first parameter of a conversion to its rule."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    prefix = model.base_model_prefix
    simple: dict[str, str] = {}
    grouped: dict[str, Any] = {}
    for key in sorted(shapes, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, dict(wanted))
        if name not in wanted and key in wanted:
            name, pattern = key, None
        if name not in wanted:
            continue
        if pattern is None:
            simple[name] = key
        else:
            rule = grouped.setdefault(name, copy.deepcopy(by_pattern[pattern]))
            rule.add_tensor(name, key, pattern, key)  # the key stands for its tensor until the rule runs
    return simple, grouped


def _run_converter(
    model: PreTrainedModel,
    first_name: str,
    converter: Any,
    shapes: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, tuple[int, ...]],
) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Record what a conversion rule does: parameter name to (program, checkpoint keys)."""
    collected: dict[str, list[str]] = {pattern: list(keys) for pattern, keys in converter.collected_tensors.items()}
    keys = [key for group in collected.values() for key in group]
    names: list[str] = []

    def convert(*tensors: torch.Tensor) -> list[torch.Tensor]:
        remaining = iter(tensors)
        rule = copy.deepcopy(converter)
        rule.collected_tensors.clear()
        for pattern, group in collected.items():
            rule.collected_tensors[pattern] = [next(remaining) for _ in group]
        results = rule.convert(first_name, model=model, config=model.config)
        unwrapped = {name: value[0] if isinstance(value, list) else value for name, value in results.items()}
        names[:] = list(unwrapped)
        return list(unwrapped.values())

    with FakeTensorMode() as mode:
        tensors = [torch.empty(shapes[key], dtype=torch.bfloat16) for key in keys]
        try:
            graph = make_fx(convert, pre_dispatch=True)(*tensors).graph
        except Exception as error:
            raise WeightsError(
                f"the checkpoint tensors for {first_name} do not fit transformers' rule for them: {error}"
            ) from error
    del mode
    programs = {}
    for index, name in enumerate(names):
        if name in wanted:
            programs[name] = _program(graph, index, keys)
    return programs


def _program(graph: fx.Graph, index: int, keys: list[str]) -> tuple[str, tuple[str, ...]]:
    """The part of a rule that makes its result number `index`, with only the tensors that it needs."""
    part = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    (output,) = graph.find_nodes(op="output")
    result = output.args[0][index]
    needed: dict[fx.Node, None] = {}
    stack = [result]
    while stack:
        node = stack.pop()
        if node not in needed:
            needed[node] = None
            stack.extend(node.all_input_nodes)
    used: list[str] = []
    for position, node in enumerate(graph.find_nodes(op="placeholder")):
        if node in needed:
            copies[node] = part.placeholder(f"source_{len(used)}")
            used.append(keys[position])
    for node in graph.nodes:
        if node in needed and node.op != "placeholder":
            copies[node] = part.node_copy(node, lambda source: copies[source])
    part.output({"value": copies[result]})
    return emit(part, traced_dtype=torch.bfloat16).source, tuple(used)


def _saved_shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Names and shapes that `save_pretrained` would write: transformers' rules in reverse, tied tensors once."""
    from transformers.core_model_loading import revert_weight_conversion

    state: dict[str, torch.Tensor] = {}
    seen: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if seen.setdefault(id(tensor), name) == name:
            state[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, state).items()}
