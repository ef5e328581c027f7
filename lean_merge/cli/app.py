"""The program itself, to which the modules beside it add the commands.

Neither this module nor those that declare commands import torch, directly or not: commands import
what they compute with when they run, so that help and completion answer at once.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Annotated, Any

import typer

from lean_merge.cli.helping import FULL_WIDTH, GroupedCommand, GroupedProgram
from lean_merge.cli.progress import LINE
from lean_merge.errors import OutputError, plain
from lean_merge.version import __version__

COMMAND: list[str] = []
"""The arguments of the command that runs; the first is its name."""
EXIT_FAILED, EXIT_USAGE, EXIT_DIFFERENT, EXIT_INTERRUPTED = 1, 2, 3, 5


class _Program(typer.Typer):
    """A typer whose commands show their options in groups."""

    def command(  # type: ignore[override]
        self, name: str, **options: Any
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        return super().command(name, cls=GroupedCommand, **options)


app = _Program(
    name="lean-merge",
    cls=GroupedProgram,
    help="Merge the abilities of text models into a multimodal one, without training and without "
    "a GPU: weights are read, merged and written one after the other.",
    epilog="Begin with `lean-merge demo`, which needs no models. `lean-merge COMMAND --help` "
    "explains a command, and `lean-merge methods NAME` a method's parameters.",
    no_args_is_help=True,
    context_settings=FULL_WIDTH,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(wanted: bool) -> None:
    if wanted:
        echo(f"lean-merge {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    pass


SPEAKS: ContextVar[bool] = ContextVar("SPEAKS", default=True)
"""Whether this process speaks to people; of several that share a merge, one does."""


def echo(text: str, *, err: bool = False) -> None:
    """Print a text in which what would steer a terminal is escaped: names come from strangers."""
    if not SPEAKS.get():
        return
    LINE.clear()
    try:
        typer.echo(plain(text), err=err)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(
            f"The standard {'error' if err else 'output'} cannot be written ({error.strerror}); "
            "what the command has made so far is on the disk."
        ) from error
