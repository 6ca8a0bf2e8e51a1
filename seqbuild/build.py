"""Compile a model: the passes, in order.

source      what the user named: hub id, directory or config            seqbuild.model.source
own code    what the model brings, if that is allowed to run            seqbuild.model.own_code
model       its module tree without weights                             seqbuild.model.from_config
targets     where to cut                                                seqbuild.targets
key         is it there already?                                        seqbuild.cache
trace       one run on fake tensors, cut into subgraphs                 seqbuild.trace
keys        which checkpoint tensors make which parameter               seqbuild.model.checkpoint_keys
emit        source code, one file a subgraph                            seqbuild.emit
describe    the manifest                                                seqbuild.describe, relied_on
publish     all of it appears under its name at once                    runtime.publish
"""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from runtime.artifact import CONSTANTS_NAME, check
from runtime.errors import TargetError
from runtime.grammar import is_opaque_path
from runtime.manifest import MANIFEST_NAME, ConversionEntry, FileEntry, Manifest, sha256
from runtime.model_code import FOLDER
from runtime.publish import disk_errors, publish_directory
from seqbuild import cache, describe
from seqbuild.model.checkpoint_keys import KeyTable, key_table
from seqbuild.model.from_config import build_weightless, default_dtype
from seqbuild.model.own_code import OwnCode, own_code_of
from seqbuild.model.relied_on import relied_on
from seqbuild.model.source import Source, resolve_source
from seqbuild.targets import as_names, inferred_targets
from seqbuild.trace.attempts import Traced, read_sample, trace_somehow, with_larger
from seqbuild.trace.subgraphs import Trace

if TYPE_CHECKING:
    from torch import nn

    from seqbuild.trace.blame import Function

DEFAULT_OUT = Path("artifacts")
# As `gc.set_threshold` takes it; by default the first is some hundred or thousand.
_RARE = (100_000, 50, 50)


@dataclass(frozen=True, kw_only=True, slots=True)
class Compiled:
    """What a compilation did.

    Attributes:
        path: the artifact.
        manifest: its table of contents.
        is_cached: whether it was there already.
        seconds: how long it took.
    """

    path: Path
    manifest: Manifest
    is_cached: bool
    seconds: float


def compile_model(model_id_or_path: str | os.PathLike[str], **options: Any) -> Path:
    """Compile a model to an artifact and return the artifact's directory.

    Args:
        model_id_or_path: hub id in the local cache, model directory, or config.json.
        options: those of `build`.

    Raises:
        ModelError, TargetError, TraceError, OutputError: see their docstrings; nothing half-written is left behind.
    """
    return build(model_id_or_path, **options).path


@contextlib.contextmanager
def _rarely_collected() -> Iterator[None]:
    """Let Python look for cyclic garbage rarely: what a compilation makes it keeps, or drops without cycles, and
    looking through a million objects again and again would be a third of its time.
    """
    before = gc.get_threshold()
    gc.set_threshold(*(max(usual, rare) if usual else 0 for usual, rare in zip(before, _RARE, strict=True)))
    try:
        yield
    finally:
        gc.set_threshold(*before)


@_rarely_collected()
def build(
    model_id_or_path: str | os.PathLike[str],
    *,
    targets: Sequence[str] | str | None = None,
    ignore: Sequence[str] | str = (),
    auto_ignore: bool = True,
    sample: str | os.PathLike[str] | None = None,
    text_only: bool = False,
    targets_per_subgraph: int = 1,
    revision: str | None = None,
    attn_implementation: str | None = None,
    out: str | os.PathLike[str] = DEFAULT_OUT,
    force: bool = False,
    trust_remote_code: bool = False,
) -> Compiled:
    """Compile a model, or find that it has been.

    Args:
        model_id_or_path: hub id in the local cache, model directory, or config.json.
        targets: patterns of the modules to cut at; None takes the model's own no-split classes.
        ignore: functions to record as one opaque step each.
        auto_ignore: make functions that cannot be recorded opaque steps, too, wherever that helps.
        sample: a safetensors file with the model's inputs by name; None makes them up.
        text_only: make up tokens alone, so that a model which also sees or hears can be calibrated with text.
        targets_per_subgraph: how many targets share a subgraph.
        revision: branch, tag or commit of a hub id.
        attn_implementation: `eager` or `sdpa`; None takes what transformers takes by itself.
        out: the directory under which the artifact's own directory is put.
        force: compile again even when the same artifact is there.
        trust_remote_code: allow the code that the model brings, if any, to be executed.
    """
    source = resolve_source(os.fspath(model_id_or_path), revision=revision)
    with own_code_of(source, is_allowed=trust_remote_code) as own:
        return _build(
            source,
            own,
            targets=targets,
            ignore=ignore,
            auto_ignore=auto_ignore,
            sample=sample,
            text_only=text_only,
            targets_per_subgraph=targets_per_subgraph,
            attn_implementation=attn_implementation,
            out=out,
            force=force,
        )


def _build(
    source: Source,
    own: OwnCode | None,
    *,
    targets: Sequence[str] | str | None,
    ignore: Sequence[str] | str,
    auto_ignore: bool,
    sample: str | os.PathLike[str] | None,
    text_only: bool,
    targets_per_subgraph: int,
    attn_implementation: str | None,
    out: str | os.PathLike[str],
    force: bool,
) -> Compiled:
    """The passes after the model's own code, if it brings any, can be imported."""
    start = time.perf_counter()
    model = build_weightless(source, attn_implementation=attn_implementation, own=own)
    inputs = read_sample(model, sample, text_only=text_only)
    ignore = as_names(ignore)
    candidates = [as_names(targets)] if targets else list(inferred_targets(model))
    parts = cache.ingredients(
        source,
        model,
        target_patterns=candidates[0],
        ignore=ignore,
        auto_ignore=auto_ignore,
        targets_per_subgraph=targets_per_subgraph,
        sample=inputs,
        model_code=own.files if own is not None else {},
    )
    key = cache.input_key(parts)
    path = Path(out) / f"{source.name}-{key[:12]}"

    def may_ignore(function: Function) -> bool:
        return auto_ignore and is_opaque_path(function.path, own.modules if own is not None else ())

    with _locked(path):
        found = None if force else cache.find_artifact(path, key)
        is_cached = found is not None
        if found is None:
            traced = trace_somehow(
                model,
                with_larger(model, inputs, is_made_up=sample is None, text_only=text_only),
                candidates,
                ignore=ignore,
                may_ignore=may_ignore,
                targets_per_subgraph=targets_per_subgraph,
                drop_uncalled=not targets,
                is_batch_only=sample is not None,
            )
            _require_matched(traced.trace, ignore)
            keys = key_table(model, source.checkpoint_shapes())
            files, manifest = _assemble(source, own, model, traced, keys, parts)
            found = _write(path, files, manifest)
    return Compiled(path=path, manifest=found, is_cached=is_cached, seconds=time.perf_counter() - start)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let one process at a time make the artifact at `path`."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.parent / f".{path.name}.lock", mode=0o666)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _require_matched(trace: Trace, ignore: Sequence[str]) -> None:
    unmatched = [name for name in trace.tracer.unmatched_ignore if name in ignore]
    if unmatched:
        raise TargetError(
            f"--ignore {unmatched[0]} fits no function of the model",
            hint="write it as function, Class.method or module.path.function",
        )


def _assemble(
    source: Source,
    own: OwnCode | None,
    model: nn.Module,
    traced: Traced,
    keys: KeyTable,
    parts: Mapping[str, str],
) -> tuple[dict[str, bytes], Manifest]:
    """All files of the artifact but the manifest, and the manifest that lists them."""
    trace = traced.trace
    names = describe.target_names(trace, model)
    own_files = {f"{FOLDER}/{path}": data for path, data in (own.files.items() if own is not None else ())}
    files = {"config.json": source.config_file.read_bytes(), **source.companions(), **own_files}
    entries, modules, targets = [], dict(model.named_modules(remove_duplicate=False)), dict.fromkeys(names)
    for index, subgraph in enumerate(trace.subgraphs):
        code = subgraph.emit(traced.marker)
        file = f"subgraphs/{index:03d}.py"
        entries.append(describe.describe_subgraph(subgraph, code, modules, targets, file))
        title = f"# subgraph {index + 1} of {len(trace.subgraphs)}: {', '.join(entries[-1].targets) or 'no target'}\n"
        files[file] = (title + code.source).encode("ascii")
    for index, program in enumerate(keys.programs):
        files[f"conversions/{index:03d}.py"] = program.encode("ascii")
    constants = dict(trace.tracer.constants)
    if constants:
        from safetensors.torch import save

        files[CONSTANTS_NAME] = save(constants)
    symbols = describe.Symbols(trace, traced.marker)
    dtype = default_dtype(source)
    manifest = Manifest(
        input_key=cache.input_key(parts),
        ingredients=dict(parts),
        model=describe.describe_model(model, dtype, tuple(own_files)),
        versions=cache.versions(),
        targets=tuple(names),
        target_patterns=traced.patterns,
        ignore=tuple(name for name in trace.tracer.ignore if name not in trace.auto_ignore),
        auto_ignore=trace.auto_ignore,
        targets_per_subgraph=int(parts["targets_per_subgraph"]),
        inputs=describe.describe_inputs(trace, symbols),
        dims=symbols.dims(),
        conditions=symbols.conditions(),
        subgraphs=tuple(entries),
        parameters=describe.describe_parameters(model, keys, dtype, traced.fixed_dtype),
        conversions=tuple(
            ConversionEntry(file=f"conversions/{index:03d}.py", num_sources=count)
            for index, count in enumerate(keys.num_sources)
        ),
        values=describe.describe_values(trace, symbols),
        constants=tuple(constants),
        sources=relied_on(model, entries, own.modules if own is not None else ()),
        files=tuple(FileEntry(path=path, bytes=len(data), sha256=sha256(data)) for path, data in sorted(files.items())),
    )
    return files, manifest


def _write(path: Path, files: Mapping[str, bytes], manifest: Manifest) -> Manifest:
    """Publish the artifact, after checking it as a host will; returns the manifest as a host reads it."""
    with publish_directory(path, replace=True) as partial:
        for name, data in files.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).write_bytes(data)
        (partial / MANIFEST_NAME).write_bytes(manifest.to_bytes())
        found, *_ = check(partial)
    return found
