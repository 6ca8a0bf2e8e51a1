"""Assemble an artifact: the code of its subgraphs, its other files, and the manifest that lists them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from safetensors.torch import save

from runtime.artifact.encoding import sha256
from runtime.artifact.files import CONSTANTS_NAME
from runtime.artifact.manifest import ConversionEntry, FileEntry, Manifest, SubgraphEntry
from runtime.artifact.own_code import FOLDER
from runtime.host.regular_files import read_regular
from seqbuild.cache.key import Compilation, digest, versions
from seqbuild.chain.emit import EmittedCode, common_scope
from seqbuild.manifest import describe
from seqbuild.manifest.inside import inner_tables
from seqbuild.manifest.portable import Parts, limits, parts
from seqbuild.model.checkpoint_keys import key_table
from seqbuild.model.defaults import default_values
from seqbuild.model.from_config import TRACE_DTYPE, build_weightless, default_dtype
from seqbuild.model.relied_on import relied_on
from seqbuild.sample.plain import plain_call

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from seqbuild.trace.attempts import Traced


def assemble(
    compilation: Compilation, model: PreTrainedModel, traced: Traced, ingredients: Mapping[str, str]
) -> tuple[dict[str, bytes], Manifest]:
    """Build all files of the artifact, and the manifest that lists them."""
    source, trace, is_deep = compilation.source, traced.trace, traced.leaves != "target"
    keys = key_table(model, source.checkpoint_shapes())
    own_files = {f"{FOLDER}/{path}": data for path, data in compilation.own_files.items()}
    programs, entries, codes = _programs(model, traced)
    found = _portable_parts(compilation, model, entries) if is_deep else Parts()
    conversions = {f"conversions/{index:03d}.py": program for index, program in enumerate(keys.programs)}
    code = {file: program.encode("ascii") for file, program in {**programs, **conversions, **found.programs}.items()}
    files = {"config.json": read_regular(source.config_file), **source.companions(), **own_files, **code}
    is_portable = is_deep and not found.foreign and not any(entry.opaque for entry in entries)
    values = default_values(model)
    defaults = {name: f"default_{place}" for place, name in enumerate(values)}
    constants = {**trace.tracer.constants, **found.constants, **{defaults[name]: values[name] for name in values}}
    if constants:
        files[CONSTANTS_NAME] = save(constants)
    symbols = describe.Symbols(trace, traced.marker)
    plain = plain_call(model, [str(node.target) for node in trace.graph.find_nodes(op="placeholder")])
    dtype = default_dtype(source)
    parameters = describe.describe_parameters(model, keys, dtype, traced.fixed_dtype)
    deep = list(zip(trace.subgraphs, entries, codes, strict=True)) if is_deep else []
    manifest = Manifest(
        input_key=digest(ingredients),
        ingredients=dict(ingredients),
        model=describe.describe_model(model, dtype, tuple(own_files)),
        versions=versions(),
        targets=tuple(dict.fromkeys(name for entry in entries for name in entry.targets)),
        target_patterns=traced.patterns,
        ignore=tuple(name for name in trace.tracer.ignore if name not in trace.auto_ignore),
        auto_ignore=trace.auto_ignore,
        targets_per_subgraph=compilation.options.targets_per_subgraph,
        inputs=describe.describe_inputs(trace, symbols, plain.absent),
        dims=symbols.dims(),
        conditions=symbols.conditions(),
        subgraphs=tuple(entries),
        parameters=parameters,
        conversions=tuple(
            ConversionEntry(file=file, num_sources=count)
            for file, count in zip(conversions, keys.num_sources, strict=True)
        ),
        values=describe.describe_values(trace, symbols),
        constants=tuple(constants),
        sources={} if is_portable else relied_on(model, entries, compilation.own_modules),
        policy=traced.leaves,
        leaf_kinds=tuple(found.kinds),
        leaves=found.leaves,
        buffers=found.buffers,
        foreign=found.foreign,
        limits=limits(model.config),
        defaults=defaults,
        decoder=plain.decoder,
        files=tuple(FileEntry(path=path, bytes=len(data), sha256=sha256(data)) for path, data in sorted(files.items())),
        **inner_tables(model, deep, found, parameters, keys.programs),
    )
    return files, manifest


def _portable_parts(compilation: Compilation, model: PreTrainedModel, entries: list[SubgraphEntry]) -> Parts:
    """Describe what a host needs to build the module tree itself."""

    def rebuilt(dtype: torch.dtype) -> nn.Module:
        return build_weightless(compilation.source, like=model, dtype=dtype, own=compilation.own)

    return parts(model, entries, rebuilt, TRACE_DTYPE)


def _programs(model: nn.Module, traced: Traced) -> tuple[dict[str, str], list[SubgraphEntry], list[EmittedCode]]:
    """Return the sources of the subgraphs by file, their entries, and the code of each subgraph.

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
        alike = users.setdefault(code.source, [])
        alike.append(index)
        file = f"subgraphs/{alike[0]:03d}.py"
        entries.append(describe.describe_subgraph(subgraph, code, modules, targets[index], file, scope))
    files = {}
    for source, alike in users.items():
        which = f"subgraph {alike[0] + 1}" if len(alike) == 1 else f"{len(alike)} subgraphs from {alike[0] + 1} on"
        names = [name for index in alike for name in targets[index]]
        shown = ", ".join(names[:1] + names[-1:] if len(alike) > 1 else names) or "no target"
        files[entries[alike[0]].file] = f"# {which} of {len(subgraphs)}: {shown}\n{source}"
    return files, entries, codes
