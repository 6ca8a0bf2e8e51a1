"""Keep transformers offline, so that an artifact's config cannot make it download anything."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Make the hub's client refuse every request while the block runs; its cache can be read."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
