"""Where the results of a merge go: the engine hands every task to one of these."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, ClassVar

import torch
from torch import Tensor

from lean_merge.checkpoints import TensorReader, as_bytes, torch_dtype
from lean_merge.engine.prefetch import Flusher
from lean_merge.engine.taskvectors import TaskVectors
from lean_merge.engine.tilestore import WriteBytes
from lean_merge.engine.update import (
    OutputRows,
    Truncated,
    Written,
    convert_tensor,
    copy_tensor,
    write_rows,
)
from lean_merge.engine.workers import Workers
from lean_merge.methods import Decision
from lean_merge.plan import Plan
from lean_merge.store import OutputFolder
from lean_merge.tasks import CopyTask, WeightTask

Spans = Sequence[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Tools:
    """What a sink works with: who reads, and who computes."""

    reader: TensorReader
    workers: Workers
    non_finite: set[str] = field(default_factory=set)
    """Names of copied tensors that hold NaN or Inf."""


Stored = Written | Truncated | None
"""What storing an update kept of it; None where nothing was lost or nothing stored."""


class Sink(abc.ABC):
    """Receives the plan's tasks in order; a context while the engine runs.

    What `copy` and `update` return waits until that part is stored, which may go on while later
    tasks are given.
    """

    ahead: ClassVar[bool] = False
    """Whether a task may be given before the one before it is finished."""
    reads_rows: ClassVar[bool] = False
    """Whether the MLLM's rows are read once more, to be stored with their update."""
    stores_decisions: ClassVar[bool] = False
    """Whether `update` takes its time over the decision alone: the task vectors' memory may serve
    the next weight meanwhile."""

    def __enter__(self) -> Sink:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return

    @abc.abstractmethod
    def copy(self, task: CopyTask, tools: Tools) -> Callable[[], None]:
        """A tensor that goes over as it is."""

    @abc.abstractmethod
    def update(
        self,
        task: WeightTask,
        vectors: TaskVectors,
        decision: Decision,
        tools: Tools,
    ) -> Callable[[], Stored]:
        """`vectors.weight`, one of `task`'s, with its decision."""

    def finished(self, task: CopyTask | WeightTask) -> Any:
        """What `finish` was told of `task` by an interrupted run whose bytes are used; else None.

        Such a task is not given.
        """
        del task
        return None

    def finish(self, task: CopyTask | WeightTask, note: Any) -> None:
        """All of `task` was given and is stored; in the order of the tasks.

        `note` is what to tell of it later, as JSON has it.
        """
        return


class FolderSink(Sink):
    """Writes into an `OutputFolder`, whose bytes go to the disk while more are made.

    Parameters
    ----------
    folder
        Open; it stays unsealed.
    """

    def __init__(self, folder: OutputFolder) -> None:
        self._folder = folder
        self._flusher = Flusher(folder)

    def __enter__(self) -> FolderSink:
        self._flusher.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._flusher.__exit__(kind, error, trace)


class CheckpointSink(FolderSink):
    """A whole checkpoint: every tensor at its place in the files of an `OutputFolder`.

    Parameters
    ----------
    plan
        Whose shards are those of `folder`.
    folder
        Open; it stays unsealed.
    """

    ahead = True
    reads_rows = True

    def __init__(self, plan: Plan, folder: OutputFolder) -> None:
        super().__init__(folder)
        self._plan = plan

    def copy(self, task: CopyTask, tools: Tools) -> Callable[[], None]:
        """The tensor's bytes, undecoded; or its numbers, where these are stored with scales."""
        return begin_copy(task, self._writer(task), tools)

    def update(
        self,
        task: WeightTask,
        vectors: TaskVectors,
        decision: Decision,
        tools: Tools,
    ) -> Callable[[], Written]:
        """The rows with the update added, rounded once."""
        output = output_rows(self._plan, task, self._writer(task))
        return write_rows(vectors, decision, output, reader=tools.reader, workers=tools.workers)

    def finished(self, task: CopyTask | WeightTask) -> Any:
        """From the folder's journal."""
        return self._folder.finished.get(task.tensor.name)

    def finish(self, task: CopyTask | WeightTask, note: Any) -> None:
        """Goes to the folder's journal once the bytes are on the disk."""
        self._folder.finish_tensor(self._plan.shards[task.shard], task.tensor.name, note)

    def _writer(self, task: CopyTask | WeightTask) -> WriteBytes:
        shard = self._plan.shards[task.shard]
        start = shard.offsets[task.tensor.name]

        def write(offset: int, data: memoryview, spans: Spans | None = None) -> None:
            self._folder.write_at(shard, start + offset, data, spans)
            self._flusher.wrote(shard, data.nbytes)

        return write


class BlockSink(FolderSink):
    """What is laid out only at the end waits in the blocks of an unfinished output.

    By itself it keeps nothing but what the engine tells of each task, so that a run without weights
    to write can be taken up again too. Others put the blocks of a task before it is finished.
    """

    def copy(self, task: CopyTask, tools: Tools) -> Callable[[], None]:
        """Nothing is copied."""
        return _nothing

    def update(
        self, task: WeightTask, vectors: TaskVectors, decision: Decision, tools: Tools
    ) -> Callable[[], Stored]:
        """Nothing is stored."""
        return _nothing

    def put(self, name: str, shape: tuple[int, ...], parts: Iterable[Tensor]) -> None:
        """Keep a block of the task in hand, as `BlockStore.put` does."""
        block = self._folder.blocks.put(name, shape, parts)
        self._flusher.wrote(None, block.nbytes)

    def finished(self, task: CopyTask | WeightTask) -> Any:
        """From the folder's journal."""
        group = self._folder.blocks.groups.get(task.tensor.name)
        return None if group is None else group.result

    def finish(self, task: CopyTask | WeightTask, note: Any) -> None:
        """Goes to the folder's journal once the blocks are on the disk."""
        self._folder.blocks.finish(task.tensor.name, note)
        # Its line in the journal is to be written, even if it has no block.
        self._flusher.wrote(None, 1)


def begin_copy(task: CopyTask, write: WriteBytes, tools: Tools) -> Callable[[], None]:
    """Begin to write a tensor out of scope as it goes over; what is returned waits for the end."""
    reader, workers = tools.reader, tools.workers
    if not task.decoded:
        return copy_tensor(
            task.source, write, reader=reader, workers=workers, non_finite=tools.non_finite
        )
    dtype = torch_dtype(task.tensor.dtype)
    return convert_tensor(task.decoded, dtype, write, reader=reader, workers=workers)


def output_rows(plan: Plan, task: WeightTask, write: WriteBytes) -> OutputRows:
    """How the rows of an in-scope tensor are written, as the recipe wants it."""
    dtype: torch.dtype = torch_dtype(task.tensor.dtype)
    return OutputRows(
        dtype=dtype,
        rounding=plan.recipe.rounding,
        seed=plan.recipe.seed,
        write=write,
    )


def _into(view: memoryview) -> WriteBytes:
    """Writes into memory."""

    def write(offset: int, data: memoryview, spans: Spans | None = None) -> None:
        data, done = data.cast("B"), 0
        for start, length in spans or [(0, data.nbytes)]:
            first = offset + start
            view[first : first + length] = data[done : done + length]
            done += length

    return write


class TensorSink(Sink):
    """Whole tensors in fresh memory, one at a time: each must be taken before the next is made."""

    reads_rows = True

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._tensor: Tensor | None = None

    def take(self) -> Tensor:
        """The tensor of the last task, which is the caller's from now on."""
        assert self._tensor is not None
        tensor, self._tensor = self._tensor, None
        return tensor

    def copy(self, task: CopyTask, tools: Tools) -> Callable[[], None]:
        """The tensor as it is stored; or its numbers, where these are stored with scales."""
        view = as_bytes(self._fresh(task))
        if not task.decoded:
            tools.reader.read_into(task.source, 0, view)
            return _nothing
        return begin_copy(task, _into(view), tools)

    def update(
        self, task: WeightTask, vectors: TaskVectors, decision: Decision, tools: Tools
    ) -> Callable[[], Written]:
        """The rows with the update added, rounded once."""
        if self._tensor is None:
            self._fresh(task)
        assert self._tensor is not None
        output = output_rows(self._plan, task, _into(as_bytes(self._tensor)))
        return write_rows(vectors, decision, output, reader=tools.reader, workers=tools.workers)

    def _fresh(self, task: CopyTask | WeightTask) -> Tensor:
        dtype = torch_dtype(task.tensor.dtype)
        self._tensor = torch.empty(task.tensor.shape, dtype=dtype)
        return self._tensor


class DecisionSink(Sink):
    """Nothing: what was decided is in the engine's results."""

    def copy(self, task: CopyTask, tools: Tools) -> Callable[[], None]:
        """Nothing is copied."""
        return _nothing

    def update(
        self, task: WeightTask, vectors: TaskVectors, decision: Decision, tools: Tools
    ) -> Callable[[], None]:
        """Nothing is stored."""
        return _nothing


def _nothing() -> None:
    """There is nothing to wait for."""
