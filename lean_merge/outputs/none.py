"""An output without weights: only the report of what a merge would decide."""

from __future__ import annotations

from typing import ClassVar

from lean_merge.outputs.base import Outcome, Output, Sink, register_kind
from lean_merge.outputs.blocks import BlockSink
from lean_merge.outputs.companions import write_report
from lean_merge.store import OutputFolder


@register_kind
class NoOutput(Output):
    """An output without weights; its folder, if there is one, gets the recipe and the report."""

    name: ClassVar[str] = "none"
    needs_folder: ClassVar[bool] = False
    done: ClassVar[str] = "selected"

    def described(self, *, written: int, disk: int) -> str:
        """Return a description for people, in a few words."""
        return "none, the report alone"

    def sink(self, folder: OutputFolder | None) -> Sink:
        """Return a sink that notes decisions in the journal, if there is a folder."""
        return Sink() if folder is None else BlockSink(folder)

    def end(self, folder: OutputFolder, outcome: Outcome) -> None:
        """Write recipe and report."""
        write_report(self, folder, outcome)
