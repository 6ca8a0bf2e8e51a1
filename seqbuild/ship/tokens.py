"""Tokenize texts once, offline, so that the calibration host needs no tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from runtime.data.samples import TokenData, require_place, save_tokens, tokenize_documents
from runtime.errors import UsageError
from runtime.host.hub import resolve_directory


def tokenize_files(
    tokenizer: str | Path,
    files: Sequence[str | Path],
    *,
    num_samples: int | None,
    seq_len: int | None,
    pack: bool,
    out: str | Path,
    loss_mask: bool = False,
    revision: str | None = None,
) -> TokenData:
    """Tokenize the documents in `files`, write a token file, and return its contents.

    Args:
        tokenizer: a directory, or the hub id of a model in the local cache.
        files: `.txt`, `.jsonl` or `.parquet` files, read in this order as one text.
        num_samples: the number of samples, spread evenly; None for all.
        seq_len: tokens in a window, or the largest number in a document; None only if not packed.
        pack: join the documents and cut windows, instead of one sample for each document; pairs are never joined.
        out: the token file; an existing one is replaced.
        loss_mask: save which tokens of a conversation are the assistant's; calibration counts only these.
        revision: branch, tag or commit of a hub id.

    Raises:
        DataError: for a missing tokenizer, or texts that cannot be read or are too short.
        OutputError: if `out` cannot be written.
        UsageError: for missing files or invalid numbers.
    """
    paths, out = [Path(file) for file in files], Path(out)
    if not paths:
        raise UsageError("no files given", hint="pass one or more .txt, .jsonl or .parquet files")
    require_place(out)
    directory = resolve_directory(tokenizer, revision=revision, what="tokenizer")
    found = tokenize_documents(
        paths,
        directory,
        num_samples=num_samples,
        seq_len=seq_len,
        pack=pack,
        loss_mask=loss_mask,
        tokenizer_name=directory.resolve().name if directory == Path(tokenizer) else str(tokenizer),
    )
    return save_tokens(
        out, found.samples, seq_len=seq_len, origin=found.origin, masks=found.masks, targets=found.targets
    )
