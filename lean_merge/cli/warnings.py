"""Show every warning once, whether it comes before, during or after the work."""

from __future__ import annotations

from collections.abc import Iterable

from lean_merge.cli.app import echo
from lean_merge.cli.rounding import FORESEEN
from lean_merge.outputs.checkpoint import KEEPING


class Warnings:
    """The warnings that a command has shown.

    Parameters
    ----------
    silent
        Whether none is shown at all.
    """

    def __init__(self, silent: bool) -> None:
        self._silent = silent
        self._told: set[str] = set()
        self._foreseen = False

    def warn(self, text: str) -> None:
        """Show a warning, unless it was shown before."""
        # What was lost is told once: in advance, or by the report.
        if text in self._told or (self._foreseen and KEEPING in text):
            return
        self._foreseen = self._foreseen or text.startswith(FORESEEN)
        self._told.add(text)
        if not self._silent:
            echo(f"warning: {text}", err=True)

    def tell(self, texts: Iterable[str]) -> None:
        """Show warnings."""
        for text in texts:
            self.warn(text)
