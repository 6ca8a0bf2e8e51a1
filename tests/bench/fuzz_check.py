"""Coverage-guided fuzzing of an artifact's check: `python tests/bench/fuzz_check.py [seconds]`; needs atheris.

Each input is taken for a manifest, for a program, for constants, for a size and for a pattern. Whatever it is, the
answer is yes, or ArtifactError; anything else stops the run with the input that did it.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import atheris

with atheris.instrument_imports(include=["runtime"]):
    import runtime.artifact.check  # noqa: F401 - everything below is instrumented by it
    from runtime.artifact.constants import check_constants
    from runtime.artifact.encoding import canonical, sha256
    from runtime.artifact.files import CONSTANTS_NAME
    from runtime.artifact.manifest import Manifest
    from runtime.artifact.size_expressions import check_condition, is_dimension
    from runtime.errors import ArtifactError
    from runtime.language.grammar import Allowed, check_program
    from runtime.patterns import fault

ALLOWED = Allowed(input_names=("x",), output_names=("y",))
HEAD, TAIL = b"def forward(self, x, *, run):\n    ", b"\n    return {'y': y}\n"


def one(data: bytes) -> None:
    """Everything that a file of an artifact can be taken for."""
    for attempt in (_manifest, _sealed, _program, _statement, _constants, _texts):
        try:
            attempt(data)
        except ArtifactError:
            continue


def _manifest(data: bytes) -> None:
    Manifest.from_bytes(data)


def _sealed(data: bytes) -> None:
    """With a digest that fits, so that what is behind it is reached."""
    import msgpack

    try:
        plain = msgpack.unpackb(data)
        sealed = canonical(plain | {"digest": sha256(canonical(plain))})
    except Exception:
        return
    Manifest.from_bytes(sealed)


def _program(data: bytes) -> None:
    check_program(data, ALLOWED, "program")


def _statement(data: bytes) -> None:
    check_program(HEAD + data + TAIL, ALLOWED, "program")


def _constants(data: bytes) -> None:
    check_constants({CONSTANTS_NAME: data}, ("a",))


def _texts(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    is_dimension(text)
    fault(text)
    check_condition(text, {"batch": 7})


if __name__ == "__main__":
    seconds = sys.argv[1] if len(sys.argv) > 1 else "60"
    atheris.Setup([sys.argv[0], f"-max_total_time={seconds}", "-max_len=4096"], one)
    atheris.Fuzz()
