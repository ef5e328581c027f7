"""Spherical interpolation between the MLLM and one expert, as mergekit has it."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from lean_merge.errors import RecipeError
from lean_merge.linalg import Pass, Products
from lean_merge.methods.base import AnalysisCost, WeightContext
from lean_merge.methods.interpolation import InterpolatingMethod, Shares
from lean_merge.methods.ranges import check_range
from lean_merge.methods.registry import register

PARALLEL = 0.9995
"""Above this cosine, or below its negative, the line takes the place of the great circle."""
TINY = 1e-8
"""A smaller norm counts as 1."""
INNER_PRODUCTS = 32 << 20
"""Bytes that the inner products of two matrices take on the way, in all threads."""


@dataclass(frozen=True, slots=True)
class SlerpParameters:
    """t : how far to go from the MLLM, at 0, to the expert, at 1."""

    t: float = 0.1

    def __post_init__(self) -> None:
        check_range("t", self.t, 0, 1)


@register
class Slerp(InterpolatingMethod[SlerpParameters]):
    """W lies at the share t of the great circle from W_mllm to W_expert, on every in-scope weight.

    With the angle theta between the two, W = (sin((1 - t) theta) W_mllm + sin(t theta) W_expert) /
    sin(theta). Where they are nearly parallel, which models of one base often are, this is linear
    interpolation.
    """

    name: ClassVar[str] = "slerp"
    reference: ClassVar[str] = "doi:10.1145/325334.325242"
    evidence: ClassVar[str] = "published and here"
    parameters_type = SlerpParameters

    def check(self) -> None:
        """Raise RecipeError if there are several experts."""
        if len(self.parameters) != 1:
            raise RecipeError(
                f"slerp goes from the MLLM to one expert, and there are {len(self.parameters)}; "
                "give one, or use linear."
            )

    def statistics(
        self, weight: WeightContext
    ) -> Generator[Sequence[Pass | None], Sequence[Products | None], Shares]:
        """Measure norms and angle of both weights, whole, and return the expert's share."""
        found = yield [Pass(inner=True)] * 2
        rows = [[] if each is None or each.inner is None else each.inner.tolist() for each in found]
        norms = [math.sqrt(rows[role][role]) for role in (0, 1)]
        first, second = (norm if norm > TINY else 1.0 for norm in norms)
        cosine = rows[0][1] / first / second
        t = self.common.t
        if abs(cosine) > PARALLEL:
            return (t,), 0.0
        angle = math.acos(cosine)
        kept, share = (math.sin(part * angle) / math.sin(angle) for part in (1 - t, t))
        return (share,), kept + share - 1.0

    def cost(self, shape: tuple[int, int], *, item: int) -> AnalysisCost:
        """Return the cost of one pass, for norms and inner product."""
        return AnalysisCost(INNER_PRODUCTS, passes=1, usual_passes=1, scratch=self.scratch)
