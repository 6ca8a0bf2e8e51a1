"""Compile a model, or find the existing artifact.

request     resolve a hub id, directory or config                       seqbuild.model.source
            import the model's own code, if allowed                     seqbuild.model.own_code
            look up the request in the cache                            seqbuild.cache.recall
passes      for a request that is not in the cache                      seqbuild.passes

Nothing here imports torch, so that a request in the cache takes less than a second.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runtime.host.own_process import RARELY
from seqbuild.cache.key import Compilation, requested
from seqbuild.cache.recall import Compiled, recall
from seqbuild.model.late_scipy import late_scipy
from seqbuild.model.own_code import own_code_of
from seqbuild.model.source import Source, resolve_source
from seqbuild.options import CompileOptions


def compile_model(model_id_or_path: str | os.PathLike[str], **options: Any) -> Path:
    """Compile a model to an artifact and return the artifact's directory.

    Args:
        model_id_or_path: hub id in the local cache, model directory, or config.json.
        options: the other attributes of `seqbuild.options.CompileOptions`.

    Raises:
        ModelError, TargetError, TraceError, OutputError: see their docstrings; no partial artifact is left behind.
    """
    return build(model_id_or_path, **options).path


def build(model_id_or_path: str | os.PathLike[str], **options: Any) -> Compiled:
    """Compile a model as `compile_model` does, and return the artifact's manifest and remarks, too."""
    return compile_with(CompileOptions(model=model_id_or_path, **options))  # type: ignore[arg-type]  # normalized there


def compile_with(options: CompileOptions, source: Source | None = None) -> Compiled:
    """Compile a model, or return the existing artifact for the same input.

    Args:
        options: state the model and how it is compiled.
        source: the model, if it was found already; None to find it by the options.
    """
    start = time.perf_counter()
    with _rarely_collected(), opened(options, source) as compilation:
        request = requested(compilation)
        found = None if options.force else recall(compilation, request)
        if found is None:
            with late_scipy():
                from seqbuild.passes import run_passes

            found = run_passes(compilation, request)
    return dataclasses.replace(found, seconds=time.perf_counter() - start)


@contextlib.contextmanager
def opened(options: CompileOptions, source: Source | None = None) -> Iterator[Compilation]:
    """Find the source, and make the model's own code, if any, importable while the block runs."""
    source = source or resolve_source(options.model, revision=options.revision)
    with own_code_of(source, is_allowed=options.trust_remote_code) as own:
        yield Compilation(source=source, own=own, options=options)


@contextlib.contextmanager
def _rarely_collected() -> Iterator[None]:
    """Reduce the frequency of cyclic garbage collection.

    Compilation creates few reference cycles, and scanning a million live objects repeatedly would take a third of the
    time.
    """
    before = gc.get_threshold()
    gc.set_threshold(*(max(usual, rare) if usual else 0 for usual, rare in zip(before, RARELY, strict=True)))
    try:
        yield
    finally:
        gc.set_threshold(*before)
