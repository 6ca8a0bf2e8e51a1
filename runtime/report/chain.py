"""The chain of an artifact: its subgraphs, and the values and bytes that cross between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runtime.artifact.size_expressions import size_of
from runtime.errors import ArtifactError
from runtime.report.facts import name_of

if TYPE_CHECKING:
    from runtime.artifact.manifest import Manifest, SubgraphEntry

_BYTES = {"bool": 1, "uint8": 1, "int8": 1, "int16": 2, "int32": 4, "int64": 8}
_BYTES |= {
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "complex64": 8,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class CrossingValue:
    """A value between subgraphs.

    Attributes:
        name: of the value.
        shape: in symbols, and for the stated sizes.
        dtype: of its numbers.
        num_bytes: of one batch; None if it depends on values, or is no tensor.
        is_freed: whether no later subgraph needs it.
    """

    name: str
    shape: str
    dtype: str
    num_bytes: int | None
    is_freed: bool = False

    @property
    def is_tensor(self) -> bool:
        """Whether it is a tensor, not a number or a container."""
        return self.dtype in _BYTES


@dataclass(frozen=True, kw_only=True, slots=True)
class ChainLink:
    """A subgraph in the chain.

    Attributes:
        index: its position.
        targets: the modules at which the model was cut, if any.
        calls: other modules that it calls.
        parameters: its weights, by size.
        weights_bytes: of all its weights.
        inputs, outputs: values.
        kept_bytes: of the values that later subgraphs still need after it, itself included; of one batch.
        file: of its code, and `same_as` the first subgraph with this file.
    """

    index: int
    targets: Sequence[str]
    calls: Sequence[str]
    parameters: Sequence[tuple[str, str, int]]
    weights_bytes: int
    inputs: Sequence[CrossingValue]
    outputs: Sequence[CrossingValue]
    kept_bytes: int
    file: str
    same_as: int
    opaque: Sequence[str]

    @property
    def freed(self) -> list[str]:
        """The inputs that are freed after it."""
        return [value.name for value in self.inputs if value.is_freed]

    @property
    def label(self) -> str:
        """Its targets, or its position in the model."""
        return ", ".join(self.targets) if self.targets else ", ".join(self.calls[:2]) or "no module"


def chain_of(manifest: Manifest, sizes: Mapping[str, int]) -> list[ChainLink]:
    """Describe the chain for a batch of these sizes."""
    described = {entry.name: entry for entry in manifest.inputs} | dict(manifest.values)
    firsts: dict[str, int] = {}
    held: dict[str, int] = {}
    for entry in manifest.inputs:
        held[entry.name] = _value(manifest, described, entry.name, sizes).num_bytes or 0
    links = []
    for index, subgraph in enumerate(manifest.subgraphs):
        outputs = [_value(manifest, described, name, sizes) for name in subgraph.output_names]
        freed = frozenset(subgraph.consumed_names)
        inputs = [_value(manifest, described, name, sizes, name in freed) for name in subgraph.input_names]
        for name in freed:
            held.pop(name, None)
        held |= {value.name: value.num_bytes or 0 for value in outputs}
        parameters = _parameters(manifest, subgraph)
        links.append(
            ChainLink(
                index=index,
                targets=subgraph.targets,
                calls=subgraph.submodules,
                parameters=parameters,
                weights_bytes=sum(size for _, _, size in parameters),
                inputs=inputs,
                outputs=outputs,
                kept_bytes=sum(held.values()),
                file=subgraph.file,
                same_as=firsts.setdefault(subgraph.file, index),
                opaque=subgraph.opaque,
            )
        )
    return links


def _parameters(manifest: Manifest, subgraph: SubgraphEntry) -> list[tuple[str, str, int]]:
    """The name, shape and bytes of each weight, the largest first."""
    found = []
    for name in subgraph.parameters:
        entry = manifest.parameters[name]
        found.append((name, f"{entry.dtype} {list(entry.shape)}", entry.bytes))
    return sorted(found, key=lambda one: -one[2])


def _value(
    manifest: Manifest, described: Mapping[str, object], name: str, sizes: Mapping[str, int], is_freed: bool = False
) -> CrossingValue:
    entry = described.get(name)
    shape: Sequence[int | str] = getattr(entry, "shape", ())
    dtype = str(getattr(entry, "dtype", ""))
    found = [_size(size, sizes) for size in shape]
    own = manifest.model.dtype if dtype == "model" else dtype
    itemsize = _BYTES.get(own.removeprefix("torch."))
    num_bytes = None
    if itemsize is not None and all(size is not None for size in found):
        num_bytes = itemsize
        for size in found:
            num_bytes *= max(size or 0, 0)
    symbols = ", ".join(str(size) for size in shape)
    return CrossingValue(
        name=name,
        shape=f"[{name_of(symbols)}]",
        dtype=own.removeprefix("torch."),
        num_bytes=num_bytes,
        is_freed=is_freed,
    )


def _size(size: int | str, sizes: Mapping[str, int]) -> int | None:
    if isinstance(size, int):
        return size
    try:
        return size_of(size, sizes)
    except ArtifactError:  # it depends on values
        return None
