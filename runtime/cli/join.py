"""The command `join`, which both command lines have. It needs neither torch nor an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from runtime.console import human_bytes, say

Parts = Annotated[
    list[Path],
    typer.Argument(metavar="PART...", help="Every directory that calibrate --parts has written."),
]
CheckpointOut = Annotated[Path, typer.Option("--out", "-o", help="Directory for the checkpoint.")]


def join(parts: Parts, out: CheckpointOut) -> None:
    """Make one checkpoint of the parts that calibrate --parts has written."""
    from runtime.checkpoint.parts import join_parts
    from runtime.provenance.output_files import complete_joined

    result = join_parts(parts, out, complete_joined)
    say(f"{out}: {result.num_tensors} tensors, {human_bytes(result.num_bytes)}, of {result.num_parts} parts")
