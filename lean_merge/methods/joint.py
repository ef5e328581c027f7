"""Base class of methods that merge the task vectors of all models alike, the MLLM's among them.

Such a method makes one task vector of all, and W = W_0 + scale * merged. The update of the MLLM is
therefore scale * merged - dV.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from lean_merge.linalg.decomposition import product64
from lean_merge.methods.base import AnalysisCost, WeightContext, per_expert
from lean_merge.methods.combination import LinearRule, averaged
from lean_merge.methods.joined import Joined
from lean_merge.methods.leading import factor_dtype
from lean_merge.methods.ranges import check_range
from lean_merge.methods.updates import Combined, Dense, LowRank
from lean_merge.methods.weighed import WeighedMethod

_STRIPS = 1 << 21
"""So many numbers of a product are computed in one job of a worker."""
_JOBS = 4
"""So many jobs run at a time at most."""


@dataclass(frozen=True, slots=True)
class JointParameters:
    """The parameters that all methods of this kind have.

    scale : factor of the merged task vector.
    weight : factor of the expert's task vector before all are merged, of each expert by itself.
    mllm_weight : the same factor of the MLLM's task vector.
    """

    scale: float = 1.0
    weight: float = per_expert(1.0)
    mllm_weight: float = 1.0

    def __post_init__(self) -> None:
        check_range("scale", self.scale, -100, 100)
        for name in ("weight", "mllm_weight"):
            check_range(name, getattr(self, name), 0, 100)


P = TypeVar("P", bound=JointParameters)


class JointMethod(WeighedMethod[P], abc.ABC):
    """A method that replaces the MLLM's task vector by one that it makes of all of them."""

    changes_by_itself: ClassVar[bool] = True

    def beside_matrices(self) -> LinearRule:
        """Return the rule that takes the mean of all task vectors."""
        return averaged(self, self.weights)

    def reads_task_vectors(self) -> tuple[bool, ...]:
        """Tell that an update takes away the MLLM's task vector, and reads no other."""
        return True, *(False for _ in self.parameters)

    def in_place_of_mllm(self, merged: LowRank | Dense) -> Joined:
        """Return the update that puts `merged`, which includes the scale, in place of dV."""
        return Joined(Combined((-1.0, *(0.0 for _ in self.parameters))), merged)


def product_bytes(shape: tuple[int, int], rank: int) -> int:
    """Return the bytes of a product of `rank` as `multiplied` stores it."""
    out_features, in_features = shape
    return min(sum(shape) * rank, out_features * in_features) * 4


def multiplied(weight: WeightContext, left: Tensor, right: Tensor) -> LowRank | Dense:
    """Return left [out, m] @ right [m, in] as factors, or as a matrix where that is smaller."""
    out_features, in_features = weight.shape
    if left.shape[1] * (out_features + in_features) < out_features * in_features:
        return LowRank(left.float().contiguous(), right.float().contiguous())
    return Dense(by_strips(weight, left, right))


def by_strips(
    weight: WeightContext, left: Tensor, right: Tensor, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return left [n, m] @ right [m, k] in `dtype`; workers compute some rows each.

    The product is computed in the dtype of `right`.
    """
    height = _job_rows(right.shape[1])
    out = torch.empty(left.shape[0], right.shape[1], dtype=dtype, device=right.device)

    def fill(start: int) -> None:
        rows = slice(start, start + height)
        out[rows] = product64(left[rows], right, dtype=dtype)

    weight.parallel(fill, range(0, left.shape[0], height))
    return out


def _job_rows(columns: int) -> int:
    return max(64, _STRIPS // max(1, columns) // 64 * 64)


def job_bytes(rows: int, inner: int, columns: int) -> int:
    """Return the bytes that `by_strips` takes for [rows, inner] times [inner, columns] at most.

    They are, for each job, a strip of the first matrix and one of the product, in float64.
    """
    return _JOBS * min(rows, _job_rows(columns)) * (inner + columns) * 8


def side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """Return the parts joined along their last dimension."""
    return torch.cat([*parts], dim=-1)


def with_core(cost: AnalysisCost, shape: tuple[int, int], columns: int) -> AnalysisCost:
    """Add what it costs to join factors of `columns` columns by a matrix, and to multiply them."""
    item = factor_dtype(shape).itemsize
    factors = sum(shape) * columns * item
    small = 8 * columns**2 * 8
    out_features, in_features = shape
    strips = max(job_bytes(out_features, columns, n) for n in (columns, in_features))
    joined = 2 * factors + small + out_features * columns * item + product_bytes(shape, columns)
    return replace(
        cost,
        workspace=max(cost.workspace, joined + strips),
        scratch=1,
        operations=cost.operations + (2 * 9.0 * columns**3 if columns > 1024 else 0.0),
    )
