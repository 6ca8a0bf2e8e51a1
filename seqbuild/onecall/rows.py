"""Choose the rows of a data set in memory: of `datasets`, a list, or anything that can be iterated.

Rows of a data set with a length are chosen at random, with a seed, and stay in its order. Others are read from the
beginning, no further than needed, so that a stream or an endless generator can be used.
"""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from runtime.arguments import shown
from runtime.errors import DataError, UsageError

if TYPE_CHECKING:
    from seqbuild.onecall.arguments import OneshotOptions

EXPECTED = (
    "pass a data set of the datasets library, a DataLoader, an iterable of records, a path, or the id of a data set"
)
_DEFAULT_SPLIT = "train"
# Their tables iterate over columns.
_HINTS = {"pandas": 'pass frame.to_dict("records")', "polars": "pass frame.to_dicts()"}


def is_loader(dataset: Any) -> bool:
    """Whether it is torch's DataLoader, or a subclass."""
    return any(kind.__name__ == "DataLoader" and kind.__module__.startswith("torch.") for kind in type(dataset).__mro__)


def require_dataset(options: OneshotOptions) -> Any:
    """Return the data set in memory, or the split of it; nothing is read.

    Raises:
        UsageError: it is of an unsupported type, or has no such split.
    """
    dataset, split = options.dataset, options.splits
    library = type(dataset).__module__.partition(".")[0]
    if library == "datasets" and isinstance(dataset, Mapping):
        return _split_of(dataset, split)
    hint = _HINTS.get(library, EXPECTED)
    if isinstance(dataset, Mapping):
        hint = "put it into a list: [row]"
    is_rows = not isinstance(dataset, type) and (isinstance(dataset, Iterable) or _is_indexed(dataset))
    if callable(dataset) and not is_rows:
        hint = "call it, and pass what it returns"
    if not is_rows or library in _HINTS or isinstance(dataset, (bytes, bytearray, Mapping)):
        raise UsageError(f"dataset is {shown(dataset)}", hint=hint)
    if split is not None:
        raise UsageError(f"splits is {split!r}, but the data set has none", hint="leave splits out")
    return dataset


def chosen_rows(dataset: Any, options: OneshotOptions) -> Iterator[Any]:
    """Yield the rows to calibrate with, prepared by the caller's function if there is one.

    Raises:
        DataError: there is none.
    """
    found = _raw_rows(dataset, options)
    first = next(found, None)
    if first is None:
        raise DataError("the data set has no rows", hint="an iterator can be read only once: pass a new one")
    prepare: Callable[[Any], Any] = options.preprocessing_func or (lambda row: row)
    for row in itertools.chain((first,), found):
        yield prepare(row)


def _raw_rows(dataset: Any, options: OneshotOptions) -> Iterator[Any]:
    count = options.num_calibration_samples
    if not _is_indexed(dataset):
        yield from dataset
        return
    indices: Sequence[int] = range(len(dataset))
    if options.shuffle_calibration_samples and count < len(dataset):
        order = random.Random(options.seed)
        # Of joined texts, it is unknown how many are needed.
        is_joined = options.concatenate_data
        indices = order.sample(indices, len(dataset)) if is_joined else sorted(order.sample(indices, count))
    for index in indices:
        yield dataset[index]


def _is_indexed(dataset: Any) -> bool:
    is_stream = any(kind.__name__ == "IterableDataset" for kind in type(dataset).__mro__)
    return hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__") and not is_stream


def _split_of(dataset: Mapping[str, Any], split: str | None) -> Any:
    """Return a split such as `train` or `train[:10%]`; by default `train`, or the only one."""
    names = list(dataset)
    if split is None:
        split = _DEFAULT_SPLIT if _DEFAULT_SPLIT in names or len(names) != 1 else names[0]
    name = split.partition("[")[0]
    if name not in names:
        raise UsageError(f"the data set has no split {name!r}", hint=f"its splits are {', '.join(map(repr, names))}")
    found = dataset[name]
    if name == split:
        return found
    if not _is_indexed(found):
        raise UsageError(f"the split {split!r} is a part of a stream", hint="pass dataset[name].take(number)")
    library: Any = sys.modules["datasets"]
    try:
        parts = library.ReadInstruction.from_spec(split).to_absolute({name: len(found)})
    except (ValueError, AssertionError) as error:
        raise UsageError(f"splits is {split!r}: {error}", hint="write it as train[:512] or train[:10%]") from error
    return found.select([index for part in parts for index in range(part.from_, part.to)])
