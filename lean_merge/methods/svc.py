"""SVC: calibrate the singular values of summed task vectors for what they share (arXiv:2602.05536).

Where several task vectors have a direction in common, their sum counts it several times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from lean_merge.errors import RecipeError, shown
from lean_merge.linalg import Pass, Products
from lean_merge.linalg.decomposition import decompose
from lean_merge.methods.base import (
    AnalysisCost,
    Decision,
    ExpertRecord,
    Passes,
    WeightContext,
)
from lean_merge.methods.joined import Joined
from lean_merge.methods.joint import (
    JointMethod,
    JointParameters,
    by_strips,
    job_bytes,
    product_bytes,
)
from lean_merge.methods.leading import (
    effort_of,
    factor_dtype,
    find_leading,
    leading_cost,
    whole_cost,
)
from lean_merge.methods.ranges import check_rank
from lean_merge.methods.registry import register
from lean_merge.methods.spectra import PassesOf, T
from lean_merge.methods.updates import Combined, Dense, LowRank

_BLOCK = 256
"""So many directions are calibrated in one job of a worker."""


@dataclass(frozen=True, slots=True)
class SvcParameters(JointParameters):
    """Parameters of singular value calibration.

    scale : factor of the merged task vector.
    weight : factor of the expert's task vector, of each expert by itself.
    mllm_weight : factor of the MLLM's task vector.
    alpha : least share with which a task vector counts; `auto`, 1 / N of N models.
    rank : calibrate so many leading directions, and leave the rest of the sum; `auto`, all.
    """

    alpha: float | str = field(default="auto", metadata={"is_free": True})
    rank: int | str = "auto"

    def __post_init__(self) -> None:
        JointParameters.__post_init__(self)
        check_rank(self.rank)
        if self.alpha != "auto" and (isinstance(self.alpha, str) or not 0 < self.alpha <= 100):
            raise RecipeError(
                f"alpha must be 'auto', or lie above 0 and up to 100, not {shown(self.alpha)}."
            )


@register
class Svc(JointMethod[SvcParameters]):
    """W = W_0 + scale * sum_j sigma_j K / sum_i max(alpha, s_ij) u_j v_j^T, of the K models' sum.

    U S V^T is the sum of the K task vectors t_i, the MLLM's among them. For each of its directions,
    a_i = u^T t_i, and s_i = <sum_i a_i, a_i> / ||a_i||^2 tells how often t_i counts in it.
    """

    name: ClassVar[str] = "svc"
    reference: ClassVar[str] = "arXiv:2602.05536"
    evidence: ClassVar[str] = "published and here"
    parameters_type = SvcParameters

    def _rank(self, shape: tuple[int, int]) -> int:
        """Return how many directions are calibrated at most."""
        rank = self.common.rank
        return min(shape) if rank == "auto" else min(int(rank), *shape)

    @property
    def _cuts(self) -> bool:
        return self.common.rank != "auto"

    @property
    def _alpha(self) -> float:
        alpha = self.common.alpha
        return 1 / self.models if alpha == "auto" else float(alpha)

    @property
    def _coefficients(self) -> tuple[float, ...]:
        """Return the coefficients of the task vectors in the update, where the sum stays."""
        of_mllm, *of_experts = (self.common.scale * weight for weight in self.weights)
        return of_mllm - 1.0, *of_experts

    def reads_task_vectors(self) -> tuple[bool, ...]:
        """Tell that the rest of the sum is added from the task vectors, if the rank is cut."""
        if not self._cuts:
            return JointMethod.reads_task_vectors(self)
        return tuple(coefficient != 0.0 for coefficient in self._coefficients)

    def forms_exactly(self, shape: tuple[int, int]) -> bool:
        """Return whether everything is computed."""
        return effort_of(shape, roles=1, rank=self._rank(shape)).exact

    def cost(self, shape: tuple[int, int], *, item: int) -> AnalysisCost:
        """Return the cost of decomposing the sum, whole or by sketches, and of calibrating it."""
        rank, models = self._rank(shape), self.roles
        if not self.forms_exactly(shape):
            cost = leading_cost(shape, roles=1, rank=rank, item=item)
            # Each block takes a pass for B Q and one for B^T y.
            return replace(
                cost,
                workspace=cost.workspace + 3 * models * sum(shape) * max(rank, cost.widest) * 4,
                widest=max(rank, cost.widest),
                passes=2 * cost.passes + 1,
                usual_passes=2 * cost.usual_passes + 1,
                scratch=1,
            )
        size, item = shape[0] * shape[1], factor_dtype(shape).itemsize
        cost = whole_cost(shape, roles=1, rank=rank)
        blocks = 4 * (models + 2) * _BLOCK * max(shape) * 8
        blocks = max(blocks, job_bytes(shape[0], rank, shape[1]))
        held = size * (4 + item) * (models + 1) + blocks + product_bytes(shape, rank)
        return replace(
            cost,
            workspace=cost.workspace + held,
            passes=1,
            usual_passes=1,
            scratch=1,
            operations=cost.operations + 2.0 * size * rank * (models + 1),
        )

    def largest_rank(self, shape: tuple[int, int]) -> int | None:
        """Return None: the rest of the sum, or the MLLM's own task vector, has full rank."""
        return None

    def update_bytes(self, shape: tuple[int, int]) -> int:
        """Return the bytes of the calibrated part."""
        rank = self._rank(shape)
        return sum(shape) * rank * 4 if self._cuts else shape[0] * shape[1] * 4

    def analyze(self, weight: WeightContext) -> Passes:
        """Decompose the sum, calibrate its singular values, and put it together again."""
        rank = self._rank(weight.shape)
        if self.forms_exactly(weight.shape):
            got = yield [Pass(dense=True)] * self.roles
            matrices = [each.dense for each in got if each is not None and each.dense is not None]
            dtype = factor_dtype(weight.shape)
            total = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
            for matrix, own in zip(matrices, self.weights, strict=True):
                total.add_(matrix, alpha=own)
            parts = decompose(total, rank, dtype=dtype)
            del total
            wide = [matrix.to(dtype) for matrix in matrices]
            counted = _in_blocks(
                weight, parts.left, lambda u: self._counted([u.T @ matrix for matrix in wide])
            )
        else:
            sum_of = _SumOf(self.weights, weight)
            inner = find_leading(sum_of.weight, roles=1, rank=rank)
            (found,) = yield from sum_of.run(inner)
            parts = found.parts
            got = yield [Pass(project=parts.left.to(weight.dtype))] * self.roles
            rows = [each.projected.T for each in got if each and each.projected is not None]
            counted = self._counted(rows)
        factors = self.models / counted
        calibrated = parts.sigma * factors
        record = ExpertRecord(
            selected=True,
            reason=_reason(factors),
            rank=parts.rank,
            directions=parts.sigma.numel(),
            factor=float(calibrated.sum() / parts.sigma.sum()) if parts.sigma.numel() else None,
        )
        records = (record,) * len(self.parameters)
        if self._cuts:
            change = (calibrated - parts.sigma) * self.common.scale
            left = (parts.left * change.to(parts.left)).float()
            part = LowRank(left, parts.right.T.float().contiguous())
            return Decision(records, Joined(Combined(self._coefficients), part))
        left = parts.left * (calibrated * self.common.scale).to(parts.left)
        merged = Dense(by_strips(weight, left, parts.right.T))
        return Decision(records, self.in_place_of_mllm(merged))

    def _counted(self, rows: Sequence[Tensor]) -> Tensor:
        """Return sum_i max(alpha, s_i) [r] float64 for the rows u^T B_i [r, in] of all models."""
        pairs = zip(self.weights, rows, strict=True)
        weighed = [own * each.double() for own, each in pairs][self.roles - self.models :]
        total = torch.stack(weighed).sum(0)
        counted = torch.zeros(total.shape[0], dtype=torch.float64, device=total.device)
        for each in weighed:
            squares = each.square().sum(1)
            share = (total * each).sum(1) / torch.where(squares > 0, squares, 1.0)
            counted += torch.where(squares > 0, share, 0.0).clamp_min(self._alpha)
        return counted.cpu()


def _in_blocks(weight: WeightContext, left: Tensor, counted: Callable[[Tensor], Tensor]) -> Tensor:
    """Return `counted` of all columns of `left`; workers take a block of them each."""
    starts = range(0, left.shape[1], _BLOCK)
    parts = weight.parallel(lambda start: counted(left[:, start : start + _BLOCK]), starts)
    return torch.cat([torch.zeros(0, dtype=torch.float64), *parts])


def _reason(factors: Tensor) -> str:
    if not factors.numel():
        return "all task vectors are zero"
    least, most = float(factors.min()), float(factors.max())
    return f"singular values of the sum are multiplied by {least:.3f} to {most:.3f}"


class _SumOf:
    """Answers a generator that asks for one matrix with the weighted sum of all task vectors."""

    def __init__(self, weights: Sequence[float], weight: WeightContext) -> None:
        self._weights = weights
        self._dtype = weight.dtype
        self._square = 0.0
        self.weight = replace(weight, squared_norms=lambda: [self._square])

    def run(self, inner: PassesOf[T]) -> PassesOf[T]:
        """Run the generator; the products of the sum are sums of products."""
        try:
            (wanted,) = next(inner)
            while True:
                assert wanted is not None
                products = yield from self._answer(wanted)
                (wanted,) = inner.send([products])
        except StopIteration as end:
            found: T = end.value
            return found

    def _answer(self, wanted: Pass) -> PassesOf[Products]:
        y = projected = times = z = None
        if wanted.gram is not None:
            y = (yield from self._summed(Pass(times=wanted.gram), "times")).to(self._dtype)
            z = yield from self._summed(Pass(project=y), "projected")
        if wanted.project is not None:
            projected = yield from self._summed(Pass(project=wanted.project), "projected")
        if wanted.times is not None:
            times = yield from self._summed(Pass(times=wanted.times), "times")
        return Products(y=y, z=z, projected=projected, times=times)

    def _summed(self, wanted: Pass, name: str) -> PassesOf[Tensor]:
        got = yield [replace(wanted, inner=not self._square)] * len(self._weights)
        total: Tensor | None = None
        for own, products in zip(self._weights, got, strict=True):
            part = getattr(products, name) * own
            total = part if total is None else total.add_(part)
        if not self._square:
            inner = torch.stack([each.inner for each in got if each and each.inner is not None])
            weights = torch.tensor(self._weights, dtype=torch.float64)
            self._square = max(0.0, float(weights @ inner @ weights))
        assert total is not None
        return total
