"""The sink of what cannot be laid out before every weight was analysed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from lean_merge.outputs.base import Sink
from lean_merge.store import OutputFolder
from lean_merge.tasks import CopyTask, WeightTask


class BlockSink(Sink):
    """Numbers wait in the blocks of an unfinished output until their file is laid out.

    By itself it keeps nothing but what the engine tells of each task, so that a run without weights
    to write can be taken up again too. Others put the blocks of a task before it is finished.

    Parameters
    ----------
    folder
        Open; it stays unsealed.
    """

    def __init__(self, folder: OutputFolder) -> None:
        self._folder = folder

    def put(self, name: str, shape: tuple[int, ...], parts: Iterable[Tensor]) -> None:
        """Keep a block of the task in hand, as `BlockStore.put` does."""
        self._folder.blocks.put(name, shape, parts)

    def finished(self, task: CopyTask | WeightTask) -> Any:
        """Look it up in the folder's journal."""
        group = self._folder.blocks.groups.get(task.tensor.name)
        return None if group is None else group.result

    def finish(self, task: CopyTask | WeightTask, note: Any) -> None:
        """Write to the folder's journal, once the blocks are on the disk."""
        self._folder.blocks.finish(task.tensor.name, note)

    def flush(self) -> None:
        """Send what is finished to the disk."""
        self._folder.flush()
