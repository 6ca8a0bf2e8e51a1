"""The tokenizer and the processor of a call: objects, or where to load them from."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.arguments import shown
from runtime.data.tokenizer import load_tokenizer
from runtime.errors import DataError, UsageError
from runtime.host.hub import resolve_directory
from runtime.host.offline import offline

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from seqbuild.onecall.arguments import OneshotOptions


_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")


def given_preparers(options: OneshotOptions) -> tuple[Any, ...]:
    """Return the tokenizer and the processor that the caller gave, loaded.

    Raises:
        UsageError: one is of another type.
        DataError: one cannot be loaded.
    """
    given = {"tokenizer": options.tokenizer, "processor": options.processor}
    return tuple(_loaded(name, value) for name, value in given.items() if value is not None)


def tokenizer_of(preparers: Sequence[Any], directory: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the caller, otherwise that of the model's directory.

    Raises:
        DataError: there is none.
    """
    from transformers import PreTrainedTokenizerBase

    for preparer in preparers:
        found = getattr(preparer, "tokenizer", preparer)
        if isinstance(found, PreTrainedTokenizerBase):
            return copy.deepcopy(found)  # a tokenizer keeps, and saves, the length at which it last cut a text
    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        raise DataError("the data is text, and the model has no tokenizer", hint="pass tokenizer=, or tokenized rows")
    return load_tokenizer(directory)


def _loaded(name: str, value: Any) -> Any:
    from transformers import AutoProcessor, PreTrainedTokenizerBase, ProcessorMixin

    if isinstance(value, (PreTrainedTokenizerBase, ProcessorMixin)):
        return value
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise UsageError(f"{name} is {shown(value)}", hint=f"pass a {name} of transformers, a directory or a hub id")
    directory = resolve_directory(value, what="tokenizer")
    if name == "tokenizer":
        return load_tokenizer(directory)
    try:
        with offline():
            return AutoProcessor.from_pretrained(  # type: ignore[no-untyped-call]
                directory, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # transformers raises many kinds of exceptions
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"the processor in {directory} cannot be loaded: {why}", hint="pass the processor itself"
        ) from error
