"""Huge pages of memory for tensors, which take one page fault where ordinary pages take 512."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "THP_MEM_ALLOC_ENABLE"  # torch's
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def use_huge_pages() -> None:
    """Let torch ask Linux for huge pages for every tensor of 2 MiB and more; keep a value that the user has set.

    Torch reads the variable once, when it allocates its first tensor, so this is called before torch is imported. It
    changes the environment, which child processes inherit: only a process of this package's own may call it. Without
    huge pages in the kernel, torch would print a warning.
    """
    try:
        is_possible = "[never]" not in _SETTING.read_text()
    except OSError:
        is_possible = False
    if is_possible:
        os.environ.setdefault(VARIABLE, "1")
