"""The manifest's encoding and what a reader refuses."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.artifact.encoding import FORMAT_VERSION, canonical, sha256
from runtime.artifact.manifest import Manifest
from runtime.errors import ArtifactError
from tests.runtime.artifacts import manifest

ROOT = Path(__file__).parents[2]


def sealed(plain: dict[str, Any]) -> bytes:
    """Encode a manifest that was changed by hand, with a digest that fits."""
    plain = {key: value for key, value in plain.items() if key != "digest"}
    return canonical(plain | {"digest": sha256(canonical(plain))})


def plain() -> dict[str, Any]:
    decoded: dict[str, Any] = msgpack.unpackb(manifest().to_bytes())
    return decoded


@pytest.mark.parametrize(
    ("value", "encoded"),
    [
        ({}, b"\x80"),
        ({"b": 1, "a": 2}, b"\x82\xa1a\x02\xa1b\x01"),
        ({"": [], "Z": {}, "a": (1,)}, b"\x83\xa0\x90\xa1Z\x80\xa1a\x91\x01"),
        ({"é": 0, "z": 0}, b"\x82\xa1z\x00\xa2\xc3\xa9\x00"),  # UTF-8 bytes decide, not the alphabet
        ([True, False, None, -1, 127, 128, 65536], b"\x97\xc3\xc2\xc0\xff\x7f\xcc\x80\xce\x00\x01\x00\x00"),
        ("x" * 32, b"\xd9\x20" + b"x" * 32),
    ],
)
def test_canonical_bytes(value: Any, encoded: bytes) -> None:
    assert canonical(value) == encoded


@pytest.mark.parametrize("value", [object(), 1j, {1j: 2}])
def test_what_the_format_has_no_place_for(value: Any) -> None:
    with pytest.raises(TypeError):
        canonical(value)


plain_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(plain_values)
def test_decoding_gives_back_what_was_encoded(value: Any) -> None:
    encoded = canonical(value)
    assert msgpack.unpackb(encoded) == value
    assert canonical(msgpack.unpackb(encoded)) == encoded


def test_round_trip() -> None:
    original = manifest()
    again = Manifest.from_bytes(original.to_bytes())
    assert again == original
    assert again.to_bytes() == original.to_bytes()
    assert type(again.subgraphs) is tuple
    assert again.inputs[0].shape == ("batch", "sequence", 2)


def test_what_is_written() -> None:
    decoded = plain()
    assert list(decoded) == sorted(decoded)
    assert decoded["format"] == "seqbuild-artifact"
    assert decoded["format_version"] == [2, 1] == list(FORMAT_VERSION)
    assert decoded["dims"] == [{"max": -1, "min": 1, "name": "batch"}, {"max": 64, "min": 1, "name": "sequence"}]
    assert len(decoded["digest"]) == 64
    assert set(decoded) == {field.name for field in dataclasses.fields(Manifest)} | {
        "format",
        "format_version",
        "digest",
    }


@pytest.mark.parametrize(
    ("version", "pattern"),
    [
        ([1, 6], r"here has format version 1\.6, this runtime reads 2\.x"),
        ([0, 9], r"here has format version 0\.9, this runtime reads 2\.x"),
        ([10**9, 0], r"format version 1000000000\.0"),
        (None, "here: format_version is damaged: Expected `array`, got `None`"),
        ("2.0", "here: format_version is damaged: Expected `array`, got `str`"),
        ([2], "here: format_version is damaged: Expected `array` of length 2"),
        ([True, 0], r"here: format_version is damaged: Expected `int`, got `bool` - at `\$\[0\]`"),
        ([2, 0, 0], "here: format_version is damaged: Expected `array` of length 2"),
        (["2", "0"], "here: format_version is damaged: Expected `int`, got `str`"),
    ],
)
def test_other_versions(version: Any, pattern: str) -> None:
    with pytest.raises(ArtifactError, match=pattern):
        Manifest.from_bytes(sealed(plain() | {"format_version": version}), "here")


def test_the_version_is_told_before_anything_else_is_complained_about() -> None:
    with pytest.raises(ArtifactError, match=r"format version 3\.0"):
        Manifest.from_bytes(canonical({"format": "seqbuild-artifact", "format_version": [3, 0], "all": "new"}))


@pytest.mark.parametrize("name", ["seqbuild", "", None, 1])
def test_another_format(name: Any) -> None:
    with pytest.raises(ArtifactError, match="is not the manifest of a seqbuild artifact"):
        Manifest.from_bytes(sealed(plain() | {"format": name}))
    with pytest.raises(ArtifactError, match="is not the manifest of a seqbuild artifact"):
        Manifest.from_bytes(canonical({}))


def extended() -> dict[str, Any]:
    """With an entry that version 1.0 does not know at every level."""
    changed = plain() | {"new": {"anything": [1, None]}}
    changed["model"]["new"] = 1
    changed["subgraphs"][0]["new"] = ["x"]
    changed["parameters"]["head.weight"]["new"] = "y"
    return changed


def test_a_higher_minor_version_may_say_more() -> None:
    again = Manifest.from_bytes(sealed(extended() | {"format_version": [2, 2]}))
    assert again == manifest()


def test_a_higher_minor_version_has_each_key_once_and_in_order() -> None:
    data = sealed(plain() | {"format_version": [2, 2]})
    entries = msgpack.unpackb(data)
    backwards = msgpack.packb(dict(reversed(entries.items())))
    doubled = b"\xde" + (len(entries) + 1).to_bytes(2, "big") + data[3:] + msgpack.packb("versions") + b"\x80"
    for changed in (backwards, doubled):
        with pytest.raises(ArtifactError, match="a key occurs twice, or the keys are not in ascending order"):
            Manifest.from_bytes(changed)


def test_a_minor_version_is_not_negative() -> None:
    with pytest.raises(ArtifactError, match=r"has format version 2\.-1"):
        Manifest.from_bytes(sealed(plain() | {"format_version": [2, -1]}))


@pytest.mark.parametrize("level", ["top", "model", "subgraph", "parameter"])
def test_this_version_may_not(level: str) -> None:
    changed = plain()
    place = {
        "top": changed,
        "model": changed["model"],
        "subgraph": changed["subgraphs"][0],
        "parameter": changed["parameters"]["head.weight"],
    }[level]
    place["new"] = 1
    with pytest.raises(ArtifactError, match=r"not the canonical encoding of the entries of format version 2\.1"):
        Manifest.from_bytes(sealed(changed))


@pytest.mark.parametrize("newer", [False, True])
@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Manifest)])
def test_no_entry_may_be_missing(name: str, newer: bool) -> None:
    changed = plain() | {"format_version": [2, 1 + int(newer)]}
    del changed[name]
    with pytest.raises(ArtifactError, match=f"missing required field `{name}`"):
        Manifest.from_bytes(sealed(changed))


def change(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    *parents, last = path.split("/")

    def apply(table: dict[str, Any]) -> None:
        place: Any = table
        for part in parents:
            place = place[int(part) if part.isdigit() else part]
        place[int(last) if last.isdigit() else last] = value

    return apply


@pytest.mark.parametrize(
    ("path", "value", "pattern"),
    [
        ("input_key", 1, "Expected `str`, got `int` - at `$.input_key`"),
        ("input_key", None, "Expected `str`, got `None` - at `$.input_key`"),
        ("targets", "layers.0", "Expected `array`, got `str` - at `$.targets`"),
        ("targets/0", 3, "Expected `str`, got `int` - at `$.targets[0]`"),
        ("targets_per_subgraph", True, "Expected `int`, got `bool` - at `$.targets_per_subgraph`"),
        ("targets_per_subgraph", 1.0, "Expected `int`, got `float` - at `$.targets_per_subgraph`"),
        ("ingredients", [], "Expected `object`, got `array` - at `$.ingredients`"),
        ("ingredients/config", 1, "Expected `str`, got `int` - at `$.ingredients[...]`"),
        ("ingredients/config", b"x", "Expected `str`, got `bytes` - at `$.ingredients[...]`"),
        ("model", [], "Expected `object`, got `array` - at `$.model`"),
        ("model/num_parameters", "8", "Expected `int`, got `str` - at `$.model.num_parameters`"),
        ("inputs/0/shape/0", None, "Expected `int | str`, got `None` - at `$.inputs[0].shape[0]`"),
        ("inputs/0/shape/2", True, "Expected `int | str`, got `bool` - at `$.inputs[0].shape[2]`"),
        ("subgraphs", {}, "Expected `array`, got `object` - at `$.subgraphs`"),
        ("subgraphs/1", "x", "Expected `object`, got `str` - at `$.subgraphs[1]`"),
        ("subgraphs/1/input_names/0", 1, "Expected `str`, got `int` - at `$.subgraphs[1].input_names[0]`"),
        ("parameters/head.weight/shape/0", "batch", "Expected `int`, got `str` - at `$.parameters[...].shape[0]`"),
        ("files/0/bytes", "9", "Expected `int`, got `str` - at `$.files[0].bytes`"),
    ],
)
def test_wrong_types_are_named(path: str, value: Any, pattern: str) -> None:
    changed = plain()
    change(path, value)(changed)
    with pytest.raises(ArtifactError, match=re.escape(f"here is damaged: {pattern}")):
        Manifest.from_bytes(sealed(changed), "here")


def test_every_changed_byte_is_noticed() -> None:
    good = manifest().to_bytes()
    for position in range(len(good)):
        for flip in (0x01, 0x80):
            bad = bytearray(good)
            bad[position] ^= flip
            with pytest.raises(
                ArtifactError,
                match=r"here(: digest)? (is damaged|is not the manifest)|format.version",
            ):
                Manifest.from_bytes(bytes(bad), "here")


def test_every_truncation_is_noticed() -> None:
    good = manifest().to_bytes()
    for length in range(len(good)):
        with pytest.raises(ArtifactError, match="here is damaged"):
            Manifest.from_bytes(good[:length], "here")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00",
        b"\x90",
        b"\xc1",
        manifest().to_bytes() + b"\x00",
        manifest().to_bytes() * 2,
        b"\xdf\xff\xff\xff\xff",  # a table of four billion entries
        b"\xdd\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\x91" * 100_000,  # deeper than any stack
        b"\x81\xa1a" * 50_000,
        b"\x81\xa1a\xcb\x3f\xf0\x00\x00\x00\x00\x00\x00",  # a float
        b"\x81\xa1a\xc4\x00",  # a binary
        b"\x81\xc4\x00\x01",  # a binary as key
        b"\x81\x01\x01",  # a number as key
        b"\x81\xa1a\xd4\x01\x00",  # an extension type
        b"\x81\xa1a\xc7\x00\x01",
        b"\x81\xa1a\xd6\xff\x00\x00\x00\x00",  # a time
        b"\x81\xa1a\xa1\xff",  # not UTF-8
        b"PK\x03\x04",
        b"\x80\x04K\x01.",  # a pickle
    ],
)
def test_damage(data: bytes) -> None:
    with pytest.raises(ArtifactError) as caught:
        Manifest.from_bytes(data, "here")
    assert caught.value.message.startswith("here ")


def test_only_one_encoding_is_accepted() -> None:
    good = manifest().to_bytes()
    longer = good.replace(b"\xb4targets_per_subgraph\x01", b"\xb4targets_per_subgraph\xcc\x01")
    assert len(longer) == len(good) + 1
    with pytest.raises(ArtifactError, match="digest does not match"):
        Manifest.from_bytes(longer)
    shuffled = msgpack.packb(dict(reversed(plain().items())))
    with pytest.raises(ArtifactError, match="not the canonical encoding"):
        Manifest.from_bytes(shuffled)
    (count,) = good[:1] if good[0] & 0xF0 == 0x80 else (0,)
    if count == 0:  # a table of more than 15 entries: 0xde and two bytes
        duplicated = (
            b"\xde"
            + (int.from_bytes(good[1:3], "big") + 1).to_bytes(2, "big")
            + good[3:]
            + b"\xb4targets_per_subgraph\x01"
        )
        with pytest.raises(ArtifactError, match="not the canonical encoding"):
            Manifest.from_bytes(duplicated)


def test_the_digest_is_that_of_the_content() -> None:
    with pytest.raises(ArtifactError, match="digest does not match"):
        Manifest.from_bytes(canonical(plain() | {"digest": "0" * 64}))
    with pytest.raises(ArtifactError, match="digest does not match"):
        Manifest.from_bytes(canonical(plain() | {"input_key": "x"}))
    without = plain()
    del without["digest"]
    with pytest.raises(ArtifactError, match="digest does not match"):
        Manifest.from_bytes(canonical(without))


def test_entries_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        manifest().input_key = "x"  # type: ignore[misc]


def test_reading_needs_no_torch() -> None:
    modules = "runtime.artifact.manifest, runtime.language.grammar, runtime.chain"
    program = f"import {modules}, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
