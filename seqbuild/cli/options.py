"""Options of the compiler's commands."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from runtime.cli.options import Trust
from seqbuild.options import DEFAULT_OUT, CompileOptions

Out = Annotated[Path, typer.Option("--out", "-o", help="Directory that contains the artifacts.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def _compile_options(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Hub id in the local cache, directory or config.json.")
    ],
    targets: Annotated[
        list[str] | None,
        typer.Option("--targets", "-t", help="Where to cut: class, module name or re:pattern; repeatable."),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(help="Function, Class.method or module.path.function to keep opaque; repeatable."),
    ] = None,
    auto_ignore: Annotated[bool, typer.Option(help="Make unrecordable functions opaque, or reject them.")] = True,
    sample: Annotated[
        Path | None,
        typer.Option(help="Safetensors with the model's inputs by name, or seqbuild data with images or sounds."),
    ] = None,
    text_only: Annotated[bool, typer.Option("--text-only", help="Compile a multimodal model for text only.")] = False,
    targets_per_subgraph: Annotated[int, typer.Option(min=1, help="Targets in each subgraph.")] = 1,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    attn_implementation: Annotated[str | None, typer.Option(help="eager or sdpa; default: the model's own.")] = None,
    out: Out = DEFAULT_OUT,
    leaves: Annotated[
        str, typer.Option(help="Tracing depth: target, linear, or auto for linear where nothing is kept whole.")
    ] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Compile again even if the artifact exists.")] = False,
    trust_remote_code: Trust = False,
) -> CompileOptions:
    """Build the options of a compilation from the command line."""
    return CompileOptions(
        model=source,
        targets=tuple(targets or ()),
        ignore=tuple(ignore or ()),
        auto_ignore=auto_ignore,
        sample=sample,
        text_only=text_only,
        targets_per_subgraph=targets_per_subgraph,
        revision=revision,
        attn_implementation=attn_implementation,
        out=out,
        force=force,
        trust_remote_code=trust_remote_code,
        leaves=leaves,
    )


def takes_compile_options(*, without: str = "") -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Turn a function of `CompileOptions` and `as_json` into a command with the options of a compilation.

    Args:
        without: the name of an option that the command does not have.
    """

    def decorate(run: Callable[[CompileOptions, bool], None]) -> Callable[..., None]:
        @functools.wraps(run)
        def command(*, as_json: bool, **values: Any) -> None:
            run(_compile_options(**values), as_json)

        signature = inspect.signature(_compile_options, eval_str=True)
        parameters = [*signature.parameters.values()]
        parameters.append(
            inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, annotation=AsJson, default=False)
        )
        kept = {parameter.name: parameter for parameter in parameters if parameter.name != without}
        shape: Any = command  # typer reads both
        shape.__signature__ = inspect.Signature([*kept.values()])
        shape.__annotations__ = {name: parameter.annotation for name, parameter in kept.items()}
        return command

    return decorate
