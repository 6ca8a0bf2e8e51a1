"""Read calibration and evaluation data: token ids, cut into samples.

**Files.** Text with a tokenizer (`runtime.data.documents`: `.txt`, `.jsonl`, `.parquet`), or a token file
(`runtime.data.token_file`: `.safetensors`), which needs no tokenizer and loads none, so that the calibration host can
do without the tokenizer and its libraries.

**From documents to samples.** Packed, the ids of all documents are joined in order and cut into windows of `seq_len`
that do not overlap; the rest at the end is dropped. Not packed, each document is one sample, cut at `seq_len`. If there
are more samples than `num_samples`, those with index `i * total // num_samples` are taken: the same ones every time,
spread over the whole text.

**Pairs.** A record of source and target is one sample and its labels, for encoder-decoder models, each cut at
`seq_len`; pairs are never joined, even if packing is on. The target is tokenized as a target if the tokenizer
distinguishes them (another vocabulary, the code of another language).

**Special tokens.** A document gets those that its tokenizer adds by default, a conversation only those of its chat
template, a window none of its own. So a text in one `.txt` starts with one BOS, and its later windows start in the
middle of the text. Perplexity is measured like this since GPTQ (WikiText-2 joined to one string, tokenized once, cut
into windows), so figures can be compared. A model that needs a BOS in each sample (gemma) is better measured on
documents that are not packed.

**Which tokens count.** All do, unless there is a loss mask: that of a token file or, with `loss_mask`, the text of the
assistant in conversations (`runtime.data.chats`), whereas all of a plain text counts. A mask affects statistics, never
perplexity.

Shapes: B samples of a batch, S tokens of a sample, T tokens of the joined documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from runtime.arguments import as_path, require_count, require_counts, shown
from runtime.data.decoder import LABELS
from runtime.data.document_tokens import Tokens, document_tokens, target_tokens
from runtime.data.documents import Document, read_documents, require_file, require_pairs
from runtime.data.named_batches import chosen
from runtime.data.named_samples import process_documents
from runtime.data.named_tensors import NamedSamples
from runtime.data.token_file import (
    LOSS_MASK,
    SUFFIX,
    DataOrigin,
    TokenData,
    Tokenized,
    read_token_file,
    require_place,
    save_tokens,
)
from runtime.data.tokenizer import NO_TOKENIZER, file_digest, load_tokenizer, tokenizer_digest
from runtime.errors import DataError, UsageError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "DataOrigin",
    "TokenData",
    "batches",
    "load_tokens",
    "require_place",
    "save_tokens",
    "tokenize_documents",
]

_T = TypeVar("_T")


def load_tokens(
    path: str | Path,
    *,
    tokenizer_dir: Path | None = None,
    num_samples: int | None = None,
    seq_len: int | None = None,
    pack: bool = True,
    loss_mask: bool = False,
    vocab_size: int | None = None,
) -> TokenData:
    """Read samples from a text or a token file.

    Samples of a token file are cut already: `pack` is ignored, and `seq_len` can only shorten them, each at its end.

    Args:
        path: `.txt`, `.jsonl`, `.parquet` or `.safetensors`.
        tokenizer_dir: a directory with the tokenizer's files; required for text, ignored for a token file.
        num_samples: the number of samples; None for all.
        seq_len: the number of tokens of a window, or the maximum of a sample; None to cut nothing.
        pack: join the documents and cut windows, instead of one sample for each document.
        loss_mask: in conversations, count only the text of the assistant; a token file must have a mask. By default,
            the mask of a token file is used if it has one.
        vocab_size: reject ids outside of a model's vocabulary of this size.

    Raises:
        DataError: the file cannot be read, is invalid, or has too few samples.
        UsageError: a number is not positive, or text is packed without `seq_len`.
    """
    found = load_data(
        path,
        tokenizer_dir=tokenizer_dir,
        num_samples=num_samples,
        seq_len=seq_len,
        pack=pack,
        loss_mask=loss_mask,
        vocab_size=vocab_size,
    )
    if isinstance(found, NamedSamples):
        raise DataError(f"{path} has images, sounds or videos, so its samples are not tokens alone", hint="use text")
    return found


def load_data(
    path: str | Path,
    *,
    tokenizer_dir: Path | None = None,
    num_samples: int | None = None,
    seq_len: int | None = None,
    pack: bool = True,
    loss_mask: bool = False,
    vocab_size: int | None = None,
) -> TokenData | NamedSamples:
    """Read samples as `load_tokens` does, or samples of named tensors if there are images, sounds or videos."""
    path = as_path("the data", path)
    tokenizer_dir = None if tokenizer_dir is None else as_path("tokenizer_dir", tokenizer_dir)
    if path.suffix == SUFFIX:
        require_counts(num_samples=num_samples, seq_len=seq_len)
        read = read_token_file(path)
        if isinstance(read, NamedSamples):
            _require_no_mask(loss_mask, str(path))
            return chosen(read, num_samples, seq_len, str(path))
        data = _shortened(read, num_samples, seq_len)
        if loss_mask and data.masks is None:
            raise DataError(f"{path} has no loss mask", hint="make it again with `seqbuild data --loss-mask`")
    elif tokenizer_dir is None:
        require_file(path)
        raise DataError(f"{path} is text, which requires a tokenizer", hint=NO_TOKENIZER)
    else:
        found = tokenize_documents(
            [path], tokenizer_dir, num_samples=num_samples, seq_len=seq_len, pack=pack, loss_mask=loss_mask
        )
        if isinstance(found, NamedSamples):
            return found
        data = TokenData(
            samples=found.samples,
            path=path,
            digest=found.origin.sources[0][1],
            seq_len=seq_len,
            origin=found.origin,
            masks=found.masks,
            targets=found.targets,
        )
    if vocab_size is not None:
        largest = max(int(sample.max()) for sample in (*data.samples, *(data.targets or ())))
        if largest >= vocab_size:
            raise DataError(
                f"{data.path} has the token id {largest}, but the model's vocabulary has {vocab_size} entries",
                hint="use the model's own tokenizer",
            )
    return data


def tokenize_documents(
    paths: Sequence[Path],
    tokenizer_dir: Path,
    *,
    num_samples: int | None,
    seq_len: int | None,
    pack: bool,
    loss_mask: bool = False,
    tokenizer_name: str = "",
) -> Tokenized | NamedSamples:
    """Make samples from the documents of several files, in this order.

    Args:
        paths: `.txt`, `.jsonl` or `.parquet`.
        tokenizer_dir: a directory with the tokenizer's files.
        num_samples: as for `load_tokens`, of all files together.
        seq_len: as for `load_tokens`.
        pack: as for `load_tokens`.
        loss_mask: as for `load_tokens`.
        tokenizer_name: the name of the tokenizer in the origin, by default that of its directory.

    Raises:
        DataError: as for `load_tokens`, and if only some documents are pairs.
        UsageError: as for `load_tokens`.
    """
    require_counts(num_samples=num_samples, seq_len=seq_len)
    if pack and seq_len is None:
        raise UsageError("packing requires the length of a window", hint="set seq_len")
    what = ", ".join(str(path) for path in paths)
    documents = [document for path in paths for document in read_documents(path)]
    if not documents:
        raise DataError(f"{what} has only white space")
    if any(document.media for document in documents):
        _require_no_mask(loss_mask, what)
        some = _spread(documents, num_samples, f"{what} has {len(documents)} records")
        sources = [(path.name, file_digest(path)) for path in paths]
        return process_documents(some, tokenizer_dir, sources=sources, seq_len=seq_len, name=tokenizer_name)
    tokenizer = load_tokenizer(tokenizer_dir)
    targets = None
    if any(document.target is not None for document in documents):
        require_pairs(documents)
        if loss_mask:
            raise DataError("pairs of source and target have no loss mask", hint="leave --loss-mask out")
        some = _spread(documents, num_samples, f"{what} has {len(documents)} pairs")
        parts = [document_tokens(tokenizer, document, seq_len, False) for document in some]
        targets = tuple(target_tokens(tokenizer, document, seq_len) for document in some)
    elif pack and seq_len is not None:
        parts = _windows(tokenizer, documents, num_samples, seq_len, what, loss_mask)
    else:
        some = _spread(documents, num_samples, f"{what} has {len(documents)} documents")
        parts = [document_tokens(tokenizer, document, seq_len, loss_mask) for document in some]
    if loss_mask and not any(bool(counts_S.any()) for _, counts_S in parts):
        raise DataError(
            f"the loss mask excludes all tokens of {what}: no sample has text of the assistant",
            hint="use longer samples, or conversations with assistant messages, or leave --loss-mask out",
        )
    samples = tuple(ids_S for ids_S, _ in parts)
    masks = tuple(counts_S for _, counts_S in parts) if loss_mask else None
    origin = DataOrigin(
        tokenizer=tokenizer_name or tokenizer_dir.resolve().name,
        tokenizer_digest=tokenizer_digest(tokenizer, tokenizer_dir),
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        sources=tuple((path.name, file_digest(path)) for path in paths),
    )
    return Tokenized(samples=samples, masks=masks, targets=targets, origin=origin)


def _require_no_mask(loss_mask: bool, what: str) -> None:
    if loss_mask:
        raise DataError(
            f"{what} has images, sounds or videos, for which no loss mask is made", hint="leave --loss-mask out"
        )


def batches(
    samples: Sequence[Tensor],
    batch_size: int,
    masks: Sequence[Tensor] | None = None,
    targets: Sequence[Tensor] | None = None,
) -> list[dict[str, Tensor]]:
    """Stack samples of equal length, because padding would affect the statistics.

    The longest samples come first, so that a batch too large for the memory fails at once. Samples of equal length
    stay in order; the last batch of each length may be smaller.

    Args:
        samples: tensors [S] int64.
        batch_size: the maximum number of samples of a batch.
        masks: which tokens of each sample count in statistics, bool [S].
        targets: the text to generate for each sample, [T] int64; those of a batch have the same length too.

    Returns:
        `{"input_ids": [B, S], "attention_mask": [B, S]}` for each batch, int64, the mask all ones; with masks also
        `"loss_mask": [B, S]`, with targets `"labels": [B, T]`, both int64.

    Raises:
        UsageError: `batch_size` is not positive.
        DataError: a sample is not a tensor of tokens, or masks or targets do not fit the samples.
    """
    import torch

    require_count("batch_size", batch_size)
    _require_samples("sample", samples)
    if masks is not None:
        _require_samples("mask", masks)
        if [mask.shape for mask in masks] != [sample.shape for sample in samples]:
            raise DataError("masks do not have the shapes of the samples", hint="pass one mask for each sample")
    if targets is not None:
        _require_samples("target", targets)
        if len(targets) != len(samples):
            raise DataError(f"{len(targets)} targets for {len(samples)} samples", hint="pass one for each sample")
    by_length: dict[tuple[int, int], list[int]] = {}
    for index, sample in enumerate(samples):
        by_length.setdefault((len(sample), 0 if targets is None else len(targets[index])), []).append(index)
    result = []
    for length in sorted(by_length, reverse=True):
        equals = by_length[length]
        for start in range(0, len(equals), batch_size):
            chosen = equals[start : start + batch_size]
            ids_BS = torch.stack([samples[index] for index in chosen])
            batch = {"input_ids": ids_BS, "attention_mask": torch.ones_like(ids_BS)}
            if masks is not None:
                batch[LOSS_MASK] = torch.stack([masks[index] for index in chosen]).to(torch.int64)
            if targets is not None:
                batch[LABELS] = torch.stack([targets[index] for index in chosen])
            result.append(batch)
    return result


def _require_samples(name: str, samples: Any) -> None:
    """Require a sequence of tensors of tokens."""
    import torch

    if not isinstance(samples, (list, tuple)):
        raise DataError(f"{name}s is {shown(samples)}", hint=f"pass a list of tensors [sequence], one for each {name}")
    for index, sample in enumerate(samples):
        is_tensor = isinstance(sample, torch.Tensor)
        if not is_tensor or sample.dim() != 1 or sample.is_floating_point() or not len(sample):
            what = f"{sample.dtype} {list(sample.shape)}" if is_tensor else shown(sample)
            raise DataError(f"{name} {index} is {what}", hint="it must be a tensor [sequence] of integers")


def _windows(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    num_samples: int | None,
    seq_len: int,
    what: str,
    loss_mask: bool,
) -> list[Tokens]:
    import torch

    parts = [document_tokens(tokenizer, document, None, loss_mask) for document in documents]
    ids_T, counts_T = torch.cat([ids for ids, _ in parts]), torch.cat([counts for _, counts in parts])
    num_windows = len(ids_T) // seq_len
    there_are = f"{what} has {num_windows} windows of {seq_len} tokens ({len(ids_T)} tokens in all)"
    if num_windows == 0:
        raise DataError(there_are, hint="use more text or a smaller --seq-len")
    starts = _spread(range(0, num_windows * seq_len, seq_len), num_samples, there_are)
    windows = [slice(start, start + seq_len) for start in starts]
    return [(ids_T[window].clone(), counts_T[window].clone()) for window in windows]


def _spread(items: Sequence[_T], count: int | None, there_are: str) -> Sequence[_T]:
    """Choose `count` items at equal distances, beginning with the first; None for all."""
    if count is None:
        return items
    if count > len(items):
        raise DataError(f"{there_are}, but {count} are required", hint="reduce --samples or use more data")
    return [items[index * len(items) // count] for index in range(count)]


def _shortened(data: TokenData, num_samples: int | None, seq_len: int | None) -> TokenData:
    if seq_len is None:
        seq_len = data.seq_len
    elif data.seq_len is not None and seq_len > data.seq_len:
        raise DataError(
            f"samples of {data.path} were cut at {data.seq_len} tokens, but {seq_len} are required",
            hint=f"reduce --seq-len to {data.seq_len}, or make the file again with `seqbuild data`",
        )

    def shorten(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        chosen = _spread(tensors, num_samples, f"{data.path} has {len(data.samples)} samples")
        return tuple(tensor[:seq_len] for tensor in chosen)

    return replace(
        data,
        samples=shorten(data.samples),
        masks=None if data.masks is None else shorten(data.masks),
        targets=None if data.targets is None else shorten(data.targets),
        seq_len=seq_len,
    )
