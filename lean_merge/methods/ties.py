"""TIES-Merging: trim, elect signs, and average what agrees (arXiv:2306.01708)."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from lean_merge.errors import RecipeError, shown
from lean_merge.linalg import Pass, Products, counting_bytes, largest_magnitudes
from lean_merge.methods.base import AnalysisCost, Survey, WeightContext, per_expert
from lean_merge.methods.elementwise import Block, ElementwiseMethod
from lean_merge.methods.registry import register

TRIM_OVER = ("weight", "model")
Thresholds = tuple[tuple[float, ...], ...]
"""For each task vector, the smallest magnitude at which its entries are kept."""


@dataclass(frozen=True, slots=True)
class TiesParameters:
    """Parameters of TIES-Merging.

    density : share of each task vector's entries that is kept, the largest by magnitude.
    trim_over : keep that share in every `weight`, or in the whole `model`.
    weight : weight of the expert's task vector, of each expert by itself.
    mllm_weight : weight of the MLLM's task vector.
    scale : factor of the merged task vector.
    """

    density: float = 0.2
    trim_over: str = "weight"
    weight: float = per_expert(1.0)
    mllm_weight: float = 1.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise RecipeError(f"density must lie above 0 and up to 1, not {self.density}.")
        if self.trim_over not in TRIM_OVER:
            raise RecipeError(
                f"trim_over must be one of {', '.join(TRIM_OVER)}, not {shown(self.trim_over)}."
            )
        for name in ("weight", "mllm_weight"):
            if not 0 <= getattr(self, name) <= 100:
                raise RecipeError(f"{name} must lie in 0 .. 100, not {getattr(self, name)}.")
        if not -100 <= self.scale <= 100:
            raise RecipeError(f"scale must lie in -100 .. 100, not {self.scale}.")


@register
class Ties(ElementwiseMethod[TiesParameters]):
    """W = W_0 + scale * the mean, over the task vectors that agree in sign, of their large entries.

    The task vectors t_i are the MLLM's and the experts', with weights w_i. An entry of t_i is kept
    where its magnitude is at least the k-th largest, k = round(density n) of n entries; others
    count as 0. The sign of sum w_i t_i is elected for each entry, where 0 counts as positive. The
    merged entry is sum w_i t_i / sum w_i over the t_i of that sign.
    """

    name: ClassVar[str] = "ties"
    reference: ClassVar[str] = "arXiv:2306.01708"
    parameters_type = TiesParameters
    evidence: ClassVar[str] = "published and here"

    def statistics(
        self, weight: WeightContext
    ) -> Generator[Sequence[Pass | None], Sequence[Products | None], Thresholds]:
        """Return the magnitude thresholds of this weight, or those of the whole model."""
        if self.common.trim_over == "model":
            found: Thresholds = weight.surveyed
            return found
        return (yield from self._thresholds())

    def survey(self) -> Survey | None:
        """Ask for thresholds over all weights if the parameter `trim_over` is `model`."""
        if self.common.trim_over != "model":
            return None
        return Survey(("ties", self.common.density), 2, self._thresholds)

    def _thresholds(
        self,
    ) -> Generator[Sequence[Pass | None], Sequence[Products | None], Thresholds]:
        ranks = partial(_kept, self.common.density)
        return (yield from largest_magnitudes(ranks, torch.float32, count=self._models))

    @property
    def _models(self) -> int:
        return len(self.parameters) + 1

    def cost(self, shape: tuple[int, int], *, item: int) -> AnalysisCost:
        """Return the cost of counting magnitudes, which takes two passes over the rows.

        They belong to the survey if the thresholds are those of the whole model.
        """
        passes = 0 if self.common.trim_over == "model" else 2
        return AnalysisCost(
            counting_bytes(self._models, 1),
            passes=passes,
            usual_passes=passes,
            scratch=self.scratch,
        )

    @property
    def scratch(self) -> int:
        """Return how many blocks `fill` needs: one for each task vector, and three more.

        The three hold the elected signs, which entries agree with them, and the sum of weights.
        """
        return self._models + 3

    def fill(self, block: Block, out: Tensor) -> None:
        """Write the scaled merged task vector minus the MLLM's own task vector to `out`."""
        *weighed, signs, agrees, divisor = block.scratch
        weights = self.common.mllm_weight, *(own.weight for own in self.parameters)
        signs.zero_()
        parts = zip(weighed, block.task_vectors, weights, block.statistics, strict=True)
        for trimmed, task_vector, weight, (threshold,) in parts:
            torch.abs(task_vector, out=trimmed)
            torch.ge(trimmed, threshold, out=trimmed)
            signs.add_(trimmed.mul_(task_vector).mul_(weight))
        # The sign is +1 where the sum is not negative, and -1 elsewhere.
        torch.ge(signs, 0.0, out=signs).mul_(2.0).sub_(1.0)
        out.zero_()
        divisor.zero_()
        for trimmed, weight in zip(weighed, weights, strict=True):
            torch.mul(trimmed, signs, out=agrees)
            torch.gt(agrees, 0.0, out=agrees)
            out.addcmul_(trimmed, agrees)
            divisor.add_(agrees, alpha=weight)
        # Where no task vector agrees, divide by 1 instead of 0.
        divisor.add_(torch.eq(divisor, 0.0, out=agrees))
        out.div_(divisor).mul_(self.common.scale).sub_(block.task_vectors[0])


def _kept(density: float, count: int) -> tuple[int]:
    """Return how many of `count` entries are kept."""
    return (round(density * count),)
