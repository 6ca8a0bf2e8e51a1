"""What config.json says: the numbers that data must respect, and whether two of them describe one model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.errors import ModelError, WeightsError
from runtime.manifest import ATTENTIONS

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from runtime.artifact import Artifact

# What a run without training, sampling and cache does not look at, so that copies of one model may differ in it.
_WITHOUT_EFFECT = re.compile(
    r"_.*|.*_token_id|.*dropout.*|.*dropprob|initializer_.*|output_.*|use_cache|return_dict|router_aux_loss_coef"
    r"|id2label|label2id|problem_type|architectures|(torch_)?dtype|transformers_version|quantization_config"
)


def read_config(directory: Path) -> PretrainedConfig:
    """The config of a directory, with transformers' defaults where it says nothing.

    Raises:
        ModelError: when transformers does not know such a model.
    """
    from transformers import AutoConfig

    try:
        # Without `trust_remote_code=False` a config with code of its own would ask on the terminal, and run it.
        config: PretrainedConfig = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except MemoryError:
        raise
    except Exception as error:  # transformers validates with many kinds of exceptions
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{directory / 'config.json'} describes no model that transformers knows: {why}") from error
    require_plain_attention(config, directory)
    return config


def require_plain_attention(config: PretrainedConfig, origin: Path) -> None:
    """Refuse a config that asks for an attention outside of torch; transformers would fetch its kernel from the hub.

    Raises:
        ModelError: naming the attention.
    """
    for part in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))):
        wanted = str(getattr(part, "_attn_implementation", ""))
        if wanted not in ATTENTIONS:
            raise ModelError(f"{origin} asks for the attention {wanted!r}", hint="eager and sdpa are offered")


def text_limits(artifact: Artifact) -> tuple[int | None, int | None]:
    """Size of the vocabulary and length of the longest sequence, None where the config does not state it."""
    config = read_config(artifact.path).get_text_config()
    vocab_size, longest = (getattr(config, name, None) for name in ("vocab_size", "max_position_embeddings"))
    return _positive(vocab_size), _positive(longest)


def require_same_model(artifact: Artifact, directory: Path) -> None:
    """Refuse a checkpoint whose config is not the one that was compiled.

    Tensors of one shape can belong to models that compute differently: another base of the rotary embedding, another
    epsilon. Then the subgraphs would run, and give something else than the checkpoint's own model.

    Args:
        artifact: brings the config it was compiled from.
        directory: the checkpoint's; a config.json in it may be missing.

    Raises:
        WeightsError: naming the first entry that differs.
    """
    if not (directory / "config.json").is_file():
        return
    compiled, found = (read_config(path).to_dict() for path in (artifact.path, directory))
    for name, expected, got in _differences(compiled, found):
        raise WeightsError(
            f"{directory / 'config.json'} has {name} = {got!r}, the artifact was compiled with {expected!r}",
            hint="compile the model of this checkpoint",
        )


def _differences(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for name in one:
        if name not in other or _WITHOUT_EFFECT.fullmatch(name):
            continue
        first, second = one[name], other[name]
        if isinstance(first, Mapping) and isinstance(second, Mapping):
            yield from _differences(first, second, f"{prefix}{name}.")
        elif first != second:
            yield prefix + name, first, second


def _positive(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None
