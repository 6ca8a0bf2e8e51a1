"""Compute the input key: a hash over everything that determines an artifact, each ingredient by name.

Excluded on purpose, because they do not change the artifact's bytes: the locations of model and artifact, the time, the
user, the machine, the process's hash seed, and the values of the sample input (only shapes and dtypes are used).
tests/seqbuild/test_recall.py has a test for each.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import runtime
from runtime.artifact.encoding import FORMAT_VERSION, canonical, sha256
from runtime.artifact.manifest import Manifest
from runtime.chain import check
from runtime.host.regular_files import read_regular
from runtime.language.library_sources import changed_sources
from seqbuild.model.source import Source

if TYPE_CHECKING:
    import torch
    from torch import nn


def versions() -> dict[str, str]:
    """Return the versions of the software that takes part in a compilation."""
    return {name: importlib.metadata.version(name) for name in ("seqbuild", "torch", "transformers")}


def ingredients(
    source: Source,
    model: nn.Module,
    *,
    target_patterns: Sequence[str],
    ignore: Sequence[str],
    auto_ignore: bool,
    targets_per_subgraph: int,
    sample: Mapping[str, Any],
    model_code: Mapping[str, bytes],
    sources: Mapping[str, str],
    leaves: str,
) -> dict[str, str]:
    """Return all ingredients of the input key: name to a short value or the digest of a long one.

    Args:
        source: the model's description on disk.
        model: without weights.
        target_patterns: where to cut.
        ignore: the functions to record as opaque steps.
        auto_ignore: whether other functions may become opaque steps, too.
        targets_per_subgraph: the requested number of targets in each subgraph.
        sample: the inputs.
        model_code: the files of the model's own code, by path.
        sources: the library files that define the model, module name to sha256.
        leaves: the tracing depth.
    """
    config: Any = getattr(model, "config", None)
    parts = {
        "format": ".".join(map(str, FORMAT_VERSION)),
        **source_ingredients(source, model_code),
        "model_class": f"{type(model).__module__}.{type(model).__qualname__}",
        "model_source": _digest(sources),
        "seqbuild_source": own_digest(),
        "attn_implementation": str(getattr(config, "_attn_implementation", "")),
        "targets": json.dumps(list(target_patterns)),
        "ignore": json.dumps(list(ignore)),
        "auto_ignore": json.dumps(auto_ignore),
        "leaves": leaves,
        "targets_per_subgraph": str(targets_per_subgraph),
        "sample": json.dumps({name: _signature(value) for name, value in sample.items()}),
    }
    return parts | {f"version_{name}": version for name, version in versions().items()}


def source_ingredients(source: Source, model_code: Mapping[str, bytes]) -> dict[str, str]:
    """Return the ingredients from the model's directory, including its own code but not its location."""
    checkpoint = source.checkpoint_shapes()
    return {
        "config": sha256(read_regular(source.config_file)),
        "companions": _digest({name: sha256(data) for name, data in source.companions().items()}),
        "checkpoint_names": "none" if checkpoint is None else _digest({k: list(v) for k, v in checkpoint.items()}),
        "model_code": _digest({path: sha256(data) for path, data in model_code.items()}),
    }


def input_key(parts: Mapping[str, str]) -> str:
    """Return the sha256, in hex, of the canonical encoding of the ingredients."""
    return sha256(canonical(dict(parts)))


def find_artifact(path: Path, key: str) -> Manifest | None:
    """Return the manifest of the complete artifact with this key at `path`, if its library sources are unchanged.

    Raises:
        ArtifactError: if the existing artifact is damaged.
    """
    if not path.is_dir():
        return None
    found, _ = check(path)
    return found if found.input_key == key and not changed_sources(found.sources) else None


def own_digest() -> str:
    """Hash each file of the compiler and of the runtime, with which it shares code.

    A version number does not change with every commit.
    """
    found: dict[str, str] = {}
    for package in (Path(__file__).resolve().parents[1], Path(runtime.__file__).resolve().parent):
        for path in sorted(package.rglob("*.py")):
            found[f"{package.name}/{path.relative_to(package).as_posix()}"] = sha256(path.read_bytes())
    return _digest(found)


def _signature(value: torch.Tensor | Any) -> str:
    shape = getattr(value, "shape", None)
    return repr(value) if shape is None else f"{value.dtype}{list(shape)}"


def _digest(value: Mapping[str, Any]) -> str:
    return sha256(canonical(dict(value)))
