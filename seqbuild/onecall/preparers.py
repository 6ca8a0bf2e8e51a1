"""The tokenizer and the processor of a call: objects, or where to load them from."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.arguments import shown
from runtime.data.processor_files import PROCESSOR_FILES, processor_in
from runtime.data.tokenizer import has_tokenizer, load_tokenizer
from runtime.errors import DataError, UsageError
from runtime.host.hub import resolve_directory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from seqbuild.onecall.arguments import OneshotOptions


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
        DataError: neither has a tokenizer.
    """
    from transformers import PreTrainedTokenizerBase

    for preparer in preparers:
        found = getattr(preparer, "tokenizer", preparer)
        if isinstance(found, PreTrainedTokenizerBase):
            return copy.deepcopy(found)  # a tokenizer keeps, and saves, the length at which it last cut a text
    if not has_tokenizer(directory):
        raise DataError("the data is text, and the model has no tokenizer", hint="pass tokenizer=, or tokenized rows")
    return load_tokenizer(directory)


def _loaded(name: str, value: Any) -> Any:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

    if isinstance(value, (PreTrainedTokenizerBase, ProcessorMixin)):
        return value
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise UsageError(f"{name} is {shown(value)}", hint=f"pass a {name} of transformers, a directory or a hub id")
    directory = resolve_directory(value, what="tokenizer")
    is_processor = name == "processor" and any((directory / file).is_file() for file in PROCESSOR_FILES[:2])
    return processor_in(directory) if is_processor else load_tokenizer(directory)
