"""Decide weights on the plan's device, or on the CPU if the device runs out of memory."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lean_merge.checkpoints import TensorReader
from lean_merge.engine.device import (
    Accelerator,
    accelerator_of,
    computing_on,
    is_out_of_memory,
)
from lean_merge.engine.taskvectors import TaskVectors
from lean_merge.engine.workers import Workers
from lean_merge.mapping import LogicalWeight
from lean_merge.methods import Decision, ExpertRecord, Method, WeightContext
from lean_merge.plan import Plan
from lean_merge.plan.resources import arithmetic_dtype
from lean_merge.tasks import (
    Fallback,
    Stored,
    WeightResult,
    WeightTask,
    looks,
    needs_analysis,
    task_dtype,
)
from lean_merge.tasks.tiles import tile_rows

LONGEST_REASON = 160
"""The most characters that are kept of a device's message."""


@dataclass(frozen=True, slots=True)
class Decided:
    """The decision on a weight, which took `passes` passes over its rows.

    The update is on the CPU, where `vectors` form their tiles from now on. `fallback` is None if
    the device had the memory that was planned.
    """

    vectors: TaskVectors
    decision: Decision
    passes: int = 0
    fallback: Fallback | None = None

    def without_evidence(self) -> Decided:
        """Return this without evidence, whose memory the next weight needs once it is stored."""
        return replace(self, decision=replace(self.decision, evidence=None))

    def result(self, name: str, stored: Stored) -> WeightResult:
        """Return the result for the weight, a part of tensor `name`, after it was `stored`."""
        decision = self.decision
        norms = [*decision.squared_norms] or self.vectors.squared_norms()
        return WeightResult(
            name=name,
            canonical=self.vectors.weight.canonical,
            experts=_with_norms(decision, norms),
            merged=decision.update is not None,
            squared_norms=tuple(norms),
            stored=stored,
            passes=self.passes,
            fallback=self.fallback,
        )


def _with_norms(decision: Decision, squared_norms: list[float]) -> tuple[ExpertRecord, ...]:
    """Return the experts' records, with update norms where task vectors' norms give them."""
    norms = () if decision.update is None else decision.update.norms(squared_norms)
    if not norms:
        return decision.experts
    pairs = zip(decision.experts, norms, strict=True)
    return tuple(replace(record, update_norm=norm) for record, norm in pairs)


@dataclass(frozen=True, slots=True)
class _Site:
    """A place where a weight is analysed, its name, and the number of tiles that stay there."""

    accelerator: Accelerator | None
    resident: int
    arena: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    name: str = "cpu"


class Decider:
    """The engine's part that brings logical weights to their decisions.

    A weight for which the device has too little memory is analysed there with no tile resident; if
    that is still too much, on the CPU, with none either. Which tiles are resident changes no
    number. The CPU's sums are in another order than the device's, and may be of another dtype.

    Parameters
    ----------
    plan
        The methods, the seed, and the device with its memory.
    workers
        The threads that compute passes.
    surveyed
        The results of the methods' surveys of all weights, by the surveys' keys.
    """

    def __init__(self, plan: Plan, workers: Workers, surveyed: Mapping[Hashable, Any]) -> None:
        self._plan = plan
        self._surveyed = surveyed
        self._workers = workers
        self._accelerator = _accelerator(plan, workers)
        self._fallen: dict[tuple[tuple[int, int], int], tuple[int, str]] = {}

    @property
    def pinned(self) -> int:
        """Return the bytes of host memory that are pinned for copies to the device."""
        return 0 if self._accelerator is None else self._accelerator.pinned

    def close(self) -> None:
        """Wait until nothing is on its way to the device."""
        if self._accelerator is not None:
            self._accelerator.close()

    def decide(self, task: WeightTask, number: int, reader: TensorReader, arena: Tensor) -> Decided:
        """Decide about the `number`-th logical weight of a task.

        Parameters
        ----------
        reader
            The reader of the rows.
        arena : Tensor, uint8, 1-D
            Memory on the CPU for the tiles that the plan lets stay there.
        """
        weight, resident = task.weight.slices[number], task.resident[number]
        method = task.methods[number]
        if method is None:
            record = ExpertRecord(selected=False, reason=task.filtered[number])
            vectors = self._vectors(None, weight, _Site(None, 0), reader)
            return Decided(vectors, _nothing(weight, record))
        if self._accelerator is None:
            return self._attempt(method, weight, _Site(None, resident, arena), reader)
        if not looks(method, weight):
            return self._attempt(method, weight, _Site(None, 0), reader)
        sites = _sites(self._accelerator, resident)
        # A site that failed for one weight would fail for its equals, so they skip it.
        first, reason = self._fallen.get((weight.shape, resident), (0, ""))
        for rank, site in enumerate(sites[first:], first):
            try:
                decided = self._attempt(method, weight, site, reader)
            except RuntimeError as error:
                if site.accelerator is None or not is_out_of_memory(error):
                    raise
                reason = _shortened(str(error))
            else:
                if rank == 0:
                    return decided
                self._fallen[weight.shape, resident] = rank, reason
                return replace(decided, fallback=Fallback(site.name, reason))
            # Only here have the error, and the frames that it holds, been released.
            self._accelerator.release()
        raise AssertionError("the last site is the CPU, which returns or raises")

    def _attempt(
        self, method: Method[Any], weight: LogicalWeight, site: _Site, reader: TensorReader
    ) -> Decided:
        device = torch.device("cpu") if site.accelerator is None else site.accelerator.device
        with computing_on(device):
            vectors = self._vectors(method, weight, site, reader)
            if method.cost(weight.shape, item=4).passes and not needs_analysis(method, weight):
                record = ExpertRecord(False, "", rank=0, update_norm=0.0)
                return Decided(vectors, _nothing(weight, record))
            survey = method.survey()
            context = WeightContext(
                name=weight.canonical,
                shape=vectors.shape,
                seed=self._plan.recipe.seed,
                dtype=vectors.dtype,
                device=device,
                squared_norms=vectors.squared_norms,
                parallel=self._workers.map,
                surveyed=None if survey is None else self._surveyed[survey.key],
                over_update=vectors.run_update,
            )
            decision, passes = _analyze(method, vectors, context)
            if decision.update is not None:
                decision = replace(decision, update=decision.update.on_cpu())
            vectors.leave_device()
        reader.count(decision.recalled)
        return Decided(vectors, _explained(decision, weight), passes + vectors.update_passes)

    def _vectors(
        self,
        method: Method[Any] | None,
        weight: LogicalWeight,
        site: _Site,
        reader: TensorReader,
    ) -> TaskVectors:
        task = task_dtype(method, weight)
        device = "cpu" if site.accelerator is None else self._plan.device
        lent = None
        if site.accelerator is not None:
            lent = site.accelerator.lend(tile_bytes(method, weight), site.resident)
        return TaskVectors(
            weight,
            reader=reader,
            workers=self._workers,
            arena=site.arena if lent is None else lent.resident,
            resident=site.resident,
            task_dtype=task,
            dtype=arithmetic_dtype(task, device),
            uploader=None if lent is None else lent.uploader,
            landing=() if lent is None else lent.landing,
            differences=method is None or method.differences,
        )


def _nothing(weight: LogicalWeight, record: ExpertRecord) -> Decision:
    """Return a decision without an update, with the same record for every expert."""
    return _explained(Decision((record,) * len(weight.experts)), weight)


def _explained(decision: Decision, weight: LogicalWeight) -> Decision:
    """Return the decision, with reasons for the experts that are known to change nothing."""
    records = tuple(
        replace(record, selected=False, reason=source.zero_because)
        if source.zero_because
        else record
        for record, source in zip(decision.experts, weight.experts, strict=True)
    )
    return replace(decision, experts=records)


def _accelerator(plan: Plan, workers: Workers) -> Accelerator | None:
    """Return the plan's device; None if that is the CPU."""
    tiles = [
        tile_bytes(method, weight)
        for task in plan.weights
        for weight, method in zip(task.weight.slices, task.methods, strict=True)
    ]
    return accelerator_of(
        torch.device(plan.device),
        workers,
        largest_tile=max(tiles, default=0),
        peak=plan.prediction.peak_vram,
        limit=plan.vram,
    )


def _sites(accelerator: Accelerator, resident: int) -> list[_Site]:
    """Return the sites to try, from the planned one to one that always works, each once."""
    device = str(accelerator.device)
    planned = [_Site(accelerator, resident, name=device)] if resident else []
    streamed = _Site(accelerator, 0, name=f"{device}, no tile resident")
    return [*planned, streamed, _Site(None, 0)]


def _analyze(
    method: Method[Any], vectors: TaskVectors, context: WeightContext
) -> tuple[Decision, int]:
    """Return the method's decision, and how often it asked for a pass over the rows."""
    analysis = method.analyze(context)
    passes = 0
    try:
        wanted = next(analysis)
        while True:
            passes += 1
            wanted = analysis.send(vectors.run(wanted))
    except StopIteration as end:
        decision: Decision = end.value
    return decision, passes


def tile_bytes(method: Method[Any] | None, weight: LogicalWeight) -> int:
    """Return the bytes of a weight's largest tile of all task vectors."""
    out_features, in_features = weight.shape
    item = task_dtype(method, weight).itemsize
    height = min(out_features, tile_rows(in_features))
    return height * in_features * item * len(weight.others)


def _shortened(message: str) -> str:
    first = message.strip().splitlines()[0] if message.strip() else "out of memory"
    return first if len(first) <= LONGEST_REASON else first[:LONGEST_REASON].rstrip() + "..."
