"""The files of a checkpoint besides its tensors, and what its config says is not quantized."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from runtime.experts import Mixture
from runtime.grammar import SOURCE_LIMIT_BYTES
from runtime.regular_files import read_regular
from runtime.split import checkpoint_name

if TYPE_CHECKING:
    from runtime.artifact import Artifact
    from runtime.checkpoint import Checkpoint
    from runtime.weights import Weights

_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".py", ".index.json")
_NEVER_COPIED = ("adapter_config.json",)  # it has readers load other weights on top


def write_companions(
    directory: Path, artifact: Artifact, checkpoint: Checkpoint, quantization_config: dict[str, Any]
) -> None:
    """Write config.json with the quantization config, and copy tokenizer, generation config and their kin.

    The checkpoint's own files go before the artifact's: they belong to the weights. The model's own code is the
    artifact's: it is what was allowed and what ran.

    Args:
        directory: of the new checkpoint.
        artifact: brings config and tokenizer, for a checkpoint that is nothing but tensors.
        checkpoint: the original.
        quantization_config: for config.json.
    """
    compiled = json.loads(artifact.companions.get("config.json", b"{}").decode("utf-8"))
    config = (checkpoint.config or compiled) | {"quantization_config": quantization_config}
    if artifact.model_code is not None:
        config["auto_map"] = _local(compiled.get("auto_map", {}))
        for name, data in artifact.model_code.files.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes(data)
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (directory / "config.json").write_text(text + "\n", encoding="utf-8")
    for path in sorted(checkpoint.directory.iterdir()):
        target = directory / path.name
        if _may_be_copied(path.name) and not target.exists() and _is_inside(path) and _is_companion(path):
            target.write_bytes(read_regular(path))
    for name, data in artifact.companions.items():
        if _may_be_copied(name) and not (directory / name).exists():
            (directory / name).write_bytes(data)


def _may_be_copied(name: str) -> bool:
    return not name.startswith(".") and not name.endswith(_NOT_COPIED) and name not in _NEVER_COPIED


def _is_inside(path: Path) -> bool:
    """Whether this is a file of its directory: none elsewhere that a link leads to, but for the hub's cache."""
    if not path.is_file():
        return False
    home, target = path.parent.resolve(), path.resolve()
    is_of_hub = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
    return home in target.parents or is_of_hub


def _local(auto_map: Any) -> Any:
    """An auto_map whose code is in the directory itself, wherever it came from (`owner/name--module.Class`)."""
    if isinstance(auto_map, dict):
        return {kind: _local(value) for kind, value in auto_map.items()}
    if isinstance(auto_map, list):
        return [_local(value) for value in auto_map]
    return auto_map.rpartition("--")[2] if isinstance(auto_map, str) else auto_map


def _is_companion(path: Path) -> bool:
    """What readers look for in a model's directory."""
    kinds = (".json", ".jinja", ".txt", ".model", ".tiktoken")
    return path.suffix in kinds and path.stat().st_size <= 32 * SOURCE_LIMIT_BYTES


def not_quantized(
    model: nn.Module, source: Weights, quantized: Container[str], tables: Sequence[str] = ()
) -> list[str]:
    """Patterns for everything that a reader could take for a quantized Linear and that is none.

    Those are the Linear modules that were left as they are, and what is one or more Linear modules to readers with
    other classes than ours: routers, and experts, whose weights are single matrices in the checkpoint and one stack
    here; and what the checkpoint has besides the model (layers that predict several tokens, DeepSeek's for instance).

    Args:
        model: the module tree.
        source: says which tensors make which parameter.
        quantized: names of the modules that were quantized.
        tables: names of the embeddings that a target matches.
    """
    modules = dict(model.named_modules())
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear) and name not in quantized]
    found = dict.fromkeys(other for name in (*linear, *tables) for other in _names(name, source))
    mixtures = {
        f"{name}.{own}": f"{name}.{own.rpartition('.')[2]}"
        for name, module in modules.items()
        if isinstance(module, Mixture)
        for own in module.stacked
        if own not in module.stacks
    }
    lists = _lists(key for name in modules if name in quantized for key in _names(name, source))
    for name, origin in source.origins.items():
        owner = modules.get(name.rpartition(".")[0])
        if origin.conversion >= 0:
            found.update(dict.fromkeys(_stacked(origin.keys, lists)))
        elif name.endswith(".weight") and not isinstance(owner, (nn.Linear, nn.Embedding)):
            matrices = [key for key in origin.keys if len(source.checkpoint.shape(key)) == 2]
            found.update(dict.fromkeys(key.removesuffix(".weight") for key in matrices))
        if name in mixtures and len(origin.keys) == 1:
            found["re:" + re.escape(checkpoint_name(origin.keys[0], mixtures[name])) + r"(\.|$)"] = None
    found.update(dict.fromkeys(_left_over(source)))
    return list(found)


def _left_over(source: Weights) -> Iterator[str]:
    """Modules of matrices that no parameter is made from; experts as one regular expression."""
    used = {key for origin in source.origins.values() for key in origin.keys}
    for key in source.checkpoint:
        if key not in used and key.endswith(".weight") and len(source.checkpoint.shape(key)) == 2:
            owner, number, _ = key.removesuffix(".weight").rpartition(".experts.")
            yield "re:" + re.escape(f"{owner}.experts") + r"\.\d+\." if number else key.removesuffix(".weight")


def _names(name: str, source: Weights) -> Iterator[str]:
    """A module's name in the model, and in the checkpoint, where experts may have another."""
    yield name
    key = source.plain_key(f"{name}.weight") if f"{name}.weight" in source.origins else None
    if key is not None:
        yield key.removesuffix(".weight")


def _lists(names: Iterable[str]) -> set[str]:
    """Names of what has a numbered member among these modules or around them."""
    found: set[str] = set()
    for name in names:
        parts = name.split(".")
        found.update(".".join(parts[:depth]) for depth, part in enumerate(parts) if part.isdigit())
    return found


def _stacked(keys: tuple[str, ...], lists: Container[str]) -> Iterator[str]:
    """The modules of several tensors: one regular expression where they are the members of a list.

    Args:
        keys: the tensors.
        lists: those of which other members are quantized (Ernie has experts for text and for images in one).
    """
    parts = [key.split(".")[:-1] for key in keys]
    columns = zip(*parts, strict=False)
    depth = sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))
    if len(keys) > 1 and all(len(part) > depth and part[depth].isdigit() for part in parts):
        owner = ".".join(parts[0][:depth])
        numbers = "|".join(dict.fromkeys(part[depth] for part in parts))
        yield "re:" + re.escape(owner) + (rf"\.({numbers})\." if owner in lists else r"\.\d+\.")
    else:
        yield from (".".join(part) for part in parts)
