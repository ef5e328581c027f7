"""Analyses in the order of the tasks, where memory has room each beside the one before it.

A pass gives all workers something to do, but between two passes small dense problems keep one or
two threads busy and the others wait. A second weight fills these gaps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lean_merge.engine.analysis import Analyst, Found, tile_bytes
from lean_merge.engine.workers import Batch, Tools, Workers
from lean_merge.mapping import LogicalWeight
from lean_merge.plan import Plan
from lean_merge.plan.budget import aligned
from lean_merge.tasks import WeightTask


@dataclass(frozen=True, slots=True)
class Part:
    """A logical weight of a task, the `number`-th, and with what it is read."""

    task: WeightTask
    number: int
    tools: Tools

    @property
    def weight(self) -> LogicalWeight:
        """Its tensors' rows."""
        return self.task.weight.slices[self.number]

    @property
    def beside(self) -> bool:
        """Whether it may be analysed beside another such."""
        return self.task.beside[self.number]


@dataclass(frozen=True, slots=True)
class _Running:
    part: Part
    start: int
    """Where in the arena the place of its tiles begins."""
    batch: Batch[Found]


class Ahead:
    """Gives the analyses of `parts` one after another; the next may be under way by then.

    Parameters
    ----------
    plan
        With what may stay resident, and which parts may be analysed beside another.
    analyst, drivers
        Who decides, and the threads in which that is done.
    parts
        All that will be asked for, in order.
    eager
        Whether an analysis is begun as soon as there is room for it, while what was decided before
        is stored; else only when one is asked for.
    """

    def __init__(
        self,
        plan: Plan,
        analyst: Analyst,
        drivers: Workers,
        parts: Sequence[Part],
        *,
        eager: bool,
    ) -> None:
        self._analyst = analyst
        self._drivers = drivers
        self._eager = eager
        self._coming = deque(parts)
        self._running: deque[_Running] = deque()
        # Memory of the CPU is reused for all weights: new pages cost more than the arithmetic.
        self._arena = torch.empty(plan.arena, dtype=torch.uint8)

    def next(self) -> Found:
        """The next part's analysis, waited for; its task vectors last until `done`."""
        self._begin_all()
        [found] = self._running[0].batch.results()
        return found

    def done(self) -> None:
        """Nothing more is read from the last part's task vectors."""
        self._running.popleft()
        if self._eager:
            self._begin_all()

    def _begin_all(self) -> None:
        """Begin the analyses for which there is room now."""
        while self._coming and (place := self._place(self._coming[0])) is not None:
            part, (start, stop) = self._coming.popleft(), place
            analyze = partial(self._analyze, arena=self._arena[start:stop])
            batch = self._drivers.start(analyze, [part])
            self._running.append(_Running(part, start, batch))

    def _place(self, part: Part) -> tuple[int, int] | None:
        """Where in the arena the tiles of `part` may stay; None while there is no room for it.

        Of two at a time one has the arena's start and the other its end.
        """
        size = aligned(part.task.resident[part.number] * tile_bytes(part.weight))
        if not self._running:
            return 0, size
        if len(self._running) > 1 or not (part.beside and self._running[0].part.beside):
            return None
        if self._running[0].start:
            return 0, size
        whole = self._arena.numel()
        return whole - size, whole

    def _analyze(self, part: Part, arena: Tensor) -> Found:
        task, number = part.task, part.number
        method = task.methods[number]
        if method is None:
            return self._analyst.left_alone(part.weight, task.filtered[number], part.tools)
        return self._analyst.decide(
            method, part.weight, resident=task.resident[number], arena=arena, tools=part.tools
        )
