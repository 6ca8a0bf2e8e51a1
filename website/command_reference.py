"""The reference of the command lines, made from the programs themselves."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import typer.main

import runtime.cli.app
import seqbuild.cli.app

PROGRAMS: Mapping[str, typer.Typer] = {"seqbuild": seqbuild.cli.app.app, "seqbuild-runtime": runtime.cli.app.app}
_FACTS = re.compile(r"\s*\[([^][]*)\]$")  # typer's own, at the end of an option's help
_TYPE = re.compile(r"<(?:list\[)?(\w+).*>$")
_PLACEHOLDERS = {"str": "TEXT", "int": "N", "float": "X", "path": "PATH"}


def commands_of(group: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the full name of each command below a program, in the order of its help."""
    sections = getattr(group, "sections", {}).values()
    for child in [name for names in sections for name in names] or list(group.commands):
        command = group.commands[child]
        if hasattr(command, "commands"):
            yield from commands_of(command, f"{name} {child}")
        else:
            yield f"{name} {child}", command


def page(program: str) -> str:
    """Return the page of a program, as Markdown."""
    group: Any = typer.main.get_command(PROGRAMS[program])
    found = list(commands_of(group, program))
    lines = [f"# `{program}`", "", group.help, "", "| Command | |", "|---|---|"]
    lines += [f"| [`{name}`](#{name.replace(' ', '-')}) | {_cell(_first(command.help))} |" for name, command in found]
    lines += ["", group.epilog or "", ""]
    for name, command in found:
        lines += _command(name, command, typer.Context(command, info_name=name))
    return "\n".join(lines)


def _first(text: str) -> str:
    return " ".join(text.partition("\n\n")[0].split())


def _command(name: str, command: Any, context: Any) -> Iterator[str]:
    shown = [parameter for parameter in command.get_params(context) if not getattr(parameter, "hidden", False)]
    arguments = [parameter for parameter in shown if parameter.param_type_name == "argument"]
    options = [parameter for parameter in shown if parameter.param_type_name == "option"]
    yield from (f"## `{name}`", "", *_paragraphs(command.help), "")
    yield from ("```sh", _usage(name, arguments, options), "```", "")
    if arguments:
        yield from ("| Argument | Description |", "|---|---|")
        yield from (f"| `{_argument(argument)}` | {_cell(argument.help or '')} |" for argument in arguments)
        yield ""
    yield from ("| Option | Default | Description |", "|---|---|---|")
    for option in options:
        spelled, text = option.get_help_record(context)
        yield f"| {_spelled(spelled)} | {_default(option, text)} | {_cell(_FACTS.sub('', text))} |"
    yield ""


def _paragraphs(text: str) -> Iterator[str]:
    for paragraph in text.split("\n\n"):
        yield from (" ".join(paragraph.split()), "")


def _usage(name: str, arguments: Sequence[Any], options: Sequence[Any]) -> str:
    required = [f"{max(option.opts, key=len)} {_placeholder(option)}" for option in options if option.required]
    return " ".join((name, *map(_argument, arguments), *required, "[OPTIONS]"))


def _argument(argument: Any) -> str:
    name = f"{_placeholder(argument)}{'...' if argument.nargs != 1 else ''}"
    return name if argument.required else f"[{name}]"


def _placeholder(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name.upper()).removesuffix("...")


def _spelled(text: str) -> str:
    """The forms of an option, each as code: `--pack / --no-pack`, `-o, --out PATH`."""
    text = _TYPE.sub(lambda found: _PLACEHOLDERS.get(found[1].lower(), found[1].upper()), text)
    return ", ".join(f"`{form}`" for form in re.split(r", | / ", text))


def _default(option: Any, help_text: str) -> str:
    if option.required:
        return "**required**"
    facts = _FACTS.search(help_text)
    stated = [fact.removeprefix("default: ") for fact in facts[1].split("; ") if "default: " in fact] if facts else []
    return f"`{stated[0]}`" if stated else ""


def _cell(text: str) -> str:
    """A text as the cell of a table: without Markdown, and on one line."""
    return re.sub(r"([\\`*_<>|{}\[\]])", r"\\\1", " ".join(text.split()))
