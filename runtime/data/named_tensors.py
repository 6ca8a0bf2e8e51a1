"""Read and write token files of version 2.0: named tensors for each sample, for models with images, sounds or videos.

The file is a safetensors file. The tensors of sample `i` have the names `i.NAME`, such as `0.input_ids` and
`0.pixel_values`; samples are numbered from 0 without gaps. Each tensor is the model's input for that sample alone, as
its processor makes it: of any shape and dtype, the first dimension a batch of one, or the images or patches of the
sample. Samples may have different names and shapes. `labels` are the tokens to predict, -100 for none.

The metadata has the key of version 1 (`runtime.data.token_file`) with the same fields, and

    version         "2.0"
    num_samples     the number of samples
    media_tokens    the ids of tokens that stand for media
    padding_token   the id to pad with
    is_joinable     whether a batch of samples of equal shapes is each tensor concatenated along its first dimension

Texts are still written as version 1, which older releases read; they reject version 2.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from runtime.data.decoder import LABELS, NOT_A_LABEL
from runtime.data.mixing import num_taken, spread
from runtime.data.options import DataOptions
from runtime.data.origin import METADATA_KEY, DataOrigin
from runtime.errors import DataError
from runtime.host.publish import write_file

if TYPE_CHECKING:
    import torch

Sample: TypeAlias = "dict[str, torch.Tensor]"

NAMED_VERSION = "2.0"
IDS, MASK = "input_ids", "attention_mask"
_TOKENS = (IDS, "decoder_input_ids", LABELS)
_LARGEST_ID, _LONGEST_NUMBER = 2**31, 10  # digits


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class NamedSamples:
    """Samples of named tensors, and what is needed to batch them.

    Attributes:
        samples: the tensors of each sample, on the CPU.
        origin: the tokenizer and the sources.
        media_tokens: the ids of tokens that stand for media.
        padding_token: the id to pad with.
        is_joinable: whether samples of equal shapes can be batched.
        seq_len: the maximum number of tokens; None if nothing was cut.
        path: the data or token file that was read, or the token file that was written.
    """

    samples: tuple[Sample, ...]
    origin: DataOrigin
    media_tokens: tuple[int, ...]
    padding_token: int
    is_joinable: bool
    seq_len: int | None
    path: Path = Path()

    @property
    def texts(self) -> list[torch.Tensor]:
        """The tokens of each sample, of media included: of the text, or else of the decoder."""
        names = [text_name(sample) for sample in self.samples]
        return [sample[name][0] for sample, name in zip(self.samples, names, strict=True) if name]


def text_name(sample: Mapping[str, Any]) -> str | None:
    """Return the name of the tensor of tokens: of the text, or else of the decoder."""
    return next((name for name in (IDS, LABELS) if name in sample), None)


def save_named(path: Path, data: NamedSamples) -> None:
    """Write samples as a file of version 2.0, atomically. An existing file is replaced."""
    from safetensors.torch import save

    fields = asdict(data.origin) | {
        "version": NAMED_VERSION,
        "num_samples": len(data.samples),
        "seq_len": data.seq_len,
        "media_tokens": list(data.media_tokens),
        "padding_token": data.padding_token,
        "is_joinable": data.is_joinable,
    }
    tensors = {f"{index}.{name}": value for index, sample in enumerate(data.samples) for name, value in sample.items()}
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    write_file(path, save(tensors, metadata={METADATA_KEY: text}))


def read_named(
    tensors: Mapping[str, torch.Tensor], fields: Mapping[str, Any], seq_len: int | None, origin: DataOrigin
) -> NamedSamples:
    """Check the contents of a file of version 2.0.

    Raises:
        DataError: naming the violated rule; the caller adds the name of the file.
    """
    count = fields.get("num_samples")
    if type(count) is not int or not 0 < count <= len(tensors):
        raise DataError(f"num_samples is {count!r}")
    samples: list[Sample] = [{} for _ in range(count)]
    for key in sorted(tensors, key=_order):
        number, _, name = key.partition(".")
        is_number = number.isdecimal() and len(number) < _LONGEST_NUMBER and str(int(number)) == number
        if not is_number or int(number) >= count or not name.isidentifier():
            raise DataError(f"it has the tensor {key[:80]!r}, which is of none of its {count} samples")
        if not tensors[key].numel():
            raise DataError(f"{key} is empty")
        samples[int(number)][name] = tensors[key]
    media_tokens = fields.get("media_tokens")
    if not isinstance(media_tokens, list) or not all(
        type(token) is int and 0 <= token < _LARGEST_ID for token in media_tokens
    ):
        raise DataError("media_tokens is not a list of ids")
    padding_token, is_joinable = fields.get("padding_token"), fields.get("is_joinable")
    if type(padding_token) is not int or not 0 <= padding_token < min(origin.vocab_size, _LARGEST_ID):
        raise DataError(f"padding_token is {padding_token!r}")
    if type(is_joinable) is not bool:
        raise DataError(f"is_joinable is {is_joinable!r}")
    for index, sample in enumerate(samples):
        _require_tokens(index, sample, origin.vocab_size, seq_len)
    return NamedSamples(
        samples=tuple(samples),
        origin=origin,
        media_tokens=tuple(media_tokens),
        padding_token=padding_token,
        is_joinable=is_joinable,
        seq_len=seq_len,
    )


def _order(key: str) -> tuple[int, str]:
    number = key.partition(".")[0]
    return (int(number) if number.isdecimal() and len(number) < _LONGEST_NUMBER else -1, key)


def _require_tokens(index: int, sample: Sample, vocab_size: int, seq_len: int | None) -> None:
    import torch

    if not sample:
        raise DataError(f"sample {index} has no tensors")
    for name in _TOKENS:
        ids = sample.get(name)
        if ids is None:
            continue
        if ids.dtype not in (torch.int32, torch.int64) or ids.dim() < 2:
            raise DataError(f"{index}.{name} is {ids.dtype} of shape {tuple(ids.shape)}")
        lowest = NOT_A_LABEL if name == LABELS else 0
        for wrong in (int(ids.min()), int(ids.max())):
            if not lowest <= wrong < vocab_size:
                raise DataError(f"token id {wrong} of {index}.{name} is outside its vocabulary of {vocab_size}")
        if seq_len is not None and ids.shape[1] > seq_len:
            raise DataError(f"{index}.{name} has {ids.shape[1]} tokens, but seq_len is {seq_len}")


def chosen(data: NamedSamples, options: DataOptions, what: str) -> NamedSamples:
    """Return the samples of a file that the options state, with their text cut at a length.

    Raises:
        DataError: there are fewer samples, media would be cut, or samples were cut at a smaller length before.
    """
    if options.loss_mask:
        raise DataError(f"{what} has no loss mask", hint="leave --loss-mask out")
    indices, seq_len = chosen_of_file(len(data.samples), data.seq_len, options, what)
    cut = [shortened(data.samples[index], options.seq_len, data.media_tokens, f"sample {index}") for index in indices]
    return replace(data, samples=tuple(cut), seq_len=seq_len)


def chosen_of_file(total: int, cut_at: int | None, options: DataOptions, what: str) -> tuple[list[int], int | None]:
    """Return the indices of the samples of a token file that the options state, and their maximum length.

    Raises:
        DataError: there are fewer samples, or they were cut at a smaller length before.
    """
    seq_len = options.seq_len
    if seq_len is not None and cut_at is not None and seq_len > cut_at:
        raise DataError(
            f"samples of {what} were cut at {cut_at} tokens, but {seq_len} are required",
            hint=f"reduce --seq-len to {cut_at}, or make the file again with `seqbuild data`",
        )
    count = num_taken(total, options.num_samples, options.default_samples)
    if count > total:
        raise DataError(
            f"{what} has {total} samples, but {count} are required", hint="reduce --samples or use more data"
        )
    return spread(count, total), cut_at if seq_len is None else seq_len


def shortened(sample: Sample, max_length: int | None, media_tokens: Sequence[int], where: str) -> Sample:
    """Cut the tensors of tokens of a sample at a length.

    Raises:
        DataError: tokens of media would be cut off.
    """
    import torch

    name = text_name(sample)
    if max_length is None or name is None or sample[name].shape[1] <= max_length:
        return sample
    ids_BS = sample[name]
    if bool(torch.isin(ids_BS[:, max_length:], torch.tensor(list(media_tokens) or [-1])).any()):
        raise DataError(
            f"{where} has {ids_BS.shape[1]} tokens with its media, and --seq-len {max_length} would cut the media",
            hint=f"use --seq-len {ids_BS.shape[1]}, or smaller or fewer media",
        )
    return {
        name: value[:, :max_length].clone() if is_of_tokens(name, value, ids_BS) else value
        for name, value in sample.items()
    }


def is_of_tokens(name: str, value: torch.Tensor, ids_BS: torch.Tensor) -> bool:
    """Whether a tensor has one number for each token of the text: ids, masks, types, labels."""
    is_named = name in (MASK, LABELS) or name.endswith(("input_ids", "token_type_ids", "_mask", "position_ids"))
    return is_named and not value.is_floating_point() and value.shape[:2] == ids_BS.shape


def sizes_of(samples: Sequence[Mapping[str, torch.Tensor]]) -> list[str]:
    """Describe the shapes of each input, smallest and largest: `pixel_values [64, 1176] to [256, 1176]`."""
    shapes: dict[str, list[list[int]]] = {}
    for sample in samples:
        for name, value in sample.items():
            shapes.setdefault(name, []).append(list(value.shape))
    lines = []
    for name, found in shapes.items():
        low, high = min(found), max(found)
        some = "" if len(found) == len(samples) else f" in {len(found)} samples"
        lines.append(f"{name} {low}{some}" if low == high else f"{name} {low} to {high}{some}")
    return lines
