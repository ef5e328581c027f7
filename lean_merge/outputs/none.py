"""Nothing but the report: what a merge would decide."""

from __future__ import annotations

from typing import ClassVar

from lean_merge.outputs.base import Outcome, Output, Sink, register
from lean_merge.outputs.blocks import BlockSink
from lean_merge.outputs.companions import write_report
from lean_merge.store import OutputFolder


@register
class NoOutput(Output):
    """No weights; a folder, if there is one, gets recipe and report."""

    name: ClassVar[str] = "none"
    needs_folder: ClassVar[bool] = False
    done: ClassVar[str] = "selected"

    def described(self, *, written: int, disk: int) -> str:
        """Describe it for people, in a few words."""
        return "none, the report alone"

    def sink(self, folder: OutputFolder | None) -> Sink:
        """Keep in the journal what was decided, if there is one."""
        return Sink() if folder is None else BlockSink(folder)

    def end(self, folder: OutputFolder, outcome: Outcome) -> None:
        """Write recipe and report."""
        write_report(self, folder, outcome)
