"""The seam for several processes that share one merge; a merge by one process has no crew."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Protocol, TypeVar

from lean_merge.linalg import Products
from lean_merge.plan import Plan
from lean_merge.plan.resources import Resources

T = TypeVar("T")


class Crew(Protocol):
    """The processes of a job, seen from one of them; docs/scale.md tells how they work.

    `leads` tells whether this process alone writes what is not tensors, and speaks to people.
    `at_work` is true inside of `together`, and `surveys` while any process has weights to decide.
    """

    leads: bool
    at_work: bool
    surveys: bool

    def together(self, plan: Plan, out: Path, work: Callable[[], T]) -> T:
        """Return what `work` returns in the process that leads, which shares what it runs."""

    def run(self, plan: Plan, sink: Any, on_event: Callable[[Any], None]) -> Any:
        """Carry out a plan as `engine.run` does, each process its share."""

    def spread(
        self,
        weights: Sequence[T],
        products: Callable[[Sequence[T]], Iterable[Sequence[Products | None]]],
    ) -> Iterable[Sequence[Products | None]]:
        """Have a survey's products of each weight computed, and yield them in order."""

    def own(self, resources: Resources) -> Resources:
        """Return this process's part of the machine, where nothing was asked for."""

    def gather(self, own: T) -> list[T]:
        """Return what every process gives, the one that leads first."""


CREW: ContextVar[Crew | None] = ContextVar("CREW", default=None)
