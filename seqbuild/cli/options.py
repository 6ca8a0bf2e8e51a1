"""Options of the compiler's commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

SourceArgument = Annotated[
    str, typer.Argument(metavar="SOURCE", help="Hub id in the local cache, directory or config.json.")
]
Targets = Annotated[
    list[str] | None,
    typer.Option("--targets", "-t", help="Where to cut: class name, module name or re:pattern; may be repeated."),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option("--ignore", help="Function, Class.method or module.path.function to call whole; may be repeated."),
]
AutoIgnore = Annotated[
    bool, typer.Option("--auto-ignore/--no-auto-ignore", help="Call whole what cannot be recorded, or refuse it.")
]
Sample = Annotated[
    Path | None, typer.Option("--sample", help="Safetensors with the model's inputs by name; else made up.")
]
TextOnly = Annotated[bool, typer.Option("--text-only", help="Compile for text alone a model that also sees or hears.")]
TargetsPerSubgraph = Annotated[int, typer.Option(min=1, help="Targets that share a subgraph.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
AttnImplementation = Annotated[str | None, typer.Option(help="eager or sdpa; by default the model's own.")]
Leaves = Annotated[
    str, typer.Option("--leaves", help="How deep to trace: target, linear, or auto for linear where that is whole.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
DEFAULT_OUT = Path("artifacts")
