"""What a kind of output is to the engine: a sink, which takes the results of a merge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lean_merge.mapping import LogicalWeight, WeightSource
from lean_merge.methods import Decision
from lean_merge.store import Spans, WriteBytes
from lean_merge.tasks import CopyTask, Stored, WeightTask

ReadRows = Callable[[WeightSource, slice], Tensor]
"""Reads rows of a weight as one role stores it; they are valid until the next call."""


__all__ = ["ReadRows", "Sink", "Spans", "WriteBytes"]


class Sink:
    """Takes the results of a merge, task by task in the order of the plan.

    The engine computes; a sink only stores. Where it gives a writer for a task, the engine reads
    the MLLM's rows, adds the update and writes the tensor's bytes through it, from several threads.
    Where it gives none, no row is read again, and the sink keeps of the update itself what it
    wants. This class stores nothing at all.
    """

    def writer(self, task: CopyTask | WeightTask) -> WriteBytes | None:
        """Give what writes the bytes of a tensor; None where they are not wanted.

        It is asked for once for a tensor out of scope, and once for each logical weight of another.
        """
        del task
        return None

    def keep(
        self, task: WeightTask, weight: LogicalWeight, decision: Decision, read: ReadRows
    ) -> Stored:
        """Store the update of `weight`, one of those of `task`, where there is no writer."""
        return None

    def finished(self, task: CopyTask | WeightTask) -> Any:
        """Tell what `finish` was given by an interrupted run whose bytes are used; None if nothing.

        The engine then does nothing else for the task.
        """
        del task
        return None

    def finish(self, task: CopyTask | WeightTask, note: Any) -> None:
        """Take note that a task is stored as a whole; tasks are finished in their order.

        `note` is what `finished` will tell of it, as JSON has it.
        """
        return

    def flush(self) -> None:
        """Send to the disk what was written so far; called from a thread of its own.

        Raises OutputError or BudgetError where the disk refuses.
        """
        return
