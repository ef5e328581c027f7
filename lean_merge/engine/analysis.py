"""From task vectors to decisions: on the plan's device, or the CPU if that runs out of memory."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lean_merge.checkpoints import common_dtype
from lean_merge.engine.device import Accelerator, computing_on, is_out_of_memory, queues_of
from lean_merge.engine.taskvectors import TaskVectors
from lean_merge.engine.workers import Tools, Workers
from lean_merge.mapping import LogicalWeight
from lean_merge.methods import Decision, ExpertRecord, Method, WeightContext
from lean_merge.plan import Plan
from lean_merge.plan.resources import arithmetic_dtype
from lean_merge.tasks import Fallback, looks, needs_analysis
from lean_merge.tasks.tiles import tile_rows

LONGEST_REASON = 160
"""Characters of a device's message that are kept."""


@dataclass(frozen=True, slots=True)
class Found:
    """A weight's decision, and how many passes over its rows that took.

    The factors are on the CPU, where `vectors` form their tiles from now on.
    """

    vectors: TaskVectors
    decision: Decision
    passes: int = 0
    fallback: Fallback | None = None


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a weight is analysed, how many tiles stay there, and in words."""

    accelerator: Accelerator | None
    resident: int
    arena: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    name: str = "cpu"


class Analyst:
    """Decides what becomes of logical weights, one after another.

    A weight for which the device has too little memory is analysed there with no tile resident,
    and if that is still too much, on the CPU with none. Which tiles are resident changes no number;
    the CPU's sums are in another order than the device's, and may be of another dtype.
    """

    def __init__(self, plan: Plan, workers: Workers) -> None:
        self._plan = plan
        self._workers = workers
        self._accelerator = _accelerator(plan, workers)
        self._fallen: dict[tuple[tuple[int, int], int], tuple[int, str]] = {}

    @property
    def pinned(self) -> int:
        """Bytes of host memory that are pinned for copies to the device."""
        return 0 if self._accelerator is None else self._accelerator.pinned

    def close(self) -> None:
        """Wait until nothing is on its way to the device."""
        if self._accelerator is not None:
            self._accelerator.close()

    def decide(
        self,
        method: Method[Any],
        weight: LogicalWeight,
        *,
        resident: int,
        arena: Tensor,
        tools: Tools,
    ) -> Found:
        """Analyse one weight, with so many tiles `resident` if there is memory for them.

        On the CPU that is `arena`.
        """
        if self._accelerator is None:
            return self._attempt(method, weight, _Place(None, resident, arena), tools)
        if not looks(method, weight):
            return self._attempt(method, weight, _Place(None, 0), tools)
        places = _places(self._accelerator, resident)
        # What failed for one weight would fail for its equals: they begin where that one ended.
        first, reason = self._fallen.get((weight.shape, resident), (0, ""))
        for number, place in enumerate(places[first:], first):
            try:
                found = self._attempt(method, weight, place, tools)
            except RuntimeError as error:
                if place.accelerator is None or not is_out_of_memory(error):
                    raise
                reason = _shortened(str(error))
            else:
                if number == 0:
                    return found
                self._fallen[weight.shape, resident] = number, reason
                return replace(found, fallback=Fallback(place.name, reason))
            # Only here are the error, and the frames that it came through, gone.
            self._accelerator.release()
        raise AssertionError("the last place is the CPU, which returns or raises")

    def left_alone(self, weight: LogicalWeight, reason: str, tools: Tools) -> Found:
        """No update, for a part of a tensor that a filter takes."""
        record = ExpertRecord(selected=False, reason=reason)
        decision = Decision((record,) * len(weight.experts))
        return Found(self._vectors(weight, _Place(None, 0), tools), decision)

    def _attempt(
        self, method: Method[Any], weight: LogicalWeight, place: _Place, tools: Tools
    ) -> Found:
        device = torch.device("cpu") if place.accelerator is None else place.accelerator.device
        with computing_on(device):
            vectors = self._vectors(weight, place, tools)
            if _passes(method, weight) and not needs_analysis(weight):
                record = ExpertRecord(False, "", rank=0, update_norm=0.0)
                return Found(vectors, Decision((record,) * len(weight.experts)))
            context = WeightContext(
                name=weight.canonical,
                shape=vectors.shape,
                seed=self._plan.recipe.seed,
                dtype=vectors.dtype,
                device=device,
                squared_norms=vectors.squared_norms,
                parallel=self._workers.map,
            )
            decision, passes = _analyze(method, vectors, context)
            if decision.update is not None:
                decision = replace(decision, update=decision.update.on_cpu())
            vectors.leave_device()
        return Found(vectors, decision, passes)

    def _vectors(self, weight: LogicalWeight, place: _Place, tools: Tools) -> TaskVectors:
        task = common_dtype(source.dtype for source in weight.roles)
        device = "cpu" if place.accelerator is None else self._plan.device
        lent = None
        if place.accelerator is not None:
            lent = place.accelerator.lend(tile_bytes(weight), place.resident)
        return TaskVectors(
            weight,
            reader=tools.reader,
            workers=tools.workers,
            arena=place.arena if lent is None else lent.resident,
            resident=place.resident,
            dtype=arithmetic_dtype(task, device),
            uploader=None if lent is None else lent.uploader,
            landing=() if lent is None else lent.landing,
        )


def _accelerator(plan: Plan, workers: Workers) -> Accelerator | None:
    """The plan's device; None if that is the CPU, to which nothing needs to be brought."""
    device = torch.device(plan.device)
    queues = queues_of(device)
    if queues is None:
        return None
    weights = [weight for task in plan.weights for weight in task.weight.slices]
    return Accelerator(
        device,
        queues,
        workers,
        largest_tile=max(map(tile_bytes, weights), default=0),
        peak=plan.prediction.peak_vram,
        limit=plan.vram,
    )


def _passes(method: Method[Any], weight: LogicalWeight) -> int:
    return method.cost(weight.shape, item=4).passes


def _places(accelerator: Accelerator, resident: int) -> list[_Place]:
    """From what the plan wants to what always works; not twice the same."""
    device = str(accelerator.device)
    places = [_Place(accelerator, resident, name=device)] if resident else []
    streamed = _Place(accelerator, 0, name=f"{device}, no tile resident")
    return [*places, streamed, _Place(None, 0)]


def _analyze(
    method: Method[Any], vectors: TaskVectors, context: WeightContext
) -> tuple[Decision, int]:
    """The method's decision, and how often it asked for a pass over the rows."""
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


def tile_bytes(weight: LogicalWeight) -> int:
    """Bytes of the largest tile of all task vectors of a weight."""
    out_features, in_features = weight.shape
    item = common_dtype(source.dtype for source in weight.roles).itemsize
    height = min(out_features, tile_rows(in_features))
    return height * in_features * item * len(weight.others)


def _shortened(message: str) -> str:
    first = message.strip().splitlines()[0] if message.strip() else "out of memory"
    return first if len(first) <= LONGEST_REASON else first[:LONGEST_REASON].rstrip() + "..."
