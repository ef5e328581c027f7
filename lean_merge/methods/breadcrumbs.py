"""Model Breadcrumbs: drop the outliers and the small entries of task vectors (arXiv:2312.06795)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lean_merge.methods.base import per_expert
from lean_merge.methods.magnitude import BandMethod
from lean_merge.methods.ranges import check_range
from lean_merge.methods.registry import register
from lean_merge.methods.sparse import SparseParameters


@dataclass(frozen=True, slots=True)
class BreadcrumbsTiesParameters(SparseParameters):
    """Parameters of Model Breadcrumbs.

    density : share of the task vector's entries that is kept, of each expert by itself.
    mllm_density : the same for the MLLM's task vector; at 0 it is the first expert's.
    gamma : share of the entries that is dropped as too large, of each expert by itself. The MLLM's
        is the first expert's.
    weight : weight of the expert's task vector, of each expert by itself.
    mllm_weight : weight of the MLLM's task vector.
    normalize : divide by the sum of the weights.
    scale : factor of the merged task vector.
    """

    gamma: float = per_expert(0.01)

    def __post_init__(self) -> None:
        SparseParameters.__post_init__(self)
        check_range("gamma", self.gamma, 0, 1)


@dataclass(frozen=True, slots=True)
class BreadcrumbsParameters(BreadcrumbsTiesParameters):
    __doc__ = BreadcrumbsTiesParameters.__doc__

    normalize: bool = False
    least_weight: ClassVar[float] = -100


@register
class Breadcrumbs(BandMethod[BreadcrumbsTiesParameters]):
    """W = W_0 + scale * the sum of the task vectors without their largest and smallest entries.

    Of the n entries of each task vector the round(gamma n) largest are dropped, the next
    round(density n) are kept, and the rest is dropped. If these are more than there are, fewer
    large ones are dropped.
    """

    name: ClassVar[str] = "breadcrumbs"
    reference: ClassVar[str] = "arXiv:2312.06795"
    evidence: ClassVar[str] = "published and here"
    parameters_type: ClassVar[type[BreadcrumbsTiesParameters]] = BreadcrumbsParameters
    elects: ClassVar[bool] = False

    def ranks(self, role: int, count: int) -> tuple[int, int]:
        """Return the ranks of the smallest and the largest entry that is kept of `count`."""
        gamma = self.parameters[max(0, role - 1)].gamma
        kept = round(self.densities[role] * count)
        dropped = min(round(gamma * count), count - kept)
        return (dropped + kept, dropped + 1) if kept else (0, 0)
