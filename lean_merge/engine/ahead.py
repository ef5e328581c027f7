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

from lean_merge.checkpoints import LogicalWeight
from lean_merge.engine.analysis import Analyst, Found, tile_bytes
from lean_merge.engine.sinks import Tools
from lean_merge.engine.workers import Batch, Workers
from lean_merge.plan import Plan
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
    arena: Tensor
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
    """

    def __init__(
        self, plan: Plan, analyst: Analyst, drivers: Workers, parts: Sequence[Part]
    ) -> None:
        self._analyst = analyst
        self._drivers = drivers
        self._coming = deque(parts)
        self._running: deque[_Running] = deque()
        # Memory of the CPU is reused for all weights: new pages cost more than the arithmetic.
        self._arenas = [torch.empty(size, dtype=torch.uint8) for size in sorted(plan.arenas)]

    def next(self) -> Found:
        """The next part's analysis, waited for; its task vectors last until `done`."""
        if not self._running:
            self._begin(self._coming.popleft())
        running = self._running[0]
        if self._coming and self._arenas and running.part.beside and self._coming[0].beside:
            self._begin(self._coming.popleft())
        [found] = running.batch.results()
        return found

    def done(self) -> None:
        """Nothing more is read from the last part's task vectors."""
        self._arenas.append(self._running.popleft().arena)
        self._arenas.sort(key=Tensor.numel)

    def _begin(self, part: Part) -> None:
        """Analyse `part` in the smallest arena that is free and large enough."""
        needed = part.task.resident[part.number] * tile_bytes(part.weight)
        fits = next(i for i, each in enumerate(self._arenas) if each.numel() >= needed)
        arena = self._arenas.pop(fits)
        batch = self._drivers.start(partial(self._analyze, arena=arena), [part])
        self._running.append(_Running(part, arena, batch))

    def _analyze(self, part: Part, arena: Tensor) -> Found:
        task, number = part.task, part.number
        method = task.methods[number]
        if method is None:
            return self._analyst.left_alone(part.weight, task.filtered[number], part.tools)
        return self._analyst.decide(
            method, part.weight, resident=task.resident[number], arena=arena, tools=part.tools
        )
