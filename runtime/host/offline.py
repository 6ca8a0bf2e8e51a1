"""Nothing is fetched: what an artifact makes transformers do must not reach the hub, whatever its config names."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Let the hub's client refuse every request meanwhile; files of its cache can be read."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
