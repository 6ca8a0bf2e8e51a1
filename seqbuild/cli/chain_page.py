"""The page that `inspect --html` writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.console import say
from runtime.errors import UsageError

if TYPE_CHECKING:
    from runtime.artifact.manifest import Manifest

_BATCH_SIZE, _SEQ_LEN = 8, 2048
BATCH, SEQUENCE = "batch", "sequence"


def require_sizes(artifact: Path, html: Path | None, batch_size: int | None, seq_len: int | None) -> None:
    """Reject sizes without a page, and a page that cannot be written.

    Raises:
        UsageError, OutputError: naming the option or the file.
    """
    from runtime.cli.report import require_page_outside
    from runtime.report.html import require_replaceable

    if html is not None:
        require_page_outside("--html", html, artifact)
        require_replaceable(html)
    elif batch_size is not None or seq_len is not None:
        raise UsageError("--batch-size and --seq-len require --html", hint="pass --html FILE, or leave them out")


def write_html(
    path: Path, manifest: Manifest, sources: Mapping[str, str], batch_size: int | None, seq_len: int | None
) -> None:
    """Write the page of an artifact, with bytes for a batch of these sizes, or of usual ones within its limits.

    Raises:
        UsageError: for a size that the artifact does not support.
    """
    from runtime.planning.request import dim_sizes
    from runtime.report.chain_page import write_chain

    usual = {BATCH: _BATCH_SIZE, SEQUENCE: _SEQ_LEN}
    for dim in manifest.dims:
        if dim.name in usual:
            usual[dim.name] = max(dim.min, usual[dim.name] if dim.max < 0 else min(usual[dim.name], dim.max))
    batch, sequence = batch_size or usual[BATCH], seq_len or usual[SEQUENCE]
    sizes, remarks = dim_sizes(manifest, batch, sequence, {})
    write_chain(path, manifest, sources, sizes)
    for line in remarks:
        say(line)
    say(f"page: {path}")
