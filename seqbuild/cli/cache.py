"""The commands `seqbuild cache ls|explain|prune`."""

from __future__ import annotations

import json
import re
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from runtime.cli.run import require_output
from runtime.console import human_bytes, put, say
from runtime.terminal import Column, printable, shortened, table_lines, width_of
from seqbuild.cli.options import AsJson, Out, takes_compile_options
from seqbuild.options import DEFAULT_OUT

if TYPE_CHECKING:
    from seqbuild.cli.explain import Explanation
    from seqbuild.options import CompileOptions

app = typer.Typer(help="List compiled artifacts, explain cache hits and misses, remove artifacts.")

_SHOWN = 60
_COLUMNS = (
    Column(heading="artifact"),
    Column(heading="model", is_flexible=True, dropped=1),
    Column(heading="size", is_number=True, dropped=3),
    Column(heading="used", is_number=True, dropped=2),
)


@app.command("ls")
def list_command(out: Out = DEFAULT_OUT, as_json: AsJson = False) -> None:
    """List the artifacts, most recently used first."""
    require_output()
    from seqbuild.cache.store import entries

    found = sorted(entries(out), key=lambda entry: -entry.used)
    if as_json:
        facts = [
            {
                "path": str(entry.path),
                "input_key": entry.manifest.input_key if entry.manifest is not None else None,
                "bytes": entry.num_bytes,
                "used": entry.used,
                "damage": entry.damage,
            }
            for entry in found
        ]
        put(json.dumps(facts))
        return
    rows = [
        (
            str(entry.path),
            entry.manifest.model.class_name if entry.manifest is not None else "DAMAGED",
            human_bytes(entry.num_bytes),
            f"{(time.time() - entry.used) / 86400:.1f} days ago",
        )
        for entry in found
    ]
    for line in table_lines(_COLUMNS, [tuple(map(printable, row)) for row in rows], width_of(sys.stdout)):
        say(line)
    say(f"{len(found)} artifacts, {human_bytes(sum(entry.num_bytes for entry in found))}")


@app.command("explain")
@takes_compile_options(without="force")
def explain_command(options: CompileOptions, as_json: bool) -> None:
    """Show the ingredients of an artifact's key, and why compile would find it or not. Options as for compile."""
    from seqbuild.cli.explain import explain

    require_output()
    found = explain(options)
    if as_json:
        put(json.dumps(_facts(found)))
    else:
        _say(found)


def _facts(found: Explanation) -> dict[str, Any]:
    from seqbuild.cli.explain import EXCLUDED

    return {
        "hit": found.is_hit,
        "path": str(found.path),
        "input_key": found.input_key,
        "reason": found.reason,
        "ingredients": dict(found.ingredients),
        "nearest": str(found.nearest) if found.nearest is not None else None,
        "differing": {name: list(values) for name, values in found.differing.items()},
        "changed": list(found.changed),
        "excluded": EXCLUDED,
    }


def _say(found: Explanation) -> None:
    from seqbuild.cli.explain import EXCLUDED

    width = max(map(len, found.ingredients))
    room = min((width_of(sys.stdout) or _SHOWN * 2) - width - 2, _SHOWN)
    for name, value in found.ingredients.items():
        say(f"{name:{width}}  {shortened(value, room)}")
    for name, description in EXCLUDED.items():
        say(f"{'not included':{width}}  {name}: {description}")
    say(f"{'input key':{width}}  {found.input_key}")
    if found.is_hit:
        say(f"hit: {found.path}")
        return
    say(f"miss: {found.reason} ({found.path})")
    if found.nearest is not None:
        say(f"nearest: {found.nearest}, which differs in {', '.join(found.differing) or 'nothing'}")
    for name, (theirs, ours) in found.differing.items():
        say(f"  {name}: {shortened(theirs, _SHOWN)} there, {shortened(ours, _SHOWN)} here")
    if found.changed:
        say(f"library files that have changed: {', '.join(found.changed)}")


@app.command()
def prune(
    out: Out = DEFAULT_OUT,
    older_than: Annotated[
        str | None, typer.Option("--older-than", help="Artifacts not used for this time: 30d, 12h, 45m.")
    ] = None,
    max_size: Annotated[
        str | None, typer.Option("--max-size", help="The least recently used artifacts beyond this size: 10GB, 500MB.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All artifacts.")] = False,
) -> None:
    """Remove remains of killed compilations, and artifacts by age, by size, or all."""
    from seqbuild.cache.store import prune as run

    seconds = _number(older_than, {"m": 60.0, "h": 3600.0, "d": 86400.0}, "--older-than") if older_than else None
    units = {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
    size = int(_number(max_size, units, "--max-size")) if max_size else None
    total = 0
    for gone in run(out, older_than_s=seconds, max_bytes=size, everything=everything):
        say(f"removed {gone.path}: {gone.why}, {human_bytes(gone.num_bytes)}")
        total += gone.num_bytes
    say(f"{human_bytes(total)} freed")


def _number(text: str, units: dict[str, float], option: str) -> float:
    from runtime.errors import UsageError

    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]+)", text)
    if match is None or match[2] not in units:
        raise UsageError(f"{option} must be a number followed by one of {', '.join(units)}; got {text!r}")
    return float(match[1]) * units[match[2]]
