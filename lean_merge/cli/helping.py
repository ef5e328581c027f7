"""Show help in groups of options, over the whole width of the terminal."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup

MODELS, METHOD, OUTPUT, RESOURCES, RUN = "Models", "Method", "Output", "Resources", "Run"
GRID = "Grid and measurement"
GROUPS = (MODELS, METHOD, GRID, OUTPUT, RESOURCES, RUN)
"""The groups of options, in the order in which help shows them."""
MERGING, STUDYING, LOOKING = "Merge", "Study models and results", "Look things up"
"""The groups of commands."""
FULL_WIDTH = {"max_content_width": 1000}
"""Settings with which help takes the whole width of the terminal."""
_WIDEST = 34
"""Columns of the spellings of options; what is longer has a line of its own."""


class GroupedCommand(TyperCommand):
    """A command whose help shows its options in groups, each under the panel that it names."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the groups of options that the command has."""
        rows: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                group = getattr(parameter, "rich_help_panel", None) or RUN
                rows.setdefault(group, []).append(record)
        for group in (*GROUPS, *(each for each in rows if each not in GROUPS)):
            if group in rows:
                with formatter.section(group):
                    formatter.write_dl(rows[group], col_max=_WIDEST)


class GroupedProgram(TyperGroup):
    """The program, whose help shows every command with a whole sentence."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the commands in their groups, and then the program's own options."""
        rows: dict[str, list[tuple[str, str]]] = {MERGING: [], STUDYING: [], LOOKING: []}
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            if command is not None and not command.hidden:
                sentences = (command.help or "").split("\n\n")[0]
                group = getattr(command, "rich_help_panel", None) or LOOKING
                rows.setdefault(group, []).append((name, " ".join(sentences.split())))
        for group, listed in rows.items():
            if listed:
                with formatter.section(group):
                    formatter.write_dl(listed)
        records = [parameter.get_help_record(ctx) for parameter in self.get_params(ctx)]
        with formatter.section("Options"):
            formatter.write_dl([each for each in records if each is not None])
