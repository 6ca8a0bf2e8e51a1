"""Tokenize texts once, offline, so that the calibration host needs no tokenizer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from runtime.arguments import require_counts
from runtime.data.named_tensors import NamedSamples, save_named
from runtime.data.options import DataOptions, data_sources
from runtime.data.samples import TokenData, is_token_file, require_place, save_tokens
from runtime.data.tokenization import DataSummary, prepare_data
from runtime.errors import OutputError, UsageError
from runtime.host.hub import resolve_directory
from runtime.status import doing


def tokenize_files(
    tokenizer: str | Path,
    files: Sequence[str | Path],
    *,
    num_samples: int | None,
    seq_len: int | None,
    pack: bool,
    out: str | Path,
    loss_mask: bool = False,
    force: bool = False,
    revision: str | None = None,
) -> TokenData | NamedSamples:
    """Tokenize the documents in `files`, write a token file, and return its contents.

    Args:
        tokenizer: a directory, or the hub id of a model in the local cache.
        files: data arguments (`runtime.data.sources`), read in this order as one text.
        num_samples: the number of samples, spread evenly; None for all.
        seq_len: tokens in a window, or the largest number in a document; None only if not packed.
        pack: join the documents and cut windows, instead of one sample for each document; pairs are never joined.
        out: the token file.
        loss_mask: save which tokens of a conversation are the assistant's; calibration counts only these.
        force: replace an existing file.
        revision: branch, tag or commit of a hub id.

    Raises:
        DataError: for a missing tokenizer, or texts that cannot be read or are too short.
        OutputError: if `out` cannot be written, or exists.
        UsageError: for missing files or invalid numbers.
    """
    options = DataOptions(
        sources=tuple(files), num_samples=num_samples, seq_len=seq_len, pack=pack, loss_mask=loss_mask
    )
    return write_token_file(tokenizer, options, Path(out), force=force, revision=revision)[0]


def write_token_file(
    tokenizer: str | Path, options: DataOptions, out: Path, *, force: bool = False, revision: str | None = None
) -> tuple[TokenData | NamedSamples, DataSummary, Path]:
    """Tokenize data, write a token file, and return its contents, how they were made, and the tokenizer's directory.

    Raises:
        DataError, OutputError, UsageError: as for `tokenize_files`.
    """
    require_counts(num_samples=options.num_samples, seq_len=options.seq_len)
    if is_token_file(data_sources(options)):
        raise UsageError(f"{options.sources[0]} is a token file already", hint="pass text")
    require_place(out)
    if os.path.exists(out) and not force:
        raise OutputError(f"{out} already exists", hint="pass --force to replace it, or choose another name")
    directory = resolve_directory(tokenizer, revision=revision, what="tokenizer")
    doing("tokenizing")
    name = directory.resolve().name if directory == Path(tokenizer) else str(tokenizer)
    found = prepare_data(options, directory, name)
    tokens = found.tokens
    if isinstance(tokens, NamedSamples):
        save_named(out, tokens)
        return replace(tokens, path=out), found.summary, directory
    saved = save_tokens(
        out,
        tokens.samples,
        seq_len=found.seq_len,
        origin=tokens.origin,
        masks=tokens.masks,
        targets=tokens.targets,
    )
    return saved, found.summary, directory
