"""The sink that keeps every update as factors of a LoRA adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lean_merge.budget import STRIP_ELEMENTS
from lean_merge.checkpoints import LogicalWeight
from lean_merge.engine.sinks import BlockSink, Tools
from lean_merge.engine.taskvectors import TaskVectors
from lean_merge.engine.update import Truncated
from lean_merge.linalg import truncate
from lean_merge.methods import Decision
from lean_merge.output import AdapterModule, Group, OutputFolder, StoredFactors
from lean_merge.plan import Plan, row_runs
from lean_merge.tasks import WeightTask

ADAPTER_ERROR = 2e-4
"""Largest relative Frobenius error of an update that `--lora-rank auto` cuts off."""


class AdapterSink(BlockSink):
    """Factors of every update, cut to the rank that the recipe wants.

    Parameters
    ----------
    plan
        Of a merge whose updates are of low rank.
    folder
        Where the factors wait.
    """

    def __init__(self, plan: Plan, folder: OutputFolder) -> None:
        super().__init__(folder)
        self._plan = plan

    def update(
        self, task: WeightTask, vectors: TaskVectors, decision: Decision, tools: Tools
    ) -> Callable[[], Truncated | None]:
        """B [out, k] and A [k, in] become blocks; returns the error of the cut."""
        factors = cut_factors(self._plan, decision)
        if factors is None:
            return lambda: None
        cut, b, a = factors
        if cut.rank:
            name = vectors.weight.canonical
            out_features, in_features = vectors.weight.shape
            self.put(f"{name}.b", (out_features, cut.rank), b)
            self.put(f"{name}.a", (cut.rank, in_features), a)
        return lambda: cut

    def modules(self) -> list[AdapterModule]:
        """Those with an update, in the order of the tasks, all of which are finished."""
        groups = self._folder.blocks.groups
        return [
            self._plan.adapter_module(
                task, tuple(_stored(part, groups[task.tensor.name]) for part in task.weight.slices)
            )
            for task in self._plan.weights
            if groups[task.tensor.name].blocks
        ]


def _stored(weight: LogicalWeight, group: Group) -> StoredFactors:
    a, b = (group.blocks.get(f"{weight.canonical}.{factor}") for factor in "ab")
    return StoredFactors(row_runs(weight), 0 if a is None else a.shape[0], a, b)


def cut_factors(
    plan: Plan, decision: Decision
) -> tuple[Truncated, Iterator[Tensor], Iterator[Tensor]] | None:
    """The rank and error of an update's cut, and rows of B and of A, strip by strip.

    None without an update.
    """
    if decision.left is None or decision.right is None:
        return None
    wanted = plan.recipe.lora_rank
    rank = None if isinstance(wanted, str) else wanted
    cut = truncate(decision.left, decision.right, error=ADAPTER_ERROR, rank=rank)
    strips = _strips(decision.left, cut.of_left), _strips(cut.of_right, decision.right)
    return Truncated(cut.rank, cut.error), *strips


def _strips(left: Tensor, right: Tensor) -> Iterator[Tensor]:
    """The product's rows, a few at a time."""
    height = max(1, STRIP_ELEMENTS // max(1, *right.shape))
    for first in range(0, left.shape[0], height):
        yield torch.mm(left[first : first + height], right)
