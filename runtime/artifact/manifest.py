"""The artifact's table of contents: schema, canonical encoding, and nothing that needs torch.

docs/format.md is the specification. Reading is strict: unknown major version, wrong type, missing key, wrong digest
or a non-canonical encoding is an ArtifactError that names what is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from runtime.artifact.encoding import FORMAT_VERSION, decoded, from_plain, in_key_order, packed, sha256, to_plain
from runtime.errors import ArtifactError

START, PAD = "start", "pad"  # the keys of a rule; without a start, the last label comes first
MIXTURES = ("Experts", "DenseExperts")

FORMAT = "seqbuild-artifact"
MANIFEST_NAME = "manifest.msgpack"
UNBOUNDED = -1
UNKNOWN_ABSENCE = -1
DTYPES = (
    *("bool", "uint8", "int8", "int16", "int32", "int64"),
    *("float8_e4m3fn", "float8_e5m2", "float16", "bfloat16", "float32", "float64", "complex64"),
)
# Those that are part of torch: any other name makes transformers look for a kernel elsewhere, on the hub even.
ATTENTIONS = ("eager", "sdpa", "None", "")

Shape = tuple[int | str, ...]
_T = TypeVar("_T")
_SINCE_1: Mapping[str, int] = {"since": 1}  # an entry that artifacts of format version 1.0 do not have
_SINCE_2: Mapping[str, int] = {"since": 2}
_SINCE_3: Mapping[str, int] = {"since": 3}
_SINCE_5: Mapping[str, int] = {"since": 5}
_SINCE_6: Mapping[str, int] = {"since": 6}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelEntry:
    """Which model the artifact was made from.

    `dtype` is the weights' dtype by default, torch's name for it; `ignored_keys` are regular expressions for
    checkpoint tensors that the model does not use. `code` are the paths of the model's own code, empty for a model
    that is part of transformers.
    """

    class_name: str
    module: str
    model_type: str
    dtype: str
    attn_implementation: str
    num_parameters: int
    base_model_prefix: str
    ignored_keys: tuple[str, ...]
    config_class_name: str = field(default="", metadata=_SINCE_1)
    config_module: str = field(default="", metadata=_SINCE_1)
    code: tuple[str, ...] = field(default=(), metadata=_SINCE_1)


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorEntry:
    """Dtype (`"model"` for the run's) and shape of a value; the shape mixes integers and expressions over dims."""

    dtype: str
    shape: Shape


@dataclass(frozen=True, kw_only=True, slots=True)
class InputEntry:
    """An input of the model. `absent` is the number that stands for its absence, everywhere in the tensor; -1 where the
    model computes something else without the input, or that is not known.
    """

    name: str
    dtype: str
    shape: Shape
    absent: int = field(default=UNKNOWN_ABSENCE, metadata=_SINCE_6)


@dataclass(frozen=True, kw_only=True, slots=True)
class DimEntry:
    """A symbolic size and the range in which the trace holds; `max` is -1 without a bound."""

    name: str
    min: int
    max: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SubgraphEntry:
    """One step of the chain, see docs/format.md."""

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
    uses: tuple[str, ...] = field(default=(), metadata=_SINCE_1)
    rehearsed: tuple[str, ...] = field(default=(), metadata=_SINCE_1)
    scope: str = field(default="", metadata=_SINCE_2)
    arguments: tuple[str, ...] = field(default=(), metadata=_SINCE_2)
    results: tuple[str, ...] = field(default=(), metadata=_SINCE_2)


@dataclass(frozen=True, kw_only=True, slots=True)
class LeafKind:
    """What modules that the host builds by itself do: torch's name of the class, and its options besides shapes.

    Where the model's own class calculates in another way, `program` is the file of what it does, `arguments` are what
    that calls its inputs, and `attributes` the parameters that it reads.
    """

    kind: str
    options: Mapping[str, Shape] = field(default_factory=dict)
    program: str = ""
    arguments: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class BufferEntry:
    """A tensor of the model that is computed, not loaded: the constant that has its values, by the run's dtype; under
    an empty name when they are the same for all.
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
    is_buffer: bool = field(default=False, metadata=_SINCE_2)


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
    """A parameter that meets a scaled tensor, and its axis along the tensor's channels."""

    name: str
    axis: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaleGroup:
    """Linear modules that read one tensor, and what can scale that tensor's channels without changing the model.

    `producer` is the weight of a norm [C] or of a Linear [C, I] whose channels make up the tensor, empty where there is
    none; `bias` is scaled with it; `offset` is what the model adds to the weight; `others` are the other parameters
    that the tensor meets. `channels` says which of the producer's channels each feature of the tensor is proportional
    to, as runs of consecutive ones: start, length, start, length.
    """

    subgraph: int
    modules: tuple[str, ...]
    others: tuple[ScaledParameter, ...] = ()
    producer: str = ""
    bias: str = ""
    offset: int = 0
    channels: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """An attention module, and the subgraph that computes it: the next of its calls of
    `aten.scaled_dot_product_attention` that no earlier entry stands for. Artifacts since 1.6 have `CachedValue`.
    """

    subgraph: int
    module: str


@dataclass(frozen=True, kw_only=True, slots=True)
class CachedValue:
    """A value that an attention module puts into its key-value cache, or compares with it.

    `part` is `k` for what the model's code gives to the cache as keys, `v` for values, `q` for the queries. `name` is
    what the subgraph's code calls the value, and `after` the name that the statement assigns to which completes it.
    `kind` is the name of the module's class, `heads` the size of the value's second of four dimensions, 0 if it has
    none.
    """

    subgraph: int
    module: str
    kind: str
    part: str
    name: str
    after: str
    heads: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The whole table of contents, see docs/format.md."""

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
    sources: Mapping[str, str] = field(default_factory=dict, metadata=_SINCE_1)
    auto_ignore: tuple[str, ...] = field(default=(), metadata=_SINCE_1)
    conditions: tuple[str, ...] = field(default=(), metadata=_SINCE_1)
    policy: str = field(default="target", metadata=_SINCE_2)
    leaf_kinds: tuple[LeafKind, ...] = field(default=(), metadata=_SINCE_2)
    leaves: Mapping[str, int] = field(default_factory=dict, metadata=_SINCE_2)
    buffers: Mapping[str, BufferEntry] = field(default_factory=dict, metadata=_SINCE_2)
    foreign: Mapping[str, str] = field(default_factory=dict, metadata=_SINCE_2)
    limits: Mapping[str, int] = field(default_factory=dict, metadata=_SINCE_2)
    scale_groups: tuple[ScaleGroup, ...] = field(default=(), metadata=_SINCE_3)
    attentions: tuple[Attention, ...] = field(default=(), metadata=_SINCE_3)
    defaults: Mapping[str, str] = field(default_factory=dict, metadata=_SINCE_5)
    decoder: Mapping[str, int] = field(default_factory=dict, metadata=_SINCE_6)
    mixture_groups: tuple[ScaleGroup, ...] = field(default=(), metadata=_SINCE_6)
    cached: tuple[CachedValue, ...] = field(default=(), metadata=_SINCE_6)

    @property
    def is_portable(self) -> bool:
        """Whether the artifact is the whole program: a host needs no code of the model's."""
        return self.policy == "linear" and not self.foreign and not self.opaque_steps

    @property
    def opaque_steps(self) -> tuple[str, ...]:
        """Paths of all functions that are called whole, in order of first use."""
        return tuple(dict.fromkeys(path for entry in self.subgraphs for path in entry.opaque))

    def to_bytes(self) -> bytes:
        """The canonical encoding, digest included."""
        plain = in_key_order(to_plain(self) | {"format": FORMAT, "format_version": list(FORMAT_VERSION)})
        plain["digest"] = sha256(packed(plain))
        return packed({key: plain[key] for key in sorted(plain)})

    @classmethod
    def from_bytes(cls, data: bytes, origin: str = MANIFEST_NAME) -> Manifest:
        """Decode and check; `origin` is the file's name in messages.

        Raises:
            ArtifactError: for anything that docs/format.md does not allow.
        """
        plain, encoded = decoded(data, origin)
        if plain.get("format") != FORMAT:
            raise ArtifactError(f"{origin} is not the manifest of a seqbuild artifact")
        version = plain.get("format_version")
        if not (isinstance(version, list) and len(version) == 2 and all(type(part) is int for part in version)):
            raise ArtifactError(f"{origin} states no format version")
        if version[0] != FORMAT_VERSION[0]:
            raise ArtifactError(
                f"{origin} has format version {version[0]}.{version[1]}, this runtime reads {FORMAT_VERSION[0]}.x",
                hint="compile the model again, or use the runtime that belongs to the artifact",
            )
        if encoded != data:
            raise ArtifactError(f"{origin} is damaged: its encoding is not canonical")
        digest = plain.pop("digest", None)
        if digest != sha256(packed(plain)):  # what is left is in order already, as all of it was
            raise ArtifactError(f"{origin} is damaged: its digest does not match its content")
        entries = {key: value for key, value in plain.items() if key not in ("format", "format_version")}
        manifest: Manifest = from_plain(cls, entries, origin, minor=version[1])
        return manifest
