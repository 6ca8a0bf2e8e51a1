"""Find modules that vLLM loads as one layer but that have different schemes, so that it does not load the checkpoint.

The names are those of the `packed_modules_mapping` of vLLM's models (0.32), and a few that its Transformers backend
fuses by computation. Modules are fused only if they have the same parent and, where the artifact's scale groups state
which modules read one tensor, read the same tensor: the keys of cross-attention are not fused with its queries. The
matrices of all experts of a layer are one layer, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from runtime.formats.presets import plain_value

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs

    from runtime.artifact.manifest import ScaleGroup
    from runtime.recipe.recipe import Assignment

READER = "vLLM 0.32"
_CONSEQUENCE = "with different schemes it fails or computes wrong numbers"
_REMEDY = "give them one scheme, or ignore all of them"
FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("query_net", "key_net", "value_net"),
    ("wq", "wk", "wv"),
    ("q", "k", "v"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
    ("gate_proj", "up_proj"),
    ("gate_proj", "dense_h_to_4h"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
    ("fc1", "fc3"),
    ("c_fc_0", "c_fc_1"),
)


def mixed_layers(
    linears: Iterable[str],
    groups: Sequence[ScaleGroup],
    experts: Mapping[str, Sequence[str]],
    jobs: Mapping[str, Assignment],
) -> Iterator[str]:
    """Yield a sentence for each kind of layer that vLLM cannot load.

    Args:
        linears: names of all Linear modules, quantized or not.
        groups: the modules that read one tensor, as far as known.
        experts: the matrices of its experts by the name of a mixture.
        jobs: assignment of each quantized module.
    """
    places: dict[tuple[tuple[str, str], ...], list[tuple[str, ...]]] = {}
    of_experts = {name for names in experts.values() for name in names}
    for layer in fused_layers([name for name in linears if name not in of_experts], groups):
        schemes = [(name.rpartition(".")[2], _scheme(jobs.get(name))) for name in layer]
        if len({scheme for _, scheme in schemes}) > 1:
            places.setdefault(tuple(schemes), []).append(layer)
    for kind, layers in places.items():
        listed = _listed(f"{name} ({scheme})" for name, (_, scheme) in zip(layers[0], kind, strict=True))
        more = f", and {len(layers) - 1} more layers" if len(layers) > 1 else ""
        owns = _listed(own for own, _ in kind)
        yield f"{READER} loads {owns} as one layer; {_CONSEQUENCE}: {listed}{more}; {_REMEDY}"
    for owner, names in experts.items():
        found = {_scheme(jobs.get(name)): name for name in reversed(names)}
        if len(found) > 1:
            listed = _listed(f"{name} ({scheme})" for scheme, name in reversed(found.items()))
            yield f"{READER} loads all experts of {owner} as one layer; {_CONSEQUENCE}: {listed}; {_REMEDY}"


def fused_layers(linears: Sequence[str], groups: Sequence[ScaleGroup]) -> Iterator[tuple[str, ...]]:
    """Yield the modules that vLLM loads as one layer."""
    siblings = {name: number for number, group in enumerate(groups) for name in group.modules}
    children: dict[str, dict[str, str]] = {}
    for name in linears:
        owner, _, own = name.rpartition(".")
        children.setdefault(owner, {})[own] = name
    for named in children.values():
        for owns in FUSED:
            together: dict[int | None, list[str]] = {}
            for own in owns:
                if own in named:
                    together.setdefault(siblings.get(named[own]), []).append(named[own])
            yield from (tuple(names) for names in together.values() if len(names) > 1)


def _scheme(job: Assignment | None) -> str:
    if job is None:
        return "not quantized"
    inputs = job.scheme.input_activations
    if inputs is None:
        return _described(job.scheme.weights)
    kind = {"True": "dynamic", "False": "static"}.get(str(plain_value(inputs.dynamic)), "local")
    return f"{_described(job.scheme.weights)}, {kind} inputs {_described(inputs)}"


def _described(args: QuantizationArgs) -> str:
    """Describe all properties that affect what is stored and computed."""
    parts = [f"{args.num_bits} bit {plain_value(args.type)}"]
    if not args.symmetric:
        parts.append("asymmetric")
    strategy = str(plain_value(args.strategy))
    sizes = {"group": args.group_size, "tensor_group": args.group_size, "block": args.block_structure}
    parts.append(f"by {strategy}" + (f" of {sizes[strategy]}" if strategy in sizes else ""))
    if args.scale_dtype is not None:
        parts.append(f"with scales in {str(args.scale_dtype).removeprefix('torch.')}")
    return " ".join(parts)


def _listed(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:-1]) + f" and {listed[-1]}"
