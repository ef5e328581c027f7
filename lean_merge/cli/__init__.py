"""The command line: parse, call the public API, show progress, map errors to exit codes."""

# Each adds its commands to the program, in this order.
from lean_merge.cli import merge, studies, tools  # noqa: F401
from lean_merge.cli.app import EXIT_DIFFERENT, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, app
from lean_merge.cli.entry import main

__all__ = [
    "EXIT_DIFFERENT",
    "EXIT_FAILED",
    "EXIT_INTERRUPTED",
    "EXIT_USAGE",
    "app",
    "main",
]
