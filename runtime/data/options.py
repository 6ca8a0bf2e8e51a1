"""The options that decide which samples are made of which data."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from runtime.data.file_formats import require_format
from runtime.data.sources import STANDARD_INPUT, DataSource, parse_source
from runtime.errors import UsageError

DEFAULT_SEQ_LEN = 2048
_MOST_NAMES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class DataOptions:
    """What is read, how it becomes samples, and how many.

    Attributes:
        sources: data arguments (`runtime.data.sources`), read in this order.
        num_samples: the number of samples, spread evenly; None for all.
        default_samples: the maximum if `num_samples` is None; None for no maximum.
        seq_len: tokens in a window, or the maximum of a sample; None for the default.
        default_length: the default, reduced to the tokenizer's maximum and to the length of the text; None to cut
            nothing, which requires that nothing is packed.
        pack: join documents and cut windows, instead of one sample for each document.
        loss_mask: in conversations, count only the text of the assistant.
        shuffle: take the documents in a random order, instead of evenly spread ones.
        seed: of that order; None for 0.
        columns: the fields to read, for sources that state none.
        format: the format of files, for sources that state none.
        split: the split of data sets, for sources that state none.
        config: the configuration of data sets, for sources that state none.
        revision: the revision of data sets, for sources that state none.
        show: the number of samples to print.
    """

    sources: tuple[str | Path | DataSource, ...] = ()
    num_samples: int | None = None
    default_samples: int | None = None
    seq_len: int | None = None
    default_length: int | None = None
    pack: bool = True
    loss_mask: bool = False
    shuffle: bool = False
    seed: int | None = None
    columns: tuple[str, ...] = ()
    format: str | None = None
    split: str | None = None
    config: str | None = None
    revision: str | None = None
    show: int = 0


def data_sources(options: DataOptions) -> list[DataSource]:
    """Parse the data arguments and complete them with the settings for all sources.

    Raises:
        UsageError: an argument is invalid, or a setting applies to no source.
    """
    if not options.sources:
        raise UsageError("no data given", hint="pass a file, a directory or the id of a data set")
    if options.seed is not None and not options.shuffle:
        raise UsageError(f"--seed {options.seed} has no effect without --shuffle", hint="add --shuffle")
    require_format(options.format)
    given = [source if isinstance(source, DataSource) else parse_source(source) for source in options.sources]
    if [source.location for source in given].count(STANDARD_INPUT) > 1:
        raise UsageError("standard input is given twice", hint="it can be read only once")
    settings = {"split": options.split, "config": options.config, "revision": options.revision}
    if any(settings.values()) and all(_is_file(source) for source in given):
        name = next(name for name, value in settings.items() if value)
        raise UsageError(f"{name} {settings[name]!r} applies to data sets, but the data are files", hint="leave it out")
    return [_completed(source, options) for source in given]


def names_of(locations: Sequence[str]) -> str:
    """Name the sources of data in a message."""
    names = ["standard input" if name == STANDARD_INPUT else name for name in locations]
    rest = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + rest


def _completed(source: DataSource, options: DataOptions) -> DataSource:
    is_file = _is_file(source)
    return replace(
        source,
        columns=source.columns or options.columns,
        format=source.format or options.format,
        split=source.split or (None if is_file else options.split),
        config=source.config or (None if is_file else options.config),
        revision=source.revision or (None if is_file else options.revision),
    )


def _is_file(source: DataSource) -> bool:
    return source.location == STANDARD_INPUT or os.path.isfile(source.location)
