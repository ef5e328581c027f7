"""Find the leading singular triplets of task vectors, whole or by sketches.

Methods that need more of a task vector than its right singular vectors begin here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from lean_merge.linalg import Pass, Products
from lean_merge.linalg.decomposition import Decomposed, decompose, decompose_product
from lean_merge.methods.base import AnalysisCost, ExpertRecord, WeightContext
from lean_merge.methods.spectra import (
    MAX_DEPTH,
    MIN_DEPTH,
    SMALL_GAP,
    Effort,
    Judge,
    PassesOf,
    Spectrum,
    Verdict,
    find_spectra,
    finish_spectra,
)

WHOLE_BELOW = 1024
"""Weights with min(out, in) up to this are decomposed whole, in float64."""
LEAST_RANK = 32
"""A sketch computes so many directions at least: more columns converge in fewer passes."""
ACCURACY = 0.005
"""A sketch ends when the estimated relative error of what is kept is at most this."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Leading:
    """The leading singular triplets of one task vector, and how far they can be trusted.

    Attributes
    ----------
    parts : Decomposed
        The triplets.
    error : float
        Estimated relative Frobenius error of their product; 0 if they were computed whole.
    gap : bool
        Whether the first direction is ill-defined, since the second is nearly as large.
    is_faint : bool
        Whether the task vector is not zero, but too small for a sketch.
    """

    parts: Decomposed
    error: float
    gap: bool
    is_faint: bool = False

    def record(self, count: int, *, square: float, factor: float) -> ExpertRecord:
        """Return what the report says of an expert of which the first `count` directions are kept.

        `square` is the task vector's squared norm, and `factor` multiplies what is kept.
        """
        sigma = self.parts.sigma[:count]
        kept = float(sigma.square().sum())
        if not count:
            reason = "the expert's task vector is zero"
            if self.is_faint:
                reason += " to within what a sketch can tell"
            return ExpertRecord(False, reason, rank=0, update_norm=0.0)
        share = min(1.0, kept / square)
        held = f"{count} singular directions hold" if count > 1 else "1 singular direction holds"
        return ExpertRecord(
            selected=True,
            reason=f"{held} {share:.1%} of the task vector's energy",
            rank=self.parts.rank,
            computed_rank=self.parts.spectrum.numel(),
            angle_error=self.error,
            directions=count,
            energy_kept=share,
            factor=factor,
            gap=self.gap,
            update_norm=abs(factor) * math.sqrt(kept),
        )


def is_always_whole(shape: tuple[int, int]) -> bool:
    """Return whether a weight of `shape` is always decomposed whole."""
    return min(shape) <= WHOLE_BELOW


def effort_of(shape: tuple[int, int], *, roles: int, rank: int, sums: bool = False) -> Effort:
    """Return how `rank` directions of `roles` task vectors are found: by sketches, or else whole.

    A sketch must be able to reach its largest depth within the smaller side.
    """
    start = min(max(rank, LEAST_RANK), min(shape))
    exact = is_always_whole(shape) or MAX_DEPTH * -(-2 * start // MIN_DEPTH) > min(shape)
    return Effort(shape, roles, exact, start, start, sums)


def leading_cost(shape: tuple[int, int], *, roles: int, rank: int, item: int) -> AnalysisCost:
    """Return the cost of `find_leading`; see `AnalysisCost`."""
    effort = effort_of(shape, roles=roles, rank=rank)
    if effort.exact:
        return whole_cost(shape, roles=roles, rank=rank)
    return effort.cost(item=item, images=True, usual_depth=MIN_DEPTH)


def whole_cost(shape: tuple[int, int], *, roles: int, rank: int) -> AnalysisCost:
    """Return the cost of decomposing `roles` task vectors whole, one after another."""
    smaller, larger = min(shape), max(shape)
    rank, item = min(rank, smaller), factor_dtype(shape).itemsize
    dense = smaller * larger * 4
    eigen = 5 * smaller**2 * 8  # Gram matrix, eigenvectors, LAPACK's workspace
    chunk = 3 * min(2048, larger) * smaller * 8
    factors = (roles + 1) * (smaller + larger) * rank * item
    each = 9.0 * smaller**3 + 2.0 * smaller * larger * (smaller + rank)
    return AnalysisCost(
        dense + eigen + chunk + factors,
        passes=roles,
        # A pass reads one task vector, and so less than the plan counts for it.
        usual_passes=max(1, roles - 1),
        operations=roles * each,
    )


def factor_dtype(shape: tuple[int, int]) -> torch.dtype:
    """Return the dtype of singular vectors: float64 of small weights, else float32."""
    return torch.float64 if is_always_whole(shape) else torch.float32


def find_leading(weight: WeightContext, *, roles: int, rank: int) -> PassesOf[list[Leading]]:
    """Find the `rank` leading singular triplets of each of `roles` task vectors."""
    effort = effort_of(weight.shape, roles=roles, rank=rank)
    if effort.exact:
        return (yield from find_whole(weight, roles=roles, rank=rank))
    spectra = yield from find_spectra(weight, effort, until_accurate([rank] * roles))
    counts = [min(rank, spectrum.rank, spectrum.sigma.numel()) for spectrum in spectra]
    return (yield from with_left(weight, effort, spectra, counts))


def find_whole(weight: WeightContext, *, roles: int, rank: int) -> PassesOf[list[Leading]]:
    """Decompose task vectors whole, one after another, so that only one is held as a matrix."""
    found = []
    for role in range(roles):
        products = yield [Pass(dense=True) if r == role else None for r in range(roles)]
        got = products[role]
        assert got is not None and got.dense is not None
        parts = decompose(got.dense, rank, dtype=factor_dtype(weight.shape))
        del products, got  # the next role's matrix takes their place
        sigma = parts.spectrum
        gap = (
            len(sigma) > 1
            and bool(sigma[0] > 0)
            and bool(sigma[0] - sigma[1] < SMALL_GAP * sigma[0])
        )
        found.append(Leading(parts, 0.0, gap))
    return found


def with_left(
    weight: WeightContext, effort: Effort, spectra: Sequence[Spectrum], counts: Sequence[int]
) -> PassesOf[list[Leading]]:
    """Complete the first `counts` directions of sketched spectra with their left vectors.

    One pass gives the images B V, which makes the triplets those of the projection B V V^T.
    """
    carried = [
        spectrum.vectors[:, :count] if count else None
        for spectrum, count in zip(spectra, counts, strict=True)
    ]
    _, images = yield from finish_spectra(weight, effort, list(spectra), carried)
    return weight.parallel(_completed, list(zip(spectra, images, counts, strict=True)))


def _completed(found: tuple[Spectrum, Tensor | None, int]) -> Leading:
    spectrum, images, count = found
    vectors = spectrum.vectors[:, :count]
    if images is None:
        images = vectors.new_zeros(1, 0)
    parts = decompose_product(images, vectors, count=count, rank=spectrum.rank)
    parts = replace(parts, spectrum=spectrum.sigma)
    error = relative_error(spectrum, count)
    return Leading(parts, error, not spectrum.has_gap, spectrum.is_faint)


def relative_error(spectrum: Spectrum, count: int) -> float:
    """Estimate the relative error of the product of the first `count` triplets of a sketch."""
    sigma, angles = spectrum.sigma[:count], spectrum.angles[:count]
    total = float(sigma.square().sum())
    return math.sqrt(2 * float((sigma * angles).square().sum()) / total) if total else 0.0


def until_accurate(counts: Sequence[int]) -> Judge:
    """Return a judge that asks for passes until the first `counts` directions are accurate."""

    def judge(spectra: list[Spectrum], depth: int, may_grow: bool) -> Verdict:
        pairs = zip(spectra, counts, strict=True)
        errors = [relative_error(spectrum, min(k, spectrum.rank)) for spectrum, k in pairs]
        return Verdict.DONE if max(errors) <= ACCURACY else Verdict.MORE

    return judge


def of_experts(weight: WeightContext) -> WeightContext:
    """Return the weight without the MLLM's task vector, for a generator that `for_experts` runs."""
    return replace(weight, squared_norms=lambda: weight.squared_norms()[1:])


def for_experts(inner: PassesOf[T]) -> PassesOf[T]:
    """Run a generator that asks the experts' task vectors alone.

    The MLLM's is formed once all the same, so that its norm is known and its rows are checked.
    """
    of_mllm: Pass | None = Pass()
    try:
        wanted = next(inner)
        while True:
            got: Sequence[Products | None] = yield [of_mllm, *wanted]
            of_mllm = None
            wanted = inner.send(got[1:])
    except StopIteration as end:
        found: T = end.value
        return found
