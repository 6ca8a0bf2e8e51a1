"""Load a tokenizer from a directory, without its code and without a network, and identify it by a digest."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.artifact.config_policy import stated_tokenizers
from runtime.console import quiet
from runtime.errors import DataError
from runtime.host.offline import offline
from runtime.host.regular_files import file_digest, require_regular_entries

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_TOKENIZER = "pass the directory of a tokenizer, or a token file made by `seqbuild data`, which needs none"

_TOKENIZER_FILES = ("*token*", "vocab*", "merges*", "spiece*")

# Japanese and phonemes: they start programs and load shared libraries that the files can choose.
_STARTS_PROGRAMS = re.compile(r"BertJapanese|Wav2Vec2Phoneme|Vits")


def load_tokenizer(directory: Path, *, add_bos_token: bool | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a directory.

    Args:
        directory: with its files.
        add_bos_token: whether it adds BOS; None for what its files state.

    Raises:
        DataError: the tokenizer is missing, needs its own code, or its files name an unsupported class.
    """
    from transformers import AutoTokenizer

    if not directory.is_dir():
        raise DataError(f"{directory} is not a directory with a tokenizer", hint=NO_TOKENIZER)
    try:
        require_regular_entries(directory)
    except OSError as error:
        raise DataError(f"the tokenizer's file {error.filename} cannot be read: {error.strerror}") from error
    chosen = {} if add_bos_token is None else {"add_bos_token": add_bos_token}
    try:
        # Without `trust_remote_code=False`, transformers prompts on the terminal for a tokenizer with code of its own.
        # It warns about an unknown model type in the config next to a tokenizer, but loads the tokenizer.
        with quiet("transformers.configuration_utils"), offline():
            require_tokenizer_class(directory)
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False, **chosen
            )
    except MemoryError:
        raise
    except Exception as error:  # the tokenizers library raises plain `Exception`
        if not has_tokenizer(directory):
            raise DataError(f"{directory} has no tokenizer", hint=NO_TOKENIZER) from error
        why = str(error).partition("\n")[0].removesuffix(" from one of:")  # a list follows
        raise DataError(f"the tokenizer in {directory} cannot be loaded: {why}", hint=NO_TOKENIZER) from error
    # From a config alone, transformers makes a tokenizer without a vocabulary.
    if not any((directory / name).is_file() for name in _vocabulary_files(tokenizer)):
        raise DataError(f"{directory} has the config of a tokenizer, but no vocabulary", hint=NO_TOKENIZER)
    return tokenizer


def has_tokenizer(directory: Path) -> bool:
    """Whether a directory has files with the names that tokenizers use."""
    return any(any(directory.glob(pattern)) for pattern in _TOKENIZER_FILES)


def require_tokenizer_class(directory: Path) -> None:
    """Require that the class named by the files is a tokenizer that starts no programs: transformers would load any
    class, for example a model.

    Raises:
        DataError: it is another class.
    """
    from transformers import PreTrainedTokenizerBase
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    for name in stated_tokenizers(directory):
        for own in (name, name.removesuffix("Fast"), f"{name}Fast"):
            found = tokenizer_class_from_name(own)
            is_tokenizer = isinstance(found, type) and issubclass(found, PreTrainedTokenizerBase)
            if found is not None and (not is_tokenizer or _STARTS_PROGRAMS.match(own)):
                raise DataError(f"{directory} names {name} as its tokenizer, which is not a supported tokenizer")


def _vocabulary_files(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return sorted({"tokenizer.json", *tokenizer.vocab_files_names.values()})


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase, directory: Path, besides: Sequence[str] = ()) -> str:
    """Return a digest of the names and contents of the files that determine the behavior of a tokenizer, and others."""
    settings = [
        "added_tokens.json",
        "chat_template.jinja",
        "special_tokens_map.json",
        "tokenizer_config.json",
    ]
    digest = hashlib.sha256()
    for name in [*_vocabulary_files(tokenizer), *settings, *besides]:
        if (directory / name).is_file():
            digest.update(f"{name} {file_digest(directory / name)}\n".encode())
    return digest.hexdigest()
