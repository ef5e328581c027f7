"""The loop over the plan's tasks, in the order of the output."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from lean_merge.checkpoints import TensorReader, TensorSpec, torch_dtype
from lean_merge.engine.ahead import Ahead, Part
from lean_merge.engine.analysis import Analyst, Found
from lean_merge.engine.prefetch import Flusher, Prefetcher
from lean_merge.engine.update import OutputRows, begin_copy, write_rows
from lean_merge.engine.workers import Precision, Tools, Workers, full_float32, worker_pool
from lean_merge.mapping import LogicalWeight
from lean_merge.memory import release_free_memory, usage
from lean_merge.methods import Decision, ExpertRecord
from lean_merge.outputs.base import Sink, Spans, WriteBytes
from lean_merge.plan import Plan
from lean_merge.tasks import CopyTask, Note, Stored, WeightResult, WeightTask, from_note, to_note

READ_AHEAD = 256 << 20
"""Bytes that are brought into the page cache before they are used."""
PREFETCHED_FILES = 8
"""Files that the read-ahead holds open: a task reads few."""
MOST_BEGUN = 8
"""Tasks that may be on their way to the sink at a time."""
RELEASE_ABOVE = 16 << 20
"""Bytes that free memory may grow by before it is given back; a part of the budget's slack."""


@dataclass(frozen=True, slots=True)
class Event:
    """Progress: output tensor `name` of `nbytes` is written; `merged` if an update went in.

    `reused` tells that an interrupted run wrote it; `warnings` are sentences for people.
    """

    name: str
    nbytes: int
    merged: bool
    reused: bool = False
    warnings: tuple[str, ...] = ()


@dataclass
class RunResult:
    """What happened to all of them, and where the time went, in seconds."""

    weights: list[WeightResult] = field(default_factory=list)
    non_finite: list[str] = field(default_factory=list)
    """Tensors out of scope that hold NaN or Inf."""
    seconds: dict[str, float] = field(default_factory=dict)
    bytes_read: int = 0
    peak_vram: int = 0
    peak_vram_used: int = 0
    pinned: int = 0

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Adds the time of the block to `phase`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            self.seconds[phase] = self.seconds.get(phase, 0.0) + elapsed


def run(plan: Plan, sink: Sink, on_event: Callable[[Event], None]) -> RunResult:
    """Carry out every task of `plan` and give the results to `sink`."""
    result = RunResult()
    with closing(steps(plan, sink, result)) as events:
        for event in events:
            on_event(event)
    return result


def steps(plan: Plan, sink: Sink, result: RunResult) -> Generator[Event, None, None]:
    """Carry out `plan` task by task: an event after each, and what happened noted in `result`.

    Torch's settings are the caller's again while it holds an event, where no thread of ours goes on
    with its work meanwhile.
    """
    on_cuda = torch.device(plan.device).type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(plan.device)
    before = _Settings.now()
    with ExitStack() as stack:
        stack.enter_context(full_float32())
        reader = stack.enter_context(TensorReader())
        # The threads write, so they end before what sends to the disk what they wrote.
        flusher = stack.enter_context(Flusher(sink.flush))
        # Those that drive an analysis wait for the workers, and so end after them.
        drivers = stack.enter_context(worker_pool(plan.at_a_time))
        workers = stack.enter_context(worker_pool(plan.workers))
        notes = [from_note(sink.finished(task)) for task in plan.tasks]
        sources = [
            [] if note else _sources(task, rows=sink.reads_rows)
            for task, note in zip(plan.tasks, notes, strict=True)
        ]
        apart = stack.enter_context(TensorReader(max_files=PREFETCHED_FILES))
        prefetcher = stack.enter_context(Prefetcher(apart, sources, ahead=READ_AHEAD))
        engine = _Engine(plan, sink, flusher, Tools(reader, workers), result, drivers, notes)
        stack.callback(engine.analyst.close)
        begun: deque[_Begun] = deque()
        goes_on = sink.ahead or sink.stores_decisions or plan.at_a_time > 1
        for index, (task, note) in enumerate(zip(plan.tasks, notes, strict=True)):
            prefetcher.begin(index)
            begun.append(engine.begin(index, task, note))
            last = index == len(plan.tasks) - 1
            while begun and (last or not sink.ahead or not _may_wait(begun)):
                event = engine.finish(begun[0])
                prefetcher.done(begun.popleft().index)
                with nullcontext() if goes_on else before.in_force():
                    yield event
        result.non_finite = sorted(engine.tools.non_finite)
        if on_cuda:
            result.peak_vram = torch.cuda.max_memory_reserved(plan.device)
            result.peak_vram_used = torch.cuda.max_memory_allocated(plan.device)
        result.pinned = engine.analyst.pinned


@dataclass(frozen=True, slots=True)
class _Begun:
    """A task that is given to the sink, and what waits until each of its parts is stored."""

    index: int
    task: CopyTask | WeightTask
    reader: TensorReader
    parts: tuple[Callable[[], WeightResult | None], ...] = ()
    reused: Note | None = None
    """Of a task that an interrupted run finished."""


def _may_wait(begun: Sequence[_Begun]) -> bool:
    """Whether all that is begun may go on by itself: few tasks, and one weight's factors."""
    weights = sum(isinstance(each.task, WeightTask) for each in begun)
    return len(begun) < MOST_BEGUN and weights < 2


@dataclass(frozen=True, slots=True)
class _Settings:
    """The settings of torch that the engine changes while it computes."""

    threads: int
    precision: Precision

    @classmethod
    def now(cls) -> _Settings:
        return cls(torch.get_num_threads(), Precision.now())

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """These settings inside the block; those before it afterwards."""
        others = _Settings.now()
        self._set()
        try:
            yield
        finally:
            others._set()

    def _set(self) -> None:
        torch.set_num_threads(self.threads)
        self.precision.set()


def _source_name(task: CopyTask | WeightTask) -> str:
    return task.source.name if isinstance(task, CopyTask) else task.tensor.name


def _sources(task: CopyTask | WeightTask, *, rows: bool) -> list[TensorSpec]:
    return list(task.stored if isinstance(task, CopyTask) else task.read(rows=rows))


class _Engine:
    def __init__(
        self,
        plan: Plan,
        sink: Sink,
        flusher: Flusher,
        tools: Tools,
        result: RunResult,
        drivers: Workers,
        notes: Sequence[Note | None],
    ) -> None:
        self._plan = plan
        self._sink = sink
        self._flusher = flusher
        self.tools = tools
        self._result = result
        self.analyst = Analyst(plan, tools.workers)
        self._own = [replace(tools, reader=tools.reader.counting()) for _ in plan.tasks]
        parts = [
            Part(task, number, own)
            for task, own, note in zip(plan.tasks, self._own, notes, strict=True)
            if note is None and isinstance(task, WeightTask)
            for number in range(len(task.weight.slices))
        ]
        eager = plan.eager and (sink.ahead or sink.stores_decisions)
        self._analyses = Ahead(plan, self.analyst, drivers, parts, eager=eager)
        self._done_early = eager and sink.stores_decisions
        self._settled = 0

    def begin(self, index: int, task: CopyTask | WeightTask, note: Note | None) -> _Begun:
        """Copy, or analyse and decide; what is to be stored may still be on its way.

        A task with a `note` is finished already.
        """
        tools = self._own[index]
        if note is not None:
            return _Begun(index, task, tools.reader, reused=note)
        if isinstance(task, CopyTask):
            write = self._writer(task)
            copying = () if write is None else (begin_copy(task, write, tools),)
            return _Begun(index, task, tools.reader, copying)
        parts = tuple(self._parts(task, tools))
        self._release()
        return _Begun(index, task, tools.reader, parts)

    def _release(self) -> None:
        """Give free memory back where it has grown: pages that come back cost the system time."""
        if usage().anonymous > self._settled + RELEASE_ABOVE:
            release_free_memory()
            self._settled = usage().anonymous

    def _parts(self, task: WeightTask, tools: Tools) -> Iterator[Callable[[], WeightResult]]:
        """The logical weights one after another; the factors of one may wait to be stored."""
        waiting: Callable[[], WeightResult] | None = None
        for part in range(len(task.weight.slices)):
            begun = self._merge(task, part, tools)
            if waiting is not None:
                yield partial(_same, waiting())
            waiting = begun
        if waiting is not None:
            yield waiting

    def finish(self, begun: _Begun) -> Event:
        """Wait until all of a task is stored, and note what happened."""
        with self._result.timed("copy" if isinstance(begun.task, CopyTask) else "write"):
            weights = [weight for part in begun.parts if (weight := part()) is not None]
        note = begun.reused
        if note is None:
            non_finite = _source_name(begun.task) in self.tools.non_finite
            note = Note(weights, begun.reader.bytes_read, non_finite)
            self._sink.finish(begun.task, to_note(note))
            # Its line in the journal is to be written, even if it has no bytes.
            self._flusher.wrote(1)
        elif note.non_finite:
            self.tools.non_finite.add(_source_name(begun.task))
        self._result.weights.extend(note.weights)
        self._result.bytes_read += note.bytes_read
        return Event(
            name=begun.task.tensor.name,
            nbytes=begun.task.tensor.nbytes,
            merged=any(weight.merged for weight in note.weights),
            reused=begun.reused is not None,
            warnings=_warnings(note.weights),
        )

    def _merge(self, task: WeightTask, part: int, tools: Tools) -> Callable[[], WeightResult]:
        """Decide about a part, and give what waits until that is stored."""
        weight = task.weight.slices[part]
        with self._result.timed("analyze"):
            found = self._analyses.next()
        decision = _explained(found.decision, weight)
        if self._done_early:
            self._analyses.done()
        with self._result.timed("write"):
            stored = self._store(task, replace(found, decision=decision), tools)
        norms = [*decision.squared_norms] or found.vectors.squared_norms()
        passes, fallback = found.passes, found.fallback
        tools.reader.count(decision.recalled)
        # What was gathered is stored; the next weight needs its memory.
        decision = replace(decision, evidence=None)
        del found
        if not self._done_early:
            self._analyses.done()
        return lambda: WeightResult(
            name=task.tensor.name,
            canonical=weight.canonical,
            experts=_with_norms(decision, norms),
            merged=decision.update is not None,
            squared_norms=tuple(norms),
            stored=stored(),
            passes=passes,
            fallback=fallback,
        )

    def _store(self, task: WeightTask, found: Found, tools: Tools) -> Callable[[], Stored]:
        """Begin to store a weight; what is returned waits for the end."""
        write, vectors, decision = self._writer(task), found.vectors, found.decision
        reader, workers = tools.reader, tools.workers
        if write is None:
            kept = self._sink.keep(
                task,
                vectors.weight,
                decision,
                lambda source, rows: source.read(rows, reader, workers.buffer, "base"),
            )
            return lambda: kept
        recipe = self._plan.recipe
        output = OutputRows(torch_dtype(task.tensor.dtype), recipe.rounding, recipe.seed, write)
        return write_rows(vectors, decision, output, reader=reader, workers=workers)

    def _writer(self, task: CopyTask | WeightTask) -> WriteBytes | None:
        """The sink's writer; what goes through it is counted, to be sent to the disk in time."""
        write = self._sink.writer(task)
        if write is None:
            return None

        def counted(offset: int, data: memoryview, spans: Spans | None = None) -> None:
            write(offset, data, spans)
            self._flusher.wrote(data.nbytes)

        return counted


def _same(result: WeightResult) -> WeightResult:
    return result


def _warnings(weights: Sequence[WeightResult]) -> tuple[str, ...]:
    return tuple(
        f"{weight.canonical}: the device ran out of memory; analysed on {weight.fallback.place}"
        for weight in weights
        if weight.fallback is not None
    )


def _explained(decision: Decision, weight: LogicalWeight) -> Decision:
    """The decision with the reason of every expert that is known to change nothing."""
    records = tuple(
        replace(record, selected=False, reason=source.zero_because)
        if source.zero_because
        else record
        for record, source in zip(decision.experts, weight.experts, strict=True)
    )
    return replace(decision, experts=records)


def _with_norms(decision: Decision, squared_norms: list[float]) -> tuple[ExpertRecord, ...]:
    """The records, with the norms that the update knows from those of the task vectors."""
    norms = () if decision.update is None else decision.update.norms(squared_norms)
    if not norms:
        return decision.experts
    pairs = zip(decision.experts, norms, strict=True)
    return tuple(replace(record, update_norm=norm) for record, norm in pairs)
