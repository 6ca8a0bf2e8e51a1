"""Tokenize texts once, offline, so that the calibration host needs no tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from runtime.data.named_tensors import NamedSamples, save_named
from runtime.data.samples import TokenData, require_place, save_tokens, tokenize_documents
from runtime.data.token_file import METADATA_KEY
from runtime.errors import DataError, UsageError


def tokenize_files(
    tokenizer: str | Path,
    files: Sequence[str | Path],
    *,
    num_samples: int | None,
    seq_len: int | None,
    pack: bool,
    out: str | Path,
    loss_mask: bool = False,
) -> TokenData | NamedSamples:
    """Tokenize the documents in `files`, write a token file, and return its contents.

    Args:
        tokenizer: a directory, or the id of a model in the local hub cache. Nothing is downloaded.
        files: `.txt`, `.jsonl` or `.parquet` files, read in this order as one text.
        num_samples: the number of samples, spread evenly; None for all.
        seq_len: tokens in a window, or the largest number in a document; None only if not packed.
        pack: join the documents and cut windows, instead of one sample for each document; pairs are never joined.
        out: the token file; an existing one is replaced.
        loss_mask: save which tokens of a conversation are the assistant's; calibration counts only these.

    Raises:
        DataError: for a missing tokenizer, or texts that cannot be read or are too short.
        OutputError: if `out` cannot be written.
        UsageError: for missing files or invalid numbers.
    """
    paths, out = [Path(file) for file in files], Path(out)
    if not paths:
        raise UsageError("no files given", hint="pass one or more .txt, .jsonl or .parquet files")
    require_place(out)
    directory = _tokenizer_directory(str(tokenizer))
    found = tokenize_documents(
        paths,
        directory,
        num_samples=num_samples,
        seq_len=seq_len,
        pack=pack,
        loss_mask=loss_mask,
        tokenizer_name=directory.resolve().name if directory == Path(tokenizer) else str(tokenizer),
    )
    if isinstance(found, NamedSamples):
        save_named(out, found, METADATA_KEY)
        return found
    return save_tokens(
        out, found.samples, seq_len=seq_len, origin=found.origin, masks=found.masks, targets=found.targets
    )


def _tokenizer_directory(name: str) -> Path:
    """Return the directory itself, or the hub cache directory with this model's tokenizer."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if name and Path(name).is_dir():
        return Path(name)
    try:
        # Tokenizers of all versions of transformers have one of these two.
        for file in ("tokenizer_config.json", "tokenizer.json"):
            found = try_to_load_from_cache(name, file)
            if isinstance(found, str):
                return Path(found).parent
    except HFValidationError:
        pass  # not a valid id
    raise DataError(
        f"{name!r} is neither a directory nor a model whose tokenizer is in the local hub cache",
        hint="pass the directory with its tokenizer.json, or download the model's tokenizer first",
    )
