"""A data argument: where records come from, and how they are read.

An argument is a location, optionally followed by `::` and settings for this source alone:

    chat.jsonl                              a file
    texts/                                  all supported files of a directory, in sorted order
    -                                       standard input
    owner/name                              a data set of the hub in the local cache
    owner/name::config=en,split=train[:512] with a configuration and a split
    chat.jsonl::weight=0.7                  with its share of the samples
    qa.csv::column=prompt=ask,column=completion=reply

Settings are `weight`, `format`, `split`, `config`, `revision` and `column`, which may be repeated. An existing path is
never cut at `::`.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from runtime.data.file_formats import Record, require_format
from runtime.errors import UsageError

STANDARD_INPUT = "-"
_MARK = "::"
_URL = re.compile(r"(?:hf|https?)://(?:(?:(?:huggingface\.co|hf\.co)/)?datasets/([\w.-]+/[\w.-]+))?")
_LONGEST_ARGUMENT = 4096
_SETTINGS = ("weight", "format", "split", "config", "revision", "column")
_HINT = f"write SOURCE{_MARK}NAME=VALUE,NAME=VALUE with the names {', '.join(_SETTINGS)}"


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSource:
    """A data argument.

    Attributes:
        location: a path, `-` for standard input, or the id of a data set on the hub.
        weight: the share of the samples relative to other sources; None if sources are not mixed by weight.
        format: the format of a file; None to take it from the name.
        split: the split of a data set, such as `train` or `train[:512]`.
        config: the configuration (subset) of a data set.
        revision: the branch, tag or commit of a data set on the hub.
        columns: the fields to read, as for `as_document`.
    """

    location: str
    weight: float | None = None
    format: str | None = None
    split: str | None = None
    config: str | None = None
    revision: str | None = None
    columns: tuple[str, ...] = ()

    @property
    def is_of_data_set(self) -> bool:
        """Whether it has settings that only data sets have."""
        return any(value is not None for value in (self.split, self.config, self.revision))


@dataclass(frozen=True, kw_only=True, slots=True)
class DataPart:
    """One file or data set of a source.

    Attributes:
        name: its name in the token file, without its folder.
        records: iterates over its records in order.
        digest: computes the SHA-256 that identifies its content; called after the records were read.
    """

    name: str
    records: Callable[[], Iterator[Record]]
    digest: Callable[[], str]


def parse_source(text: str | Path) -> DataSource:
    """Parse a data argument.

    Raises:
        UsageError: a setting is unknown or its value invalid.
    """
    argument = str(text)
    if not argument or "\0" in argument:
        raise UsageError(f"the data argument is {argument!r}", hint="pass a file, a directory or the id of a data set")
    if len(argument) > _LONGEST_ARGUMENT:
        raise UsageError(
            f"the data argument has {len(argument):,} characters, beginning with {argument[:40]!r}",
            hint="pass a file, a directory or the id of a data set, not the text itself",
        )
    url = _URL.match(argument)
    if url is not None and not os.path.exists(argument):
        hint = f"pass the id of the data set: {url[1]}" if url[1] else "download it, and pass the file"
        raise UsageError(f"{argument} is a URL, and nothing is downloaded", hint=hint)
    location, mark, settings = argument.partition(_MARK)
    if isinstance(text, Path) or not mark or os.path.exists(argument):
        return DataSource(location=argument)
    source = DataSource(location=location)
    for setting in settings.split(","):
        name, _, value = setting.partition("=")
        if name not in _SETTINGS or not value or not location:
            raise UsageError(f"{argument} has the invalid setting {setting!r}", hint=_HINT)
        if name == "column":
            source = replace(source, columns=(*source.columns, value))
        elif name == "weight":
            source = replace(source, weight=_weight(value, argument))
        else:
            changes: dict[str, str] = {name: value}
            source = replace(source, **changes)  # type: ignore[arg-type]
    require_format(source.format)
    return source


def _weight(text: str, argument: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise UsageError(f"{argument} has the weight {text!r}", hint="a weight is a number above 0, such as 0.7")
    return weight
