"""The program itself, to which the modules beside it add the commands."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from tqdm import tqdm

from lean_merge.engine import Event
from lean_merge.errors import OutputError, plain
from lean_merge.plan import Plan
from lean_merge.version import __version__

EXIT_FAILED, EXIT_USAGE, EXIT_DIFFERENT, EXIT_INTERRUPTED = 1, 2, 3, 5

app = typer.Typer(
    name="lean-merge",
    help="Merge the abilities of a text model into a multimodal one, by streaming IP-Merging.",
    no_args_is_help=True,
    add_completion=False,
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
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def echo(text: str, *, err: bool = False) -> None:
    """Print a text in which what would steer a terminal is escaped: names come from strangers."""
    try:
        typer.echo(plain(text), err=err)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(
            f"The standard {'error' if err else 'output'} cannot be written ({error.strerror}); "
            "what the command has made so far is on the disk."
        ) from error


@contextmanager
def progress(plan: Plan, quiet: bool) -> Iterator[Callable[[Event], None]]:
    total = sum(task.tensor.nbytes for task in plan.tasks)
    with tqdm(
        total=total,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        disable=quiet or not sys.stderr.isatty(),
    ) as bar:

        def on_event(event: Event) -> None:
            bar.set_postfix_str(event.name[-40:], refresh=False)
            bar.update(event.nbytes)
            if not quiet:
                for line in event.warnings:
                    bar.write(f"warning: {line}", file=sys.stderr)

        yield on_event
