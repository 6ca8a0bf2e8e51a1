"""Select the layers to keep when a config is made shallow, and adapt its entries about layers.

A layer's kind consists of all config entries about it: its entries in lists with one entry for each layer, whether its
index is in a list of indices, and on which side of each boundary it lies (`first_k_dense_replace` and the like). The
first layer of each kind is kept, and enough others to form a chain.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BY_LAYER = ("per_layer_config",)
_FEWEST, _WITH_TWO_KINDS, _MOST = 3, 4, 9

_DEPTH = re.compile(
    r"(.*_)?(num_hidden_layers|n_layers?|num_layers|num_layers_per_stack|depth|(en|de)coder_layers|num_(en|de)coder_layers"
    r"|layers|num_blocks|conf_num_hidden_layers)|num_self_attends_per_block"
)
_MAIN_DEPTH = re.compile(r"num_hidden_layers|n_layers?|num_layers|depth|layers|decoder_layers|num_blocks")
_FIRST = re.compile(
    r"first_k_dense_replace|(.*_)?num_dense_layers|moe_layer_(start|end)_index|num_hash_layers|max_window_layers"
    r"|loop_layer_index_(start|end)"
)
_LAST = re.compile(r"num_kv_shared_layers")
_PARTS = ("n_input_layers", "n_recurrent_layers", "n_output_layers")
_INDICES = re.compile(r".*_(layers|layer_ids|layer_indices|layers_indices|idxs|indexes|block_indices|block_indexes)")
_SOURCES = re.compile(r"kv_source_layers")


@dataclass(frozen=True, kw_only=True, slots=True)
class Layers:
    """Layers to keep for one table of a config.

    Attributes:
        kept: for each depth in the table, the old indices of the kept layers, ascending.
        main: the depth to which boundaries and lists of indices refer; 0 if there is none.
    """

    kept: Mapping[int, Sequence[int]]
    main: int

    @classmethod
    def of(cls, table: Mapping[str, Any]) -> Layers:
        """Choose the layers to keep for `table`, whose sequences are lists."""
        depths = {key: value for key, value in table.items() if _is_depth(key, value)}
        main = next((value for key, value in depths.items() if _MAIN_DEPTH.fullmatch(key)), 0)
        return cls(kept={depth: _choose(table, depth, depth == main) for depth in depths.values()}, main=main)

    def entry(self, key: str, value: Any) -> Any:
        """Return the new `value`, or `value` itself if it does not refer to layers."""
        if _is_depth(key, value):
            return len(self.kept[value])
        if isinstance(value, list):
            return self._list(key, value)
        kept = self.kept.get(self.main, ())
        if type(value) is not int or value <= 0 or not self.main:
            return value
        if _FIRST.fullmatch(key):
            return sum(index < value for index in kept)
        if _LAST.fullmatch(key):
            return sum(index >= self.main - value for index in kept)
        return value

    def _list(self, key: str, items: list[Any]) -> list[Any]:
        kept = self.kept.get(self.main, ())
        if self.main and _SOURCES.fullmatch(key) and len(items) == self.main:
            return _sources(items, kept)
        if self.main and is_index_list(key, items, self.main):
            return [new for new, old in enumerate(kept) if old in items]
        return next(
            ([items[index] for index in kept] for depth, kept in self.kept.items() if len(items) == depth), items
        )

    def is_by_layer(self, items: Sequence[Any]) -> bool:
        """Return whether a list has one entry for each layer."""
        return len(items) in self.kept

    def by_layer(self, value: Mapping[str, Any]) -> dict[str, Any]:
        """Return a table of single layers' entries, under the new numbers."""
        kept = next(iter(self.kept.values()), ())
        entries = {int(index): entry for index, entry in value.items()}
        return {str(new): entries[old] for new, old in enumerate(kept) if old in entries}

    def parts(self, table: Mapping[str, Any]) -> dict[str, int]:
        """Return the new sizes of the consecutive parts that a table divides its layers into."""
        kept, start, sizes = self.kept.get(self.main, ()), 0, {}
        for name in _PARTS:
            if name in table:
                sizes[name] = sum(start <= index < start + table[name] for index in kept)
                start += table[name]
        return sizes


def is_index_list(key: str, items: Sequence[Any], depth: int) -> bool:
    """Return whether a list contains layer indices, instead of one entry for each layer."""
    return bool(
        items
        and _INDICES.fullmatch(key)
        and all(type(item) is int and 0 <= item < depth for item in items)
        and len(set(items)) == len(items)
        and not (len(items) == depth and set(items) <= {0, 1})
    )


def _is_depth(key: str, value: Any) -> bool:
    return (
        type(value) is int
        and value > 0
        and key not in _PARTS
        and not any(pattern.fullmatch(key) for pattern in (_FIRST, _LAST))
        and bool(_DEPTH.fullmatch(key))
    )


def _choose(table: Mapping[str, Any], depth: int, is_main: bool) -> list[int]:
    """Return the layers to keep, ascending; pairs if every second one is the other half of a layer."""
    labels = _labels(table, depth, is_main)
    stride = 2 if any(set(label[1::2]) == {"mlp"} and "mlp" not in label[::2] for label in labels) else 1
    kinds: dict[tuple[str, ...], list[int]] = {}
    for index in range(depth // stride):
        kind = tuple(label[index * stride + part] for label in labels for part in range(stride))
        kinds.setdefault(kind, []).append(index)
    kept = sorted(indices[0] for indices in kinds.values())[:_MOST]
    wanted = min(depth // stride, _FEWEST if len(kinds) == 1 else _WITH_TWO_KINDS)
    seconds = sorted(index for indices in kinds.values() for index in indices[1:2])
    for index in [*seconds, *range(depth // stride)]:
        if len(kept) >= wanted:
            break
        if index not in kept:
            kept.append(index)
    return [index * stride + part for index in sorted(kept) for part in range(stride)]


def _labels(table: Mapping[str, Any], depth: int, is_main: bool) -> list[list[str]]:
    """Return one list of `depth` labels for each entry of the table about layers."""
    labels: list[list[str]] = []
    for key, value in table.items():
        if key in BY_LAYER and isinstance(value, Mapping):
            entries = {int(index): str(entry) for index, entry in value.items()}
            labels.append([entries.get(index, "") for index in range(depth)])
        elif isinstance(value, (list, tuple)):
            if is_main and is_index_list(key, value, depth) and not _SOURCES.fullmatch(key):
                labels.append([str(index in value) for index in range(depth)])
            elif len(value) == depth and not any(isinstance(item, Mapping) for item in value):
                if _SOURCES.fullmatch(key):
                    labels.append([str(source == index) for index, source in enumerate(value)])
                elif len(set(map(str, value))) < max(2, depth) or isinstance(value[0], str):
                    labels.append(list(map(str, value)))
        elif is_main and type(value) is int and 0 < value <= depth:
            if _FIRST.fullmatch(key):
                labels.append([str(index < value) for index in range(depth)])
            elif _LAST.fullmatch(key):
                labels.append([str(index >= depth - value) for index in range(depth)])
    sizes = [int(table[name]) for name in _PARTS if name in table]
    if is_main and sum(sizes) == depth:
        labels.append([str(part) for part, size in enumerate(sizes) for _ in range(size)])
    return labels


def _sources(sources: Sequence[int], kept: Sequence[int]) -> list[int]:
    """Return the layer whose keys and values each layer uses: the same if it is kept, else the last with its own."""
    result: list[int] = []
    for new, old in enumerate(kept):
        own = [place for place in range(new) if result[place] == place]
        if sources[old] == old or not own:
            result.append(new)
        else:
            result.append(kept.index(sources[old]) if sources[old] in kept else own[-1])
    return result
