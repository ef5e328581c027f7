"""The command line: it calls the public API, shows progress, and turns errors into exit codes."""

# Each module adds its commands to the program, in this order.
from lean_merge.cli import merge, prior, push, studies, sweep, tools  # noqa: F401
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
