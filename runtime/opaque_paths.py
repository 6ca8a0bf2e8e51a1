"""Which functions of the model's code an artifact may name, to be called whole."""

from __future__ import annotations

import re
from collections.abc import Collection

# Where opaque steps may lie, and what of it they may not be.
_OPAQUE = re.compile(
    r"transformers\.(models\.[a-z0-9_]+\.(modeling_[a-z0-9_]+|vision|perceiver)|masking_utils|modeling_attn_mask_utils"
    r"|modeling_rope_utils|modeling_layers|pytorch_utils|activations|cache_utils|integrations\.(sdpa_attention|moe))"
    r":_?[A-Za-z][A-Za-z0-9_]*(\._?[A-Za-z][A-Za-z0-9_]*)*\Z"
)
_REACHES_FILES = re.compile(r"pretrained|load|save|push|fetch|import|register|apply_chunking", re.IGNORECASE)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,200}\Z")


def is_opaque_path(path: str, own_modules: Collection[str] = ()) -> bool:
    """Whether `module:function` or `module:Class.method` may name an opaque step: it lies where transformers keeps
    what models calculate, and not among the functions that read, write or fetch files.

    It may also lie in one of `own_modules`, the code that the artifact brings: whoever runs that has allowed all of it.
    """
    module, _, qualified = path.partition(":")
    if module in own_modules:
        return all(_NAME.match(part) and not part.startswith("__") for part in qualified.split("."))
    return _OPAQUE.match(path) is not None and _REACHES_FILES.search(path.partition(":")[2]) is None
