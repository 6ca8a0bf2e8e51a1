"""The command line `seqbuild`: quantize a model in one call, and each of its steps.

Torch and transformers are imported only by commands that need them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

import runtime.cli.options as given
from runtime.cli.app import calibrate, doctor, recipes
from runtime.cli.check import check
from runtime.cli.commands import CommandList
from runtime.cli.dequantize import dequantize
from runtime.cli.evaluate import evaluate
from runtime.cli.join import join
from runtime.cli.plan import plan
from runtime.cli.report import report
from runtime.cli.run import EPILOG, require_output, run_app
from runtime.cli.search import search
from runtime.cli.sweep import sweep
from runtime.console import human_bytes, put, say, warn
from runtime.data.options import DataOptions
from runtime.host import own_process
from seqbuild.cli.cache import app as cache_app
from seqbuild.cli.next_command import next_command
from seqbuild.cli.options import takes_compile_options
from seqbuild.cli.quantize import QuantizeCommand, quantize

if TYPE_CHECKING:
    from seqbuild.cache.recall import Compiled
    from seqbuild.options import CompileOptions

_QUANTIZE = "quantize MODEL --scheme W4A16 -o OUT"


class Commands(CommandList):
    """The commands of `seqbuild`."""

    sections: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "Quantize a model": ("quantize", "recipes", "evaluate", "report", "dequantize"),
        "Step by step": ("compile", "data", "plan", "search", "calibrate", "sweep"),
        "Look at a compiled model": ("inspect", "verify", "check", "cache"),
        "For another host": ("pack", "sign", "doctor", "join"),
    }
    example = _QUANTIZE
    others: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("oneshot", "one-shot", "quant", "ptq", "compress", "auto-round", "autoround", "convert"),
        f"use seqbuild {_QUANTIZE}",
    )


app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    cls=Commands,
    help="Quantize a large language model layer by layer, in one call or step by step.",
    epilog=f"seqbuild COMMAND --help lists the options of a command. {EPILOG}",
)

app.command(cls=QuantizeCommand)(quantize)
app.command()(recipes)
app.command()(evaluate)
app.command()(plan)
app.command()(search)
app.command()(calibrate)
app.command("check")(check)
app.command()(doctor)
app.command()(join)
app.command()(report)
app.command()(dequantize)
app.command()(sweep)
app.add_typer(cache_app, name="cache")

ArtifactPath = Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Directory written by seqbuild compile.")]


@app.command("compile")
@takes_compile_options()
def compile_command(options: CompileOptions, as_json: bool) -> None:
    """Trace a model once, cut it at its layers, and save the code of each part."""
    from seqbuild.build import compile_with

    done = compile_with(options)
    for line in done.remarks:
        warn(line)
    if as_json:
        put(json.dumps(_compiled_facts(done)))
    else:
        _say_compiled(done)
        put(f"next: {next_command(done, options)}")


def _compiled_facts(done: Compiled) -> dict[str, Any]:
    manifest = done.manifest
    return {
        "path": str(done.path),
        "cached": done.is_cached,
        "input_key": manifest.input_key,
        "targets": len(manifest.targets),
        "subgraphs": len(manifest.subgraphs),
        "parameters": manifest.model.num_parameters,
        "bytes": sum(entry.bytes for entry in manifest.files),
        "portable": manifest.is_portable,
        "foreign": dict(manifest.foreign),
        "seconds": done.seconds,
    }


def _say_compiled(done: Compiled) -> None:
    from seqbuild.cli.show import remarks

    manifest = done.manifest
    say(
        f"{manifest.model.class_name}: {len(manifest.targets)} layers by {', '.join(manifest.target_patterns)}, "
        f"{len(manifest.subgraphs)} subgraphs, {manifest.model.num_parameters:,} parameters"
    )
    for line in remarks(manifest):
        say(line)
    num_bytes = sum(entry.bytes for entry in manifest.files)
    result = "already exists, nothing was traced" if done.is_cached else human_bytes(num_bytes)
    say(f"{done.path}: {result}; {done.seconds:.1f} s")


@app.command()
def inspect(
    artifact: ArtifactPath,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
    code: Annotated[int | None, typer.Option("--code", min=0, metavar="N", help="Print subgraph N's source.")] = None,
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Write a page: subgraphs, values between them, weights and code."),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=1, help="Samples per batch, for the bytes in --html; default: 8.")
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option("--seq-len", min=1, help="Tokens per sample, for the bytes in --html; default: 2048.")
    ] = None,
) -> None:
    """Show an artifact's manifest, the code of one subgraph, or all of it as a page."""
    from runtime.chain import check as checked
    from runtime.errors import UsageError
    from seqbuild.cli.chain_page import require_sizes, write_html
    from seqbuild.cli.show import print_table

    require_output()
    require_sizes(artifact, html, batch_size, seq_len)
    manifest, sources = checked(artifact)
    if html is not None:
        write_html(html, manifest, sources, batch_size, seq_len)
    elif code is not None:
        if code >= len(manifest.subgraphs):
            raise UsageError(
                f"there is no subgraph {code}", hint=f"valid numbers are 0 to {len(manifest.subgraphs) - 1}"
            )
        put(sources[manifest.subgraphs[code].file].rstrip("\n"))
    elif as_json:
        put(json.dumps(dataclasses.asdict(manifest), indent=2))
    else:
        print_table(manifest)


@app.command()
def verify(
    artifact: ArtifactPath,
    weights: Annotated[
        str | None,
        typer.Option("--weights", help="Model directory or hub id with safetensors; default: a small random model."),
    ] = None,
    revision: given.Revision = None,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Compile again instead, and compare every byte.")] = False,
    source: Annotated[
        str | None,
        typer.Option("--source", help="For --rebuild: the model's directory or hub id, if it had a checkpoint."),
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = "float32",
    tolerance: Annotated[
        float, typer.Option("--tolerance", help="The largest relative difference that counts as equal.")
    ] = 0.0,
    allow_version_skew: given.Skew = False,
    trust_remote_code: given.Trust = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> int:
    """Compare the chain with the model, or with the result of compiling again. Exit code 0 if equal, else 1."""
    require_output()
    if rebuild:
        is_file = source is not None and Path(source).is_file()  # a config.json
        model = Path(source or "") if is_file else given.directory_of(source, revision, "model")
        return _rebuild(artifact, model, trust_remote_code, as_json)
    from seqbuild.cli.show import print_report
    from seqbuild.verify.artifact import verify_artifact
    from seqbuild.verify.report import as_plain

    found = verify_artifact(
        artifact,
        weights=given.directory_of(weights, revision, "weights"),
        dtype=dtype,
        tolerance=tolerance,
        trust_remote_code=trust_remote_code,
        allow_version_skew=allow_version_skew,
    )
    if as_json:
        put(json.dumps(as_plain(found)))
    else:
        print_report(found)
    return 0 if found.is_equal else 1


def _rebuild(artifact: Path, source: Path | None, trust_remote_code: bool, as_json: bool) -> int:
    from seqbuild.verify.rebuild import rebuild

    found = rebuild(artifact, source=source, trust_remote_code=trust_remote_code)
    if as_json:
        facts = {"same": found.is_same, "files": found.num_files, "differing": list(found.differing)}
        put(json.dumps(facts | {"ingredients": list(found.ingredients)}))
    else:
        say(str(found))
    return 0 if found.is_same else 1


@app.command()
def pack(
    artifact: ArtifactPath,
    recipe: Annotated[Path, typer.Option("--recipe", help="YAML recipe for the host, or a preset such as W4A16.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The bundle: a directory, or a file with the suffix .tar.")],
    data: Annotated[Path | None, typer.Option("--data", help="Token file written by seqbuild data.")] = None,
    weights: Annotated[str | None, typer.Option("--weights", help="Checkpoint to include, or its hub id.")] = None,
    revision: given.Revision = None,
) -> None:
    """Write a directory or .tar with everything that a host without network access needs."""
    from seqbuild.ship.pack import pack as run

    path = run(artifact, recipe=recipe, out=out, data=data, weights=given.directory_of(weights, revision, "weights"))
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    say(f"{path}: {len(files)} files, {human_bytes(sum(file.stat().st_size for file in files))}")


@app.command()
def sign(
    artifact: ArtifactPath,
    private_key: Annotated[Path, typer.Option("--private-key", help="Elliptic curve key in PEM.")],
    password_file: Annotated[
        Path | None, typer.Option("--password-file", help="File with the private key's password.")
    ] = None,
) -> None:
    """Sign an artifact, so that a host can verify its origin."""
    from runtime.host.regular_files import read_text
    from seqbuild.ship.sign import sign_artifact

    password = read_text(password_file).rstrip("\r\n") if password_file is not None else None
    say(f"{sign_artifact(artifact, private_key=private_key, password=password)}: signed")


@app.command()
@given.takes_data_options
def data(
    tokenizer: Annotated[
        str,
        typer.Argument(
            metavar="TOKENIZER", help="Directory, or hub id in the local cache; for images or sounds, of the model."
        ),
    ],
    sources: given.DataArguments,
    out: Annotated[Path, typer.Option("--out", "-o", help="The .safetensors file to write.")],
    data_options: DataOptions,
    revision: given.Revision = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Tokenize texts into one file, so that the calibration host needs no tokenizer."""
    from runtime.cli.batches import describe
    from runtime.data.options import DEFAULT_SEQ_LEN
    from seqbuild.ship.tokens import write_token_file

    options = dataclasses.replace(data_options, sources=tuple(sources), default_length=DEFAULT_SEQ_LEN)
    made, summary, directory = write_token_file(tokenizer, options, out, force=force, revision=revision)
    describe(str(out), made, summary, options.show, directory, say)


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    if argv is None:
        own_process.claim()
    return run_app(app, "seqbuild", argv)
