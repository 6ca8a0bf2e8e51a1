"""Show the content of an artifact as text and JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING

from runtime.artifact.manifest import UNBOUNDED, Manifest, SubgraphEntry
from runtime.console import human_bytes, printable, say
from seqbuild.verify.report import HEADINGS, Verification

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_NAMES_SHOWN = 4
_FILE_WIDTH = 240  # files and pipes have no width


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


def rows(manifest: Manifest) -> Iterator[tuple[str, ...]]:
    """Return one row for each subgraph, under `_HEADINGS`."""
    for index, entry in enumerate(manifest.subgraphs):
        num_bytes = sum(manifest.parameters[name].bytes for name in entry.parameters)
        yield (
            str(index),
            ", ".join(entry.targets) or "-",
            _some(entry.submodules),
            human_bytes(num_bytes),
            _some(entry.input_names),
            _some(entry.consumed_names),
            _outputs(manifest, entry),
        )


_HEADINGS = ("subgraph", "targets", "calls", "weights", "inputs", "frees", "outputs")


def print_table(manifest: Manifest) -> None:
    """Print the summary and a table of the subgraphs on standard output."""
    print_rows(summary(manifest), _HEADINGS, rows(manifest))


def print_rows(lines: Iterable[str], headings: Iterable[str], cells: Iterable[tuple[str, ...]]) -> None:
    """Print some lines, then a table, on standard output."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    for line in lines:
        console.print(printable(line), markup=False, soft_wrap=True)
    table = Table(box=SIMPLE_HEAD)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in cells:
        table.add_row(*(printable(cell).replace("[", r"\[") for cell in row))
    console.print(table)


def _outputs(manifest: Manifest, entry: SubgraphEntry) -> str:
    shapes = {name: manifest.values[name].shape for name in entry.output_names if name in manifest.values}
    return _some([f"{name} {_shape(shapes.get(name, ()))}" for name in entry.output_names])


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
    """Print the comparison as a table, with remarks and verdict, on standard output."""
    weights = "a small model of its architecture, random weights" if found.weights is None else f"{found.weights}"
    print_rows([f"{found.path}: {found.class_name}, {weights}, {found.dtype} on the CPU"], HEADINGS, _rows(found))
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
            shape.result,
        )
