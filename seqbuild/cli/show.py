"""Show the content of an artifact as text and JSON."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from runtime.artifact.manifest import UNBOUNDED, Manifest, SubgraphEntry
from runtime.console import human_bytes, say
from runtime.terminal import Column, Names, printable, table_lines, width_of
from seqbuild.verify.report import Verification

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_NAMES_SHOWN = 4
_COLUMNS = (
    Column(heading="subgraph"),
    Column(heading="targets", is_flexible=True),
    Column(heading="calls", is_flexible=True, dropped=3),
    Column(heading="weights", is_number=True),
    Column(heading="inputs", is_flexible=True, dropped=2),
    Column(heading="frees", is_flexible=True, dropped=1),
    Column(heading="outputs", is_flexible=True),
)
_COMPARED = (
    *(Column(heading=name) for name in ("batch", "sequence", "padding")),
    Column(heading="images", dropped=1),
    Column(heading="seed", dropped=2),
    *(Column(heading=name) for name in ("absolute", "relative", "result")),
)


def summary(manifest: Manifest) -> Iterator[str]:
    """Return a summary of the manifest, one line for each fact."""
    model = manifest.model
    yield f"model          {model.class_name} ({model.model_type}), {model.num_parameters:,} parameters, {model.dtype}"
    yield f"attention      {model.attn_implementation}"
    yield f"compiled with  {', '.join(f'{name} {version}' for name, version in manifest.versions.items())}"
    yield f"input key      {manifest.input_key}"
    yield f"targets        {len(manifest.targets)} by {', '.join(manifest.target_patterns)}"
    yield f"inputs         {', '.join(f'{entry.name} {_shape(entry.shape)}' for entry in manifest.inputs)}"
    ranges = [_range(dim.name, dim.min, dim.max) for dim in manifest.dims]
    yield f"valid for      {', '.join(ranges) or 'these sizes only'}"
    yield f"portable       {_portability(manifest)}"
    yield f"opaque steps   {', '.join(manifest.opaque_steps) or 'none'}"
    if model.code:
        yield f"own code       {', '.join(model.code)}"
    yield f"relies on      {', '.join(manifest.sources) or 'no library source'}"
    yield f"files          {len(manifest.files)}, {human_bytes(sum(entry.bytes for entry in manifest.files))}"


def _portability(manifest: Manifest) -> str:
    if manifest.is_portable:
        return f"the host needs no model code ({len(manifest.leaves):,} modules, {len(manifest.leaf_kinds)} kinds)"
    if manifest.foreign:
        classes = [path.partition(":")[2] for path in dict.fromkeys(manifest.foreign.values())]
        return f"no, the host calls {len(manifest.foreign)} modules of the model's code, of class {_some(classes)}"
    return "no, the host calls the model's code" + (" in opaque steps" if manifest.policy == "linear" else "")


def remarks(manifest: Manifest) -> Iterator[str]:
    """Return decisions of the compiler that a user should know, one line each."""
    yield f"Portable: {_portability(manifest)}"
    opaque = manifest.opaque_steps
    unrecordable = [path for path in opaque if path in manifest.auto_ignore]
    ignored = [path for path in opaque if path not in manifest.auto_ignore]
    if ignored:
        yield f"Opaque steps by --ignore: {', '.join(ignored)}"
    if unrecordable:
        yield f"Opaque steps, because they cannot be recorded: {', '.join(unrecordable)}"
    rehearsed = dict.fromkeys(name for entry in manifest.subgraphs for name in entry.rehearsed if name not in opaque)
    if rehearsed:
        yield f"Shapes determined by a run on small values: {_some(list(rehearsed))}"
    fixed = [f"{dim.name} = {dim.min}" for dim in manifest.dims if dim.min == dim.max]
    if fixed:
        yield f"Valid only for {', '.join(fixed)}"


def rows(manifest: Manifest) -> Iterator[tuple[str | Names, ...]]:
    """Return one row for each subgraph, under `_COLUMNS`."""
    for index, entry in enumerate(manifest.subgraphs):
        num_bytes = sum(manifest.parameters[name].bytes for name in entry.parameters)
        yield (
            str(index),
            _names(entry.targets),
            _names(entry.submodules),
            human_bytes(num_bytes),
            _names(entry.input_names),
            _names(entry.consumed_names),
            _outputs(manifest, entry),
        )


def print_table(manifest: Manifest) -> None:
    """Print the summary and a table of the subgraphs on standard output."""
    for line in summary(manifest):
        say(line)
    say()
    _print_rows(_COLUMNS, list(rows(manifest)))


def _print_rows(columns: Sequence[Column], cells: Sequence[Sequence[str | Names]]) -> None:
    for line in table_lines(columns, cells, width_of(sys.stdout)):
        say(line)


def _names(names: Sequence[str]) -> Names:
    shown = tuple(printable(name) for name in names[:_NAMES_SHOWN])
    return Names(shown or ("-",), max(len(names) - _NAMES_SHOWN, 0))


def _outputs(manifest: Manifest, entry: SubgraphEntry) -> Names:
    shapes = {name: manifest.values[name].shape for name in entry.output_names if name in manifest.values}
    found = _names([f"{name} {_shape(shapes.get(name, ()))}" for name in entry.output_names])
    return found._replace(brief=_names(entry.output_names).names)


def _some(names: tuple[str, ...] | list[str]) -> str:
    rest = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _shape(shape: tuple[int | str, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _range(name: str, low: int, high: int) -> str:
    if low == high:
        return f"{name} = {low}"
    return f"{name} >= {low}" if high == UNBOUNDED else f"{low} <= {name} <= {high}"


def print_report(found: Verification) -> None:
    """Print the comparison as a table, with details, remarks and verdict, on standard output."""
    weights = "a small model of its architecture, random weights" if found.weights is None else f"{found.weights}"
    say(f"{found.path}: {found.class_name}, {weights}, {found.dtype} on the CPU")
    say()
    _print_rows(_COMPARED, list(_rows(found)))
    say()
    for shape in found.shapes:
        if ":" in shape.result:
            say(f"batch {shape.batch}, sequence {shape.sequence}, seed {shape.seed}: {shape.result}")
    for remark in found.remarks:
        say(remark)
    say(f"{found.verdict}; {found.seconds:.1f} s")


def _rows(found: Verification) -> Iterator[tuple[str, ...]]:
    for shape in found.shapes:
        is_measured = not (shape.skipped or shape.problem)
        yield (
            str(shape.batch),
            str(shape.sequence),
            shape.padding or "-",
            "-" if shape.images is None else str(shape.images),
            str(shape.seed),
            f"{shape.absolute:.3g}" if is_measured else "-",
            f"{shape.relative:.3g}" if is_measured else "-",
            shape.result.partition(":")[0],
        )
