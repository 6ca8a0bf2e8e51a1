"""The list of commands of both command lines, and hints for commands and options that do not exist."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from typer.core import TyperGroup

from runtime.errors import UsageError


class CommandList(TyperGroup):
    """The commands of a program, listed in sections.

    Attributes:
        sections: the commands of each section of the help, by its title.
        example: arguments of a command, for the message about an option before the command.
        others: the hint for each command that exists in another program, but not in this one.
    """

    sections: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    example: ClassVar[str] = "COMMAND"
    others: ClassVar[Mapping[str, str]] = {}

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the sections of the help."""
        for title, names in self.sections.items():
            rows = [(name, self.commands[name].get_short_help_str(limit=200)) for name in names]
            with formatter.section(title):
                formatter.write_dl(rows)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Explain an option before the command."""
        known = {option for parameter in self.params for option in parameter.opts}
        if args and args[0].startswith("-") and args[0].partition("=")[0] not in {*known, "--help"}:
            hint = f"options come after a command, as in {ctx.info_name} {self.example}"
            raise UsageError(f"No such option: {args[0]}", hint=hint)
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Find the command, or explain where else it is."""
        if args and args[0] not in self.commands and args[0] in self.others:
            raise UsageError(f"there is no command {args[0]!r}", hint=self.others[args[0]])
        return super().resolve_command(ctx, args)
