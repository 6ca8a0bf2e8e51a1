"""The record of a quantized checkpoint, `seqbuild.json`: schema, canonical bytes, and a reader that trusts nothing.

docs/provenance.md is the specification. The same run gives the same bytes: nothing in a record depends on the time, the
host, the place of a directory or the number of workers. Keys of a later minor version are ignored. Importing this
module does not import torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec

from runtime.errors import WeightsError
from runtime.host.regular_files import open_regular, reason_of

RECORD_NAME, CARD_NAME, RECIPE_NAME = "seqbuild.json", "README.md", "recipe.yaml"
FORMAT, VERSION = "seqbuild-provenance", (1, 0)
LARGEST_RECORD = 256 * 2**20  # the largest mixtures have some 70,000 modules, each with a line of 300 bytes
Count = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
FILES, TENSORS = "files", "tensors"  # the forms of source weights


class FileDigest(msgspec.Struct, frozen=True, kw_only=True):
    """A file: its name relative to its directory, its size, and its SHA-256; empty if it was not computed."""

    name: str
    bytes: Count
    sha256: str


class NamedDigest(msgspec.Struct, frozen=True, kw_only=True):
    """A source of data: its name without folders, and its SHA-256; empty if it is not known."""

    name: str
    sha256: str


class CardFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What the card of the source model states for the hub; empty for what it does not state."""

    license: str = ""
    license_name: str = ""
    license_link: str = ""
    language: tuple[str, ...] = ()
    pipeline_tag: str = ""


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The source model; `hub_id` and `revision` are empty unless its directory is a snapshot of the hub's cache."""

    name: str
    hub_id: str
    revision: str
    class_name: str
    model_type: str
    card: CardFacts


class ArtifactFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The compiled model: SHA-256 of its manifest, and the key of what it was compiled from."""

    sha256: str
    input_key: str


class GroupFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A group of the recipe: the name of its preset or group, its scheme in words, and how many modules have it."""

    name: str
    scheme: str
    num_modules: Count


class RecipeFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The recipe: SHA-256 of recipe.yaml, its modifiers, and modifiers that no recipe can state."""

    sha256: str
    modifiers: tuple[str, ...]
    own_modifiers: tuple[str, ...]
    groups: tuple[GroupFacts, ...]
    cache: str


class WeightsFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The source weights. `sha256` is over the lines `DIGEST  NAME` of all files, or of all tensors of a model in
    memory, and empty if hashing was off.
    """

    form: str
    bytes: Count
    sha256: str
    files: tuple[FileDigest, ...]


class DataFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The calibration data; `inputs_sha256` is over the model inputs that were made of it."""

    sources: tuple[NamedDigest, ...]
    num_samples: Count
    num_tokens: Count
    settings: dict[str, str]
    inputs_sha256: str


class ModuleFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The report of one module, see `runtime.streaming.report.ModuleReport`; numbers that are not finite are None."""

    name: str
    algorithm: str
    scheme: str
    error: float | None
    loss: float | None
    damping: float | None
    num_tokens: Count
    num_bytes: Count
    num_dead: Count
    fallback: str


class OutputFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The result: size of its tensors, and all of its files except the card and the record."""

    bytes: Count
    files: tuple[FileDigest, ...]


class EvaluationFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The perplexity of the source and of the result over `num_tokens` predicted tokens."""

    before: float
    after: float
    num_tokens: Count
    sources: tuple[NamedDigest, ...]


class ProvenanceRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The content of `seqbuild.json`."""

    format: str
    format_version: tuple[int, int]
    versions: dict[str, str]
    model: ModelFacts
    artifact: ArtifactFacts
    recipe: RecipeFacts
    weights: WeightsFacts
    data: DataFacts | None
    options: dict[str, str]
    modules: tuple[ModuleFacts, ...]
    unquantized: tuple[str, ...]
    unreached: tuple[str, ...]
    num_caches: Count
    warnings: tuple[str, ...]
    serving: tuple[str, ...]
    output: OutputFacts
    evaluation: EvaluationFacts | None
    command: str


class _StatedVersion(msgspec.Struct):
    format: str
    format_version: tuple[int, int]


def encode_record(record: ProvenanceRecord) -> bytes:
    """Return the canonical bytes: JSON with one line for each key, and for each element of a list of tables."""
    lines = []
    for name in record.__struct_fields__:
        value = getattr(record, name)
        if isinstance(value, tuple) and value and isinstance(value[0], (msgspec.Struct, str)):
            value_text = "[\n" + ",\n".join(f"  {_compact(entry)}" for entry in value) + "\n ]"
        else:
            value_text = _compact(value)
        lines.append(f" {_compact(name)}: {value_text}")
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def _compact(value: Any) -> str:
    return msgspec.json.format(msgspec.json.encode(value), indent=0).decode()


def read_record(directory: Path) -> ProvenanceRecord:
    """Read the record of a quantized checkpoint.

    Raises:
        WeightsError: it is missing, damaged, or of a version that cannot be read.
    """
    path = directory / RECORD_NAME
    try:
        with open_regular(path) as file:
            data = file.read(LARGEST_RECORD + 1)
        if len(data) > LARGEST_RECORD:
            raise ValueError(f"it has more than {LARGEST_RECORD} bytes")
        found = msgspec.json.decode(data, type=_StatedVersion)
        if found.format != FORMAT:
            raise ValueError(f"its format is {found.format!r}, not {FORMAT!r}")
        if found.format_version[0] == VERSION[0]:
            return msgspec.json.decode(data, type=ProvenanceRecord)
    except FileNotFoundError:
        raise WeightsError(
            f"{directory} has no {RECORD_NAME}", hint="pass a directory that seqbuild has quantized"
        ) from None
    except (OSError, ValueError, RecursionError) as error:  # msgspec's own errors are ValueErrors
        raise WeightsError(f"{path} cannot be read: {reason_of(error)}", hint="copy the checkpoint again") from error
    stated, known = (".".join(map(str, version)) for version in (found.format_version, VERSION))
    raise WeightsError(
        f"{path} has format version {stated}, and this release reads {known}", hint="use a newer release of seqbuild"
    )
