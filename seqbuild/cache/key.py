"""The cache key: a named list of everything that decides an artifact, each ingredient a short text or a digest.

The list is made in two stages, because building the model takes most of the time of a compilation without changes:

1. `requested`, from the files and options alone. Its digest names the record of a compilation, by which an identical
   one finds the artifact without building the model or importing torch (`seqbuild.cache.recall`).
2. `resolved`, from these and the model once it is built: its class and the library files that define it are added, and
   options are replaced by what they select for this model. Its digest is the artifact's input key, so that two requests
   for the same artifact, such as explicit and default targets, share it.

Excluded on purpose, because they do not change the artifact's bytes: the locations of model and artifact, the time, the
user, the machine, the process's hash seed, and the values of the sample (the input key uses shapes and dtypes only).
tests/seqbuild/test_recall.py has a test for each.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import runtime
from runtime.artifact.encoding import FORMAT_VERSION, canonical, sha256
from runtime.errors import DataError
from runtime.host.regular_files import read_regular
from seqbuild.model.own_code import OwnCode
from seqbuild.model.source import Source
from seqbuild.options import CompileOptions

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True, kw_only=True, slots=True)
class Compilation:
    """What is compiled: the source, its own code if it has any, and the options."""

    source: Source
    own: OwnCode | None
    options: CompileOptions

    @property
    def own_files(self) -> Mapping[str, bytes]:
        """Return the files of the model's own code, by path."""
        return self.own.files if self.own is not None else {}

    @property
    def own_modules(self) -> tuple[str, ...]:
        """Return the import names of the modules of the model's own code."""
        return self.own.modules if self.own is not None else ()

    def artifact_path(self, input_key: str) -> Path:
        """Return the directory of the artifact with this key."""
        return self.options.out / f"{self.source.name}-{input_key[:12]}"


def requested(compilation: Compilation) -> dict[str, str]:
    """List the ingredients that are known before the model is built.

    Raises:
        DataError: if the sample file cannot be read.
    """
    source, options = compilation.source, compilation.options
    checkpoint = source.checkpoint_shapes()
    ingredients = {
        "format": ".".join(map(str, FORMAT_VERSION)),
        "config": sha256(read_regular(source.config_file)),
        "companions": digest({name: sha256(data) for name, data in source.companions().items()}),
        "checkpoint_names": "none" if checkpoint is None else digest({k: list(v) for k, v in checkpoint.items()}),
        "model_code": digest({path: sha256(data) for path, data in compilation.own_files.items()}),
        "seqbuild_source": own_digest(),
        "attn_implementation": options.attn_implementation or "default",
        "targets": json.dumps(list(options.targets)),
        "ignore": json.dumps(list(options.ignore)),
        "auto_ignore": json.dumps(options.auto_ignore),
        "leaves": options.leaves,
        "targets_per_subgraph": str(options.targets_per_subgraph),
        "sample": _requested_sample(options),
    }
    return ingredients | {f"version_{name}": version for name, version in versions().items()}


def resolved(
    request: Mapping[str, str],
    model: nn.Module,
    *,
    targets: tuple[str, ...],
    sample: Mapping[str, Any],
    sources: Mapping[str, str],
) -> dict[str, str]:
    """Complete the ingredients of a request with those that only the model tells.

    Args:
        request: the result of `requested`.
        model: without weights.
        targets: the patterns to cut at.
        sample: the inputs to trace with.
        sources: the library files that define the model, module name to sha256.
    """
    config: Any = getattr(model, "config", None)
    return {
        **request,
        "model_class": f"{type(model).__module__}.{type(model).__qualname__}",
        "model_source": digest(sources),
        "attn_implementation": str(getattr(config, "_attn_implementation", "")),
        "targets": json.dumps(list(targets)),
        "sample": json.dumps({name: _signature(value) for name, value in sample.items()}),
    }


def digest(ingredients: Mapping[str, Any]) -> str:
    """Return the sha256, in hex, of the canonical encoding of a table."""
    return sha256(canonical(dict(ingredients)))


def versions() -> dict[str, str]:
    """Return the versions of the software that takes part in a compilation."""
    libraries = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    return {"seqbuild": runtime.__version__, **libraries}


def own_digest() -> str:
    """Hash each file of the compiler and of the runtime, with which it shares code.

    A version number does not change with every commit.
    """
    found: dict[str, str] = {}
    for package in (Path(__file__).resolve().parents[1], Path(runtime.__file__).resolve().parent):
        for path in sorted(package.rglob("*.py")):
            found[f"{package.name}/{path.relative_to(package).as_posix()}"] = sha256(path.read_bytes())
    return digest(found)


def _requested_sample(options: CompileOptions) -> str:
    if options.sample is None:
        return "generated, text only" if options.text_only else "generated"
    try:
        return sha256(read_regular(options.sample))
    except OSError as error:
        raise DataError(f"the sample {options.sample} cannot be read: {error.strerror}") from error


def _signature(value: torch.Tensor | Any) -> str:
    shape = getattr(value, "shape", None)
    return repr(value) if shape is None else f"{value.dtype}{list(shape)}"
