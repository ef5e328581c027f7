"""The sinks of a checkpoint, of a stream, and of what waits in blocks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lean_merge.checkpoints import as_bytes, torch_dtype
from lean_merge.outputs.base import Sink, Spans, WriteBytes
from lean_merge.store import OutputFolder, Shard
from lean_merge.tasks import CopyTask, WeightTask


class CheckpointSink(Sink):
    """A whole checkpoint: every tensor at its place in the files of an `OutputFolder`.

    Parameters
    ----------
    shards
        Those of `folder`.
    folder
        Open; it stays unsealed.
    """

    def __init__(self, shards: Sequence[Shard], folder: OutputFolder) -> None:
        self._shards = shards
        self._folder = folder

    def writer(self, task: CopyTask | WeightTask) -> WriteBytes:
        """Write at the tensor's place in its shard."""
        return self._folder.writer(self._shards[task.shard], task.tensor.name)

    def finished(self, task: CopyTask | WeightTask) -> Any:
        """Look it up in the folder's journal."""
        return self._folder.finished.get(task.tensor.name)

    def finish(self, task: CopyTask | WeightTask, note: Any) -> None:
        """Write to the folder's journal, once the bytes are on the disk."""
        self._folder.finish_tensor(self._shards[task.shard], task.tensor.name, note)

    def flush(self) -> None:
        """Send what was written to the disk."""
        self._folder.flush()


class BlockSink(Sink):
    """What is laid out only at the end waits in the blocks of an unfinished output.

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


class TensorSink(Sink):
    """Whole tensors in fresh memory, one at a time: each must be taken before the next is made."""

    def __init__(self) -> None:
        self._tensor: Tensor | None = None

    def take(self) -> Tensor:
        """The tensor of the last task, which is the caller's from now on."""
        assert self._tensor is not None
        tensor, self._tensor = self._tensor, None
        return tensor

    def writer(self, task: CopyTask | WeightTask) -> WriteBytes:
        """Write into the tensor, which is made by the first of its weights."""
        if self._tensor is None:
            dtype = torch_dtype(task.tensor.dtype)
            self._tensor = torch.empty(task.tensor.shape, dtype=dtype)
        view = as_bytes(self._tensor)

        def write(offset: int, data: memoryview, spans: Spans | None = None) -> None:
            data, done = data.cast("B"), 0
            for start, length in spans or [(0, data.nbytes)]:
                first = offset + start
                view[first : first + length] = data[done : done + length]
                done += length

        return write
