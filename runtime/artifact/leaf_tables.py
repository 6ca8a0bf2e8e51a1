"""Check that the tables of a portable artifact describe modules that can be built and experts that can be split."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from runtime.artifact.manifest import MIXTURES, LeafKind, Manifest

_LARGEST_COUNT = 2**20
_NUM_AXES = {"Linear": 2, "Conv1D": 2, "Embedding": 2, "Conv1d": 3, "Conv2d": 4, "Conv3d": 5}
_ACCUMULATORS = ("hidden", "weights", "float32")


def wrong_leaf_tables(manifest: Manifest) -> Iterator[str]:
    """Yield a sentence for each error in the parameters of leaves and the options of experts."""
    if manifest.is_portable:
        for name, index in manifest.leaves.items():
            if manifest.leaf_kinds[index].kind not in MIXTURES:
                yield from _wrong_weights(manifest, name, manifest.leaf_kinds[index].kind)
    sound = {}
    for index, kind in enumerate(manifest.leaf_kinds):
        if kind.kind in MIXTURES:
            wrong = _wrong_options(kind)
            if wrong:
                yield f"{kind.kind} of kind {index} cannot be built: {wrong}"
            else:
                sound[index] = kind
    for name, index in manifest.leaves.items():
        if index in sound:
            yield from _wrong_parameters(manifest, name, sound[index])


def _wrong_weights(manifest: Manifest, name: str, kind: str) -> Iterator[str]:
    weight, bias = (manifest.parameters.get(f"{name}.{own}") for own in ("weight", "bias"))
    if weight is None or len(weight.shape) != _NUM_AXES[kind]:
        yield f"the {kind} {name} has no weight with {_NUM_AXES[kind]} axes"
    elif weight.is_buffer or (bias is not None and bias.is_buffer):
        yield f"the weight or bias of the {kind} {name} is a buffer, not a parameter"


def _wrong_options(kind: LeafKind) -> str:
    counts: Mapping[str, int] = {
        option: values[0]
        for option, values in kind.options.items()
        if len(values) == 1 and isinstance(values[0], int) and 0 <= values[0] < _LARGEST_COUNT
    }
    if not counts.get("num_experts"):
        return "num_experts is not a valid number"
    for option in ("stacked", "flat"):
        names = kind.options.get(option, ())
        if not all(isinstance(own, str) and own for own in names) or len(set(names)) < len(names):
            return f"{option} is not a list of distinct names"
    if not kind.options.get("stacked"):
        return "it has no parameters"
    if kind.kind != "Experts":
        return "" if len(kind.arguments) == 1 else "its program must take one input"
    accumulator, inputs = kind.options.get("accumulator", ()), kind.options.get("inputs", ())
    if len(accumulator) != 1 or accumulator[0] not in _ACCUMULATORS:
        return f"accumulator is not one of {', '.join(_ACCUMULATORS)}"
    if len(inputs) != 3 or not all(isinstance(own, str) for own in inputs) or len(set(inputs)) < 3:
        return "inputs must be three distinct names"
    if counts.get("is_column") not in (0, 1):
        return "is_column is neither 0 nor 1"
    if counts.get("num_dims", 2) not in (2, 3) or any(
        option in kind.options and option not in counts for option in ("num_identity", "num_dims")
    ):
        return "num_identity or num_dims has an invalid value"
    if not set(kind.options.get("flat", ())) <= set(kind.options["stacked"]):
        return "flat names a parameter that is not stacked"
    if len(kind.arguments) != 2 + len(kind.options["stacked"]):
        return "the inputs of its program do not match its stacked parameters"
    return ""


def _wrong_parameters(manifest: Manifest, name: str, kind: LeafKind) -> Iterator[str]:
    count = int(kind.options["num_experts"][0])
    counts = (count, count + int(kind.options.get("num_identity", (0,))[0]))
    for own in map(str, kind.options["stacked"]):
        entry = manifest.parameters.get(f"{name}.{own}")
        if entry is None:
            yield f"the experts {name} have no parameter {own}, which the manifest lists as stacked"
        elif entry.is_buffer:
            yield f"the parameter {name}.{own} of experts is a buffer, not a parameter"
        elif own in kind.options.get("flat", ()):
            if not entry.shape or entry.shape[0] % count:
                yield f"the parameter {name}.{own} cannot be divided equally among {count} experts"
        elif not entry.shape or entry.shape[0] not in counts:
            yield f"the parameter {name}.{own} does not have one part for each of {count} experts"
