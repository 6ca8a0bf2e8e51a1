"""Say how to serve a quantized checkpoint: with vLLM where it was tested to load the result, or with transformers."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runtime.artifact.manifest import Manifest

# The architectures that docs/readers.md tests with vLLM; what vLLM does not load of them, `reader_limits` states.
VLLM_MODEL_TYPES = (
    *("llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "opt", "qwen3_moe", "mixtral", "deepseek_v3"),
    *("granitemoe", "llama4_text", "qwen3_next"),
)
_NOT_LOADED = ("does not load", "at random", "wrong numbers")
_DEQUANTIZED = "CompressedTensorsConfig(dequantize=True)"
NO_READER = "none of the tested programs loads all of it, see the warnings above and docs/readers.md"


def auto_class(name: str) -> str:
    """Return the class of transformers that loads a model whose own class, `name`, cannot be imported from there."""
    return "AutoModelForCausalLM" if "CausalLM" in name else "AutoModel"


def serving_lines(manifest: Manifest, path: Path, remarks: Sequence[str]) -> tuple[str, ...]:
    """Return the command or the code that loads a checkpoint.

    Args:
        manifest: of the model.
        path: the checkpoint.
        remarks: the warnings of its calibration, which name the readers that do not load it.
    """
    limits = [text.removeprefix("warning: ") for text in remarks]
    if manifest.model.model_type in VLLM_MODEL_TYPES and not any(text.startswith("vLLM") for text in limits):
        # A name that begins with a dash would be an option.
        return (f"vllm serve {shlex.quote(f'./{path}' if str(path).startswith('-') else str(path))}",)
    of_transformers = [text for text in limits if text.startswith("transformers")]
    if any(reason in text for text in of_transformers for reason in _NOT_LOADED):
        return (NO_READER,)
    name, options = manifest.model.class_name, ["device_map='auto'"]
    if manifest.model.code:
        name = auto_class(name)
        options.append("trust_remote_code=True")
    names = [name]
    if any(_DEQUANTIZED in text for text in of_transformers):
        names.insert(0, "CompressedTensorsConfig")
        options.append(f"quantization_config={_DEQUANTIZED}")
    code = f"from transformers import {', '.join(names)}; model = {name}.from_pretrained"
    return (f"{code}({str(path)!r}, {', '.join(options)})",)
