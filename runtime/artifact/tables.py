"""Check that the tables of a manifest are consistent: an inconsistency would fail in the middle of a run."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from runtime.artifact.chain_order import wrong_chain
from runtime.artifact.encoding import canonical, sha256
from runtime.artifact.expert_tables import wrong_experts, wrong_lookups
from runtime.artifact.leaf_tables import wrong_leaf_tables
from runtime.artifact.manifest import (
    ATTENTIONS,
    DTYPES,
    MIXTURES,
    PAD,
    START,
    UNKNOWN_ABSENCE,
    InputEntry,
    LeafKind,
    Manifest,
    TensorEntry,
)
from runtime.artifact.own_code import is_own_module
from runtime.artifact.rotation_spaces import wrong_rotations
from runtime.artifact.scale_groups import wrong_groups
from runtime.artifact.size_expressions import ANY_SIZE, check_condition, is_dimension
from runtime.console import shown
from runtime.errors import ArtifactError
from runtime.language.library_sources import LONGEST_NAME, is_module_name
from runtime.patterns import fault

POLICIES = ("target", "linear")
KINDS = ("Linear", "Conv1D", "Embedding", "Conv1d", "Conv2d", "Conv3d", *MIXTURES)
# Options of convolutions, and the strings that are allowed instead of numbers.
_CONVOLUTION = ("stride", "padding", "dilation", "groups", "padding_mode")
_WORDS = {"padding": ("same", "valid"), "padding_mode": ("zeros", "reflect", "replicate", "circular")}
_OTHER_DTYPES = ("uint16", "uint32", "uint64", "complex128", "complex32")
_MODELING = re.compile(r"transformers\.models(\.[a-z0-9_]+)+\.modeling_[a-z0-9_]+")
# An input that can be filled with one number: its dtype, and how many numbers it has for each token.
_COUNTED, _LARGEST_ROW = ("bool", "int32", "int64"), 4096
_MOST_PATTERNS = 4096
_MOST_AXES = 64
_MOST_ELEMENTS = 2**40  # per parameter: all experts of a layer form one
RUN_DTYPES = ("float32", "float16", "bfloat16")


def check_tables(manifest: Manifest) -> None:
    """Reject tables that contradict each other.

    Raises:
        ArtifactError: naming the entry.
    """
    constants = frozenset(manifest.constants)
    for entry in manifest.subgraphs:
        inputs = frozenset(entry.input_names)
        missing = [name for name in entry.parameters if name not in manifest.parameters]
        missing += [name for name in entry.constants if name not in constants]
        missing += [name for name in entry.consumed_names if name not in inputs]
        if missing:
            raise ArtifactError(f"{entry.file} needs {missing[0]!r}, which the manifest does not describe")
    for wrong in (*_wrong_places(manifest), *_wrong_values(manifest)):
        raise ArtifactError(wrong)
    sizes = dict.fromkeys((dim.name for dim in manifest.dims), ANY_SIZE)
    for condition in manifest.conditions:
        check_condition(condition, sizes)
    for name, parameter in manifest.parameters.items():
        if not -1 <= parameter.conversion < len(manifest.conversions):
            raise ArtifactError(f"parameter {name} names conversion {parameter.conversion}, which does not exist")
        conversion = manifest.conversions[parameter.conversion] if parameter.conversion >= 0 else None
        if conversion is not None and conversion.num_sources != len(parameter.sources):
            takes, found = conversion.num_sources, len(parameter.sources)
            raise ArtifactError(f"parameter {name} has {found} sources, and its conversion takes {takes}")
        if not parameter.sources or (parameter.dtype != "model" and parameter.dtype not in DTYPES):
            raise ArtifactError(f"parameter {name} has no sources, or the unknown dtype {parameter.dtype!r}")
    if manifest.model.dtype not in RUN_DTYPES:
        raise ArtifactError(f"the model has the unknown dtype {manifest.model.dtype!r}")
    if manifest.model.attn_implementation not in ATTENTIONS:
        raise ArtifactError(
            f"the model has the unsupported attention implementation {manifest.model.attn_implementation!r}"
        )
    for module in manifest.sources:
        if not is_module_name(module):
            raise ArtifactError(f"the manifest lists the source of {module!r}, which is not a module name")
    if len(manifest.model.ignored_keys) > _MOST_PATTERNS:
        raise ArtifactError(
            f"the manifest lists {len(manifest.model.ignored_keys)} patterns of keys, more than {_MOST_PATTERNS}"
        )
    for pattern in manifest.model.ignored_keys:
        wrong = fault(pattern)
        if wrong:
            raise ArtifactError(
                f"the manifest's pattern {pattern[:80]!r} is not a supported regular expression: {wrong}"
            )
    checks = (
        _wrong_leaves,
        wrong_leaf_tables,
        wrong_chain,
        wrong_groups,
        wrong_experts,
        wrong_lookups,
        wrong_rotations,
    )
    for wrongs in checks:
        for wrong in wrongs(manifest):
            raise ArtifactError(wrong)


def _wrong_places(manifest: Manifest) -> Iterator[str]:
    """Yield a sentence for each program or class at a path where it is not allowed."""
    files = [("subgraphs", entry.file) for entry in manifest.subgraphs]
    files += [("conversions", program.file) for program in manifest.conversions]
    files += [("leaves", kind.program) for kind in manifest.leaf_kinds if kind.program]
    for folder, file in files:
        if re.fullmatch(rf"{folder}/[0-9]{{3,6}}\.py", file) is None:
            yield f"{file!r} is not a valid path in {folder}/"
    model = manifest.model
    is_known = _is_class(model.module, model.class_name) and _MODELING.fullmatch(model.module) is not None
    if not is_known and not is_own_module(model.module):
        yield f"the model's class is {model.module}.{model.class_name}, which is not a model of transformers"
    for name, path in manifest.foreign.items():
        module, _, class_name = path.partition(":")
        known = module.split(".")[0] in ("torch", "transformers", "timm") or is_own_module(module)
        if not known or not _is_class(module, class_name) or not _is_name(name):
            yield f"the foreign module {name!r} has the class {path!r}, which is not of the model or a known library"
    if manifest.input_key != sha256(canonical(dict(manifest.ingredients))):
        yield "the manifest's input key does not match its ingredients"


def _wrong_values(manifest: Manifest) -> Iterator[str]:
    """Yield a sentence for each invalid shape, dtype or range."""
    names = {dim.name for dim in manifest.dims}
    for dim in manifest.dims:
        if not _is_name(dim.name) or not -1 <= dim.max < 2**62 or not 0 <= dim.min < 2**62:
            yield f"the size {dim.name!r} has the invalid range {dim.min} to {dim.max}"
    if len(names) != len(manifest.dims):
        yield "the manifest states the range of a size twice"
    entries: list[tuple[str, InputEntry | TensorEntry]] = [(entry.name, entry) for entry in manifest.inputs]
    entries += manifest.values.items()
    for name, entry in entries:
        if entry.dtype not in ("model", "", *DTYPES, *_OTHER_DTYPES) or not all(map(is_dimension, entry.shape)):
            yield f"the value {name!r} has the invalid dtype {entry.dtype!r} or shape {shown(list(entry.shape))}"
    if len({entry.name for entry in manifest.inputs}) != len(manifest.inputs):
        yield "the manifest states an input twice"
    yield from _wrong_absent_inputs(manifest)
    for name, parameter in manifest.parameters.items():
        is_shape = len(parameter.shape) <= _MOST_AXES and all(map(is_dimension, parameter.shape))
        if not is_shape or math.prod(parameter.shape) > _MOST_ELEMENTS or parameter.bytes < 0:
            yield f"the parameter {name!r} has the invalid shape {shown(list(parameter.shape))} or size"
        if parameter.tied_to and (parameter.tied_to not in manifest.parameters or parameter.tied_to == name):
            yield f"the parameter {name!r} is tied to {parameter.tied_to!r}, which is not another parameter"
    constants = frozenset(manifest.constants)
    for name, constant in manifest.defaults.items():
        if name not in manifest.parameters or constant not in constants:
            yield f"the default {constant!r} of {name!r} names a missing constant or parameter"
    for name, limit in manifest.limits.items():
        if not 0 < limit < 2**62:
            yield f"the limit {name!r} has the invalid value {limit}"


def _wrong_absent_inputs(manifest: Manifest) -> Iterator[str]:
    """Yield a sentence for each invalid `absent` number or decoder rule: the host makes these inputs by their shape."""
    for entry in manifest.inputs:
        of_each = entry.shape[2:]  # axes after rows and tokens
        is_sized = len(of_each) < 4 and all(isinstance(size, int) for size in of_each)
        is_fit = entry.dtype in _COUNTED and is_sized and math.prod(map(int, of_each)) <= _LARGEST_ROW
        if entry.absent != UNKNOWN_ABSENCE and not (is_fit and 0 <= entry.absent < 2**31):
            yield f"the input {entry.name!r} has the invalid absent number {entry.absent}"
    rule = manifest.decoder
    if rule and (PAD not in rule or rule.keys() - {PAD, START} or not all(0 <= id < 2**31 for id in rule.values())):
        yield f"the rule for the decoder's inputs is invalid: {shown(dict(rule))}"
    most = max((entry.shape[0] for entry in manifest.parameters.values() if len(entry.shape) > 1), default=0)
    ids = {f"the decoder's {name} token": token for name, token in rule.items()}
    ids |= {f"the number for an absent {entry.name}": entry.absent for entry in manifest.inputs}
    for what, number in ids.items():
        if number >= max(most, 2):  # masks hold 0 and 1; other inputs are indices
            yield f"{what} is {number}, but the largest table of the model has {most} rows"


def _is_class(module: str, class_name: str) -> bool:
    return is_module_name(module) and all(part.isidentifier() for part in class_name.split("."))


def _wrong_leaves(manifest: Manifest) -> Iterator[str]:
    """Yield a sentence for each error in the tables that a portable artifact's module tree is built from."""
    if manifest.policy not in POLICIES:
        yield f"the leaf policy is {manifest.policy!r}, not one of {', '.join(POLICIES)}"
    for kind in manifest.leaf_kinds:
        yield from _wrong_kind(kind)
    for name, index in manifest.leaves.items():
        if not 0 <= index < len(manifest.leaf_kinds) or not _is_name(name):
            yield f"the leaf {name!r} is of kind {index}, which the manifest does not describe"
    constants = frozenset(manifest.constants)
    for name, buffer in manifest.buffers.items():
        used = buffer.constants
        if not _is_name(name) or name in manifest.parameters or not used or used.keys() - {"", *RUN_DTYPES}:
            yield f"the computed tensor {name!r} has an invalid name, no values, or is also a parameter"
        if not constants.issuperset(used.values()):
            yield f"the values of {name!r} are not a constant of the artifact"
    if manifest.is_portable:
        yield from _missing_parts(manifest)


def _wrong_kind(kind: LeafKind) -> Iterator[str]:
    if kind.kind not in KINDS:
        yield f"{kind.kind!r} is not a leaf kind; the kinds are {', '.join(KINDS)}"
    if bool(kind.program) != bool(kind.arguments):
        yield f"a leaf of kind {kind.kind} has a program without inputs, or inputs without a program"
    if kind.kind in MIXTURES and not kind.program:
        yield "experts must have a program"
    wanted = _CONVOLUTION if kind.kind.startswith("Conv") and kind.kind != "Conv1D" else ()
    if kind.kind not in MIXTURES and sorted(kind.options) != sorted(wanted):
        yield f"a leaf of kind {kind.kind} has the invalid options {shown(list(kind.options))}"
    for name, values in kind.options.items() if wanted else ():
        words = _WORDS.get(name, ())
        are_fit = (value in words if isinstance(value, str) else 0 <= value < 2**20 for value in values)
        if not values or not all(are_fit):
            yield f"a leaf of kind {kind.kind} has the invalid {name} {shown(values)}"


def _missing_parts(manifest: Manifest) -> Iterator[str]:
    """Yield a sentence for each name that the code of a portable artifact uses and its tables do not describe."""
    for name in manifest.parameters:
        if not _is_name(name):
            yield f"the parameter {name!r} is not a dotted name"
    for entry in manifest.subgraphs:
        for name in entry.submodules:
            if name not in manifest.leaves:
                yield f"{entry.file} calls {name}, which the manifest does not describe as a leaf"
        for name in entry.attributes:
            if name not in manifest.parameters and name not in manifest.buffers:
                yield f"{entry.file} reads {name}, which is neither a parameter nor a computed tensor"
        if entry.objects:
            yield f"{entry.file} passes {entry.objects[0]} to model code, which a portable artifact does not have"


def _is_name(name: str) -> bool:
    return len(name) <= LONGEST_NAME and re.fullmatch(r"\w+(\.\w+)*", name) is not None and name[:2] != "__"
