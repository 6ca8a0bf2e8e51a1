"""The origin of samples, which a token file states."""

from __future__ import annotations

from dataclasses import dataclass

METADATA_KEY = "seqbuild_tokens"  # in the metadata of a token file


@dataclass(frozen=True, kw_only=True, slots=True)
class DataOrigin:
    """The tokenizer and the texts of token ids.

    Attributes:
        tokenizer: its name, for people.
        tokenizer_digest: over the names and contents of its files.
        vocab_size: one more than the largest id of the tokenizer.
        sources: name and digest of each text file, in the order in which they were read.
    """

    tokenizer: str
    tokenizer_digest: str
    vocab_size: int
    sources: tuple[tuple[str, str], ...]
