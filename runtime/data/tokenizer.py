"""Load a tokenizer from a directory, without its code and without a network, and identify it by a digest."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.artifact.config_policy import stated_tokenizers
from runtime.console import quiet
from runtime.errors import DataError
from runtime.host.offline import offline
from runtime.host.regular_files import open_regular, require_regular_entries

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_TOKENIZER = "give the tokenizer's directory, or a token file made by `seqbuild data`, which needs none"

# Japanese and phonemes: analysers in programs and shared libraries of their own, which the files may choose.
_STARTS_PROGRAMS = re.compile(r"BertJapanese|Wav2Vec2Phoneme|Vits")


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory.

    Raises:
        DataError: when there is none, it needs code of its own, or its files name something else.
    """
    from transformers import AutoTokenizer

    if not directory.is_dir():
        raise DataError(f"{directory} is no directory with a tokenizer", hint=NO_TOKENIZER)
    try:
        require_regular_entries(directory)
    except OSError as error:
        raise DataError(f"the tokenizer's file {error.filename} cannot be read: {error.strerror}") from error
    try:
        # Without `trust_remote_code=False` a tokenizer with code of its own would ask on the terminal.
        # It may say that the model type in the config beside a tokenizer is unknown, and loads it all the same.
        with quiet("transformers.configuration_utils"), offline():
            _require_tokenizer_class(directory)
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
    except MemoryError:
        raise
    except Exception as error:  # the tokenizers library raises plain `Exception`
        why = str(error).partition("\n")[0]
        raise DataError(f"{directory} holds no tokenizer that loads: {why}", hint=NO_TOKENIZER) from error
    # Given a config alone, transformers makes tokenizers without a vocabulary and does not complain.
    if not any((directory / name).is_file() for name in _vocabulary_files(tokenizer)):
        raise DataError(f"{directory} holds no tokenizer, only its config", hint=NO_TOKENIZER)
    return tokenizer


def _require_tokenizer_class(directory: Path) -> None:
    """Refuse a directory whose files name a class that is no tokenizer: transformers loads whatever has that name, a
    model for instance; or one whose tokenizers start other programs.

    Raises:
        DataError: naming the class.
    """
    from transformers import PreTrainedTokenizerBase
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    for name in stated_tokenizers(directory):
        for own in (name, name.removesuffix("Fast"), f"{name}Fast"):
            found = tokenizer_class_from_name(own)
            is_tokenizer = isinstance(found, type) and issubclass(found, PreTrainedTokenizerBase)
            if found is not None and (not is_tokenizer or _STARTS_PROGRAMS.match(own)):
                raise DataError(f"{directory} names {name} as its tokenizer, which is not a tokenizer to be loaded")


def _vocabulary_files(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return sorted({"tokenizer.json", *tokenizer.vocab_files_names.values()})


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase, directory: Path) -> str:
    """Over the names and contents of those files of the directory that determine what the tokenizer does."""
    settings = [
        "added_tokens.json",
        "chat_template.jinja",
        "special_tokens_map.json",
        "tokenizer_config.json",
    ]
    digest = hashlib.sha256()
    for name in [*_vocabulary_files(tokenizer), *settings]:
        if (directory / name).is_file():
            digest.update(f"{name} {file_digest(directory / name)}\n".encode())
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
