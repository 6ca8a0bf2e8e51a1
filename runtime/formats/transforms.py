"""Write and read the `transform_config` of a checkpoint: rotations that a reader computes while the model runs.

A group has one matrix for each size, and places where it is applied. At the locations `weight_input` and
`weight_output` the stored weights include it; at the others a reader applies it:

    input    x becomes x T / sqrt(n) before the module
    output   y becomes y T / sqrt(n) after it
    q_attn   the queries, and
    k_cache  the keys that enter the cache, after the rotary embedding

and T^T instead of T at a place with `inverse`. `runtime.algorithms.hadamard` defines T. The checkpoint stores T, with
entries +1 and -1, as `MODULE.GROUP_LOCATION.weight` of the first module that it is applied to.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from runtime.algorithms.hadamard import LARGEST_SIZE, Hadamard, is_power_of_two, known_factor
from runtime.console import shown
from runtime.errors import QuantizationError
from runtime.formats.targets import class_names, matches_name
from runtime.patterns import fault

if TYPE_CHECKING:
    import torch
    from torch import nn

INPUT, OUTPUT, QUERIES, KEYS = "input", "output", "q_attn", "k_cache"
ONLINE = (INPUT, OUTPUT, QUERIES, KEYS)
OF_WEIGHTS = ("weight_input", "weight_output")  # the stored weights include these
OF_ATTENTION = (QUERIES, KEYS)
HADAMARD, RANDOM_HADAMARD = "hadamard", "random-hadamard"
TYPES = (HADAMARD, RANDOM_HADAMARD)
PRECISIONS = ("float64", "float32", "bfloat16", "float16")
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_MOST = 1000  # groups, places of a group, patterns of a place
_ROWS_AT_A_TIME = 64
NO_TRANSFORMS: tuple[Any, ...] = (None, {}, [])


class TransformConfigError(ValueError):
    """A transform_config is invalid or unsupported; the text says how."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformPlace:
    """Where a matrix is applied.

    Attributes:
        location: see the module's description.
        targets: patterns of modules.
        ignore: patterns of modules to which it is not applied.
        inverse: whether the transposed matrix is applied.
    """

    location: str
    targets: tuple[str, ...]
    ignore: tuple[str, ...] = ()
    inverse: bool = False

    def matches(self, name: str, module_class: type | str) -> bool:
        """Whether it applies to a module."""
        known = class_names(module_class)

        def is_any(patterns: Sequence[str]) -> bool:
            return any(matches_name(pattern, name) or pattern in known for pattern in patterns)

        return is_any(self.targets) and not is_any(self.ignore)


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformGroup:
    """A matrix and its places.

    Attributes:
        name: its key in the config.
        kind: one of `TYPES`.
        places: in the config's order.
        block: the size of the matrix, which multiplies consecutive blocks; None for all features of a module.
        precision: the dtype of the computation.
    """

    name: str
    kind: str
    places: tuple[TransformPlace, ...]
    block: int | None = None
    precision: str = "float64"

    def as_config(self) -> dict[str, Any]:
        """Return the group as compressed-tensors writes it."""
        return {
            "type": self.kind,
            "apply": [
                {
                    "targets": list(place.targets),
                    "location": place.location,
                    "inverse": place.inverse,
                    "ignore": list(place.ignore),
                }
                for place in self.places
            ],
            "randomize": False,
            "requires_grad": False,
            "head_dim": self.block,
            "precision": f"torch.{self.precision}",
        }

    def size_for(self, features: int) -> int:
        """Return the size of the matrix for so many features.

        Raises:
            QuantizationError: no matrix of this size is supported, or it does not divide the features.
        """
        size = self.block or features
        if features % size:
            raise QuantizationError(f"blocks of {size} do not divide {features} features")
        if self.kind == HADAMARD and not is_power_of_two(size):
            raise QuantizationError(f"type {HADAMARD} needs a power of two, not {size}")
        known_factor(size)
        return size


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleTransform:
    """A matrix at a place of one module, of `size` features."""

    module: str
    group: TransformGroup
    location: str
    inverse: bool
    size: int

    @property
    def matrix(self) -> tuple[str, int]:
        """A value that is equal for places with the same matrix."""
        return self.group.name, self.size

    @property
    def tensor(self) -> str:
        """The last parts of the name of the stored matrix."""
        return f"{self.group.name}_{self.location}.weight"


def transform_config(groups: Sequence[TransformGroup]) -> dict[str, Any]:
    """Return the "transform_config" of these groups; empty for none."""
    return {"config_groups": {group.name: group.as_config() for group in groups}} if groups else {}


def read_transform_config(config: Any) -> tuple[TransformGroup, ...]:
    """Read a "transform_config", which is untrusted.

    Raises:
        TransformConfigError: if it is invalid, or has an unsupported type, location, size or field.
    """
    if config in NO_TRANSFORMS:
        return ()
    groups = _mapping(config, "transform_config", ("config_groups",)).get("config_groups")
    found = _mapping(groups, "config_groups", None)
    if len(found) > _MOST:
        raise TransformConfigError(f"it has {len(found)} groups, more than {_MOST}")
    return tuple(_group(name, value) for name, value in found.items())


def _mapping(value: Any, what: str, keys: Sequence[str] | None) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise TransformConfigError(f"{what} must be a mapping, not {shown(value)}")
    unknown = next((key for key in value if keys is not None and key not in keys), None)
    if unknown is not None:
        raise TransformConfigError(f"{what} has the unknown field {shown(unknown)}")
    return value


_GROUP_FIELDS = ("type", "apply", "randomize", "requires_grad", "head_dim", "precision")


def _group(name: str, value: Any) -> TransformGroup:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise TransformConfigError(f"the group {shown(name)} has an invalid name")
    entries = _mapping(value, f"the group {name}", _GROUP_FIELDS)
    apply = entries.get("apply", [])
    if not isinstance(apply, list) or len(apply) > _MOST:
        raise TransformConfigError(f"apply of the group {name} must be a list of at most {_MOST} places")
    group = TransformGroup(
        name=name,
        kind=str(entries.get("type"))[:80],
        places=tuple(_place(name, place) for place in apply),
        block=entries.get("head_dim"),
        precision=str(entries.get("precision", "float32")).removeprefix("torch.")[:80],
    )
    if not any(place.location in ONLINE for place in group.places):
        return group  # the stored weights include it
    if group.kind not in TYPES:
        raise TransformConfigError(f"the type {group.kind!r} of the group {name} is not {' or '.join(TYPES)}")
    if entries.get("randomize", False) is not False:
        raise TransformConfigError(f"the group {name} has randomize, whose permutations are not supported")
    if group.precision not in PRECISIONS:
        raise TransformConfigError(f"the precision {group.precision!r} of the group {name} is not supported")
    if group.block is not None and not _is_size(group.block):
        raise TransformConfigError(
            f"head_dim {shown(group.block)} of the group {name} is not a size up to {LARGEST_SIZE}"
        )
    return group


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= LARGEST_SIZE


def _place(name: str, value: Any) -> TransformPlace:
    entries = _mapping(value, f"a place of the group {name}", ("targets", "location", "inverse", "ignore"))
    location, inverse = entries.get("location"), entries.get("inverse", False)
    if location not in (*ONLINE, *OF_WEIGHTS):
        raise TransformConfigError(f"the location {shown(location)} of the group {name} is not supported")
    if not isinstance(inverse, bool):
        raise TransformConfigError(f"inverse of the group {name} must be true or false, not {shown(inverse)}")
    lists = {}
    for key in ("targets", "ignore"):
        given = entries.get(key, [])
        patterns = [given] if isinstance(given, str) else given
        if not isinstance(patterns, list) or len(patterns) > _MOST or not all(isinstance(p, str) for p in patterns):
            raise TransformConfigError(f"{key} of the group {name} must be a list of at most {_MOST} names")
        for pattern in patterns:
            wrong = fault(pattern.removeprefix("re:")) if pattern.startswith("re:") else ""
            if wrong:
                raise TransformConfigError(f"{pattern[:80]!r} is not a valid regular expression: {wrong}")
        lists[key] = tuple(patterns)
    return TransformPlace(location=location, inverse=inverse, **lists)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelTransforms:
    """The rotations that are computed while a model runs.

    Attributes:
        groups: of the checkpoint's transform_config.
        transforms: what is applied to each module, group by group.
        matrices: by `ModuleTransform.matrix`.
    """

    groups: tuple[TransformGroup, ...] = ()
    transforms: tuple[ModuleTransform, ...] = ()
    matrices: Mapping[tuple[str, int], Hadamard] = field(default_factory=dict)

    @property
    def attention(self) -> dict[str, Hadamard]:
        """The rotation of queries and keys by attention module."""
        return {one.module: self.matrices[one.matrix] for one in self.transforms if one.location in OF_ATTENTION}

    def at(self, location: str) -> dict[str, Hadamard]:
        """The rotations at a location by module."""
        return {one.module: self.matrices[one.matrix] for one in self.transforms if one.location == location}


def module_transforms(
    groups: Sequence[TransformGroup],
    modules: Mapping[str, type | str],
    features: Callable[[str, str], int | None],
) -> Iterator[ModuleTransform]:
    """Yield what is applied while the model runs, group by group, place by place, in the order of the modules.

    Args:
        groups: of a config.
        modules: classes, or their names, by module name.
        features: gets a module and a location; returns the number of features there, 0 for attention, None where
            nothing is applied.

    Raises:
        TransformConfigError: if two matrices are applied at the same place, or a size does not fit.
    """
    taken: dict[tuple[str, str], str] = {}
    for group in groups:
        for place in (place for place in group.places if place.location in ONLINE):
            for name, module_class in modules.items():
                count = features(name, place.location) if place.matches(name, module_class) else None
                if count is None:
                    continue
                other = taken.get((name, place.location))
                if other == group.name:
                    raise TransformConfigError(f"two places of the group {other} apply to {place.location} of {name}")
                if other is not None:
                    raise TransformConfigError(f"the groups {other} and {group.name} both apply to {name}")
                taken[name, place.location] = group.name
                if place.location in OF_ATTENTION and (group.block is None or place.inverse):
                    raise TransformConfigError(f"the group {group.name} on {name} needs a head_dim, and no inverse")
                try:
                    size = group.size_for(count or group.block or 0)
                except QuantizationError as error:
                    raise TransformConfigError(f"the group {group.name} on {name}: {error.message}") from error
                yield ModuleTransform(
                    module=name, group=group, location=place.location, inverse=place.inverse, size=size
                )
    one_sided = next((at for at in taken if at[1] in OF_ATTENTION and not _is_paired(at[0], taken)), None)
    if one_sided is not None:
        raise TransformConfigError(f"queries and keys of {one_sided[0]} must be transformed by one group")


def _is_paired(attention: str, taken: Mapping[tuple[str, str], str]) -> bool:
    return taken.get((attention, QUERIES)) == taken.get((attention, KEYS))


def features_in(
    model: nn.Module, called: Container[str], attentions: Container[str]
) -> Callable[[str, str], int | None]:
    """Return the function that `module_transforms` needs for a module tree.

    Args:
        model: the module tree.
        called: the parameters that the model uses.
        attentions: the attention modules whose queries and keys are known.
    """
    from torch import nn

    def features(name: str, location: str) -> int | None:
        module = model.get_submodule(name)
        if location in OF_ATTENTION and name in attentions:
            return 0
        if location in OF_ATTENTION or not isinstance(module, nn.Linear):
            raise TransformConfigError(
                f"{location} of {name or 'the whole model'} cannot be transformed: it is not a module of that kind"
            )
        if f"{name}.weight" not in called:
            return None
        num_out, num_in = module.get_parameter("weight").shape
        return num_in if location == INPUT else num_out

    return features


def stored_matrix(
    read_rows: Callable[[int, int], torch.Tensor], size: int, *, is_random: bool, dtype: torch.dtype
) -> Hadamard:
    """Recognize a stored matrix, which is read some rows at a time.

    Args:
        read_rows: gets the first row and the number of rows.
        size: of the matrix.
        is_random: whether it may have signs.
        dtype: of the computation.

    Raises:
        TransformConfigError: if it is another matrix.
    """
    import torch

    kinds = [False, True] if is_random and is_power_of_two(size) else [False]
    for is_listed in kinds:
        plain, found = Hadamard(size=size, is_listed=is_listed, dtype=dtype), []
        for first in range(0, size, _ROWS_AT_A_TIME):
            count = min(_ROWS_AT_A_TIME, size - first)
            stored = read_rows(first, count).double()
            signs = stored[:, :1]
            if not bool((signs.abs() == 1).all()) or not torch.equal(stored, signs * plain.rows(first, count)):
                break
            found.append(signs[:, 0])
        else:
            made = torch.cat(found)
            if is_random:
                return replace(plain, signs=made)
            if bool((made == 1).all()):
                return plain
    what = "with a sign for each row" if is_random else "of Sylvester's construction"
    raise TransformConfigError(f"it is not a known Hadamard matrix {what}")
