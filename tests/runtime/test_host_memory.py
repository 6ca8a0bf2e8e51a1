"""The memory that the host has and that this process uses."""

from __future__ import annotations

import torch

from runtime.host.limits import available_bytes, resident_bytes
from runtime.host.memory import trim_heap


def test_the_machine_tells_what_it_has() -> None:
    before = resident_bytes()
    block = torch.ones(2**24)
    assert resident_bytes() - before > 2**25
    del block
    trim_heap()
    assert resident_bytes() - before < 2**25
    assert (available_bytes() or 1) > 0
