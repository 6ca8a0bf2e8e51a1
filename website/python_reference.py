"""The reference of the Python packages: their public names, whose docstrings mkdocstrings reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import runtime
import seqbuild
from runtime import errors
from seqbuild import modifiers


@dataclass(frozen=True, kw_only=True)
class Part:
    """A heading of a page, a sentence below it, and the objects that follow, by their full names."""

    title: str
    text: str
    names: Sequence[str]


_CALLS = ("oneshot", "compile_model", "verify_artifact", "plan")
_RUN = ("load", "load_tokens", "batches", "calibrate", "evaluate", "plan_artifact", "dequantize", "sweep")
_ERRORS = tuple(name for name, found in vars(errors).items() if isinstance(found, type))


def _all(package: str, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{package}.{name}" for name in names)


def _others(package: str, names: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    return _all(package, [name for name in names if name not in known])


PAGES: Mapping[str, Sequence[Part]] = {
    "python-seqbuild": (
        Part(
            title="seqbuild",
            text="The compiler, and the call that quantizes a model. `import seqbuild` imports torch on the first use.",
            names=(*_all("seqbuild", _CALLS), "seqbuild.onecall.arguments.OneshotOptions"),
        ),
        Part(
            title="Modifiers",
            text="The recipe of `oneshot`, with the names and fields of llm-compressor.",
            names=_all("seqbuild.modifiers", modifiers.__all__),
        ),
        Part(
            title="Traces",
            text="The functions of llm-compressor's sequential pipeline, under the same names.",
            names=_others("seqbuild", seqbuild.__all__, _CALLS),
        ),
    ),
    "python-runtime": (
        Part(
            title="runtime",
            text="The calibration host: it loads, runs, quantizes and evaluates artifacts, and never traces.",
            names=_all("runtime", _RUN),
        ),
        Part(
            title="Objects",
            text="What these functions take and return.",
            names=(
                *_others("runtime", runtime.__all__, (*_RUN, *_ERRORS)),
                "runtime.streaming.options.RunOptions",
                "runtime.streaming.report.Calibration",
                "runtime.streaming.report.ModuleReport",
                "runtime.evaluation.Evaluation",
                "runtime.streaming.work.Work",
            ),
        ),
    ),
    "errors": (
        Part(
            title="Errors",
            text="Every error that a user can cause, in one tree. The message names the value, and `hint` says what to "
            "do. Command lines print both on one line and exit with code 2.",
            names=_all("runtime.errors", _ERRORS),
        ),
    ),
}


def page(name: str) -> str:
    """Return a page of the reference, as Markdown for mkdocstrings."""
    return "\n".join(_lines(PAGES[name]))


def _lines(parts: Sequence[Part]) -> Iterator[str]:
    for level, part in enumerate(parts):
        yield from (f"{'##' if level else '#'} {part.title}", "", part.text, "")
        for name in part.names:
            yield from (f"::: {name}", "    options:", f"      heading_level: {3 if len(parts) > 1 else 2}", "")
