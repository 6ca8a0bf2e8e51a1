"""The lists of saved statistics, as JSON: of a directory, and of each of its steps. They are untrusted when read.

statistics.json                    identity, and the digests of the lists of steps
step-00003.json                    the measured modules, and the distinct inputs that they read
step-00003.safetensors             small sums of all inputs of the step
step-00003-input-00007.safetensors the Gram matrix of one input, and some of its tokens
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec

from runtime.algorithms.output_squares import NUM_SAMPLED
from runtime.errors import DataError
from runtime.host.regular_files import open_regular, reason_of

INDEX_NAME = "statistics.json"
FORMAT, VERSION = "seqbuild-statistics", 1
_LARGEST_LIST = 256 * 2**20
_SAMPLE_DTYPES = ("F64", "F32", "F16", "BF16")
_T = TypeVar("_T")
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Width = Annotated[int, msgspec.Meta(ge=1, le=2**24)]
Digest = Annotated[str, msgspec.Meta(pattern="^([0-9a-f]{64})?$")]


class SavedInput(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A distinct input: a tensor that one or several modules read.

    Attributes:
        width: its number of features, I.
        num_tokens: how many were measured.
        num_batches: how many batches had some of them; 0 also if channels were not measured.
        num_sampled: tokens in the sample.
        sample_dtype: their dtype, as safetensors names it.
        has_gram: whether its Gram matrix is saved.
        matrix: SHA-256 of the file with the matrix and the sample; empty without one.
    """

    width: Width
    num_tokens: Count
    num_batches: Count
    num_sampled: Count
    sample_dtype: str
    has_gram: bool
    matrix: Digest


class SavedPass(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Modules that were measured together.

    Attributes:
        all_tokens: whether experts were measured on all tokens, or on those routed to them.
        measured: the modules, also those that no batch has called.
        calls: the input of each module that was called, by its number, in the order of first calls.
    """

    all_tokens: bool
    measured: tuple[str, ...]
    calls: dict[str, Count]


class SavedCache(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The minima and maxima of keys, values or queries of an attention module: of each call and each head."""

    module: str
    part: str
    num_calls: Count
    num_heads: Width


class SavedStep(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The statistics of one step of the artifact.

    Attributes:
        label: the step, for messages.
        inputs: the distinct ones.
        passes: which modules were measured.
        experts: those of them that belong to experts.
        caches: of attention modules.
        sums: SHA-256 of the file with the small sums; empty without inputs and caches.
    """

    label: str
    inputs: tuple[SavedInput, ...]
    passes: tuple[SavedPass, ...]
    experts: tuple[str, ...]
    caches: tuple[SavedCache, ...]
    sums: Digest

    def __post_init__(self) -> None:
        """Reject a list that contradicts itself."""
        numbers = [number for one in self.passes for number in one.calls.values()]
        if any(number >= len(self.inputs) for number in numbers):
            raise ValueError("a module reads an input that is not listed")
        for saved in self.inputs:
            if (saved.sample_dtype in _SAMPLE_DTYPES) != bool(saved.num_sampled) or saved.num_sampled > NUM_SAMPLED:
                raise ValueError(f"a sample has {saved.num_sampled} tokens of dtype {saved.sample_dtype!r}")
            if not saved.num_tokens and (saved.num_batches or saved.num_sampled or saved.matrix):
                raise ValueError("an input without tokens has sums")


class SavedIndex(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The content of a directory.

    Attributes:
        format: `seqbuild-statistics`.
        format_version: of the files.
        identity: what decides the statistics: a digest or a value for each ingredient, by name.
        surroundings: what may change the last bits of sums, by name.
        data: the facts of the calibration data, as a record of provenance has them; JSON.
        steps: SHA-256 of the list of each step.
        sha256: of this list with an empty `sha256`, against damage.
    """

    format: str
    format_version: int
    identity: dict[str, str]
    surroundings: dict[str, str]
    data: str
    steps: tuple[Digest, ...]
    sha256: Digest = ""

    def sealed(self) -> SavedIndex:
        """Return the list with its own digest."""
        empty = msgspec.structs.replace(self, sha256="")
        return msgspec.structs.replace(self, sha256=sha256_of(encoded(empty)))


def step_name(index: int) -> str:
    """The name of the list of a step."""
    return f"step-{index:05d}.json"


def sums_name(index: int) -> str:
    """The name of the file with the small sums of a step."""
    return f"step-{index:05d}.safetensors"


def matrix_name(index: int, number: int) -> str:
    """The name of the file with the Gram matrix of an input."""
    return f"step-{index:05d}-input-{number:05d}.safetensors"


def encoded(record: msgspec.Struct) -> bytes:
    """Encode a list."""
    return msgspec.json.encode(record) + b"\n"


def sha256_of(data: bytes) -> str:
    """Return the digest of a list."""
    return hashlib.sha256(data).hexdigest()


def read_record(path: Path, kind: type[_T], digest: str | None = None) -> tuple[_T, str]:
    """Read a list, and return it with its digest.

    Args:
        path: the file.
        kind: of the list.
        digest: the expected one; None for any.

    Raises:
        DataError: it is missing, damaged, or has another digest.
    """
    try:
        with open_regular(path) as file:
            data = file.read(_LARGEST_LIST + 1)
        if len(data) > _LARGEST_LIST:
            raise ValueError(f"it has more than {_LARGEST_LIST} bytes")
        found = sha256_of(data)
        if digest is not None and found != digest:
            raise ValueError("its SHA-256 differs from the one in the list above it")
        return msgspec.json.decode(data, type=kind), found
    except (OSError, ValueError, RecursionError) as error:  # msgspec's own errors are ValueErrors
        raise damaged(path, reason_of(error)) from error


def damaged(path: Path, reason: str) -> DataError:
    """Return the error for a file of saved statistics that cannot be used."""
    return DataError(f"{path} cannot be used: {reason}", hint="copy the statistics again, or measure them again")
