"""A sink for outputs whose files can be laid out only when every weight has been analysed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from lean_merge.outputs.base import Sink
from lean_merge.store import OutputFolder
from lean_merge.tasks import CopyTask, WeightTask


class BlockSink(Sink):
    """A sink that keeps numbers in the blocks of an unfinished output.

    By itself it keeps only the engine's note on each task, so that a run that writes no weights can
    be resumed too. Subclasses put the blocks of a task before it is finished.

    Parameters
    ----------
    folder
        Open; it stays unsealed.
    """

    def __init__(self, folder: OutputFolder) -> None:
        self.folder: OutputFolder = folder

    def put(self, name: str, shape: tuple[int, ...], parts: Iterable[Tensor]) -> None:
        """Write a block of the present task, as `BlockStore.put` does."""
        self.folder.blocks.put(name, shape, parts)

    def finished(self, task: CopyTask | WeightTask) -> Any:
        """Return the note from the folder's journal."""
        group = self.folder.blocks.groups.get(task.tensor.name)
        return None if group is None else group.result

    def finish(self, task: CopyTask | WeightTask, note: Any) -> None:
        """Note the task in the folder's journal, once the blocks are on the disk."""
        self.folder.blocks.finish(task.tensor.name, note)

    def flush(self) -> None:
        """Send finished blocks to the disk."""
        self.folder.flush()
