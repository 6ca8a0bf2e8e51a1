"""Read and write token files: samples of token ids, which need no tokenizer. Format version 1.2; 2.0 is described in
`runtime.data.named_tensors`.

A token file is a safetensors file. Its tensors are `tokens`, int32 or int64 of one dimension, all samples joined, and
`offsets`, int64, one more than there are samples: sample `i` is `tokens[offsets[i]:offsets[i + 1]]`. Offsets start at
0, increase strictly and end at the number of tokens; every id lies in `[0, vocab_size)`.

Since 1.1 there may be `loss_mask`, bool, uint8, or an integer of 8, 32 or 64 bits: one number for each token, 1 if it
counts in statistics and 0 if not. A file without one has version 1.0.

Since 1.2 there may be `targets` and `target_offsets`, in the form of `tokens` and `offsets`, with as many samples: the
text that an encoder-decoder model should generate for each of them.

The metadata has one key, `seqbuild_tokens`, a JSON object with sorted keys and no white space:

    version             "1.0", "1.1" or "1.2": the lowest that has all contents of the file
    tokenizer           its name, for people
    tokenizer_digest    over the names and contents of its files
    vocab_size          one more than the largest id of the tokenizer
    seq_len             the maximum length of a sample; null if nothing was cut
    sources             [[file name, digest], ...] of the texts, in the order in which they were read

There is one key because safetensors writes several in an order that changes from process to process, and equal samples
must have equal bytes. For the same reason only the names of files are stored, not their folders. Digests are SHA-256 in
hexadecimal. A reader rejects another major version. It ignores unknown tensors and keys, which a later minor version
may add. A file that violates any of these rules is rejected.

Shapes: S tokens of a sample, T tokens of all samples, N samples.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from runtime.data.documents import require_file
from runtime.data.named_tensors import NAMED_VERSION, NamedSamples, read_named
from runtime.data.origin import METADATA_KEY, DataOrigin
from runtime.errors import DataError, OutputError, UsageError
from runtime.host.publish import write_file
from runtime.host.regular_files import read_regular

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX = ".safetensors"
VERSION, MASKED_VERSION, PAIRED_VERSION = "1.0", "1.1", "1.2"
LOSS_MASK = "loss_mask"  # the name of a tensor
_MAKE_AGAIN = "make it again with `seqbuild data`"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Tokenized:
    """Samples, and the tokenizer and texts that they were made from.

    Attributes:
        samples: N tensors [S] int64 on the CPU; lengths differ unless they were packed.
        origin: the tokenizer and the texts.
        masks: which tokens of each sample count in statistics, bool [S]; None if all do.
        targets: the text to generate for each sample, [T] int64; None if samples are not pairs.
    """

    samples: tuple[Tensor, ...]
    origin: DataOrigin
    masks: tuple[Tensor, ...] | None = None
    targets: tuple[Tensor, ...] | None = None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenData(Tokenized):
    """Samples of a file.

    Attributes:
        path: the text or token file that was read, or the token file that was written.
        digest: of that file.
        seq_len: the maximum length of a sample; None if nothing was cut.
    """

    path: Path
    digest: str
    seq_len: int | None


def save_tokens(
    path: Path,
    samples: Sequence[Tensor],
    *,
    seq_len: int | None,
    origin: DataOrigin,
    masks: Sequence[Tensor] | None = None,
    targets: Sequence[Tensor] | None = None,
) -> TokenData:
    """Write samples as a token file, atomically. An existing file is replaced.

    Args:
        path: the file, with the extension `.safetensors`.
        samples: one or more tensors [S] of ids, none empty.
        seq_len: the maximum length of a sample; None if nothing was cut.
        origin: the tokenizer and the texts of the ids.
        masks: which tokens of each sample count in statistics, bool [S].
        targets: the text to generate for each sample, [T]; none empty.

    Raises:
        OutputError: the file cannot be written.
        UsageError: the file has another extension.
    """
    import torch
    from safetensors.torch import save

    require_place(path)
    dtype = torch.int32 if origin.vocab_size <= 2**31 else torch.int64
    tokens, offsets = _joined(samples)
    version = PAIRED_VERSION if targets is not None else VERSION if masks is None else MASKED_VERSION
    metadata = {"version": version, "seq_len": seq_len, **asdict(origin)}
    tensors = {"tokens": tokens.to(dtype), "offsets": offsets}
    if targets is not None:
        tokens, tensors["target_offsets"] = _joined(targets)
        tensors["targets"] = tokens.to(dtype)
    if masks is not None:
        tensors[LOSS_MASK] = torch.cat(list(masks)).to(torch.uint8)
    content = save(
        tensors,
        metadata={METADATA_KEY: json.dumps(metadata, sort_keys=True, separators=(",", ":"))},
    )
    write_file(path, content)
    return TokenData(
        samples=tuple(samples),
        path=path,
        digest=_sha256(content),
        seq_len=seq_len,
        origin=origin,
        masks=None if masks is None else tuple(masks),
        targets=None if targets is None else tuple(targets),
    )


def _joined(samples: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Join samples; return their tokens, and the offsets of their ends."""
    import torch

    offsets = torch.tensor([0, *(len(sample) for sample in samples)]).cumsum(0)
    return torch.cat(list(samples)).to(torch.int64), offsets


def has_token_metadata(content: bytes) -> bool:
    """Whether the bytes of a safetensors file with a valid header are those of a token file."""
    return METADATA_KEY in _metadata_of(content)


def require_place(path: Path) -> None:
    """Check the path of a token file before the work of making it.

    Raises:
        UsageError: the extension is not that of a token file.
        OutputError: the path cannot be a file.
    """
    if path.suffix != SUFFIX:
        raise UsageError(f"{path} is not the name of a token file", hint=f"use the extension {SUFFIX}")
    if path.is_dir():
        raise OutputError(f"{path} is a directory", hint="name a file in it")
    if path.parent.exists() and not path.parent.is_dir():
        raise OutputError(f"{path.parent} is not a directory", hint="choose another one")


def read_token_file(path: Path) -> TokenData | NamedSamples:
    """Read a token file of version 1 or 2 and check its format.

    Raises:
        DataError: the file is missing, damaged, of another version, or violates the format.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load

    require_file(path)
    content = read_regular(path)
    try:
        tensors = load(content)
    except (SafetensorError, KeyError, ValueError) as error:
        raise DataError(f"{path} is not a valid safetensors file: {error}", hint=_MAKE_AGAIN) from error
    fields = _fields_of(_metadata_of(content), path)
    seq_len, origin = _seq_len(fields, path), _as_origin(fields, path)
    if _major(fields) == _major({"version": NAMED_VERSION}):
        try:
            return replace(read_named(tensors, fields, seq_len, origin), path=path)
        except DataError as error:
            raise _broken(path, error.message) from error
    samples = _read_samples(tensors, ("tokens", "offsets"), seq_len, origin, path)
    targets = None
    if "targets" in tensors:
        targets = _read_samples(tensors, ("targets", "target_offsets"), seq_len, origin, path)
        if len(targets) != len(samples):
            raise _broken(path, f"it has {len(targets)} targets for {len(samples)} samples")
    lengths = [len(sample) for sample in samples]
    mask_T = _read_mask(tensors, sum(lengths), path)
    return TokenData(
        samples=samples,
        path=path,
        digest=_sha256(content),
        seq_len=seq_len,
        origin=origin,
        masks=None if mask_T is None else torch.split(mask_T, lengths),
        targets=targets,
    )


def _read_samples(
    tensors: Mapping[str, Tensor], names: tuple[str, str], seq_len: int | None, origin: DataOrigin, path: Path
) -> tuple[Tensor, ...]:
    """Split a tensor of joined samples at its offsets."""
    import torch

    tokens_T = _tensor(tensors, names[0], (torch.int32, torch.int64), path).to(torch.int64)
    offsets = _tensor(tensors, names[1], (torch.int64,), path)
    if (
        len(offsets) < 2
        or int(offsets[0]) != 0
        or int(offsets[-1]) != len(tokens_T)
        or not bool((offsets[1:] > offsets[:-1]).all())
    ):
        raise _broken(path, f"its {names[1]} do not increase from 0 to the {len(tokens_T)} tokens")
    longest = int(offsets.diff().max())
    if seq_len is not None and longest > seq_len:
        raise _broken(path, f"a sample has {longest} tokens, but seq_len is {seq_len}")
    for wrong in (int(tokens_T.min()), int(tokens_T.max())):
        if not 0 <= wrong < origin.vocab_size:
            raise _broken(path, f"token id {wrong} is outside its vocabulary of {origin.vocab_size}")
    return tuple(tokens_T[start:end] for start, end in pairwise(offsets.tolist()))


def _read_mask(tensors: Mapping[str, Tensor], num_tokens: int, path: Path) -> Tensor | None:
    import torch

    if LOSS_MASK not in tensors:
        return None
    mask_T = _tensor(tensors, LOSS_MASK, (torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64), path)
    if len(mask_T) != num_tokens:
        raise _broken(path, f"its loss_mask has {len(mask_T)} numbers for {num_tokens} tokens")
    if not bool(((mask_T == 0) | (mask_T == 1)).all()):
        raise _broken(path, "its loss_mask has other numbers than 0 and 1")
    return mask_T.to(torch.bool)


def _metadata_of(content: bytes) -> Mapping[str, str]:
    """Return the metadata of safetensors bytes with a valid header: 8 bytes of its size, then JSON."""
    size = int.from_bytes(content[:8], "little")
    metadata: Mapping[str, str] = json.loads(content[8 : 8 + size]).get("__metadata__") or {}
    return metadata


def _fields_of(metadata: Mapping[str, str], path: Path) -> Mapping[str, Any]:
    """Return the metadata of a token file of a known version."""
    if METADATA_KEY not in metadata:
        raise DataError(f"{path} is a safetensors file but not a token file", hint=_MAKE_AGAIN)
    try:
        fields = json.loads(metadata[METADATA_KEY])
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"its metadata is not JSON: {error}") from error
    version = fields.get("version") if isinstance(fields, dict) else None
    if not isinstance(version, str):
        raise _broken(path, "its metadata has no version")
    if _major(fields) not in (_major({"version": VERSION}), _major({"version": NAMED_VERSION})):
        raise DataError(
            f"{path} has token file version {version}, but this release reads {PAIRED_VERSION} and {NAMED_VERSION}"
        )
    return cast(Mapping[str, Any], fields)


def _major(fields: Mapping[str, Any]) -> str:
    return str(fields["version"]).partition(".")[0]


def _seq_len(fields: Mapping[str, Any], path: Path) -> int | None:
    seq_len = fields.get("seq_len")
    if seq_len is not None and not _is_count(seq_len):
        raise _broken(path, f"seq_len is {seq_len!r}")
    return cast("int | None", seq_len)


def _as_origin(fields: Mapping[str, Any], path: Path) -> DataOrigin:
    sources = fields.get("sources")
    if not isinstance(sources, list) or not all(_is_pair_of_strings(source) for source in sources):
        raise _broken(path, "sources is not a list of pairs of name and digest")
    for name in ("tokenizer", "tokenizer_digest"):
        if not isinstance(fields.get(name), str):
            raise _broken(path, f"{name} is not a string")
    if not _is_count(fields.get("vocab_size")):
        raise _broken(path, f"vocab_size is {fields.get('vocab_size')!r}")
    return DataOrigin(
        tokenizer=fields["tokenizer"],
        tokenizer_digest=fields["tokenizer_digest"],
        vocab_size=fields["vocab_size"],
        sources=tuple((name, digest) for name, digest in sources),
    )


def _is_count(value: object) -> bool:
    return type(value) is int and value > 0


def _is_pair_of_strings(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(item, str) for item in value)


def _tensor(tensors: Mapping[str, Tensor], name: str, dtypes: tuple[object, ...], path: Path) -> Tensor:
    tensor = tensors.get(name)
    if tensor is None:
        raise _broken(path, f"it has no tensor {name}")
    if tensor.dtype not in dtypes or tensor.dim() != 1:
        raise _broken(path, f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}")
    return tensor


def _broken(path: Path, why: str) -> DataError:
    return DataError(f"{path} is not a valid token file: {why}", hint=_MAKE_AGAIN)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
