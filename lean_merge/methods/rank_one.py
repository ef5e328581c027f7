"""Rank-one transfer: add the leading singular directions of the experts' task vectors.

From the selective transfer of what reinforcement learning changed, 2026.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from lean_merge.errors import RecipeError, shown
from lean_merge.methods.accuracy import accuracy_warnings
from lean_merge.methods.base import (
    AnalysisCost,
    ExpertRecord,
    Method,
    Passes,
    WeightContext,
    per_expert,
)
from lean_merge.methods.combination import LinearRule, added
from lean_merge.methods.expertwise import add_parts
from lean_merge.methods.leading import (
    find_leading,
    for_experts,
    is_always_whole,
    leading_cost,
    of_experts,
)
from lean_merge.methods.ranges import check_range
from lean_merge.methods.registry import register


@dataclass(frozen=True, slots=True)
class RankOneParameters:
    """Parameters of rank-one transfer.

    scale : beta, factor of the update, of each expert by itself.
    rank : how many singular directions are added.
    stretch : stretch them to the Frobenius norm of the whole task vector.
    """

    scale: float = per_expert(0.05)
    rank: int = 1
    stretch: bool = True

    def __post_init__(self) -> None:
        check_range("scale", self.scale, -100, 100)
        if type(self.rank) is not int or self.rank < 1:
            raise RecipeError(f"rank must be a whole number from 1, not {shown(self.rank)}.")


@register
class RankOne(Method[RankOneParameters]):
    """W = W_mllm + sum_k scale_k ||dM_k||_F u_1 v_1^T, of the first singular direction of dM_k.

    With `rank` r it is sum_(i <= r) sigma_i u_i v_i^T, stretched to the norm of dM_k.
    """

    name: ClassVar[str] = "rank_one"
    reference: ClassVar[str] = "Selective transfer of RL updates, 2026"
    evidence: ClassVar[str] = "published and here"
    parameters_type = RankOneParameters

    def beside_matrices(self) -> LinearRule:
        """Return the rule that adds the experts' task vectors."""
        return added(self)

    def forms_exactly(self, shape: tuple[int, int]) -> bool:
        """Return whether the weight is so small that everything is computed."""
        return is_always_whole(shape)

    def cost(self, shape: tuple[int, int], *, item: int) -> AnalysisCost:
        """Return the cost of finding the leading directions of all experts."""
        experts = len(self.parameters)
        return leading_cost(shape, roles=experts, rank=self.common.rank, item=item)

    def largest_rank(self, shape: tuple[int, int]) -> int:
        """Return the given rank for each expert."""
        return len(self.parameters) * min(self.common.rank, *shape)

    def warnings(self, records: Sequence[ExpertRecord]) -> list[str]:
        """Warn of sketches that did not become accurate."""
        return accuracy_warnings(records)

    def analyze(self, weight: WeightContext) -> Passes:
        """Find each expert's leading directions, and add them."""
        roles = len(self.parameters)
        inner = find_leading(of_experts(weight), roles=roles, rank=self.common.rank)
        found = yield from for_experts(inner)
        squares = weight.squared_norms()[1:]
        factors = []
        for own, leading, square in zip(self.parameters, found, squares, strict=True):
            kept = float(leading.parts.sigma.square().sum())
            stretch = math.sqrt(square / kept) if own.stretch and kept else 1.0
            factors.append(own.scale * stretch)
        return add_parts(found, [one.parts.sigma.numel() for one in found], factors, squares)
