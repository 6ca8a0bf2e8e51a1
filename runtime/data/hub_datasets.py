"""Read data sets of the hub from the local cache, and directories of data sets, with the library `datasets`. Offline.

A data set of the hub may be in the cache in two forms: its files, as `hf download` stores them, or the tables that
`datasets.load_dataset` has prepared from them. Both are found. Files are streamed: nothing is converted or copied.

Nothing of a data set is executed: `datasets` 4 has no loading scripts, only its own readers are used, and only those
that read plain data; a data set that names files outside its directory is rejected.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import itertools
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from runtime.console import quiet
from runtime.data.documents import Document, as_document
from runtime.data.file_formats import Record
from runtime.data.records import chosen_columns
from runtime.data.sources import DataPart, DataSource
from runtime.errors import DataError, SeqbuildError, UsageError
from runtime.host.hub import cached_snapshot, is_inside
from runtime.host.offline import offline
from runtime.host.regular_files import is_there, read_text, require_regular

_SAVED_NAMES = ("state.json", "dataset_dict.json")
_READERS = (
    "arrow",
    "audiofolder",
    "csv",
    "imagefolder",
    "json",
    "parquet",
    "text",
    "videofolder",
    "webdataset",
)
_LOGGERS = ("datasets", "datasets.load", "datasets.packaged_modules.cache.cache", "huggingface_hub.repocard")
_LONGEST_REASON = 300
_INSTALL = "pip install 'datasets>=4'"
_MOST_VALUES = 1_000_000  # of a card, with aliases
_BOUND = r"-?\d+%?"
_SLICE = re.compile(rf"(?P<name>[\w.-]+)(\[(?P<start>{_BOUND})?:(?P<end>{_BOUND})?\])?")


def is_saved(path: Path) -> bool:
    """Whether a directory was written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    return any(os.path.isfile(path / name) for name in _SAVED_NAMES)


def saved_parts(source: DataSource, path: Path) -> list[DataPart]:
    """Return the data set that `save_to_disk` wrote to a directory."""
    with _datasets(path) as datasets:
        _require_saved_inside(path)
        found = datasets.load_from_disk(str(path))
    splits = dict(found) if isinstance(found, datasets.DatasetDict) else {"train": found}
    return _parts(source, splits, path.name, [split._fingerprint for split in splits.values()], home=path)


def _require_saved_inside(path: Path) -> None:
    """Require that the tables of a saved data set are regular files in its directory; the library opens any."""
    for state in (path / "state.json", *path.glob("*/state.json")):
        if not is_there(state):
            continue
        for listed in ("_data_files", "_indices_files"):
            for file in json.loads(read_text(state)).get(listed) or ():
                name = str(file["filename"])
                if Path(name).is_absolute() or ".." in Path(name).parts:
                    raise DataError(f"{state} names {name!r}, which is outside of its directory", hint="save it again")
                require_regular(state.parent / name)


def directory_parts(source: DataSource, directory: Path) -> list[DataPart]:
    """Return the splits of a directory that has the layout of a data set on the hub."""
    splits, files = _streamed(source, directory, str(directory))
    states = [(Path(file).name, os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files]
    return _parts(source, splits, directory.name, states, home=directory)


def cached_parts(source: DataSource) -> list[DataPart]:
    """Return the splits of a data set in the local cache.

    Raises:
        DataError: it is not in the cache, or cannot be read.
    """
    name = source.location
    if importlib.util.find_spec("datasets") is None:  # most likely, a path is misspelled
        raise DataError(
            f"no file or directory {name} exists, and reading the data set {name} requires the package datasets",
            hint=_INSTALL,
        )
    failure: SeqbuildError | None = None
    snapshot = cached_snapshot(name, source.revision, kind="datasets")
    if snapshot is not None:
        try:
            splits, _ = _streamed(source, snapshot, name)
            return _parts(source, splits, name, [snapshot.name], home=snapshot)
        except UsageError:
            raise
        except DataError as error:
            if error.__cause__ is None:  # the data set is rejected
                raise
            failure = error  # of the library: the cache may have the card alone
    if source.revision is None:
        prepared = _prepared(source)
        if prepared:
            from datasets.config import HF_DATASETS_CACHE

            identity = [split._fingerprint for split in prepared.values()]
            return _parts(source, prepared, name, identity, home=Path(HF_DATASETS_CACHE))
    at, option = (f" at {source.revision}", f" --revision {source.revision}") if source.revision else ("", "")
    why = f"no file or directory {name} exists, and the data set {name}{at} is not in the local cache"
    if failure is not None:
        why = f"{failure.message}; the data set in the local cache may be incomplete"
    command = f"hf download --repo-type dataset {name}{option}"
    raise DataError(why, hint=f"download it on a machine with a network: {command}")


def _streamed(source: DataSource, directory: Path, name: str) -> tuple[dict[str, Any], list[str]]:
    """Return the splits of a directory as streams, and the files of them."""
    with _datasets(name, source.config) as datasets:
        _require_own_files(directory)
        builder = datasets.load_dataset_builder(
            str(directory.absolute()), name=source.config, cache_dir=_scratch().name, token=False
        )
        _require_plain(builder, directory.absolute())
        splits = dict(builder.as_streaming_dataset())
    files = [str(file) for found in (builder.config.data_files or {}).values() for file in found]
    return splits, sorted(files)


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    """Return a directory for the cache that the library creates even for streams; it is removed with the process."""
    return tempfile.TemporaryDirectory(prefix="seqbuild-")


def _require_own_files(directory: Path) -> None:
    """Reject a card that names files outside the directory, before the library looks for them, on a network even."""
    from datasets.config import REPOCARD_FILENAME, REPOYAML_FILENAME
    from huggingface_hub import DatasetCard

    settings: list[Any] = []
    if (directory / REPOCARD_FILENAME).is_file():
        card: Any = DatasetCard(read_text(directory / REPOCARD_FILENAME))
        settings.append(card.data.to_dict())
    if (directory / REPOYAML_FILENAME).is_file():
        settings.append(yaml.safe_load(read_text(directory / REPOYAML_FILENAME)))
    for _ in _texts_in(settings, str(directory)):
        pass
    for value in _texts_in([table.get("configs") for table in settings if isinstance(table, dict)], str(directory)):
        if "://" in value or Path(value).is_absolute() or ".." in Path(value).parts:
            raise DataError(f"the card of {directory} names {value!r}, which is outside of it", hint="remove it")


def _texts_in(value: Any, name: str) -> Iterator[str]:
    """Yield the texts in nested values; aliases of YAML, which may be of any number or contain themselves, count."""
    values = [value]
    for _ in range(_MOST_VALUES):
        if not values:
            return
        value = values.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, (dict, list)):
            values += value.values() if isinstance(value, dict) else value
    raise DataError(f"the card of {name} has more than {_MOST_VALUES:,} values", hint="shorten it")


def _require_plain(builder: Any, root: Path) -> None:
    """Reject a reader that can execute code or connect to servers, and files outside the directory."""
    reader = type(builder).__module__.rpartition(".")[2]
    if reader not in _READERS:
        raise DataError(f"{root} has data for the reader {reader!r}", hint=f"supported are {', '.join(_READERS)}")
    for file in (file for found in (builder.config.data_files or {}).values() for file in found):
        if "://" in str(file) or root not in Path(os.path.normpath(file)).parents:
            raise DataError(f"{root} names {file}, which is outside of it", hint="remove it from its card")
        if not is_inside(Path(file), root.resolve()):
            raise DataError(f"{file} is a link to a file outside of the data set", hint="replace it with the file")


def _prepared(source: DataSource) -> dict[str, Any]:
    """Return the tables that `datasets.load_dataset` has prepared; empty if there are none."""
    name = source.location
    with _datasets(name, source.config) as datasets:
        from datasets.load import CachedDatasetModuleFactory

        try:
            CachedDatasetModuleFactory(name).get_module()
        except (FileNotFoundError, AssertionError):
            return {}
        # A data set of the same name as one of the library's readers is never prepared.
        builder = datasets.load_dataset_builder(name, name=source.config, token=False)
        _require_plain_cache(builder, name)
        return dict(builder.as_dataset())


def _require_plain_cache(builder: Any, name: str) -> None:
    if type(builder).__module__ != "datasets.packaged_modules.cache.cache":
        raise DataError(f"{name} is not a data set in the local cache")


@contextlib.contextmanager
def _datasets(what: object, config: str | None = None) -> Iterator[Any]:
    """Import `datasets` and keep it offline while the block runs; its errors name the data set."""
    try:
        import datasets
        from datasets import config as settings
    except ImportError as error:
        raise DataError(f"reading the data set {what} requires the package datasets", hint=_INSTALL) from error
    if int(datasets.__version__.partition(".")[0]) < 4:
        raise DataError(f"datasets {datasets.__version__} can execute code of a data set", hint=_INSTALL)
    before, is_silent = settings.HF_HUB_OFFLINE, datasets.are_progress_bars_disabled()
    settings.HF_HUB_OFFLINE = True
    datasets.disable_progress_bars()
    try:
        with offline(), quiet(*_LOGGERS, level=logging.CRITICAL):
            yield datasets
    except (SeqbuildError, MemoryError):
        raise
    except Exception as error:  # readers of many formats
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        stated = f" with the config {config}" if config is not None else ""
        why = " ".join(lines[:2])[:_LONGEST_REASON] or type(error).__name__
        message = f"the data set {what}{stated} cannot be read: {why}"
        if "onfig" in why:
            raise UsageError(message, hint="choose one with --config NAME") from error
        raise DataError(message) from error
    finally:
        settings.HF_HUB_OFFLINE = before
        if not is_silent:
            datasets.enable_progress_bars()


def _parts(
    source: DataSource, splits: Mapping[str, Any], name: str, identity: Sequence[object], *, home: Path
) -> list[DataPart]:
    """Return one part for each slice that the source states; its media are files in `home`."""
    wanted = source.split
    if wanted is None:
        if len(splits) != 1:
            raise UsageError(
                f"the data set {source.location} has the splits {', '.join(splits)}",
                hint="choose one with --split NAME",
            )
        wanted = next(iter(splits))
    facts = json.dumps([name, source.config, source.revision, list(identity)], default=str)
    found = []
    for text in wanted.split("+"):
        match = _SLICE.fullmatch(text.strip())
        if match is None:
            raise UsageError(f"--split is {text!r}", hint="write a name, or a part of it: train[:512], train[10%:20%]")
        if match["name"] not in splits:
            raise UsageError(
                f"the data set {source.location} has no split {match['name']!r}", hint=f"it has {', '.join(splits)}"
            )
        label = " ".join(part for part in (name, source.config, text.strip()) if part)
        found.append(
            DataPart(
                name=label,
                records=partial(
                    _rows, splits[match["name"]], (match["start"], match["end"]), label, source.columns, home
                ),
                digest=partial(_sha256, f"{facts} {text.strip()}"),
            )
        )
    return found


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _rows(
    split: Any, bounds: tuple[str | None, str | None], name: str, columns: tuple[str, ...], home: Path
) -> Iterator[Record]:
    with _datasets(name) as datasets:
        is_table = isinstance(split, datasets.Dataset)
        split = _with_fields(split, name, columns)
        start, end = bounds
        if start is None and (end is None or end.isdecimal()):
            first, last = 0, None if end is None else int(end)
        else:
            count = len(split) if is_table else sum(1 for _ in split)
            first, last = _bound(start, 0, count), _bound(end, count, count)
    if is_table:
        last = len(split) if last is None else min(last, len(split))
        for number in range(first, last):
            yield partial(_table_row, split, number, f"row {number + 1} of {name}", columns, home)
        return
    rows = itertools.islice(split, first, last)
    for number in itertools.count(first + 1):
        with _datasets(name):
            row = next(rows, None)
        if row is None:
            return
        yield partial(_row, row, f"row {number} of {name}", columns, home)


def _table_row(split: Any, number: int, where: str, columns: tuple[str, ...], home: Path) -> Document:
    with _datasets(where):
        row = split[number]
    return _row(row, where, columns, home)


def _row(row: Mapping[str, Any], where: str, columns: tuple[str, ...], home: Path) -> Document:
    return as_document(row, where, columns).relative_to(home, home)


def _with_fields(split: Any, name: str, columns: tuple[str, ...]) -> Any:
    """Leave the columns out that are not read: images and numbers take time."""
    names = split.column_names
    if names is None:
        names = list(next(iter(split.take(1)), {}))
    split = split.select_columns(chosen_columns(names, columns, name))
    found = split.features or {}
    plain = {column: _undecoded(feature) for column, feature in found.items()}
    for column in (column for column in plain if plain[column] != found[column]):
        split = split.cast_column(column, plain[column])
    return split


def _undecoded(feature: Any) -> Any:
    """Return a feature of `datasets` without its decoders, which would open any file or address that a row names.

    Media are opened later, by the same code as those of files.
    """
    if isinstance(feature, dict):
        return {name: _undecoded(part) for name, part in feature.items()}
    changes = {"decode": False} if getattr(feature, "decode", False) is True else {}
    if hasattr(feature, "feature"):  # a list
        changes["feature"] = _undecoded(feature.feature)
    return replace(feature, **changes) if changes else feature


def _bound(text: str | None, default: int, count: int) -> int:
    """Return the row that a bound of a slice states, as `datasets` computes it."""
    if text is None:
        return default
    number = round(int(text[:-1]) * count / 100) if text.endswith("%") else int(text)
    return min(max(number + count if number < 0 else number, 0), count)
