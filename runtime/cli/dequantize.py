"""The command `dequantize`, which both command lines have. It needs no artifact."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

import runtime.cli.options as given
from runtime.cli.run import require_output
from runtime.console import human_bytes, parse_bytes, put, say, warn
from runtime.errors import UsageError
from runtime.status import doing, done

Quantized = Annotated[
    str, typer.Argument(metavar="CKPT", help="Directory of a quantized checkpoint, or hub id in the local cache.")
]
PlainOut = Annotated[Path, typer.Option("--out", "-o", help="Directory for the plain checkpoint.")]
PlainDtype = Annotated[
    str,
    typer.Option("--dtype", help="bfloat16, float16, float32, or auto: that of the checkpoint's config."),
]


def dequantize(
    checkpoint: Quantized,
    out: PlainOut,
    revision: given.Revision = None,
    dtype: PlainDtype = "auto",
    max_shard_size: given.MaxShardSize = "2GB",
    resume: given.Resume = False,
    as_json: given.SummaryAsJson = False,
) -> None:
    """Write the plain form of a quantized checkpoint, one tensor at a time."""
    from runtime.checkpoint.dequantize import FLOAT_NAMES
    from runtime.dequantization import dequantize as run
    from runtime.host.hub import resolve_directory

    require_output()
    if dtype not in ("auto", *FLOAT_NAMES):
        raise UsageError(f"--dtype must be one of auto, {', '.join(FLOAT_NAMES)}; got {dtype!r}")
    shard_bytes = parse_bytes(max_shard_size, option="--max-shard-size")
    directory = resolve_directory(checkpoint, revision=revision, what="weights")
    with ExitStack() as stack:
        stack.callback(done)
        result = run(
            directory,
            out=out,
            dtype=None if dtype == "auto" else dtype,
            max_shard_bytes=shard_bytes,
            resume=resume,
            progress=lambda line: doing(f"dequantizing: {line}"),
        )
    for remark in result.remarks:
        warn(remark)
    if as_json:
        facts = {name: getattr(result, name) for name in ("method", "dtype", "num_tensors", "num_bytes", "seconds")}
        facts |= {"num_dequantized": result.num_dequantized, "dropped": list(result.dropped)}
        put(json.dumps({"path": str(result.path), **facts, "num_resumed": result.num_resumed}))
        return
    say(
        f"{out}: {result.num_dequantized} of {result.num_tensors} tensors dequantized from {result.method}; "
        f"{human_bytes(result.num_bytes)} in {result.dtype}, {result.seconds:.1f} s"
    )
    if result.dropped:
        say(f"dropped: {len(result.dropped)} scales and transforms, such as {result.dropped[0]}")
