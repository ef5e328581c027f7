"""The sink that keeps every update as factors of a LoRA adapter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lean_merge.linalg import Truncation, truncate
from lean_merge.mapping import LogicalWeight
from lean_merge.methods import Decision
from lean_merge.outputs.base import ReadRows
from lean_merge.outputs.peft import AdapterModule, StoredFactors
from lean_merge.outputs.sinks import BlockSink
from lean_merge.plan import Plan
from lean_merge.store import Group, OutputFolder
from lean_merge.tasks import Truncated, WeightTask
from lean_merge.tasks.tiles import STRIP_ELEMENTS

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

    def keep(
        self, task: WeightTask, weight: LogicalWeight, decision: Decision, read: ReadRows
    ) -> Truncated | None:
        """Cut the update, and put B [out, k] and A [k, in] into blocks."""
        update = cut_update(self._plan, decision)
        if update is None:
            return None
        if update.rank:
            out_features, in_features = weight.shape
            self.put(f"{weight.canonical}.b", (out_features, update.rank), update.b())
            self.put(f"{weight.canonical}.a", (update.rank, in_features), update.a())
        return Truncated(update.rank, update.cut.error)

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
    return StoredFactors(weight.row_runs, 0 if a is None else a.shape[0], a, b)


@dataclass(frozen=True, slots=True)
class CutUpdate:
    """An update cut to rank k: b [out, k] @ a [k, in], which are formed a few rows at a time.

    Attributes
    ----------
    left, right : Tensor [out, r], [r, in]
        The update before.
    cut
        What it is cut to.
    """

    left: Tensor
    right: Tensor
    cut: Truncation

    @property
    def rank(self) -> int:
        """k."""
        return self.cut.rank

    def b(self) -> Iterator[Tensor]:
        """Its rows, in order."""
        return _strips(self.left, self.cut.of_left)

    def a(self) -> Iterator[Tensor]:
        """Its rows, in order."""
        return _strips(self.cut.of_right, self.right)


def cut_update(plan: Plan, decision: Decision) -> CutUpdate | None:
    """A decision's update, cut as the recipe wants; None if there is none."""
    factors = None if decision.update is None else decision.update.factors()
    if factors is None:
        return None
    wanted = plan.recipe.lora_rank
    rank = None if isinstance(wanted, str) else wanted
    cut = truncate(*factors, error=ADAPTER_ERROR, rank=rank)
    return CutUpdate(*factors, cut)


def _strips(left: Tensor, right: Tensor) -> Iterator[Tensor]:
    """The product's rows, a few at a time."""
    height = max(1, STRIP_ELEMENTS // max(1, *right.shape))
    for first in range(0, left.shape[0], height):
        yield torch.mm(left[first : first + height], right)
