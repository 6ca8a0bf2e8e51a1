"""The artifact's table of contents: schema and canonical encoding, without torch.

docs/format.md is the specification. Reading is strict: an unknown major version, wrong type, missing key, wrong digest
or non-canonical encoding is an ArtifactError that names the problem.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from runtime.artifact.encoding import FORMAT_VERSION, canonical, decoded, sha256
from runtime.artifact.rotation_table import RotationTable
from runtime.errors import ArtifactError

START, PAD = "start", "pad"  # the keys of a rule; without a start, the last label comes first
MIXTURES = ("Experts", "DenseExperts")

FORMAT = "seqbuild-artifact"
MANIFEST_NAME = "manifest.msgpack"
_WITH_ROTATIONS = (2, 1)  # the format version that added them
UNBOUNDED = -1
UNKNOWN_ABSENCE = -1
DTYPES = (
    *("bool", "uint8", "int8", "int16", "int32", "int64"),
    *("float8_e4m3fn", "float8_e5m2", "float16", "bfloat16", "float32", "float64", "complex64"),
)
# Implementations that are part of torch: any other name makes transformers look for a kernel, even on the hub.
ATTENTIONS = ("eager", "sdpa", "None", "")

Shape = tuple[int | str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelEntry:
    """The model that the artifact was made from.

    `dtype` is torch's name of the default dtype of the weights. `ignored_keys` are regular expressions for checkpoint
    tensors that the model does not use. `code` lists the paths of the model's own code, empty for a model that is part
    of transformers.
    """

    class_name: str
    module: str
    model_type: str
    dtype: str
    attn_implementation: str
    num_parameters: int
    base_model_prefix: str
    ignored_keys: tuple[str, ...]
    config_class_name: str = ""
    config_module: str = ""
    code: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorEntry:
    """Dtype (`"model"` for the dtype of the run) and shape of a value: integers and expressions over dims."""

    dtype: str
    shape: Shape


@dataclass(frozen=True, kw_only=True, slots=True)
class InputEntry:
    """An input of the model. A tensor filled with `absent` has the same effect as omitting the input; -1 when there is
    no such number, or none is known.
    """

    name: str
    dtype: str
    shape: Shape
    absent: int = UNKNOWN_ABSENCE


@dataclass(frozen=True, kw_only=True, slots=True)
class DimEntry:
    """A symbolic size and the range in which the trace is valid; `max` is -1 for no upper bound."""

    name: str
    min: int
    max: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SubgraphEntry:
    """One step of the chain; see docs/format.md."""

    file: str
    input_names: tuple[str, ...]
    consumed_names: tuple[str, ...]
    output_names: tuple[str, ...]
    submodules: tuple[str, ...]
    attributes: tuple[str, ...]
    objects: tuple[str, ...]
    constants: tuple[str, ...]
    opaque: tuple[str, ...]
    targets: tuple[str, ...]
    parameters: tuple[str, ...]
    uses: tuple[str, ...] = ()
    rehearsed: tuple[str, ...] = ()
    scope: str = ""
    arguments: tuple[str, ...] = ()
    results: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class LeafKind:
    """The computation of modules that the host builds: torch's name of the class, and its options except shapes.

    If the model's class computes something else, `program` is the file of its computation, `arguments` are the names of
    the program's inputs, and `attributes` the parameters that it reads.
    """

    kind: str
    options: Mapping[str, Shape] = field(default_factory=dict)
    program: str = ""
    arguments: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class BufferEntry:
    """A tensor of the model that is computed, not loaded: the constant that holds its values, by the dtype of the run;
    under an empty name when the values are the same for every dtype.
    """

    constants: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterEntry:
    """A parameter or persistent buffer, and the checkpoint tensors it is made from."""

    shape: tuple[int, ...]
    dtype: str
    bytes: int
    sources: tuple[str, ...]
    conversion: int
    tied_to: str
    is_buffer: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversionEntry:
    """A program that makes a parameter from several checkpoint tensors."""

    file: str
    num_sources: int


@dataclass(frozen=True, kw_only=True, slots=True)
class FileEntry:
    """A file of the artifact: relative path, size in bytes, sha256 in hex."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaledParameter:
    """A parameter that is combined with a scaled tensor, and its axis along the tensor's channels."""

    name: str
    axis: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaleGroup:
    """Linear modules that read one tensor, and the parameters that can scale its channels without changing the model.

    `producer` is the weight of a norm [C] or of a Linear [C, I] that computes the tensor's channels, empty if there is
    none. `bias` is scaled with it, `offset` is the number that the model adds to the weight, and `others` are the other
    parameters combined with the tensor. `channels` maps each feature of the tensor to the producer's channel that it is
    proportional to, as runs of consecutive channels: start, length, start, length.
    """

    subgraph: int
    modules: tuple[str, ...]
    others: tuple[ScaledParameter, ...] = ()
    producer: str = ""
    bias: str = ""
    offset: int = 0
    channels: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class CachedValue:
    """A value that an attention module writes to its key-value cache, or compares with it.

    `part` is `k` for the keys and `v` for the values that the model's code passes to the cache, `q` for the queries.
    `name` is the variable of the value in the subgraph's code, and `after` the variable assigned by the statement that
    completes the value. `kind` is the name of the module's class, `heads` the size of the second of the value's four
    dimensions, 0 if it has none.
    """

    subgraph: int
    module: str
    kind: str
    part: str
    name: str
    after: str
    heads: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertStack:
    """The composition of a stacked parameter of a mixture, the same for each expert.

    `name` is the stacked parameter, and `parts` are an expert's own parameters, as they would be named in Linear
    modules. They are joined along `axis` of the expert's slice, alternately if `is_interleaved`, each transposed before
    if `is_transposed`. Weights with the same `input` multiply the same tensor; 0 is the expert's own input.
    """

    name: str
    parts: tuple[str, ...]
    axis: int
    is_transposed: bool = False
    is_interleaved: bool = False
    input: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertPair:
    """Two modules of every expert: the columns of `module` can be multiplied by what the rows of `producer` are divided
    by. `bias` is divided too, and `channels` are the producer's rows for each column, as runs: start, length.
    """

    module: str
    producer: str
    bias: str
    channels: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertLayout:
    """How the experts of a mixture split into Linear modules, `<number>.<module>` within the mixture.

    `numbers` are the experts' numbers in order, as runs. `is_named` states that the checkpoint has a tensor for each
    part; otherwise it has stacks, and the compiler chose the names. `pairs` has at most one entry.
    """

    stacks: tuple[ExpertStack, ...]
    numbers: tuple[int, ...]
    is_named: bool
    pairs: tuple[ExpertPair, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class MixtureEntry:
    """A mixture whose experts can be split: the index of its layout, and the checkpoint's name for the module."""

    layout: int
    prefix: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The complete table of contents; see docs/format.md."""

    input_key: str
    ingredients: Mapping[str, str]
    model: ModelEntry
    versions: Mapping[str, str]
    targets: tuple[str, ...]
    target_patterns: tuple[str, ...]
    ignore: tuple[str, ...]
    targets_per_subgraph: int
    inputs: tuple[InputEntry, ...]
    dims: tuple[DimEntry, ...]
    subgraphs: tuple[SubgraphEntry, ...]
    parameters: Mapping[str, ParameterEntry]
    conversions: tuple[ConversionEntry, ...]
    values: Mapping[str, TensorEntry]
    constants: tuple[str, ...]
    files: tuple[FileEntry, ...]
    sources: Mapping[str, str]
    auto_ignore: tuple[str, ...]
    conditions: tuple[str, ...]
    policy: str
    leaf_kinds: tuple[LeafKind, ...]
    leaves: Mapping[str, int]
    buffers: Mapping[str, BufferEntry]
    foreign: Mapping[str, str]
    limits: Mapping[str, int]
    scale_groups: tuple[ScaleGroup, ...]
    defaults: Mapping[str, str]
    decoder: Mapping[str, int]
    mixture_groups: tuple[ScaleGroup, ...]
    cached: tuple[CachedValue, ...]
    expert_layouts: tuple[ExpertLayout, ...]
    mixtures: Mapping[str, MixtureEntry]
    lookups: tuple[str, ...]
    rotations: RotationTable | None = None  # none in format version 2.0

    @property
    def is_portable(self) -> bool:
        """Whether the artifact contains the complete program, so that a host needs no model code."""
        return self.policy == "linear" and not self.foreign and not self.opaque_steps

    @property
    def opaque_steps(self) -> tuple[str, ...]:
        """List the paths of all opaque functions, in order of first use."""
        return tuple(dict.fromkeys(path for entry in self.subgraphs for path in entry.opaque))

    def to_bytes(self) -> bytes:
        """Encode canonically, including the digest."""
        plain = msgspec.to_builtins(self) | {"format": FORMAT, "format_version": FORMAT_VERSION}
        return canonical(plain | {"digest": sha256(canonical(plain))})

    @classmethod
    def from_bytes(cls, data: bytes, origin: str = MANIFEST_NAME) -> Manifest:
        """Decode and check; `origin` is the file's name in messages.

        Raises:
            ArtifactError: for anything that docs/format.md does not allow.
        """
        entries = decoded(data, dict[str, msgspec.Raw], origin)
        version = _format_version(entries, origin)
        content = {key: value for key, value in entries.items() if key != "digest"}
        if canonical(entries) != data:  # the entries' own contents are compared below
            raise ArtifactError(
                f"{origin} is damaged: it is not the canonical encoding of its entries: a key occurs twice, or the "
                "keys are not in ascending order"
            )
        digest = decoded(entries.get("digest", msgspec.Raw(canonical(""))), str, f"{origin}: digest")
        if digest != sha256(canonical(content)):
            raise ArtifactError(f"{origin} is damaged: its digest does not match its content")
        if version >= _WITH_ROTATIONS and "rotations" not in entries:
            raise ArtifactError(f"{origin}: Object missing required field `rotations`")
        manifest = decoded(data, cls, origin)
        # A newer minor version has entries that are not decoded, and so cannot be compared.
        if version == FORMAT_VERSION and manifest.to_bytes() != data:
            raise ArtifactError(
                f"{origin} is damaged: it is not the canonical encoding of the entries of format version "
                f"{version[0]}.{version[1]}"
            )
        return manifest


def _format_version(entries: Mapping[str, msgspec.Raw], origin: str) -> tuple[int, int]:
    """Return the manifest's format version, if this runtime reads it."""
    absent = msgspec.Raw(canonical(None))
    try:
        name: object = msgspec.msgpack.decode(entries.get("format", absent), type=str)
    except (msgspec.MsgspecError, ValueError):
        name = None
    if name != FORMAT:
        raise ArtifactError(f"{origin} is not the manifest of a seqbuild artifact")
    version = decoded(entries.get("format_version", absent), tuple[int, int], f"{origin}: format_version")
    if version[0] != FORMAT_VERSION[0] or version[1] < 0:
        raise ArtifactError(
            f"{origin} has format version {version[0]}.{version[1]}, this runtime reads {FORMAT_VERSION[0]}.x",
            hint="compile the model again, or use the runtime that belongs to the artifact",
        )
    return version
