"""The sink that keeps every update as factors of a LoRA adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lean_merge.budget import STRIP_ELEMENTS
from lean_merge.engine.sinks import Sink, Tools
from lean_merge.engine.taskvectors import TaskVectors
from lean_merge.engine.update import Truncated
from lean_merge.linalg import truncate
from lean_merge.methods import Decision
from lean_merge.output import AdapterModule, FactorStore, StoredFactors
from lean_merge.plan import Plan, row_runs
from lean_merge.tasks import CopyTask, WeightTask

ADAPTER_ERROR = 2e-4
"""Largest relative Frobenius error of an update that `--lora-rank auto` cuts off."""


class AdapterSink(Sink):
    """Factors of every update, cut to the rank that the recipe wants.

    Parameters
    ----------
    plan
        Of a merge whose updates are of low rank.
    store
        Where the factors wait.

    Attributes
    ----------
    modules
        Those with an update, in the order of the tasks.
    """

    def __init__(self, plan: Plan, store: FactorStore) -> None:
        self._plan = plan
        self._store = store
        self._parts: list[StoredFactors] = []
        wanted = plan.recipe.lora_rank
        self._rank = None if isinstance(wanted, str) else wanted
        self.modules: list[AdapterModule] = []

    def copy(self, task: CopyTask, tools: Tools) -> Callable[[], None]:
        """An adapter holds no tensor out of scope."""
        return lambda: None

    def update(
        self, task: WeightTask, vectors: TaskVectors, decision: Decision, tools: Tools
    ) -> Callable[[], Truncated | None]:
        """B [out, k] and A [k, in] to the store, with the error of the cut."""
        cut = self._store_factors(row_runs(vectors.weight), decision)
        return lambda: cut

    def _store_factors(
        self, runs: tuple[tuple[int, int], ...], decision: Decision
    ) -> Truncated | None:
        if decision.left is None or decision.right is None:
            self._parts.append(StoredFactors(runs))
            return None
        cut = truncate(decision.left, decision.right, error=ADAPTER_ERROR, rank=self._rank)
        if cut.rank == 0:
            self._parts.append(StoredFactors(runs))
            return Truncated(0, cut.error)
        b = self._append(decision.left, cut.of_left)
        a = self._append(cut.of_right, decision.right)
        self._parts.append(StoredFactors(runs, cut.rank, a, b))
        return Truncated(cut.rank, cut.error)

    def _append(self, left: Tensor, right: Tensor) -> int:
        """The product's rows, strip by strip; where they begin."""
        height = max(1, STRIP_ELEMENTS // max(right.shape))
        starts = [
            self._store.append(torch.mm(left[first : first + height], right))
            for first in range(0, left.shape[0], height)
        ]
        return starts[0]

    def finish(self, task: CopyTask | WeightTask, note: Any) -> None:
        """The parts of a fused weight become one module."""
        parts, self._parts = tuple(self._parts), []
        if isinstance(task, WeightTask) and any(part.rank for part in parts):
            self.modules.append(self._plan.adapter_module(task, parts))
