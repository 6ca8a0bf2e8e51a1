"""No byte of an artifact can be another: each is flipped, one at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.artifact.check import check_artifact
from runtime.artifact.encoding import FORMAT_VERSION, canonical, sha256
from runtime.artifact.manifest import MANIFEST_NAME, Manifest
from runtime.artifact.size_expressions import is_dimension
from runtime.errors import ArtifactError
from runtime.language.grammar import Allowed, check_program
from runtime.patterns import fault
from tests.runtime.artifacts import FIRST, files, manifest, write

ALLOWED = Allowed(input_names=("x",), output_names=("layers_0",), submodules=("layers.0",), constants=("constant_0",))


def test_every_byte_of_an_artifact_counts(tmp_path: Path) -> None:
    root = write(tmp_path / "artifact")
    check_artifact(root)
    for name in (*sorted(files()), MANIFEST_NAME):
        path = root / name
        good = path.read_bytes()
        with path.open("r+b", buffering=0) as file:
            for position, byte in enumerate(good):
                file.seek(position)
                file.write(bytes([byte ^ (1 << position % 8)]))
                with pytest.raises(ArtifactError):
                    check_artifact(root)
                file.seek(position)
                file.write(bytes([byte]))
        assert path.read_bytes() == good
    check_artifact(root)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_bytes_are_no_manifest(data: bytes) -> None:
    with pytest.raises(ArtifactError):
        Manifest.from_bytes(data)


plain_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)


def rewritten(plain: dict[str, Any]) -> dict[str, Any]:
    """What is read under another minor version is written under this one."""
    plain = {**plain, "format_version": list(FORMAT_VERSION)}
    del plain["digest"]
    return {**plain, "digest": sha256(canonical(plain))}


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_manifest_with_any_entry_is_read_or_refused(data: st.DataObject) -> None:
    """One entry, at any depth, becomes any value, and the digest is made to fit: never anything but ArtifactError."""
    import msgpack

    plain = msgpack.unpackb(manifest().to_bytes())
    del plain["digest"]
    place = plain
    for _ in range(4):
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            break
        key = data.draw(st.sampled_from(keys))
        inner = place[key]
        if not isinstance(inner, (dict, list)) or not inner or data.draw(st.booleans()):
            place[key] = data.draw(plain_values)
            break
        place = inner
    plain["digest"] = sha256(canonical(plain))
    try:
        found = Manifest.from_bytes(canonical(plain))
    except ArtifactError:
        return
    assert found.to_bytes() == canonical(rewritten(plain))


fragments = st.sampled_from(
    [
        *(
            "self",
            "run",
            "torch",
            "x",
            "y",
            ".",
            "(",
            ")",
            "[",
            "]",
            "{",
            "}",
            ":",
            ",",
            "=",
            "+",
            "*",
            "%",
            "'a'",
            '"',
        ),
        *("__class__", "__globals__", "import os", "lambda", "for i in range(x)", "def f()", "return", "del", "\n    "),
        *("get_submodule", "get_parameter", "constant", "opaque", "ops", "aten", "add", "Tensor", "f'{x}'", ":=", "**"),
        *("torch.ops.aten.add.Tensor(x, x)", 'run.constant("constant_0")', 'self.get_submodule("layers.0")', "#", "@"),
    ]
)
REACH = ("__", "import", "lambda", "f'", ":=", "**", "@")


@settings(max_examples=500, deadline=None)
@given(st.lists(fragments, max_size=12), st.integers(2, 9))
def test_code_with_any_line_is_refused_or_plain(parts: list[str], where: int) -> None:
    lines = FIRST.splitlines()
    lines.insert(where, "    " + " ".join(parts))
    source = "\n".join(lines) + "\n"
    try:
        check_program(source.encode(), ALLOWED, "program")
    except ArtifactError:
        return
    line = " ".join(parts).partition("#")[0].replace("'a'", "")
    assert not any(word in line for word in REACH) or '"' in line, line


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=40))
def test_texts_are_no_code_sizes_or_patterns_by_accident(text: str) -> None:
    """Whatever is asked for, the answer is yes or no."""
    assert is_dimension(text) in (True, False)
    assert isinstance(fault(text), str)
    with pytest.raises(ArtifactError):
        check_program(text.encode("utf-8", "replace"), ALLOWED, "program")


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (0, True),
        (-1, False),
        (2**48, False),
        ("batch*sequence", True),
        ("Max(1, u0)", True),
        ("((sequence - 1)//2) + 1", True),
        ("batch**2", True),
        ("batch**batch", False),
        ("2**99", False),
        ("a.b", False),
        ("a[0]", False),
        ("_a", False),
        ("f(x=1)", False),
        ("", False),
        ("1 if a else 2", False),
        ("'a'*9", False),
    ],
)
def test_sizes(size: int | str, expected: bool) -> None:
    assert is_dimension(size) is expected
