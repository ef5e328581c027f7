"""Carry out a plan from the first tensor to the last, with an event for each."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field

import torch

from lean_merge.checkpoints.identity import check_unchanged
from lean_merge.engine.crew import CREW
from lean_merge.engine.scheduler import Scheduler
from lean_merge.engine.survey import survey
from lean_merge.errors import BudgetError
from lean_merge.linalg.settings import Computing
from lean_merge.outputs.base import Sink
from lean_merge.plan import Plan
from lean_merge.tasks import CopyTask, Note, WeightResult, from_note


@dataclass(frozen=True, slots=True)
class Event:
    """The news that the output tensor `name` of `nbytes` bytes is written.

    `merged` tells that it got an update, and `reused` that an interrupted run wrote it. `warnings`
    are sentences for people. `output` is the kind that is made; before a merge it may be analysis.
    """

    name: str
    nbytes: int
    merged: bool
    reused: bool = False
    warnings: tuple[str, ...] = ()
    output: str = "checkpoint"


@dataclass
class RunResult:
    """The results of a run for all tensors.

    Attributes
    ----------
    weights
        The result for each logical weight, in the order of the output.
    non_finite
        Names of the MLLM's tensors out of scope that hold NaN or Inf.
    seconds
        The time that the calling thread spent on "analyze", "write" and "copy".
    bytes_read
        Bytes of tensors that were read.
    peak_vram, peak_vram_used
        The most bytes of device memory that torch allocated, and the most that were in use.
    pinned
        Bytes of host memory that were pinned for copies to a device.
    """

    weights: list[WeightResult] = field(default_factory=list)
    non_finite: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    bytes_read: int = 0
    peak_vram: int = 0
    peak_vram_used: int = 0
    pinned: int = 0

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the time of the block to `seconds` of a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            self.seconds[phase] = self.seconds.get(phase, 0.0) + elapsed

    def add(self, note: Note, source: str) -> None:
        """Add the results for a tensor, which was `source` in the MLLM."""
        self.weights.extend(note.weights)
        self.bytes_read += note.bytes_read
        if note.non_finite:
            self.non_finite = sorted({*self.non_finite, source})


def run(plan: Plan, sink: Sink, on_event: Callable[[Event], None]) -> RunResult:
    """Carry out every task of `plan` and give the results to `sink`, with the crew if any."""
    result = RunResult()
    if (crew := CREW.get()) is not None:
        shared: RunResult = crew.run(plan, sink, on_event)
        return shared
    with closing(steps(plan, sink, result)) as events:
        for event in events:
            on_event(event)
    return result


def steps(plan: Plan, sink: Sink, result: RunResult) -> Generator[Event, None, None]:
    """Carry out `plan`: an event after each task, in order, and what happened noted in `result`.

    Torch's settings are the caller's while it holds an event; those of the process are only as long
    as no merge is at work. An input that is not what it was when it was planned is a
    CheckpointError, at the latest in the end.
    """
    check_unchanged(plan.opened)
    try:
        yield from _steps(plan, sink, result)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "DefaultCPUAllocator" not in str(error):
            raise
        raise BudgetError(
            "The system has not as much memory as was planned with; give less with --memory, or "
            "close what else takes it."
        ) from error
    check_unchanged(plan.opened)


def _steps(plan: Plan, sink: Sink, result: RunResult) -> Generator[Event, None, None]:
    on_cuda = torch.device(plan.device).type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(plan.device)
    known = {index: from_note(sink.finished(task)) for index, task in enumerate(plan.tasks)}
    reused = {index: note for index, note in known.items() if note is not None}
    with Computing() as computing:
        with result.timed("analyze"):
            surveyed, result.bytes_read = survey(plan, reused)
        scheduler = Scheduler(plan, sink, reused=reused, surveyed=surveyed, timed=result.timed)
        with scheduler:
            for index, note in scheduler.finished():
                event = _finished(plan, index, note, result, reused=index in reused)
                with computing.paused(idle=not scheduler.is_at_work):
                    yield event
            if on_cuda:
                result.peak_vram = torch.cuda.max_memory_reserved(plan.device)
                result.peak_vram_used = torch.cuda.max_memory_allocated(plan.device)
            result.pinned = scheduler.pinned


def _finished(plan: Plan, index: int, note: Note, result: RunResult, *, reused: bool) -> Event:
    """Add what happened to a task to the result, and return its event."""
    task = plan.tasks[index]
    result.add(note, task.source.name if isinstance(task, CopyTask) else task.tensor.name)
    return Event(
        name=task.tensor.name,
        nbytes=task.tensor.nbytes,
        merged=any(weight.merged for weight in note.weights),
        reused=reused,
        warnings=_warnings(note.weights),
        output=plan.output.name,
    )


def _warnings(weights: Sequence[WeightResult]) -> tuple[str, ...]:
    return tuple(
        f"{weight.canonical}: the device ran out of memory; analysed on {weight.fallback.place}"
        for weight in weights
        if weight.fallback is not None
    )
