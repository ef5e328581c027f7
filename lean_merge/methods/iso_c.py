"""Iso-C: give all singular directions of the summed task vectors one size (arXiv:2502.04959)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lean_merge.linalg import Pass, gram64
from lean_merge.linalg.spectrum import numerical_rank
from lean_merge.methods.base import (
    AnalysisCost,
    Decision,
    ExpertRecord,
    Passes,
    WeightContext,
)
from lean_merge.methods.joint import JointMethod, JointParameters, by_strips, job_bytes
from lean_merge.methods.leading import factor_dtype
from lean_merge.methods.registry import register
from lean_merge.methods.spectra import PassesOf
from lean_merge.methods.updates import Dense

SHORT = 0.25
"""A spectrum is short if it is as even as fewer than this share of equal singular values."""


@dataclass(frozen=True, slots=True)
class IsoParameters(JointParameters):
    """Parameters of Iso-C.

    scale : factor of the merged task vector.
    weight : factor of the expert's task vector, of each expert by itself.
    mllm_weight : factor of the MLLM's task vector.
    """


@register
class IsoC(JointMethod[IsoParameters]):
    """W = W_0 + scale * mean(S) U V^T, where U S V^T is the sum of all models' task vectors.

    The mean is taken over min(out, in) singular values. Directions beyond the sum's numerical
    rank are arbitrary, and are left out.
    """

    name: ClassVar[str] = "iso_c"
    reference: ClassVar[str] = "arXiv:2502.04959"
    evidence: ClassVar[str] = "published and here"
    parameters_type = IsoParameters
    exact_differences: ClassVar[bool] = True

    def cost(self, shape: tuple[int, int], *, item: int) -> AnalysisCost:
        """Return the cost of the sum and of its decomposition."""
        smaller, larger = min(shape), max(shape)
        item = factor_dtype(shape).itemsize
        matrices = smaller * larger * (2 * item + 4)
        products = max(job_bytes(shape[0], smaller, shape[1]), 6 * 2048 * smaller * 8)
        return AnalysisCost(
            matrices + 6 * smaller**2 * 8 + products,
            passes=self.roles,
            # A pass reads one task vector, and so less than the plan counts for it.
            usual_passes=max(1, self.roles - 1),
            scratch=1,
            operations=11.0 * smaller**3 + 2.0 * smaller**2 * larger,
        )

    def update_bytes(self, shape: tuple[int, int]) -> int:
        """Return the bytes of a whole matrix."""
        return shape[0] * shape[1] * 4

    def analyze(self, weight: WeightContext) -> Passes:
        """Sum the task vectors, and give all singular directions one size."""
        total = yield from summed(weight, self.weights)
        wide = weight.shape[1] > weight.shape[0]
        tall = total.T if wide else total
        values, vectors = torch.linalg.eigh(gram64(tall, tall))
        sigma = values.flip(0).clamp_min(0).sqrt()
        rank = numerical_rank(sigma, weight.shape)
        vectors = vectors.flip(1)[:, :rank]
        root = ((vectors / sigma[:rank]) @ vectors.T * self.common.scale * sigma.mean()).to(total)
        del vectors
        polar = by_strips(weight, root, total) if wide else by_strips(weight, total, root)
        effective = _effective(sigma)
        record = ExpertRecord(
            selected=True,
            reason=f"the sum's spectrum is as even as {effective} of {sigma.numel()} equal values",
            rank=rank,
            computed_rank=sigma.numel(),
            directions=effective,
            factor=self.common.scale * float(sigma.mean()),
        )
        update = self.in_place_of_mllm(Dense(polar))
        return Decision((record,) * len(self.parameters), update)

    def warnings(self, records: Sequence[ExpertRecord]) -> list[str]:
        """Warn of short spectra, in which most directions hold noise alone."""
        short = [
            record
            for record in records
            if record.directions is not None
            and record.computed_rank is not None
            and record.directions < SHORT * record.computed_rank
        ]
        if not short:
            return []
        return [
            f"the spectrum of the summed task vectors is short in {len(short)} of {len(records)} "
            "cases, as it is after LoRA training; there iso_c raises noise to the size of what was "
            "learned, and tsv_m or ties suit better"
        ]


def summed(weight: WeightContext, weights: Sequence[float]) -> PassesOf[Tensor]:
    """Return the weighted sum [out, in] of all task vectors; only one more is held meanwhile."""
    total = torch.zeros(weight.shape, dtype=factor_dtype(weight.shape), device=weight.device)
    for role, factor in enumerate(weights):
        products = yield [Pass(dense=True) if r == role else None for r in range(len(weights))]
        got = products[role]
        assert got is not None and got.dense is not None
        total.add_(got.dense, alpha=factor)
        del products, got
    return total


def _effective(sigma: Tensor) -> int:
    """Return how many equal singular values have the ratio of nuclear to Frobenius norm."""
    squares = float(sigma.square().sum())
    return round(float(sigma.sum()) ** 2 / squares) if squares else 0
