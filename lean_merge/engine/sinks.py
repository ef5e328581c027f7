"""Where the results of a merge go: the engine hands every task to one of these."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType

import torch
from torch import Tensor

from lean_merge.checkpoints import TensorReader, as_bytes, torch_dtype
from lean_merge.engine.prefetch import Flusher
from lean_merge.engine.taskvectors import TaskVectors
from lean_merge.engine.update import OutputRows, Truncated, Written, copy_tensor, write_rows
from lean_merge.engine.workers import Workers
from lean_merge.methods import Decision
from lean_merge.output import OutputFolder
from lean_merge.plan import CopyTask, Plan, WeightTask


@dataclass(frozen=True, slots=True)
class Tools:
    """What a sink works with: who reads, who computes, and a reused uint8 buffer for copies."""

    reader: TensorReader
    workers: Workers
    buffer: Tensor
    non_finite: list[str] = field(default_factory=list)
    """Names of copied tensors that hold NaN or Inf."""


class Sink(abc.ABC):
    """Receives the plan's tasks in order, one at a time; a context while the engine runs."""

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
    def copy(self, task: CopyTask, tools: Tools) -> None:
        """A tensor that goes over as it is."""

    @abc.abstractmethod
    def update(
        self,
        task: WeightTask,
        vectors: TaskVectors,
        decision: Decision,
        tools: Tools,
    ) -> Written | Truncated | None:
        """`vectors.weight`, one of `task`'s, with its decision; what storing it kept of it."""

    def finish(self, task: CopyTask | WeightTask) -> None:
        """All of `task` was given."""
        return


class CheckpointSink(Sink):
    """A whole checkpoint: every tensor at its place in the files of an `OutputFolder`.

    Parameters
    ----------
    plan
        Whose shards are those of `folder`.
    folder
        Open; it stays unsealed.
    """

    def __init__(self, plan: Plan, folder: OutputFolder) -> None:
        self._plan = plan
        self._folder = folder
        self._flusher = Flusher(folder)

    def __enter__(self) -> CheckpointSink:
        self._flusher.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._flusher.__exit__(kind, error, trace)

    def copy(self, task: CopyTask, tools: Tools) -> None:
        """The tensor's bytes, undecoded."""
        if not copy_tensor(tools.reader, task.source, self._writer(task), tools.buffer):
            tools.non_finite.append(task.source.name)

    def update(
        self,
        task: WeightTask,
        vectors: TaskVectors,
        decision: Decision,
        tools: Tools,
    ) -> Written:
        """The rows with the update added, rounded once."""
        output = output_rows(self._plan, task, self._writer(task))
        return write_rows(vectors, decision, output, reader=tools.reader, workers=tools.workers)

    def _writer(self, task: CopyTask | WeightTask) -> Callable[[int, memoryview], None]:
        shard = self._plan.shards[task.shard]
        start = shard.offsets[task.tensor.name]

        def write(offset: int, data: memoryview) -> None:
            self._folder.write_at(shard, start + offset, data)
            self._flusher.wrote(shard, data.nbytes)

        return write


def output_rows(
    plan: Plan, task: WeightTask, write: Callable[[int, memoryview], None]
) -> OutputRows:
    """How the rows of an in-scope tensor are written, as the recipe wants it."""
    dtype: torch.dtype = torch_dtype(task.tensor.dtype)
    return OutputRows(
        dtype=dtype,
        rounding=plan.recipe.rounding,
        seed=plan.recipe.seed,
        write=write,
    )


class TensorSink(Sink):
    """Whole tensors in fresh memory, one at a time: each must be taken before the next is made."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._tensor: Tensor | None = None

    def take(self) -> Tensor:
        """The tensor of the last task, which is the caller's from now on."""
        assert self._tensor is not None
        tensor, self._tensor = self._tensor, None
        return tensor

    def copy(self, task: CopyTask, tools: Tools) -> None:
        """The tensor as it is stored."""
        tensor = self._fresh(task)
        tools.reader.read_into(task.source, 0, as_bytes(tensor))

    def update(
        self, task: WeightTask, vectors: TaskVectors, decision: Decision, tools: Tools
    ) -> Written:
        """The rows with the update added, rounded once."""
        if self._tensor is None:
            self._fresh(task)
        assert self._tensor is not None
        view = as_bytes(self._tensor)

        def write(offset: int, data: memoryview) -> None:
            view[offset : offset + data.nbytes] = data.cast("B")

        output = output_rows(self._plan, task, write)
        return write_rows(vectors, decision, output, reader=tools.reader, workers=tools.workers)

    def _fresh(self, task: CopyTask | WeightTask) -> Tensor:
        dtype = torch_dtype(task.tensor.dtype)
        self._tensor = torch.empty(task.tensor.shape, dtype=dtype)
        return self._tensor


class DecisionSink(Sink):
    """Nothing: what was decided is in the engine's results."""

    def copy(self, task: CopyTask, tools: Tools) -> None:
        """Nothing is copied."""

    def update(
        self, task: WeightTask, vectors: TaskVectors, decision: Decision, tools: Tools
    ) -> None:
        """Nothing is stored."""
