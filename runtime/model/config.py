"""Read config.json: limits on the data, and whether two files describe the same model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.artifact.manifest import ATTENTIONS
from runtime.errors import ModelError, WeightsError
from runtime.host.offline import offline
from runtime.host.regular_files import is_there, read_regular, read_text, reason_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from runtime.artifact.parts import ArtifactParts

_EXPERTS = (None, "eager", "batched_mm", "grouped_mm")
_DEPTH_LIMIT = 24
LIMITS = ("vocab_size", "max_position_embeddings")
# Entries without effect on a run without training, sampling and cache; copies of one model may differ in them.
_WITHOUT_EFFECT = re.compile(
    r"_.*|.*_token_id|.*dropout.*|.*dropprob|initializer_.*|output_.*|use_cache|return_dict|router_aux_loss_coef"
    r"|id2label|label2id|problem_type|architectures|auto_map|(torch_)?dtype|transformers_version|quantization_config"
)


def read_config(directory: Path, config_class: type | None = None, *, origin: Path | None = None) -> PretrainedConfig:
    """Read the config of a directory, with its class's defaults for missing entries.

    Args:
        directory: contains a config.json.
        config_class: of a model with its own code; None for one of transformers.
        origin: the directory's name in messages.

    Raises:
        ModelError: when it is not the config of such a model.
    """
    origin = origin or directory
    try:
        config = parse_config(directory, config_class)
    except MemoryError:
        raise
    except Exception as error:  # transformers validates with many kinds of exceptions
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        whom = "transformers" if config_class is None else config_class.__name__
        raise ModelError(f"{origin / 'config.json'} is not a config that {whom} accepts: {why}") from error
    require_plain_attention(config, origin)
    return config


def parse_config(path: Path, config_class: Any = None) -> PretrainedConfig:
    """Parse a file or directory with transformers' classes or `config_class`, whose errors are not caught."""
    with offline():  # a backbone would be requested from the hub
        if config_class is None:
            from transformers import AutoConfig

            # With the default of `trust_remote_code`, a config with its own code prompts on the terminal and runs it.
            found: PretrainedConfig = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        else:
            found = config_class.from_pretrained(path, local_files_only=True)
    return found


def require_plain_attention(config: PretrainedConfig, origin: Path) -> None:
    """Reject a config with an attention or experts implementation outside of torch, also in nested configs:
    transformers would fetch a kernel from the hub.

    Raises:
        ModelError: naming the implementation.
    """
    for part in _configs(config, 0):
        wanted = str(getattr(part, "_attn_implementation", ""))
        if wanted not in ATTENTIONS:
            raise ModelError(f"{origin} has the unsupported attention {wanted!r}", hint="use eager or sdpa")
        experts = getattr(part, "_experts_implementation", None)
        if not isinstance(experts, (str, type(None))) or experts not in _EXPERTS:
            raise ModelError(
                f"{origin} has the unsupported experts implementation {experts!r}",
                hint=f"use one of {', '.join(map(str, _EXPERTS[1:]))}",
            )


def _configs(value: Any, depth: int) -> Iterator[PretrainedConfig]:
    from transformers import PretrainedConfig

    if depth > _DEPTH_LIMIT:
        return
    is_config = isinstance(value, PretrainedConfig)
    if is_config:
        yield value
    items = vars(value) if is_config else value
    if isinstance(items, Mapping):
        for item in list(items.values()):
            yield from _configs(item, depth + 1)
    elif isinstance(items, (list, tuple)):
        for item in items:
            yield from _configs(item, depth + 1)


def artifact_config(artifact: ArtifactParts) -> PretrainedConfig:
    """Read the config that an artifact was compiled from.

    Raises:
        ModelError: when it is not the config of a model on this host.
    """
    return read_config(artifact.companions_path, artifact.config_class, origin=artifact.path)


def text_limits(artifact: ArtifactParts) -> tuple[int | None, int | None]:
    """Return vocabulary size and maximum sequence length; None if the config does not state it."""
    if artifact.manifest.is_portable:
        vocab_size, longest = (artifact.manifest.limits.get(name) for name in LIMITS)
        return vocab_size, longest
    config = artifact_config(artifact).get_text_config()
    vocab_size, longest = (getattr(config, name, None) for name in LIMITS)
    return _positive(vocab_size), _positive(longest)


_TIED = "tie_word_embeddings"


def require_same_model(artifact: ArtifactParts, directory: Path) -> None:
    """Reject a checkpoint whose config differs from the compiled one.

    Tensors of the same shape can belong to models that compute something else, with another rotary base or epsilon for
    instance. The subgraphs would run without an error and give a different result.

    Args:
        artifact: contains the config it was compiled from.
        directory: the checkpoint's; config.json may be missing.

    Raises:
        WeightsError: naming the first entry or file that differs.
    """
    for name, data in artifact.model_code.files.items() if artifact.model_code is not None else ():
        if is_there(directory / name) and read_regular(directory / name) != data:
            raise WeightsError(
                f"{directory / name} differs from the code that the artifact was compiled with",
                hint="compile the model of this checkpoint",
            )
    if not is_there(directory / "config.json"):
        return
    paths = (artifact.companions_path, directory)
    stated = [_stated(path) for path in paths]
    if next(_differences(stated[0], stated[1], is_strict=True), None) is None:
        return
    if artifact.manifest.is_portable and artifact.model_code is not None:
        compiled, found = stated  # the config class is part of the model's own code
    else:
        kinds = [table.get("model_type") for table in stated]
        if None not in kinds and kinds[0] != kinds[1]:  # the rest may need the model's own code
            raise _another(directory, "model_type", *kinds)
        compiled, found = (read_config(path, artifact.config_class).to_dict() | _stated_type(path) for path in paths)
    may_untie = artifact.manifest.rotations is not None and bool(artifact.manifest.rotations.untied)
    for name, expected, got in _differences(compiled, found):
        if may_untie and name.rpartition(".")[2] == _TIED and expected is True and got is False:
            continue  # as rotations write it: the code computes the same, and the head has a tensor of its own
        raise _another(directory, name, expected, got)


def _another(directory: Path, name: str, expected: Any, got: Any) -> WeightsError:
    return WeightsError(
        f"{directory / 'config.json'} has {name} = {got!r}, the artifact was compiled with {expected!r}",
        hint="compile the model of this checkpoint",
    )


def _stated(directory: Path) -> dict[str, Any]:
    """Parse config.json without defaults."""
    path = directory / "config.json"
    try:
        table = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {reason_of(error)}") from error
    if not isinstance(table, dict):
        raise ModelError(f"{path} must be a JSON object")
    return table


def _stated_type(directory: Path) -> dict[str, Any]:
    """Return the model type stated in the file, which a given config class ignores."""
    stated = _stated(directory).get("model_type")
    return {"model_type": stated} if stated is not None else {}


def _differences(
    one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "", *, is_strict: bool = False
) -> Iterator[tuple[str, Any, Any]]:
    """Yield entries that differ; with `is_strict` also those that only one of the two has."""
    for name in dict.fromkeys((*one, *other)):
        is_missing = name not in one or name not in other
        if _WITHOUT_EFFECT.fullmatch(name) or (is_missing and not is_strict):
            continue
        first, second = one.get(name), other.get(name)
        if isinstance(first, Mapping) and isinstance(second, Mapping):
            yield from _differences(first, second, f"{prefix}{name}.", is_strict=is_strict)
        elif first != second:
            yield prefix + name, first, second


def _positive(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None
