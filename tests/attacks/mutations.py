"""Change one value of a manifest in all ways that its schema allows, and have every digest fit again."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import msgpack

from runtime.artifact.encoding import canonical, sha256

Path = tuple[Any, ...]
_INTEGERS = (0, 1, -1, 2, 3, 7, 2**20, 2**31, 2**47, 2**63 - 1, -(2**63))
_TEXTS = ("", "x", "batch", "sequence", "batch*sequence", "lm_head", "model", "float32", "int64", "no.such.name", "0")


def places(value: Any, path: Path = ()) -> Iterator[Path]:
    """The paths of all values in a manifest, the ones that hold others included."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def at(plain: Any, path: Path) -> Any:
    """The value at a path."""
    for key in path:
        plain = plain[key]
    return plain


def mutated(data: bytes, path: Path, rng: random.Random) -> bytes:
    """A manifest whose value at a path is another one of the same type, with all digests right."""
    plain = msgpack.unpackb(data)
    owner, key = at(plain, path[:-1]), path[-1]
    siblings = [at(plain, other) for other in _alike(plain, path)]
    owner[key] = _other(owner[key], siblings, rng)
    if path[0] == "ingredients":
        plain["input_key"] = sha256(canonical(plain["ingredients"]))
    del plain["digest"]
    plain["digest"] = sha256(canonical(plain))
    return canonical(plain)


def _alike(plain: Any, path: Path) -> list[Path]:
    """The paths of other values that have the same meaning: what stands under the same key elsewhere."""
    last = next(key for key in reversed(path) if isinstance(key, str))
    return [other for other in places(plain) if other and other != path and other[-1] == last]


def _other(value: Any, siblings: list[Any], rng: random.Random) -> Any:
    choices = [sibling for sibling in siblings if type(sibling) is type(value) and sibling != value]
    if choices and rng.random() < 0.3:
        return rng.choice(choices)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice([value + 1, value - 1, value * 2, *_INTEGERS])
    if isinstance(value, str):
        return rng.choice([*_TEXTS, value + "x", value[:-1], value.replace("0", "1")])
    if isinstance(value, list):
        return _other_list(value, rng)
    items = list(value.items())
    if not items:
        return value
    name, item = rng.choice(items)
    return rng.choice(
        [
            {key: kept for key, kept in items if key != name},
            {**value, f"{name}x": item},
            {**{key: kept for key, kept in items if key != name}, rng.choice(items)[0]: item},
        ]
    )


def _other_list(value: list[Any], rng: random.Random) -> list[Any]:
    shuffled = rng.sample(value, len(value))
    choices = [[], shuffled, value[::-1], value[1:], value[:-1], value + value]
    if value:
        place = rng.randrange(len(value))
        choices += [value[:place] + value[place + 1 :], [*value, value[place]]]
    return rng.choice(choices)
