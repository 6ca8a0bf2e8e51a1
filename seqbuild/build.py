"""Compile a model by running the passes below in order.

source      resolve a hub id, directory or config                       seqbuild.model.source
own code    import the model's own code, if allowed                     seqbuild.model.own_code
model       build the module tree without weights                       seqbuild.model.from_config
targets     choose the modules to cut at                                seqbuild.chain.targets
request     look up the request in the cache                            seqbuild.cache.recall
key         look up the artifact by its input key                       seqbuild.cache.key
trace       run once on fake tensors and cut into subgraphs             seqbuild.trace
keys        map checkpoint tensors to parameters                        seqbuild.model.checkpoint_keys
emit        write one source file per subgraph                          seqbuild.chain.emit
describe    build the manifest                                          seqbuild.manifest.describe, relied_on
publish     move the complete artifact to its final name atomically     runtime.host.publish
"""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save

from runtime.arguments import as_path
from runtime.artifact.check import check_programs
from runtime.artifact.config_policy import check_config
from runtime.artifact.encoding import sha256
from runtime.artifact.manifest import MANIFEST_NAME, ConversionEntry, FileEntry, Manifest, SubgraphEntry
from runtime.artifact.own_code import FOLDER
from runtime.chain import CONSTANTS_NAME, check
from runtime.errors import ArtifactError, TargetError, TraceError
from runtime.host.publish import move_aside, publish_directory
from runtime.host.regular_files import read_regular
from runtime.language.opaque import is_harmless
from seqbuild.cache import key as cache
from seqbuild.cache.lock import locked
from seqbuild.cache.recall import Compiled, recall, remember, request, vouched
from seqbuild.chain.emit import EmittedCode, common_scope
from seqbuild.chain.targets import as_names, inferred_targets
from seqbuild.manifest import describe
from seqbuild.manifest.inside import inner_tables
from seqbuild.manifest.portable import Parts, limits
from seqbuild.manifest.portable import parts as portable_parts
from seqbuild.model.checkpoint_keys import KeyTable, key_table
from seqbuild.model.defaults import default_values
from seqbuild.model.from_config import TRACE_DTYPE, build_weightless, default_dtype
from seqbuild.model.own_code import OwnCode, own_code_of
from seqbuild.model.relied_on import made_of, relied_on
from seqbuild.model.source import Source, resolve_source
from seqbuild.options import Options, make_options
from seqbuild.sample.inputs import plain_call_of
from seqbuild.trace.attempts import Traced, read_sample, trace_somehow, with_larger
from seqbuild.trace.model import Trace

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from seqbuild.blame import Function

DEFAULT_OUT = Path("artifacts")
# The first threshold of `gc.set_threshold`; Python's default is between some hundred and a few thousand.
_RARE = (100_000, 50, 50)


def compile_model(model_id_or_path: str | os.PathLike[str], **options: Any) -> Path:
    """Compile a model to an artifact and return the artifact's directory.

    Args:
        model_id_or_path: hub id in the local cache, model directory, or config.json.
        options: the keyword arguments of `build`.

    Raises:
        ModelError, TargetError, TraceError, OutputError: see their docstrings; no partial artifact is left behind.
    """
    return build(model_id_or_path, **options).path


@contextlib.contextmanager
def _rarely_collected() -> Iterator[None]:
    """Reduce the frequency of cyclic garbage collection.

    Compilation creates few reference cycles, and scanning a million live objects repeatedly would take a third of the
    time.
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
    leaves: str = "auto",
) -> Compiled:
    """Compile a model, or return the existing artifact for the same input.

    Args:
        model_id_or_path: hub id in the local cache, model directory, or config.json.
        targets: patterns of the modules to cut at; None selects the model's no-split classes.
        ignore: functions to record as one opaque step each.
        auto_ignore: also make unrecordable functions opaque steps, wherever that helps.
        sample: a safetensors file with the model's inputs by name; None generates them.
        text_only: generate tokens only, so that a multimodal model can be calibrated with text.
        targets_per_subgraph: the number of targets in each subgraph.
        revision: branch, tag or commit of a hub id.
        attn_implementation: `eager` or `sdpa`; None keeps the default of transformers.
        out: the parent directory of the artifact's directory.
        force: compile again even if the artifact exists.
        trust_remote_code: allow executing the model's own code, if any.
        leaves: tracing depth. `target` stops at the targets, which a host calls as modules of the model's own classes.
        `linear` continues to modules that the host builds by itself, and keeps whole only what cannot be traced.
        `auto` selects `linear` if no module must be kept whole (the artifact is portable) or if it reaches the experts
        of a mixture (they can be quantized), and `target` otherwise.
    """
    start, directory = time.perf_counter(), as_path("out", out)
    if model_id_or_path != "":
        as_path("the model", model_id_or_path)
    options = make_options(
        targets=targets,
        ignore=ignore,
        auto_ignore=auto_ignore,
        sample=sample,
        text_only=text_only,
        targets_per_subgraph=targets_per_subgraph,
        attn_implementation=attn_implementation,
        leaves=leaves,
    )
    source = resolve_source(os.fspath(model_id_or_path), revision=revision)
    with own_code_of(source, is_allowed=trust_remote_code) as own:
        parts = request(source, options, own.files if own is not None else {})
        found = None if force else recall(parts, source.name, directory)
        return found or _build(source, own, options, parts, directory, force=force, start=start)


def prepared(
    source: Source, own: OwnCode | None, options: Options
) -> tuple[PreTrainedModel, dict[str, Any], list[tuple[str, ...]], dict[str, str], dict[str, str]]:
    """Prepare the model and collect the ingredients of the input key.

    Returns:
        The model without weights, its sample, the targets to try, the library files that define it by module name, and
        the ingredients of the input key.
    """
    model = build_weightless(source, attn_implementation=options.attn_implementation, own=own)
    inputs = read_sample(model, options.sample, text_only=options.text_only)
    candidates = [as_names(options.targets)] if options.targets else list(inferred_targets(model))
    sources = made_of(model, own.modules if own is not None else ())
    ingredients = cache.ingredients(
        source,
        model,
        target_patterns=candidates[0],
        ignore=options.ignore,
        auto_ignore=options.auto_ignore,
        targets_per_subgraph=options.targets_per_subgraph,
        sample=inputs,
        model_code=own.files if own is not None else {},
        sources=sources,
        leaves=options.leaves,
    )
    return model, inputs, candidates, sources, ingredients


def _build(
    source: Source,
    own: OwnCode | None,
    options: Options,
    parts: Mapping[str, str],
    out: Path,
    *,
    force: bool,
    start: float,
) -> Compiled:
    """Run the remaining passes after the model's own code, if any, has become importable."""
    own_modules = own.modules if own is not None else ()
    model, inputs, candidates, sources, ingredients = prepared(source, own, options)
    key = cache.input_key(ingredients)
    path = out / f"{source.name}-{key[:12]}"
    remarks: list[str] = []

    def may_ignore(function: Function) -> bool:
        return options.auto_ignore and is_harmless(function.path, (type(model).__module__,), own_modules)

    with locked(path):
        kept = None if force else _find(path, key, remarks)
        found = kept if kept is not None and vouched(parts, path.parent, kept) else None
        is_cached = found is not None
        if found is None:
            traced = trace_somehow(
                model,
                with_larger(model, inputs, is_made_up=options.sample is None, text_only=options.text_only),
                candidates,
                ignore=options.ignore,
                may_ignore=may_ignore,
                targets_per_subgraph=options.targets_per_subgraph,
                is_batch_only=options.sample is not None,
                leaves=options.leaves,
            )
            _require_matched(traced.trace, options.ignore)
            remarks += traced.trace.remarks
            if traced.hindrance:
                remarks.append(f"layers are not traced through: {traced.hindrance}")
            keys = key_table(model, source.checkpoint_shapes())
            files, manifest = _assemble(source, own, model, traced, keys, ingredients)
            _require_accepted(files, manifest, own_modules)
            if kept is not None and kept != manifest:
                remarks.append(f"{path} was not what this compilation made before; it was moved to {move_aside(path)}")
                kept = None
            found = kept or _write(path, files, manifest)
        remember(parts, path, found, sources)
    seconds = time.perf_counter() - start
    return Compiled(path=path, manifest=found, is_cached=is_cached, seconds=seconds, remarks=tuple(remarks))


def _find(path: Path, key: str, remarks: list[str]) -> Manifest | None:
    """Return the existing artifact; move a damaged one aside, so that it can be inspected."""
    try:
        return cache.find_artifact(path, key)
    except ArtifactError as error:
        place = move_aside(path)
        remarks.append(f"what was there is damaged and was moved to {place}: {error.message}")
        return None


def _require_accepted(files: Mapping[str, bytes], manifest: Manifest, own_modules: Sequence[str]) -> None:
    """Reject an artifact that no host would accept.

    An opaque function must not be part of a forward or do more than compute, and a config must not name files or code.
    """
    try:
        check_config(files, has_own_code=bool(own_modules))
        if not manifest.is_portable:
            check_programs(manifest, files, own_modules)
    except ArtifactError as error:
        raise TraceError(
            f"no host would accept this artifact: {error.message}",
            hint="name another function with --ignore, or take the entry out of the model's files",
        ) from error


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
    ingredients: Mapping[str, str],
) -> tuple[dict[str, bytes], Manifest]:
    """Build all files of the artifact, and the manifest that lists them."""
    trace = traced.trace
    own_files = {f"{FOLDER}/{path}": data for path, data in (own.files.items() if own is not None else ())}
    files = {"config.json": read_regular(source.config_file), **source.companions(), **own_files}
    programs, entries, codes = _programs(model, traced)
    files |= programs | {f"conversions/{i:03d}.py": text.encode("ascii") for i, text in enumerate(keys.programs)}
    found = _portable_parts(source, own, model, traced, entries)
    files |= {file: program.encode("ascii") for file, program in found.programs.items()}
    is_portable = traced.leaves != "target" and not found.foreign and not any(entry.opaque for entry in entries)
    values = default_values(model)
    defaults = {name: f"default_{place}" for place, name in enumerate(values)}
    constants = {**trace.tracer.constants, **found.constants, **{defaults[name]: values[name] for name in values}}
    if constants:
        files[CONSTANTS_NAME] = save(constants)
    symbols = describe.Symbols(trace, traced.marker)
    plain = plain_call_of(model, [str(node.target) for node in trace.graph.find_nodes(op="placeholder")])
    dtype = default_dtype(source)
    parameters = describe.describe_parameters(model, keys, dtype, traced.fixed_dtype)
    deep = list(zip(trace.subgraphs, entries, codes, strict=True)) if traced.leaves != "target" else []
    manifest = Manifest(
        input_key=cache.input_key(ingredients),
        ingredients=dict(ingredients),
        model=describe.describe_model(model, dtype, tuple(own_files)),
        versions=cache.versions(),
        targets=tuple(dict.fromkeys(name for entry in entries for name in entry.targets)),
        target_patterns=traced.patterns,
        ignore=tuple(name for name in trace.tracer.ignore if name not in trace.auto_ignore),
        auto_ignore=trace.auto_ignore,
        targets_per_subgraph=int(ingredients["targets_per_subgraph"]),
        inputs=describe.describe_inputs(trace, symbols, plain.absent),
        dims=symbols.dims(),
        conditions=symbols.conditions(),
        subgraphs=tuple(entries),
        parameters=parameters,
        conversions=_conversions(keys),
        values=describe.describe_values(trace, symbols),
        constants=tuple(constants),
        sources={} if is_portable else relied_on(model, entries, own.modules if own is not None else ()),
        policy=traced.leaves,
        leaf_kinds=tuple(found.kinds),
        leaves=found.leaves,
        buffers=found.buffers,
        foreign=found.foreign,
        limits=limits(model.config),
        defaults=defaults,
        decoder=plain.decoder,
        files=_file_entries(files),
        **inner_tables(model, deep, found, parameters, keys.programs),
    )
    return files, manifest


def _portable_parts(
    source: Source, own: OwnCode | None, model: nn.Module, traced: Traced, entries: Sequence[SubgraphEntry]
) -> Parts:
    """What a host needs to build the module tree itself; nothing for a trace that stops at the targets."""
    if traced.leaves == "target":
        return Parts()

    def rebuilt(dtype: torch.dtype) -> nn.Module:
        return build_weightless(source, like=model, dtype=dtype, own=own)

    return portable_parts(model, entries, rebuilt, TRACE_DTYPE)


def _conversions(keys: KeyTable) -> tuple[ConversionEntry, ...]:
    counts = enumerate(keys.num_sources)
    return tuple(ConversionEntry(file=f"conversions/{index:03d}.py", num_sources=count) for index, count in counts)


def _file_entries(files: Mapping[str, bytes]) -> tuple[FileEntry, ...]:
    return tuple(FileEntry(path=path, bytes=len(data), sha256=sha256(data)) for path, data in sorted(files.items()))


def _programs(model: nn.Module, traced: Traced) -> tuple[dict[str, bytes], list[SubgraphEntry], list[EmittedCode]]:
    """Return the source files of the subgraphs, their entries, and the code of each subgraph.

    Subgraphs with the same code share one file.
    """
    subgraphs = traced.trace.subgraphs
    modules = dict(model.named_modules(remove_duplicate=False))
    targets = describe.target_names(model, [subgraph.graph for subgraph in subgraphs], traced.trace.targets)
    entries: list[SubgraphEntry] = []
    codes: list[EmittedCode] = []
    users: dict[str, list[int]] = {}
    for index, subgraph in enumerate(subgraphs):
        scope = None
        if traced.leaves != "target":
            scope = common_scope(subgraph.graph, targets[index][0]) if len(targets[index]) == 1 else ""
        code = subgraph.emit(traced.marker, scope=scope, is_last=index == len(subgraphs) - 1)
        codes.append(code)
        like = users.setdefault(code.source, [])
        like.append(index)
        file = f"subgraphs/{like[0]:03d}.py"
        entries.append(describe.describe_subgraph(subgraph, code, modules, targets[index], file, scope))
    files = {}
    for source, like in users.items():
        which = f"subgraph {like[0] + 1}" if len(like) == 1 else f"{len(like)} subgraphs from {like[0] + 1} on"
        names = [name for index in like for name in targets[index]]
        shown = ", ".join(names[:1] + names[-1:] if len(like) > 1 else names) or "no target"
        title = f"# {which} of {len(subgraphs)}: {shown}\n"
        files[entries[like[0]].file] = (title + source).encode("ascii")
    return files, entries, codes


def _write(path: Path, files: Mapping[str, bytes], manifest: Manifest) -> Manifest:
    """Check the artifact as a host does, publish it, and return the manifest as a host reads it."""
    with publish_directory(path, replace=True) as partial:
        for name, data in files.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).write_bytes(data)
        (partial / MANIFEST_NAME).write_bytes(manifest.to_bytes())
        found, *_ = check(partial)
    return found
