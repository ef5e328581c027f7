"""TIES-Merging: trim, elect signs, and average what agrees (arXiv:2306.01708)."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from lean_merge.linalg import Pass, Products
from lean_merge.methods.base import AnalysisCost, Survey, WeightContext
from lean_merge.methods.magnitude import BandMethod, Bands
from lean_merge.methods.ranges import check_word
from lean_merge.methods.registry import register
from lean_merge.methods.sparse import SparseParameters

TRIM_OVER = ("weight", "model")


@dataclass(frozen=True, slots=True)
class TiesParameters(SparseParameters):
    """Parameters of TIES-Merging.

    density : share of the task vector's entries that is kept, the largest by magnitude, of each
        expert by itself.
    mllm_density : the same for the MLLM's task vector; at 0 it is the first expert's.
    trim_over : keep that share in every `weight`, or in the whole `model`.
    weight : weight of the expert's task vector, of each expert by itself.
    mllm_weight : weight of the MLLM's task vector.
    normalize : True, the mean of the entries that agree; False, their sum.
    scale : factor of the merged task vector.
    """

    trim_over: str = "weight"

    def __post_init__(self) -> None:
        SparseParameters.__post_init__(self)
        check_word("trim_over", self.trim_over, TRIM_OVER)


@register
class Ties(BandMethod[TiesParameters]):
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
    elects: ClassVar[bool] = True
    keeping: ClassVar[int] = 0

    def ranks(self, role: int, count: int) -> tuple[int]:
        """Return how many of `count` entries are kept."""
        return (round(self.densities[role] * count),)

    def statistics(
        self, weight: WeightContext
    ) -> Generator[Sequence[Pass | None], Sequence[Products | None], Bands]:
        """Return the magnitudes kept in this weight, or those of the whole model."""
        if self.common.trim_over == "model":
            found: Bands = weight.surveyed
            return found
        return (yield from self.bands())

    def survey(self) -> Survey | None:
        """Ask for thresholds over all weights if the parameter `trim_over` is `model`."""
        if self.common.trim_over != "model":
            return None
        counted = tuple(map(bool, self.weights))
        return Survey(("ties", self.densities, counted), 2, self.bands)

    def cost(self, shape: tuple[int, int], *, item: int) -> AnalysisCost:
        """Return the cost of counting magnitudes.

        The passes belong to the survey if the thresholds are those of the whole model.
        """
        cost = super().cost(shape, item=item)
        if self.common.trim_over == "model":
            return dataclasses.replace(cost, passes=0, usual_passes=0)
        return cost
