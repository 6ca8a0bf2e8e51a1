"""Build a model of the right class from its config, without weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from runtime.console import quiet
from runtime.errors import ModelError
from runtime.model.config import parse_config, require_plain_attention
from runtime.model.weightless import calculate_buffers, from_config, without_weights
from seqbuild.model.source import Source

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from seqbuild.model.own_code import OwnCode

# The dtype that models are traced in: code that names it means "the dtype of the weights" (see seqbuild.chain.emit).
TRACE_DTYPE = torch.bfloat16


def build_weightless(
    source: Source,
    *,
    attn_implementation: str | None = None,
    own: OwnCode | None = None,
    dtype: torch.dtype = TRACE_DTYPE,
    like: nn.Module | None = None,
) -> PreTrainedModel:
    """Build the model of `source` with parameters on the meta device, in eval mode.

    The class is that of the model's own code, else the one that config.json names under `architectures`, else the
    causal language model of its type, else its base model.

    Args:
        source: the source with the config.
        attn_implementation: `eager` or `sdpa`; None keeps the default of transformers.
        own: the model's own code, allowed and loaded; None for a model that is part of transformers.
        dtype: dtype of the weights.
        like: a model whose class and attention implementation are reused; None determines them.

    Raises:
        ModelError: if transformers does not know the model, or it cannot be built.
    """
    config_class = own.config_class() if own is not None else None
    try:
        config = parse_config(source.config_file, config_class)
    except Exception as error:
        reader = "transformers" if config_class is None else config_class.__name__
        raise ModelError(f"{source.config_file} is not a config that {reader} supports: {_reason(error)}") from error
    require_plain_attention(config, source.config_file)
    cls: Any = type(like) if like is not None else (own.model_class() if own is not None else None)
    cls = cls or _model_class(source, config)
    if like is not None:
        attn_implementation = str(like.config._attn_implementation)  # type: ignore[union-attr]
    try:
        with without_weights(), quiet("transformers"):  # warnings about generation configs
            model: PreTrainedModel = from_config(cls, config, dtype=dtype, attention=attn_implementation)
            calculate_buffers(model)
    except Exception as error:
        raise ModelError(f"{cls.__name__} cannot be built from {source.config_file}: {_reason(error)}") from error
    model.tie_weights()  # building on the meta device creates separate parameters for shared ones
    model.train(False)
    return model


def _model_class(source: Source, config: Any) -> Any:
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    for name in source.config.get("architectures") or ():
        cls = getattr(transformers, str(name), None)
        if cls is not None and hasattr(cls, "_from_config"):
            return cls
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING):
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise ModelError(f"{source.name}: transformers has no model class for config type {type(config).__name__}")


def default_dtype(source: Source) -> str:
    """Return the name in torch of the weights' dtype in the config; float32 if the config states none."""
    for config in (source.config, source.config.get("text_config") or {}):
        name = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
        if name in ("float32", "float16", "bfloat16"):
            return name
    return "float32"


def _reason(error: BaseException) -> str:
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return " ".join(line.strip() for line in lines[:2])
