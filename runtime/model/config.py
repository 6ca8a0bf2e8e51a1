"""What config.json says: the numbers that data must respect, and whether two of them describe one model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.artifact.manifest import ATTENTIONS
from runtime.errors import ModelError, WeightsError
from runtime.host.offline import offline
from runtime.host.regular_files import is_there, read_regular, read_text

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from runtime.artifact.parts import ArtifactParts

_EXPERTS = (None, "eager", "batched_mm", "grouped_mm")
_DEPTH_LIMIT = 24
LIMITS = ("vocab_size", "max_position_embeddings")
# What a run without training, sampling and cache does not look at, so that copies of one model may differ in it.
_WITHOUT_EFFECT = re.compile(
    r"_.*|.*_token_id|.*dropout.*|.*dropprob|initializer_.*|output_.*|use_cache|return_dict|router_aux_loss_coef"
    r"|id2label|label2id|problem_type|architectures|auto_map|(torch_)?dtype|transformers_version|quantization_config"
)


def read_config(directory: Path, config_class: type | None = None, *, origin: Path | None = None) -> PretrainedConfig:
    """The config of a directory, with its class's defaults where it says nothing.

    Args:
        directory: holds a config.json.
        config_class: of a model that brings its own code; None for one that transformers knows.
        origin: what messages call the directory.

    Raises:
        ModelError: when it describes no such model.
    """
    origin = origin or directory
    try:
        config = parse_config(directory, config_class)
    except MemoryError:
        raise
    except Exception as error:  # transformers validates with many kinds of exceptions
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        whom = "transformers" if config_class is None else config_class.__name__
        raise ModelError(f"{origin / 'config.json'} describes no model that {whom} knows: {why}") from error
    require_plain_attention(config, origin)
    return config


def parse_config(path: Path, config_class: Any = None) -> PretrainedConfig:
    """The config in a file or directory, by transformers' own classes or by `config_class`; its errors come through."""
    with offline():  # a backbone would be asked for at the hub
        if config_class is None:
            from transformers import AutoConfig

            # Without `trust_remote_code=False` a config with code of its own would ask on the terminal, and run it.
            found: PretrainedConfig = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        else:
            found = config_class.from_pretrained(path, local_files_only=True)
    return found


def require_plain_attention(config: PretrainedConfig, origin: Path) -> None:
    """Refuse a config that asks for an attention or experts outside of torch; transformers would fetch a kernel from
    the hub. Every config that it holds is looked at, also where its class does not count it among its parts.

    Raises:
        ModelError: naming what it asks for.
    """
    for part in _configs(config, 0):
        wanted = str(getattr(part, "_attn_implementation", ""))
        if wanted not in ATTENTIONS:
            raise ModelError(f"{origin} asks for the attention {wanted!r}", hint="eager and sdpa are offered")
        experts = getattr(part, "_experts_implementation", None)
        if not isinstance(experts, (str, type(None))) or experts not in _EXPERTS:
            raise ModelError(
                f"{origin} asks for the experts {experts!r}", hint=f"{', '.join(map(str, _EXPERTS[1:]))} are offered"
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
    """The config that an artifact was compiled from.

    Raises:
        ModelError: when it describes no model that this host knows.
    """
    return read_config(artifact.companions_path, artifact.config_class, origin=artifact.path)


def text_limits(artifact: ArtifactParts) -> tuple[int | None, int | None]:
    """Size of the vocabulary and length of the longest sequence, None where the config does not state it."""
    if artifact.manifest.is_portable:
        vocab_size, longest = (artifact.manifest.limits.get(name) for name in LIMITS)
        return vocab_size, longest
    config = artifact_config(artifact).get_text_config()
    vocab_size, longest = (getattr(config, name, None) for name in LIMITS)
    return _positive(vocab_size), _positive(longest)


def require_same_model(artifact: ArtifactParts, directory: Path) -> None:
    """Refuse a checkpoint whose config is not the one that was compiled.

    Tensors of one shape can belong to models that compute differently: another base of the rotary embedding, another
    epsilon. Then the subgraphs would run, and give something else than the checkpoint's own model.

    Args:
        artifact: brings the config it was compiled from.
        directory: the checkpoint's; a config.json in it may be missing.

    Raises:
        WeightsError: naming the first entry or file that differs.
    """
    for name, data in artifact.model_code.files.items() if artifact.model_code is not None else ():
        if is_there(directory / name) and read_regular(directory / name) != data:
            raise WeightsError(
                f"{directory / name} is other code than the artifact was compiled with",
                hint="compile the model of this checkpoint",
            )
    if not is_there(directory / "config.json"):
        return
    paths = (artifact.companions_path, directory)
    stated = [_stated(path) for path in paths]
    if next(_differences(stated[0], stated[1], is_strict=True), None) is None:
        return
    if artifact.manifest.is_portable and artifact.model_code is not None:
        compiled, found = stated  # the classes that know more are the model's own code
    else:
        kinds = [table.get("model_type") for table in stated]
        if None not in kinds and kinds[0] != kinds[1]:  # its own code may have to tell what the rest means
            raise _another(directory, "model_type", *kinds)
        compiled, found = (read_config(path, artifact.config_class).to_dict() | _stated_type(path) for path in paths)
    for name, expected, got in _differences(compiled, found):
        raise _another(directory, name, expected, got)


def _another(directory: Path, name: str, expected: Any, got: Any) -> WeightsError:
    return WeightsError(
        f"{directory / 'config.json'} has {name} = {got!r}, the artifact was compiled with {expected!r}",
        hint="compile the model of this checkpoint",
    )


def _stated(directory: Path) -> dict[str, Any]:
    """What config.json itself says."""
    path = directory / "config.json"
    try:
        table = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if not isinstance(table, dict):
        raise ModelError(f"{path} holds no model config")
    return table


def _stated_type(directory: Path) -> dict[str, Any]:
    """The model type that the file itself states: a config class that is given does not look at it."""
    stated = _stated(directory).get("model_type")
    return {"model_type": stated} if stated is not None else {}


def _differences(
    one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "", *, is_strict: bool = False
) -> Iterator[tuple[str, Any, Any]]:
    """Entries that differ; with `is_strict` also those that only one of the two has."""
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
