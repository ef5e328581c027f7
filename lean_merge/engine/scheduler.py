"""The scheduler alone decides what is done at the same time.

The calling thread takes the plan's tensors in their order. It has tensors out of scope copied. For
each logical weight of the others it waits for the decision, and then has the result stored. It
reports each tensor that is stored completely, again in order. Beside it, one or two analysis
threads each bring one logical weight to its decision, and the workers compute the passes that
analyses ask for, and otherwise write rows and copy tensors. docs/architecture.md lists all threads.

Four rules say what may overlap:

1. Analyses begin in order. The arena, where tiles stay in memory, has two halves; an analysis takes
   one of them or both, and begins once they are free.
2. No analysis begins while more than `Plan.waiting` updates wait to be stored; there is memory for
   that many beside it.
3. An analysis leaves the arena when it has decided. If its update reads tiles there, it stays
   until the rows are written.
4. A few tensors may be on their way to the output, but no more than one weight may be while the
   calling thread waits for the next decision. If no update may wait, a tensor is finished, and the
   caller has taken it, before any work on the next begins.

An error in any thread is raised in the calling thread when it comes to the part that failed. After
that, as at the end, every thread finishes its present job and begins no other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from lean_merge.checkpoints import TensorReader, TensorSpec, torch_dtype
from lean_merge.engine.background import Flusher, ReadAhead
from lean_merge.engine.copying import copy_pieces
from lean_merge.engine.deciding import Decided, Decider
from lean_merge.engine.update import OutputRows, RowWriter
from lean_merge.engine.workers import worker_pool
from lean_merge.memory import release_free_memory, usage
from lean_merge.outputs.base import Sink
from lean_merge.plan import Plan
from lean_merge.plan.formulas import ARENA_ALIGNMENT
from lean_merge.tasks import CopyTask, Note, Stored, WeightResult, WeightTask, Written, to_note

READ_AHEAD = 256 << 20
"""Bytes that are brought into the page cache before they are used."""
AHEAD_FILES = 8
"""The most files that the read-ahead holds open; a tensor needs few."""
MOST_UNDER_WAY = 8
"""The most parts that may be on their way to the output at a time."""
RELEASE_ABOVE = 16 << 20
"""Free memory is released whenever memory has grown by this many bytes; `SLACK` counts them."""


@dataclass(frozen=True, slots=True)
class _BegunAnalysis:
    """An analysis that has begun, and the halves of the arena that it takes."""

    halves: Sequence[int]
    job: Future[Decided]


@dataclass(frozen=True, slots=True)
class _UnderWay:
    """A weight or a copy on its way to the output.

    Attributes
    ----------
    index
        The place of its task in the plan.
    is_last
        Whether it is the last part of its task.
    jobs
        The jobs of workers that store it.
    decided, kept
        The decision on a weight, and what the output kept of it at once.
    """

    index: int
    is_last: bool = True
    jobs: Sequence[Future[Any]] = ()
    decided: Decided | None = None
    kept: Stored = None

    @property
    def is_stored(self) -> bool:
        return all(job.done() for job in self.jobs)


class Scheduler:
    """A context manager that carries out a plan; its threads end with the context.

    Parameters
    ----------
    plan, sink
        The plan, and the sink for its results.
    reused : mapping of int to Note
        The notes of the tasks that an interrupted run finished, by their place in the plan. Nothing
        is done for these tasks.
    surveyed
        The results of the methods' surveys of all weights, by the surveys' keys.
    timed
        A function that returns a context, in which the calling thread's time is counted for
        "analyze", "write" or "copy".
    """

    def __init__(
        self,
        plan: Plan,
        sink: Sink,
        *,
        reused: Mapping[int, Note],
        surveyed: Mapping[Hashable, Any],
        timed: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        self._plan = plan
        self._sink = sink
        self._reused = reused
        self._surveyed = surveyed
        self._timed = timed
        self._reader = TensorReader(seen=plan.seen, room=plan.arrivals)
        self._readers: dict[int, TensorReader] = {}
        # These hold, in order: weights whose analysis has not begun, analyses in the arena, and
        # parts that are not stored yet.
        self._to_analyse = deque(self._weights())
        self._analyses: deque[_BegunAnalysis] = deque()
        self._under_way: deque[_UnderWay] = deque()
        # The CPU's memory is reused for all weights, because new pages cost more than arithmetic.
        self._arena = torch.empty(plan.arena, dtype=torch.uint8)
        self._results: list[WeightResult] = []
        self._unstored = 0
        self._settled = 0

    def _reader_of(self, index: int) -> TensorReader:
        """Return the reader that counts what is read for a task."""
        return self._readers.setdefault(index, self._reader.counting())

    def _weights(self) -> Iterator[tuple[WeightTask, int, int]]:
        """Yield each logical weight to be analysed: its task, its number, the task's place."""
        for index, task in enumerate(self._plan.tasks):
            if isinstance(task, WeightTask) and index not in self._reused:
                for number in range(len(task.weight.slices)):
                    yield task, number, index

    def __enter__(self) -> Scheduler:
        small = any(task.halves[number] == 1 for task, number, _ in self._to_analyse)
        with ExitStack() as stack:
            stack.enter_context(self._reader)
            # The workers write, so they end before the flusher, which syncs what they wrote.
            self._flusher = stack.enter_context(Flusher(self._sink.flush))
            # Analyses wait for the workers, and so end after them.
            self._analysts = stack.enter_context(worker_pool(2 if small else 1, "analysis"))
            self._workers = stack.enter_context(worker_pool(self._plan.workers))
            apart = stack.enter_context(TensorReader(max_files=AHEAD_FILES))
            sources = list(self._sources())
            self._read_ahead = stack.enter_context(ReadAhead(apart, sources, ahead=READ_AHEAD))
            stack.enter_context(self._reader.expecting(sources))
            decider = Decider(self._plan, self._workers, self._surveyed)
            self._decider = stack.enter_context(closing(decider))
            self._threads = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._threads.__exit__(kind, error, trace)

    def _sources(self) -> Iterator[Sequence[TensorSpec]]:
        """Yield the tensors that each task reads."""
        rows = self._plan.output.writes_rows
        for index, task in enumerate(self._plan.tasks):
            yield () if index in self._reused else task.read(rows=rows)

    @property
    def is_at_work(self) -> bool:
        """Return whether anything is being analysed, or is on its way to the output."""
        return bool(self._analyses or self._under_way)

    @property
    def pinned(self) -> int:
        """Return the bytes of host memory that are pinned for copies to a device."""
        return self._decider.pinned

    def finished(self) -> Iterator[tuple[int, Note]]:
        """Carry out the tasks, and yield index and note of each, in order, once it is stored."""
        for index, task in enumerate(self._plan.tasks):
            self._read_ahead.begin(index)
            for begin in self._parts(index, task):
                self._under_way.append(begin())
                while self._under_way and self._is_full():
                    yield from self._finish()
        while self._under_way:
            yield from self._finish()

    def _is_full(self) -> bool:
        """Return whether the first part under way must be finished before another is begun."""
        return (
            not self._plan.waiting
            or self._under_way[0].is_stored
            or self._unstored > 1
            or len(self._under_way) >= MOST_UNDER_WAY
        )

    def _parts(self, index: int, task: CopyTask | WeightTask) -> list[Callable[[], _UnderWay]]:
        """Return the functions that begin the parts of a task, one for each part."""
        if index in self._reused:
            return [partial(_UnderWay, index)]
        if isinstance(task, CopyTask):
            return [partial(self._copy, index, task)]
        return [partial(self._merge, index, task, n) for n in range(len(task.weight.slices))]

    def _copy(self, index: int, task: CopyTask) -> _UnderWay:
        """Begin to copy a tensor, if the output wants it."""
        write = self._sink.writer(task)
        if write is None:
            return _UnderWay(index)
        copy, pieces = copy_pieces(task, write, self._reader_of(index), self._workers)
        return _UnderWay(index, jobs=self._workers.submit(copy, pieces, can_wait=True))

    def _merge(self, index: int, task: WeightTask, number: int) -> _UnderWay:
        """Wait until a weight is decided, and begin to store it."""
        with self._timed("analyze"):
            self._begin_analyses()
            decided = self._analyses[0].job.result()
        with self._timed("write"):
            self._unstored += 1
            begun = self._store(index, task, number, decided)
        del decided
        self._release_memory()
        return begun

    def _begin_analyses(self) -> None:
        """Begin the analyses for which there is room now."""
        while self._to_analyse and self._unstored <= self._plan.waiting:
            task, number, index = self._to_analyse[0]
            taken = {half for each in self._analyses for half in each.halves}
            halves = [half for half in (0, 1) if half not in taken][: task.halves[number]]
            if len(halves) < task.halves[number]:
                return
            self._to_analyse.popleft()
            decide = partial(self._decider.decide, task, number, self._reader_of(index))
            [job] = self._analysts.submit(decide, [self._room(halves)])
            self._analyses.append(_BegunAnalysis(halves, job))

    def _room(self, halves: Sequence[int]) -> Tensor:
        """Return the arena, or one half of it."""
        if len(halves) == 2:
            return self._arena
        size = self._arena.numel() // 2 // ARENA_ALIGNMENT * ARENA_ALIGNMENT
        return self._arena[halves[0] * size : (halves[0] + 1) * size]

    def _leave_arena(self) -> None:
        """Release the room of the first decided weight for the analyses that wait for it."""
        self._analyses.popleft()
        self._begin_analyses()

    def _store(self, index: int, task: WeightTask, number: int, decided: Decided) -> _UnderWay:
        """Begin to store a weight, and leave its room in the arena."""
        is_last = number == len(task.weight.slices) - 1
        reader, write = self._reader_of(index), self._sink.writer(task)
        if write is None:
            self._leave_arena()
            kept = self._sink.keep(
                task,
                decided.vectors.weight,
                decided.decision,
                lambda source, rows: source.read(rows, reader, self._workers.buffer, "base"),
            )
            return _UnderWay(index, is_last, decided=decided.without_evidence(), kept=kept)
        recipe, dtype = self._plan.recipe, torch_dtype(task.tensor.dtype)
        output = OutputRows(dtype, recipe.rounding, recipe.seed, write)
        rows = RowWriter(decided.vectors, decided.decision.update, output, reader, self._workers)
        stays = rows.reads_arena
        jobs = self._workers.submit(rows.write_tile, rows.tiles, can_wait=not stays)
        if stays:
            wait(jobs)
        self._leave_arena()
        return _UnderWay(index, is_last, jobs, decided.without_evidence())

    def _finish(self) -> Iterator[tuple[int, Note]]:
        """Wait until the first part under way is stored; yield its task if the part is its last."""
        first = self._under_way[0]
        task = self._plan.tasks[first.index]
        with self._timed("copy" if isinstance(task, CopyTask) else "write"):
            results = [job.result() for job in first.jobs]
        self._under_way.popleft()
        if first.decided is not None:
            self._unstored -= 1
            stored = Written.of(results) if results else first.kept
            self._results.append(first.decided.result(task.tensor.name, stored))
        if self._plan.waiting:
            self._begin_analyses()
        if not first.is_last:
            return
        index = first.index
        # The update must not take memory while the caller holds the tensor.
        del first
        self._read_ahead.done(index)
        self._reader.done(index)
        note = self._reused.get(index)
        if note is None:
            non_finite = isinstance(task, CopyTask) and not all(results)
            count = self._readers.pop(index, self._reader).bytes_read
            note = Note(self._results, count, non_finite=non_finite)
            self._results = []
            self._sink.finish(task, to_note(note))
            # The journal's line must reach the disk even if the tensor has no bytes.
            self._flusher.wrote(task.tensor.nbytes if results else 1)
        yield index, note

    def _release_memory(self) -> None:
        """Release free memory if it has grown much, and not more often, because that takes time."""
        if usage().anonymous > self._settled + RELEASE_ABOVE:
            release_free_memory()
            self._settled = usage().anonymous
