"""STAR: keep the large singular values of a task vector, and rescale them (arXiv:2502.10339)."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from lean_merge.linalg.sketch import SingularSums
from lean_merge.methods.accuracy import accuracy_warnings
from lean_merge.methods.base import (
    AnalysisCost,
    Decision,
    ExpertRecord,
    Method,
    Passes,
    WeightContext,
    per_expert,
)
from lean_merge.methods.combination import LinearRule, added
from lean_merge.methods.expertwise import add_parts
from lean_merge.methods.leading import (
    Leading,
    effort_of,
    find_whole,
    for_experts,
    is_always_whole,
    of_experts,
    relative_error,
    until_accurate,
    whole_cost,
    with_left,
)
from lean_merge.methods.ranges import check_range, check_share
from lean_merge.methods.registry import register
from lean_merge.methods.spectra import (
    MIN_DEPTH,
    Effort,
    PassesOf,
    Spectrum,
    Verdict,
    find_spectra,
    finish_spectra,
)

FIRST_RANK = 64
"""So many directions are sketched first, and with them the sum of all singular values."""
BEARABLE = 0.015
"""With a larger estimated error of what is kept, the task vector is decomposed whole."""


@dataclass(frozen=True, slots=True)
class StarParameters:
    """Parameters of STAR.

    eta : share of the sum of all singular values that the kept ones make up.
    scale : factor of the update, of each expert by itself.
    """

    eta: float = 0.4
    scale: float = per_expert(1.0)

    def __post_init__(self) -> None:
        check_share("eta", self.eta)
        check_range("scale", self.scale, -100, 100)


@register
class Star(Method[StarParameters]):
    """W = W_mllm + sum_k scale_k * the large singular part of dM_k, rescaled to its nuclear norm.

    Of each dM_k the r largest singular values are kept, r being the smallest number whose sum
    reaches the share eta of the sum of all. They are multiplied by the old sum over the new one.
    """

    name: ClassVar[str] = "star"
    reference: ClassVar[str] = "arXiv:2502.10339"
    evidence: ClassVar[str] = "published and here"
    parameters_type = StarParameters

    def beside_matrices(self) -> LinearRule:
        """Return the rule that adds the experts' task vectors."""
        return added(self)

    def forms_exactly(self, shape: tuple[int, int]) -> bool:
        """Return whether the weight is so small that everything is computed."""
        return is_always_whole(shape)

    def _most(self, shape: tuple[int, int]) -> int:
        """Return the most directions that are kept: as many as for equal singular values."""
        return math.ceil(self.common.eta * min(shape))

    def _efforts(self, shape: tuple[int, int]) -> tuple[Effort, Effort]:
        """Return the efforts of the first sketch, and of the widest that there can be."""
        roles = len(self.parameters)
        first = effort_of(shape, roles=roles, rank=FIRST_RANK, sums=True)
        return first, effort_of(shape, roles=roles, rank=_widest(shape))

    def cost(self, shape: tuple[int, int], *, item: int) -> AnalysisCost:
        """Return the cost of two sketches, and of whole decompositions where they do not do."""
        whole = whole_cost(shape, roles=len(self.parameters), rank=self._most(shape))
        if is_always_whole(shape):
            return whole
        first, wide = (
            effort.cost(item=item, images=True, usual_depth=MIN_DEPTH)
            for effort in self._efforts(shape)
        )
        return AnalysisCost(
            workspace=max(whole.workspace, first.workspace, wide.workspace),
            widest=max(first.widest, wide.widest),
            passes=first.passes + wide.passes + whole.passes,
            usual_passes=first.usual_passes,
            operations=whole.operations,
        )

    def largest_rank(self, shape: tuple[int, int]) -> int:
        """Return the most directions that are kept of all experts together."""
        return len(self.parameters) * self._most(shape)

    def warnings(self, records: Sequence[ExpertRecord]) -> list[str]:
        """Warn of sketches that did not become accurate."""
        return accuracy_warnings(records)

    def analyze(self, weight: WeightContext) -> Passes:
        """Find how many singular values are kept, and their directions, and add them."""
        return (yield from for_experts(self._of_experts(of_experts(weight))))

    def _of_experts(self, weight: WeightContext) -> PassesOf[Decision]:
        roles = len(self.parameters)
        if not is_always_whole(weight.shape):
            sketched = yield from self._sketched(weight)
            if sketched is not None:
                return sketched
        found = yield from find_whole(weight, roles=roles, rank=self._most(weight.shape))
        sums = [SingularSums.of_spectrum(each.parts.spectrum) for each in found]
        return self._decision(weight, found, sums)

    def _sketched(self, weight: WeightContext) -> PassesOf[Decision | None]:
        """Decide from sketches; return None where these would not be accurate enough."""
        first, _ = self._efforts(weight.shape)
        if first.exact:
            return None

        def judge(spectra: list[Spectrum], depth: int, may_grow: bool) -> Verdict:
            return Verdict.MORE if depth < MIN_DEPTH else Verdict.DONE

        effort = first
        spectra = yield from find_spectra(weight, effort, judge)
        none = [None] * len(spectra)
        spectra, _ = yield from finish_spectra(weight, effort, spectra, none)
        sums = [spectrum.sums for spectrum in spectra if spectrum.sums is not None]
        counts = [self._kept(each) for each in sums]
        if not _is_accurate(spectra, counts):
            wanted = max(counts) + max(counts) // 8 + 16
            if wanted > _widest(weight.shape):
                return None
            effort = effort_of(weight.shape, roles=len(spectra), rank=-(-wanted // 32) * 32)
            spectra = yield from find_spectra(weight, effort, until_accurate(counts))
            if not _is_accurate(spectra, counts):
                return None
        counts = [min(k, each.rank) for k, each in zip(counts, spectra, strict=True)]
        found = yield from with_left(weight, effort, spectra, counts)
        return self._decision(weight, found, sums)

    def _kept(self, sums: SingularSums) -> int:
        """Return the smallest number of singular values whose sum reaches the share eta."""
        wanted = self.common.eta * sums.nuclear
        if wanted == 0.0:
            return 0
        # Rounding must not ask for one more where equal values reach the share exactly.
        wanted *= 1 - 1e-12
        largest = math.ceil(float(sums.counts.sum()))
        return bisect.bisect_left(range(largest), True, key=lambda k: sums.leading(k) >= wanted)

    def _decision(
        self, weight: WeightContext, found: Sequence[Leading], sums: Sequence[SingularSums]
    ) -> Decision:
        counts, factors = [], []
        for own, leading, each in zip(self.parameters, found, sums, strict=True):
            count = min(self._kept(each), leading.parts.sigma.numel())
            held = float(leading.parts.sigma[:count].sum())
            counts.append(count)
            factors.append(own.scale * each.nuclear / held if held else 0.0)
        return add_parts(found, counts, factors, weight.squared_norms())


def _widest(shape: tuple[int, int]) -> int:
    """Return the most directions of a sketch, which pays up to an eighth of the smaller side."""
    return min(shape) // 8


def _is_accurate(spectra: Sequence[Spectrum], counts: Sequence[int]) -> bool:
    """Return whether the first `counts` directions are all known, and how well."""
    return all(
        min(count, spectrum.rank) <= spectrum.sigma.numel()
        and relative_error(spectrum, min(count, spectrum.rank)) <= BEARABLE
        for spectrum, count in zip(spectra, counts, strict=True)
    )
