"""Determine from names alone which checkpoint tensors form each parameter, and how.

transformers renames, splits and fuses tensors while it loads a checkpoint. This module applies its rules to the
checkpoint's names. A rule that computes (stacking experts, splitting a fused projection) runs once on fake tensors and
is recorded as a program, so that the host needs neither the rule nor transformers.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from runtime.errors import WeightsError
from seqbuild.chain.emit import emit
from seqbuild.model.alike import fill_in, find_alike
from seqbuild.model.renaming import Renamer, is_blind, natural_order

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyTable:
    """Mapping of parameters to checkpoint tensors.

    Attributes:
        sources: parameter name to the checkpoint keys it is made from.
        conversion: parameter name to an index into `programs`; a name without entry is loaded unchanged.
        programs: source code, each a `forward(self, source_0, ..., *, run)` that returns `{"value": tensor}`.
        num_sources: the number of tensors that each program takes.
    """

    sources: Mapping[str, tuple[str, ...]]
    conversion: Mapping[str, int]
    programs: tuple[str, ...]
    num_sources: tuple[int, ...]


def key_table(model: PreTrainedModel, checkpoint: Mapping[str, tuple[int, ...]] | None) -> KeyTable:
    """Map a checkpoint's tensors to the model's parameters and persistent buffers.

    Args:
        model: without weights.
        checkpoint: names and shapes of the checkpoint's tensors; None uses the names under which transformers would
            save the model.

    Raises:
        WeightsError: if a tensor that a parameter needs is missing; the message names the first.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict(keep_vars=True).items()}
    if checkpoint is not None:
        return _table(model, checkpoint, wanted)
    state = _saved_state(model)
    return _table_by_two(model, state, wanted) or _table(model, _saved_shapes(model, state), wanted)


def _table_by_two(
    model: PreTrainedModel, state: Mapping[str, torch.Tensor], wanted: Mapping[str, tuple[int, ...]]
) -> KeyTable | None:
    """Compute the table of the names that transformers would save from two layers of each form; None if impossible."""
    forms = find_alike({name: (tensor.shape, tensor.dtype) for name, tensor in state.items()})
    if not forms or not _are_apart(model):
        return None
    left_out = dict.fromkeys(name for form in forms for name in form.left_out)
    few = {name: tensor for name, tensor in state.items() if name not in left_out}
    table = _table(model, _saved_shapes(model, few), wanted)
    sources, conversion = dict(table.sources), dict(table.conversion)
    if not fill_in(forms, sources, conversion):
        return None
    return dataclasses.replace(table, sources=sources, conversion=conversion)


def _are_apart(model: PreTrainedModel) -> bool:
    """Return whether no loading or saving rule depends on the layers' numbers."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    rules = get_model_conversion_mapping(model)
    rules = [*rules, *(rule.reverse_transform() for rule in rules)]
    is_from_scratch = getattr(model, "_weight_conversions", None) is None
    return is_from_scratch and all(
        is_blind(rule) and (not isinstance(rule, WeightConverter) or _has_known_operations(rule)) for rule in rules
    )


def _table(
    model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> KeyTable:
    """Compute the table for tensors of these names and shapes."""
    simple, grouped = _assign(model, shapes, wanted)
    sources: dict[str, tuple[str, ...]] = {name: (key,) for name, key in simple.items()}
    conversion: dict[str, int] = {}
    programs: dict[str, int] = {}
    counts: list[int] = []
    memory: Memory = {}
    for group in grouped.values():
        for name, (program, keys) in _convert(model, group, shapes, wanted, memory).items():
            if program not in programs:
                programs[program] = len(programs)
                counts.append(len(keys))
            sources[name], conversion[name] = keys, programs[program]
    return KeyTable(sources=sources, conversion=conversion, programs=tuple(programs), num_sources=tuple(counts))


@dataclass(kw_only=True)
class _KeyGroup:
    """The checkpoint keys that one run of a conversion rule takes.

    Attributes:
        rule: transformers' rule; it is copied before it runs.
        first_name: the parameter under which the keys were collected.
        keys: grouped by the rule's pattern that they match.
    """

    rule: Any
    first_name: str
    keys: dict[str, list[str]] = field(default_factory=dict)

    def flat(self) -> list[str]:
        """Return all keys, in the order in which the rule takes their tensors."""
        return [key for keys in self.keys.values() for key in keys]


# Shared by identical layers: for each result its name without numbers, its program, and the indices of its keys.
Memory = dict[Any, list[tuple[list[str], str, list[int]]]]
# These rules depend only on the tensors, the model's config and the shape of the parameter they make.
_REMEMBERED = ("Chunk", "Concatenate", "Interleave", "MergeModulelist", "SplitModulelist", "Transpose")
_NUMBERS = re.compile(r"[0-9]+")


def _assign(
    model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, str], dict[str, _KeyGroup]]:
    """Apply transformers' renamings: parameter to key, and the first parameter of a conversion to what it takes."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    renamer = Renamer(renamings, converters, model.base_model_prefix, wanted)
    simple: dict[str, str] = {}
    grouped: dict[str, _KeyGroup] = {}
    for key in sorted(shapes, key=natural_order()):
        name, pattern = renamer.rename(key)
        if name not in wanted and key in wanted:
            name, pattern = key, None
        if name not in wanted:
            continue
        if pattern is None:
            simple[name] = key
        else:
            if name not in grouped:
                grouped[name] = _KeyGroup(rule=by_pattern[pattern], first_name=name)
            grouped[name].keys.setdefault(pattern, []).append(key)
    return simple, grouped


def _convert(
    model: PreTrainedModel,
    group: _KeyGroup,
    shapes: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, tuple[int, ...]],
    memory: Memory,
) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Apply a rule to a group: parameter name to (program, checkpoint keys).

    Layers differ in the numbers in their names. The recording of one layer is reused for the next if the rule can see
    no other difference.
    """
    numbers, keys = _NUMBERS.findall(group.first_name), group.flat()
    if not _may_be_remembered(group.rule):
        recorded = _record(model, group, shapes)
        return {name: (program, _picked(keys, used)) for name, program, used in recorded if name in wanted}
    sizes = tuple((pattern, tuple(shapes[key] for key in taken)) for pattern, taken in group.keys.items())
    known_by = (id(group.rule), tuple(_NUMBERS.split(group.first_name)), wanted[group.first_name], sizes)
    if known_by not in memory:
        recorded = _record(model, group, shapes)
        memory[known_by] = [(_NUMBERS.split(name), program, used) for name, program, used in recorded]
    made = {}
    for parts, program, used in memory[known_by]:
        name = "".join(itertools.chain.from_iterable(itertools.zip_longest(parts, numbers, fillvalue="")))
        if name in wanted:
            made[name] = program, _picked(keys, used)
    return made


def _may_be_remembered(rule: Any) -> bool:
    """Return whether the rule ignores numbers in names, and its results have the numbers of the first name."""
    has_plain_targets = not any(_NUMBERS.search(pattern) or "*" in pattern for pattern in rule.target_patterns)
    return has_plain_targets and _has_known_operations(rule)


def _has_known_operations(rule: Any) -> bool:
    operations = [type(operation) for operation in rule.operations]
    return all(cls.__module__ == type(rule).__module__ and cls.__name__ in _REMEMBERED for cls in operations)


def _picked(keys: Sequence[str], places: Sequence[int]) -> tuple[str, ...]:
    return tuple(keys[place] for place in places)


def _record(
    model: PreTrainedModel, group: _KeyGroup, shapes: Mapping[str, tuple[int, ...]]
) -> list[tuple[str, str, list[int]]]:
    """Run a rule on fake tensors; return for each result its name, its program, and the positions of its keys."""
    pairs = [(pattern, key) for pattern, keys in group.keys.items() for key in keys]
    names: list[str] = []

    def convert(*tensors: torch.Tensor) -> list[torch.Tensor]:
        rule = copy.deepcopy(group.rule)
        for (pattern, key), tensor in zip(pairs, tensors, strict=True):
            rule.add_tensor(group.first_name, key, pattern, tensor)
        results = rule.convert(group.first_name, model=model, config=model.config)
        unwrapped = {name: value[0] if isinstance(value, list) else value for name, value in results.items()}
        names[:] = list(unwrapped)
        return list(unwrapped.values())

    with FakeTensorMode():
        tensors = [torch.empty(shapes[key], dtype=torch.bfloat16) for _, key in pairs]
        try:
            graph = make_fx(convert, pre_dispatch=True)(*tensors).graph
        except Exception as error:
            raise WeightsError(
                f"the checkpoint tensors for {group.first_name} do not fit transformers' rule for them: {error}"
            ) from error
    return [(name, *_program(graph, index)) for index, name in enumerate(names)]


def _program(graph: fx.Graph, index: int) -> tuple[str, list[int]]:
    """Extract the part of a rule that computes result number `index`, and the positions of the tensors it needs."""
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
    used: list[int] = []
    for position, node in enumerate(graph.find_nodes(op="placeholder")):
        if node in needed:
            copies[node] = part.placeholder(f"source_{len(used)}")
            used.append(position)
    for node in graph.nodes:
        if node in needed and node.op != "placeholder":
            copies[node] = part.node_copy(node, lambda source: copies[source])
            _let_rows_vary(node, copies[node])
    part.output({"value": copies[result]})
    return emit(part, traced_dtype=torch.bfloat16).source, used


def _let_rows_vary(node: fx.Node, copy_of: fx.Node) -> None:
    """Allow any number of rows where the program reshapes: a host may load only part of an expert stack."""
    if node.target not in (torch.ops.aten.reshape.default, torch.ops.aten.view.default):
        return
    source, sizes = node.args
    before, after = source.meta["val"].shape, node.meta["val"].shape  # type: ignore[union-attr]
    if len(before) > 1 and before[:1] == after[:1] and after.numel() and -1 not in sizes:  # type: ignore[operator]
        copy_of.args = (copy_of.args[0], [-1, *after[1:]])


def _saved_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the tensors that `save_pretrained` would save by the model's names, tied ones once, without data."""
    state: dict[str, torch.Tensor] = {}
    seen: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if seen.setdefault(id(tensor), name) == name:
            state[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return state


def _saved_shapes(model: PreTrainedModel, state: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes that `save_pretrained` would write for `state`, by applying the rules in reverse."""
    from transformers.core_model_loading import revert_weight_conversion

    return {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, dict(state)).items()}
