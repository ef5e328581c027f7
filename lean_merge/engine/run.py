"""The loop over the plan's tasks, in the order of the output."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

import torch

from lean_merge import budget
from lean_merge.checkpoints import (
    MappedWeight,
    RowSlice,
    TensorReader,
    TensorSpec,
    common_dtype,
    torch_dtype,
)
from lean_merge.engine.prefetch import Flusher, Prefetcher
from lean_merge.engine.taskvectors import Sources, TaskVectors
from lean_merge.engine.update import OutputRows, Written, copy_tensor, write_rows
from lean_merge.engine.workers import Workers, full_float32, worker_pool
from lean_merge.memory import release_free_memory
from lean_merge.methods import Decision, ExpertRecord, WeightContext
from lean_merge.output import OutputFolder
from lean_merge.plan import CopyTask, Plan, WeightTask, arithmetic_dtype

READ_AHEAD = 512 << 20


@dataclass(frozen=True, slots=True)
class Event:
    """Progress: output tensor `name` of `nbytes` is written; `merged` if an update went in."""

    name: str
    nbytes: int
    merged: bool


@dataclass(frozen=True, slots=True)
class WeightResult:
    """What happened to one logical weight; `squared_norms` are those of its task vectors."""

    name: str
    canonical: str
    experts: tuple[ExpertRecord, ...]
    merged: bool
    squared_norms: tuple[float, ...]
    written: Written
    passes: int


@dataclass
class RunResult:
    """What happened to all of them, and where the time went, in seconds."""

    weights: list[WeightResult] = field(default_factory=list)
    non_finite: list[str] = field(default_factory=list)
    """Tensors out of scope that hold NaN or Inf."""
    seconds: dict[str, float] = field(default_factory=dict)
    bytes_read: int = 0
    peak_vram: int = 0

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Adds the time of the block to `phase`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            self.seconds[phase] = self.seconds.get(phase, 0.0) + elapsed


def run(plan: Plan, folder: OutputFolder, on_event: Callable[[Event], None]) -> RunResult:
    """Carry out every task of `plan`, writing to `folder`, which stays unsealed."""
    result = RunResult()
    on_cuda = torch.device(plan.device).type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(plan.device)
    with ExitStack() as stack:
        stack.enter_context(full_float32())
        reader = stack.enter_context(TensorReader())
        workers = stack.enter_context(worker_pool(plan.workers))
        flusher = stack.enter_context(Flusher(folder))
        prefetcher = stack.enter_context(
            Prefetcher(reader, [_sources(task) for task in plan.tasks], ahead=READ_AHEAD)
        )
        engine = _Engine(plan, folder, reader, workers, flusher, result)
        for index, task in enumerate(plan.tasks):
            if isinstance(task, CopyTask):
                with result.timed("copy"):
                    engine.copy(task)
                merged = False
            else:
                merged = engine.merge(task)
                release_free_memory()
            prefetcher.used(index)
            on_event(Event(task.tensor.name, task.tensor.nbytes, merged))
        result.bytes_read = reader.bytes_read
        if on_cuda:
            result.peak_vram = torch.cuda.max_memory_reserved(plan.device)
    return result


def _sources(task: CopyTask | WeightTask) -> list[TensorSpec]:
    if isinstance(task, CopyTask):
        return [task.source]
    return [task.weight.base, task.weight.mllm, *task.weight.experts]


class _Engine:
    def __init__(
        self,
        plan: Plan,
        folder: OutputFolder,
        reader: TensorReader,
        workers: Workers,
        flusher: Flusher,
        result: RunResult,
    ) -> None:
        self._plan = plan
        self._folder = folder
        self._reader = reader
        self._workers = workers
        self._flusher = flusher
        self._result = result
        self._device = torch.device(plan.device)
        self._arena = torch.empty(_arena_bytes(plan), dtype=torch.uint8, device=self._device)
        self._buffer = torch.empty(budget.COPY_BUFFER, dtype=torch.uint8)

    def _writer(self, task: CopyTask | WeightTask) -> Callable[[int, memoryview], None]:
        shard = self._plan.shards[task.shard]
        start = shard.offsets[task.tensor.name]

        def write(offset: int, data: memoryview) -> None:
            self._folder.write_at(shard, start + offset, data)
            self._flusher.wrote(shard, data.nbytes)

        return write

    def copy(self, task: CopyTask) -> None:
        """A tensor out of scope."""
        if not copy_tensor(self._reader, task.source, self._writer(task), self._buffer):
            self._result.non_finite.append(task.source.name)

    def merge(self, task: WeightTask) -> bool:
        """A tensor in scope, one logical weight after another; True if any got an update."""
        merged = False
        for rows, resident in zip(task.weight.slices, task.resident, strict=True):
            result = self._merge_rows(task, rows, resident)
            self._result.weights.append(result)
            merged = merged or result.merged
        return merged

    def _merge_rows(self, task: WeightTask, rows: RowSlice, resident: int) -> WeightResult:
        weight = task.weight
        vectors = self._vectors(weight, rows, resident)
        context = WeightContext(
            name=rows.canonical,
            shape=vectors.shape,
            seed=self._plan.recipe.seed,
            dtype=vectors.dtype,
            device=self._device,
            squared_norms=vectors.squared_norms,
            parallel=self._workers.map,
        )
        with self._result.timed("analyze"):
            decision, passes = self._analyze(vectors, context)
        output = OutputRows(
            source=weight.mllm,
            dtype=torch_dtype(task.tensor.dtype),
            rounding=self._plan.recipe.rounding,
            seed=self._plan.recipe.seed,
            write=self._writer(task),
        )
        with self._result.timed("write"):
            written = write_rows(
                vectors, decision, output, reader=self._reader, workers=self._workers
            )
        norms = vectors.squared_norms()
        return WeightResult(
            name=weight.mllm.name,
            canonical=rows.canonical,
            experts=_with_norms(decision, norms),
            merged=decision.merges,
            squared_norms=tuple(norms),
            written=written,
            passes=passes,
        )

    def _vectors(self, weight: MappedWeight, rows: RowSlice, resident: int) -> TaskVectors:
        sources = Sources(rows=rows, base=weight.base, others=(weight.mllm, *weight.experts))
        stored = common_dtype(spec.dtype for spec in (sources.base, *sources.others))
        return TaskVectors(
            sources,
            reader=self._reader,
            workers=self._workers,
            arena=self._arena,
            resident=resident,
            dtype=arithmetic_dtype(stored, self._plan.device),
        )

    def _analyze(self, vectors: TaskVectors, context: WeightContext) -> tuple[Decision, int]:
        """Drive the method's analysis: each time it asks, one pass over the rows."""
        analysis = self._plan.method.analyze(context)
        passes = 0
        try:
            wanted = next(analysis)
            while True:
                passes += 1
                wanted = analysis.send(vectors.run(wanted))
        except StopIteration as end:
            decision: Decision = end.value
        return decision, passes


def _arena_bytes(plan: Plan) -> int:
    """The most that any logical weight keeps resident."""
    most = 0
    for task in plan.weights:
        specs = (task.weight.base, task.weight.mllm, *task.weight.experts)
        item = common_dtype(spec.dtype for spec in specs).itemsize
        for rows, resident in zip(task.weight.slices, task.resident, strict=True):
            in_features = task.weight.base.shape[1]
            height = min(rows.stop - rows.start, resident * budget.tile_rows(in_features))
            most = max(most, height * in_features * item * (len(specs) - 1))
    return most


def _with_norms(decision: Decision, squared_norms: list[float]) -> tuple[ExpertRecord, ...]:
    """The records, with the norms of updates that are multiples of a task vector filled in."""
    if not decision.coefficients:
        return decision.experts
    factors = zip(decision.experts, decision.coefficients[1:], squared_norms[1:], strict=True)
    return tuple(
        replace(record, update_norm=abs(coefficient) * math.sqrt(square) if coefficient else 0.0)
        for record, coefficient, square in factors
    )
