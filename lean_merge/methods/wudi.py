"""WUDI: the task vector that interferes least with any model's (arXiv:2503.08099), in closed form.

The interference of t with t_i is ||(t - t_i) t_i^T||^2 / ||t_i||^2. Gradient descent on the sum
over all models, from t_0 and over a length T, ends at

    t = t_0 + G (1 - exp(-T C)) / C,   G = sum_i (t_i - t_0) S_i,   C = sum_i S_i,

where S_i = t_i^T t_i / ||t_i||^2. Eigenvectors of C give it, those of a smaller matrix where the
task vectors have fewer rows together than columns, or a Chebyshev series.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lean_merge.errors import RecipeError
from lean_merge.linalg import Pass, gram64, random_block
from lean_merge.linalg.gramfunctions import (
    apply_function,
    decay_integral,
    through_eigenvectors,
)
from lean_merge.methods.base import (
    AnalysisCost,
    Decision,
    ExpertRecord,
    Passes,
    WeightContext,
)
from lean_merge.methods.joint import JointMethod, JointParameters, by_strips, job_bytes
from lean_merge.methods.leading import factor_dtype, is_always_whole
from lean_merge.methods.ranges import check_range, check_word
from lean_merge.methods.registry import register
from lean_merge.methods.updates import Dense

STARTS = ("sum", "mean")
_COLUMNS = 512
"""So many columns of a Gram matrix are computed in one job of a worker."""
_PROBES = 32
"""Columns of the block that finds leading directions."""
_TOLERANCE = 1e-6
"""Relative error of the series and of the directions that it leaves out."""


@dataclass(frozen=True, slots=True)
class WudiParameters(JointParameters):
    """Parameters of WUDI.

    scale : factor of the merged task vector.
    weight : factor of the expert's task vector, of each expert by itself.
    mllm_weight : factor of the MLLM's task vector.
    steps : T, twice the learning rate times the number of iterations of the descent.
    keep : share of the eigenvalues of C, the largest, on whose span t moves from t_0.
    start : t_0, the `sum` or the `mean` of all task vectors.
    """

    steps: float = 300.0
    keep: float = 0.85
    start: str = "sum"

    def __post_init__(self) -> None:
        JointParameters.__post_init__(self)
        check_descent(self.steps, self.start)
        check_range("keep", self.keep, 0, 1)


def check_descent(steps: float, start: str) -> None:
    """Raise RecipeError unless `steps` and `start` describe a descent."""
    if not 0 <= steps <= 1e9:
        raise RecipeError(f"steps must lie in 0 .. 1e9, not {steps}.")
    check_word("start", start, STARTS)


@register
class Wudi(JointMethod[WudiParameters]):
    """W = W_0 + scale * t, where t interferes little with any model's task vector t_i.

    The interference is sum_i ||(t - t_i) t_i^T||^2 / ||t_i||^2. Gradient descent of length `steps`
    from t_0 ends at t, on the span of the leading eigenvectors of sum_i t_i^T t_i / ||t_i||^2;
    elsewhere t is t_0.
    """

    name: ClassVar[str] = "wudi"
    reference: ClassVar[str] = "arXiv:2503.08099"
    evidence: ClassVar[str] = "published and here"
    parameters_type = WudiParameters
    exact_differences: ClassVar[bool] = True

    def _stacks(self, shape: tuple[int, int]) -> bool:
        """Return whether all rows of the task vectors are fewer than the columns."""
        return self.models * shape[0] < shape[1]

    def cost(self, shape: tuple[int, int], *, item: int) -> AnalysisCost:
        """Return the cost of all task vectors as matrices, and of the smaller eigenproblem."""
        out_features, in_features = shape
        size = out_features * in_features
        side = self.models * out_features if self._stacks(shape) else in_features
        wide = factor_dtype(shape).itemsize
        # The series holds three more matrices than the eigenvectors do.
        more = 3 if self.common.keep == 1 else 0
        matrices = size * (self.roles * (4 + wide) + (3 + more) * 8 + 4)
        square = 8 * side**2 * 8
        products = max(
            job_bytes(out_features, in_features, in_features), job_bytes(side, side, side)
        )
        chunks = max(8 * 2048 * max(side, in_features) * 8, products)
        return AnalysisCost(
            matrices + square + chunks,
            passes=1,
            usual_passes=1,
            scratch=1,
            operations=11.0 * side**3 + 4.0 * self.models * size * min(side, in_features),
        )

    def update_bytes(self, shape: tuple[int, int]) -> int:
        """Return the bytes of a whole matrix."""
        return shape[0] * shape[1] * 4

    def analyze(self, weight: WeightContext) -> Passes:
        """Read all task vectors, and solve for the merged one."""
        got = yield [Pass(dense=True)] * self.roles
        matrices = [each.dense for each in got if each is not None and each.dense is not None]
        del got
        squares = weight.squared_norms()
        # A zero task vector asks for nothing, so it only counts in the mean.
        live = [
            (matrix, own, square)
            for matrix, own, square in zip(matrices, self.weights, squares, strict=True)
            if square > 0 and own > 0
        ]
        del matrices
        kept = round(self.common.keep * weight.shape[1])
        share = 1.0 if self.common.start == "sum" else 1 / self.models
        if not live:
            merged = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        elif self._stacks(weight.shape):
            merged = self._stacked(weight, live, share, kept)
        else:
            merged = self._by_columns(weight, live, share, kept)
        record = ExpertRecord(
            True, f"{kept} of {weight.shape[1]} directions are freed", directions=kept
        )
        update = self.in_place_of_mllm(Dense(merged.mul_(self.common.scale)))
        return Decision((record,) * len(self.parameters), update)

    def _by_columns(
        self, weight: WeightContext, live: Sequence[_Live], share: float, kept: int
    ) -> Tensor:
        """Return t by the Gram matrix [in, in] of the columns of all task vectors."""
        dtype = factor_dtype(weight.shape)
        start = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
        for matrix, own, _ in live:
            start.add_(matrix, alpha=own * share)
        total = torch.zeros(0, dtype=torch.float32)
        pull = torch.zeros(0, dtype=torch.float32)
        for number, (matrix, own, square) in enumerate(live):
            gram = _gram(weight, matrix, matrix).div_(square)
            part = by_strips(weight, matrix * own - start, gram, dtype=torch.float64)
            total, pull = (total.add_(gram), pull.add_(part)) if number else (gram, part)
            del gram, part
        moved = descend(weight, pull, total, steps=self.common.steps, kept=kept)
        return start.add_(moved).float()

    def _stacked(
        self, weight: WeightContext, live: Sequence[_Live], share: float, kept: int
    ) -> Tensor:
        """Return t by the Gram matrix [N out, N out] of the rows of all task vectors."""
        norms = [math.sqrt(square) for _, _, square in live]
        rows = [
            [_gram(weight, a.T, b.T) / (n * m) for (b, _, _), m in zip(live, norms, strict=True)]
            for (a, _, _), n in zip(live, norms, strict=True)
        ]
        gram = torch.cat([torch.cat(row, dim=1) for row in rows], dim=0)
        del rows
        factors = [own * norm for (_, own, _), norm in zip(live, norms, strict=True)]
        height = weight.shape[0]
        mixed = mixture(
            weight, gram, [height] * len(live), factors, share, steps=self.common.steps, kept=kept
        )
        # All task vectors have the same rows, so what is taken of them for one row is added up.
        mixed = mixed.view(len(live), height, -1).sum(0)
        merged = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for number, ((matrix, _, _), norm) in enumerate(zip(live, norms, strict=True)):
            columns = slice(number * height, (number + 1) * height)
            right = matrix.double() if is_always_whole(weight.shape) else matrix
            merged.add_(by_strips(weight, (mixed[:, columns] / norm).to(matrix.device), right))
        return merged


_Live = tuple[Tensor, float, float]
"""A task vector that is not zero, its weight, and its squared norm before it is weighed."""


def mixture(
    weight: WeightContext,
    gram: Tensor,
    sizes: Sequence[int],
    factors: Sequence[float],
    share: float,
    *,
    steps: float,
    kept: int,
) -> Tensor:
    """Return the matrix Z [m, m] with which t = [U_1 .. U_N] Z M, for t_i = c_i U_i M_i.

    M stacks all M_i [m_i, in], each of Frobenius norm 1. Then t_0 = share * sum_i t_i, and all that
    follows depends on the right sides through their Gram matrix alone.

    Parameters
    ----------
    gram : Tensor [m, m], float64
        M M^T.
    sizes, factors
        m_i and c_i.
    share, steps, kept
        The share of the sum that t_0 is, the length of the descent, and how many of the largest
        eigenvalues count.
    """
    scales = torch.cat(
        [torch.full((n,), c, dtype=torch.float64) for n, c in zip(sizes, factors, strict=True)]
    ).to(gram.device)
    # The part of G for M_i is t_i M_i^T - t_0 M_i^T; t_i takes the diagonal blocks alone.
    pull = -share * gram
    first = 0
    for size in sizes:
        block = slice(first, first + size)
        pull[block, block] += gram[block, block]
        first += size
    pull *= scales[:, None]
    mixed = descend(weight, pull, gram, steps=steps, kept=kept)
    mixed.diagonal().add_(share * scales)
    return mixed


def descend(
    weight: WeightContext, pull: Tensor, gram: Tensor, *, steps: float, kept: int
) -> Tensor:
    """Return pull [n, m] @ (1 - exp(-steps gram)) / gram, on the `kept` largest eigenvalues.

    Where all are kept, a large `gram` [m, m] is spared its eigenvectors.
    """
    function = decay_integral(steps)
    side = gram.shape[0]

    def multiply(first: Tensor, second: Tensor) -> Tensor:
        return by_strips(weight, first, second, dtype=torch.float64)

    if kept < side or is_always_whole((side, side)):
        return multiply(pull, through_eigenvectors(gram, function, count=kept))
    probes = random_block(side, _PROBES, seed=weight.seed, name=weight.name, role="descent")
    probes = probes.double().to(gram.device)
    return apply_function(pull, gram, function, probes, multiply, tolerance=_TOLERANCE)


def _gram(weight: WeightContext, first: Tensor, second: Tensor) -> Tensor:
    """Return first^T [m, k] @ second [k, n] in float64; workers compute some columns each."""
    starts = range(0, first.shape[1], _COLUMNS)
    parts = weight.parallel(
        lambda start: gram64(first[:, start : start + _COLUMNS], second), starts
    )
    return torch.cat(parts).to(first.device)
