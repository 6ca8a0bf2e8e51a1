"""The manifest's encoding and what a reader refuses."""

from __future__ import annotations

import dataclasses
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


@pytest.mark.parametrize("value", [1.5, b"bytes", {1: 2}, {b"": 1}, {None: 1}, {"a": {2: 3}}, {1, 2}, object(), 1j])
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
    assert decoded["format_version"] == [1, 6] == list(FORMAT_VERSION)
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
        ([2, 0], r"here has format version 2\.0, this runtime reads 1\.x"),
        ([0, 9], r"here has format version 0\.9, this runtime reads 1\.x"),
        ([10**9, 0], r"format version 1000000000\.0"),
        (None, "states no format version"),
        ("1.0", "states no format version"),
        ([1], "states no format version"),
        ([True, 0], "states no format version"),
        ([1, 0, 0], "states no format version"),
        (["1", "0"], "states no format version"),
    ],
)
def test_other_versions(version: Any, pattern: str) -> None:
    with pytest.raises(ArtifactError, match=pattern):
        Manifest.from_bytes(sealed(plain() | {"format_version": version}), "here")


def test_the_version_is_told_before_anything_else_is_complained_about() -> None:
    with pytest.raises(ArtifactError, match=r"format version 2\.0"):
        Manifest.from_bytes(canonical({"format": "seqbuild-artifact", "format_version": [2, 0], "all": "new"}))


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
    again = Manifest.from_bytes(sealed(extended() | {"format_version": [1, 7]}))
    assert again == manifest()


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
    with pytest.raises(ArtifactError, match="an unknown entry 'new'"):
        Manifest.from_bytes(sealed(changed))


@pytest.mark.parametrize("newer", [False, True])
@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Manifest)])
def test_no_entry_may_be_missing(name: str, newer: bool) -> None:
    changed = plain() | {"format_version": [1, FORMAT_VERSION[1] + newer]}
    del changed[name]
    with pytest.raises(ArtifactError, match=f"no entry '{name}'"):
        Manifest.from_bytes(sealed(changed))


def of_version_1(minor: int) -> dict[str, Any]:
    """As a compiler of that minor version would have written it."""
    older = plain() | {"format_version": [1, minor]}
    del older["decoder"]
    for entry in older["inputs"]:
        del entry["absent"]
    del older["mixture_groups"]
    del older["cached"]
    if minor < 5:
        del older["defaults"]
    if minor < 3:
        del older["scale_groups"], older["attentions"]
    if minor < 2:
        for name in ("policy", "leaf_kinds", "leaves", "buffers", "foreign", "limits"):
            del older[name]
        for entry in older["subgraphs"]:
            del entry["scope"], entry["arguments"], entry["results"]
        for entry in older["parameters"].values():
            del entry["is_buffer"]
    if minor == 0:
        for name in ("sources", "auto_ignore", "conditions"):
            del older[name]
        for entry in older["subgraphs"]:
            del entry["uses"], entry["rehearsed"]
        for name in ("code", "config_class_name", "config_module"):
            del older["model"][name]
    return older


@pytest.mark.parametrize("minor", [0, 1, 2, 3, 4, 5])
def test_an_older_minor_version_is_read(minor: int) -> None:
    assert Manifest.from_bytes(sealed(of_version_1(minor))) == manifest()
    assert (manifest().sources, manifest().model.code, manifest().model.config_module) == ({}, (), "")


def test_an_older_minor_version_has_no_entries_of_a_later_one() -> None:
    with pytest.raises(ArtifactError, match="an unknown entry 'sources'"):
        Manifest.from_bytes(sealed(of_version_1(0) | {"sources": {}}))
    older = of_version_1(0)
    older["model"]["code"] = []
    with pytest.raises(ArtifactError, match="an unknown entry 'code'"):
        Manifest.from_bytes(sealed(older))


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
        ("input_key", 1, "input_key is int, not str"),
        ("input_key", None, "input_key is NoneType, not str"),
        ("targets", "layers.0", "targets is not a list"),
        ("targets/0", 3, r"targets\[0\] is int, not str"),
        ("targets_per_subgraph", True, "targets_per_subgraph is bool, not int"),
        ("ingredients", [], "ingredients is not a table"),
        ("ingredients/config", 1, r"ingredients\['config'\] is int, not str"),
        ("model", [], "model is not a table"),
        ("model/num_parameters", "8", "num_parameters is str, not int"),
        ("inputs/0/shape/0", None, r"shape\[0\] is NoneType, not int or str"),
        ("inputs/0/shape/2", True, r"shape\[2\] is bool, not int or str"),
        ("subgraphs", {}, "subgraphs is not a list"),
        ("subgraphs/1", "x", r"subgraphs\[1\] is not a table"),
        ("subgraphs/1/input_names/0", 1, r"subgraphs\[1\]: input_names\[0\] is int, not str"),
        ("parameters/head.weight/shape/0", "batch", r"parameters\['head.weight'\]: shape\[0\] is str, not int"),
        ("files/0/bytes", "9", r"files\[0\]: bytes is str, not int"),
    ],
)
def test_wrong_types_are_named(path: str, value: Any, pattern: str) -> None:
    changed = plain()
    change(path, value)(changed)
    with pytest.raises(ArtifactError, match=f"here: .*{pattern}"):
        Manifest.from_bytes(sealed(changed), "here")


def test_every_changed_byte_is_noticed() -> None:
    good = manifest().to_bytes()
    for position in range(len(good)):
        for flip in (0x01, 0x80):
            bad = bytearray(good)
            bad[position] ^= flip
            with pytest.raises(ArtifactError, match=r"here (is damaged|is not the manifest)|format version"):
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
    with pytest.raises(ArtifactError, match="encoding is not canonical"):
        Manifest.from_bytes(longer)
    shuffled = msgpack.packb(dict(reversed(plain().items())))
    with pytest.raises(ArtifactError, match="encoding is not canonical"):
        Manifest.from_bytes(shuffled)
    (count,) = good[:1] if good[0] & 0xF0 == 0x80 else (0,)
    if count == 0:  # a table of more than 15 entries: 0xde and two bytes
        duplicated = (
            b"\xde"
            + (int.from_bytes(good[1:3], "big") + 1).to_bytes(2, "big")
            + good[3:]
            + b"\xb4targets_per_subgraph\x01"
        )
        with pytest.raises(ArtifactError, match="encoding is not canonical"):
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
