"""Calibration and evaluation data: token ids, cut into samples.

**What can be read.** Text with a tokenizer (`runtime.data.documents`: `.txt`, `.jsonl`, `.parquet`), or a token
file (`runtime.data.token_file`: `.safetensors`), which needs none and loads none, so that the calibration host can
do without the tokenizer and its libraries.

**How documents become samples.** Packed, the ids of all documents are joined in order and cut into windows of
`seq_len` that do not overlap; what is left at the end is dropped. Not packed, each document is one sample,
cut at `seq_len`. Where there are more samples than asked for, those with index `i * total // num_samples` are
taken: the same ones every time, spread over the whole text.

**Pairs.** A record of source and target is one sample and its labels, for encoder-decoder models, each cut at
`seq_len`; pairs are never joined, whether packing is asked for or not. The target is tokenized as targets are where a
tokenizer tells them apart (another vocabulary, the code of another language).

**Special tokens.** A document gets those that its tokenizer adds by default, a conversation those that its
template writes and no others, a window none of its own. So a text in one `.txt` starts with one BOS and its
later windows start in the middle of the text. That is how the perplexity of GPTQ and those who followed it is
measured (WikiText-2 joined to one string, tokenized once, cut into windows), so figures can be compared.
A model that is lost without a BOS in sight (gemma) is better measured on documents that are not packed.

**Which tokens count.** All do, unless a loss mask says otherwise: that of a token file, or, if it is asked for,
what the assistant says in conversations (`runtime.data.chats`); texts count whole then. A mask is for statistics,
never for perplexity.

Shapes: B samples of a batch, S tokens of a sample, T tokens of the joined documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from runtime.arguments import as_path, shown
from runtime.data.decoder import LABELS
from runtime.data.document_tokens import Tokens, document_tokens, target_tokens
from runtime.data.documents import Document, read_documents, require_file, require_pairs
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

    A token file was cut when it was made: `pack` means nothing to it, and `seq_len` can only cut its samples
    shorter, each at its end.

    Args:
        path: `.txt`, `.jsonl`, `.parquet` or `.safetensors`.
        tokenizer_dir: a directory with the tokenizer's files; text needs it, a token file never looks at it.
        num_samples: how many; None for all there are.
        seq_len: tokens of a window, or the most a sample may have; None where nothing is to be cut.
        pack: join the documents and cut windows, instead of one sample a document.
        loss_mask: of conversations, count only what the assistant says; a token file must bring its mask. Without it, a
            token file's mask counts if there is one.
        vocab_size: refuse ids that a model with so many embeddings does not have.

    Raises:
        DataError: the file cannot be read, does not hold what it should, or too little of it.
        UsageError: a number that is not positive, or text to be packed without `seq_len`.
    """
    path = as_path("the data", path)
    tokenizer_dir = None if tokenizer_dir is None else as_path("tokenizer_dir", tokenizer_dir)
    if path.suffix == SUFFIX:
        _require_positive(num_samples=num_samples, seq_len=seq_len)
        data = _shortened(read_token_file(path), num_samples, seq_len)
        if loss_mask and data.masks is None:
            raise DataError(f"{path} has no loss mask", hint="make it again with `seqbuild data --loss-mask`")
    elif tokenizer_dir is None:
        require_file(path)
        raise DataError(f"{path} is text, and there is no tokenizer to read it with", hint=NO_TOKENIZER)
    else:
        found = tokenize_documents(
            [path], tokenizer_dir, num_samples=num_samples, seq_len=seq_len, pack=pack, loss_mask=loss_mask
        )
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
        _require_known_ids(data, vocab_size)
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
) -> Tokenized:
    """Make samples from the documents of several files, in the order given.

    Args:
        paths: `.txt`, `.jsonl` or `.parquet`.
        tokenizer_dir: a directory with the tokenizer's files.
        num_samples: as for `load_tokens`, of all files together.
        seq_len: as for `load_tokens`.
        pack: as for `load_tokens`.
        loss_mask: as for `load_tokens`.
        tokenizer_name: what the origin calls the tokenizer; by default its directory's name.

    Raises:
        DataError: as for `load_tokens`; also when some of the documents are pairs and others are not.
        UsageError: as for `load_tokens`.
    """
    _require_positive(num_samples=num_samples, seq_len=seq_len)
    if pack and seq_len is None:
        raise UsageError("packing needs the length of a window", hint="say how many tokens a sample has")
    what = ", ".join(str(path) for path in paths)
    documents = [document for path in paths for document in read_documents(path)]
    if not documents:
        raise DataError(f"{what} holds no text but white space")
    tokenizer = load_tokenizer(tokenizer_dir)
    targets = None
    if any(document.target is not None for document in documents):
        require_pairs(documents)
        if loss_mask:
            raise DataError("pairs of source and target have no loss mask", hint="leave --loss-mask out")
        some = _spread(documents, num_samples, f"{what} holds {len(documents)} pairs")
        chosen = [document_tokens(tokenizer, document, seq_len, False) for document in some]
        targets = tuple(target_tokens(tokenizer, document, seq_len) for document in some)
    elif pack and seq_len is not None:
        chosen = _windows(tokenizer, documents, num_samples, seq_len, what, loss_mask)
    else:
        some = _spread(documents, num_samples, f"{what} holds {len(documents)} documents")
        chosen = [document_tokens(tokenizer, document, seq_len, loss_mask) for document in some]
    if loss_mask and not any(bool(counts_S.any()) for _, counts_S in chosen):
        raise DataError(
            f"the loss mask leaves no token of {what}: no sample contains text of the assistant",
            hint="use longer samples, give conversations with assistant messages, or leave --loss-mask out",
        )
    samples = tuple(ids_S for ids_S, _ in chosen)
    masks = tuple(counts_S for _, counts_S in chosen) if loss_mask else None
    origin = DataOrigin(
        tokenizer=tokenizer_name or tokenizer_dir.resolve().name,
        tokenizer_digest=tokenizer_digest(tokenizer, tokenizer_dir),
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        sources=tuple((path.name, file_digest(path)) for path in paths),
    )
    return Tokenized(samples=samples, masks=masks, targets=targets, origin=origin)


def batches(
    samples: Sequence[Tensor],
    batch_size: int,
    masks: Sequence[Tensor] | None = None,
    targets: Sequence[Tensor] | None = None,
) -> list[dict[str, Tensor]]:
    """Stack samples of equal length, so that nothing is ever padded: padding would enter the statistics.

    The longest samples come first, so that a batch too large for the memory fails at once. Samples of equal
    length stay in order; the last batch of each length may be smaller.

    Args:
        samples: tensors [S] int64.
        batch_size: the most samples of a batch.
        masks: which tokens of each sample count in statistics, bool [S].
        targets: what is to be written for each sample, [T] int64; those of a batch are equally long, too.

    Returns:
        `{"input_ids": [B, S], "attention_mask": [B, S]}` for each batch, int64, the mask all ones; and with masks
        `"loss_mask": [B, S]`, with targets `"labels": [B, T]`, likewise.

    Raises:
        UsageError: `batch_size` is not positive.
        DataError: samples that are no tensors of tokens.
    """
    import torch

    _require_positive(batch_size=batch_size)
    _require_samples("sample", samples)
    if masks is not None:
        _require_samples("mask", masks)
        if [mask.shape for mask in masks] != [sample.shape for sample in samples]:
            raise DataError("the masks are not those of the samples", hint="give one mask of each sample's length")
    if targets is not None:
        _require_samples("target", targets)
        if len(targets) != len(samples):
            raise DataError(f"{len(targets)} targets for {len(samples)} samples", hint="give one target a sample")
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
    """Refuse what is no sequence of tensors of tokens."""
    import torch

    if not isinstance(samples, (list, tuple)):
        raise DataError(f"{name}s is {shown(samples)}", hint=f"give a list of tensors [sequence], one for each {name}")
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
    gives = f"{what} gives {num_windows} windows of {seq_len} tokens ({len(ids_T)} tokens in all)"
    if num_windows == 0:
        raise DataError(gives, hint="give more text or ask for shorter windows")
    starts = _spread(range(0, num_windows * seq_len, seq_len), num_samples, gives)
    windows = [slice(start, start + seq_len) for start in starts]
    return [(ids_T[window].clone(), counts_T[window].clone()) for window in windows]


def _spread(items: Sequence[_T], count: int | None, there_are: str) -> Sequence[_T]:
    """`count` items, evenly spaced from the first on; all of them for None."""
    if count is None:
        return items
    if count > len(items):
        raise DataError(f"{there_are}, and {count} were asked for", hint="ask for fewer or give more")
    return [items[index * len(items) // count] for index in range(count)]


def _shortened(data: TokenData, num_samples: int | None, seq_len: int | None) -> TokenData:
    if seq_len is None:
        seq_len = data.seq_len
    elif data.seq_len is not None and seq_len > data.seq_len:
        raise DataError(
            f"{data.path} was cut at {data.seq_len} tokens, and samples of {seq_len} were asked for",
            hint=f"ask for at most {data.seq_len}, or make the file again with `seqbuild data`",
        )
    chosen = _spread(data.samples, num_samples, f"{data.path} holds {len(data.samples)} samples")
    samples = tuple(sample[:seq_len] for sample in chosen)
    masks = data.masks
    if masks is not None:
        masks = tuple(mask[:seq_len] for mask in _spread(masks, num_samples, ""))
    targets = data.targets
    if targets is not None:
        targets = tuple(target[:seq_len] for target in _spread(targets, num_samples, ""))
    return replace(data, samples=samples, masks=masks, targets=targets, seq_len=seq_len)


def _require_known_ids(data: TokenData, vocab_size: int) -> None:
    largest = max(int(sample.max()) for sample in (*data.samples, *(data.targets or ())))
    if largest >= vocab_size:
        raise DataError(
            f"{data.path} gives token id {largest}, and the model's vocabulary has {vocab_size} entries",
            hint="take the model's own tokenizer",
        )


def _require_positive(**numbers: int | None) -> None:
    for name, number in numbers.items():
        if number is not None and (not isinstance(number, int) or number < 1):
            raise UsageError(f"{name} is {number!r}", hint="it must be a whole number, 1 or more")
