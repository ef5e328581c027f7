"""The entry point, from arguments to an exit code."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import typer

from lean_merge.cli.app import (
    COMMAND,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    SPEAKS,
    app,
)
from lean_merge.errors import BudgetError, LeanMergeError, plain

_SIGINT_OF_TYPER = 130
_CommandLineError: type[Any] = next(
    each for each in typer.BadParameter.__mro__ if each.__name__ == "ClickException"
)
"""The error of the click that typer uses; newer typers carry their own."""


class _Terminated(KeyboardInterrupt):
    """Raised on SIGTERM, which is treated as Ctrl-C is."""


def _terminate(number: int, frame: FrameType | None) -> None:
    raise _Terminated


def main(arguments: list[str] | None = None) -> None:
    """Run a command and leave with the exit code that docs/formats.md documents."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if sys.stderr is None:
        # It was closed before the start; what is written there is lost then, and nothing else.
        sys.stderr = open(os.devnull, "w")
    signal.signal(signal.SIGTERM, _terminate)
    COMMAND[:] = arguments
    try:
        # `verify` returns a code and other commands None; newer typers turn Ctrl-C into a code.
        with _job():
            code = app(arguments, prog_name="lean-merge", standalone_mode=False)
            if code == _SIGINT_OF_TYPER:
                raise KeyboardInterrupt
        if code:
            sys.exit(code)
    except _CommandLineError as error:
        error.show()
        sys.exit(EXIT_USAGE)
    except LeanMergeError as error:
        _fail(str(error), error.exit_code, arguments)
    except (KeyboardInterrupt, typer.Abort):
        message = "The command was interrupted; the same command goes on where it stopped."
        _fail(message, EXIT_INTERRUPTED, arguments)
    except BrokenPipeError:
        _silence_output()
        sys.exit(EXIT_FAILED)
    except MemoryError:
        message = "The system has not that much memory; give less with --memory."
        _fail(message, BudgetError.exit_code, arguments)
    except Exception as error:
        _fail(f"{type(error).__name__}: {error}", EXIT_FAILED, arguments)


@contextmanager
def _job() -> Iterator[None]:
    """Join the other processes of this job, if a launcher such as torchrun has started several."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    from lean_merge.studies.ranks import joined

    with joined() as job:
        SPEAKS.set(job.leads)
        yield


def _silence_output() -> None:
    """Let what waits to be printed be lost, which Python would try to write again in the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, code: int, arguments: list[str]) -> None:
    if "--debug" in arguments:
        import traceback

        traceback.print_exc()
    with suppress(OSError):
        print(f"lean-merge: {plain(message)}", file=sys.stderr)
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        _silence_output()
    sys.exit(code)
