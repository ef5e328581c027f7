"""IP-Merging: identify, rescale, project, merge (Hu et al., NeurIPS 2025, arXiv:2510.14387).

The steps in the comments are those of docs/method.md. How the spectra are found is told in
`spectra`, what they say of each other in `alignment`; here is what is made of it.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import replace
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from lean_merge.linalg import Pass, Products
from lean_merge.methods.alignment import (
    Alignment,
    align,
    compare,
    facts_of,
    is_small,
    kept_directions,
    omitted_by,
    padded,
    portray,
    ratio,
    records,
)
from lean_merge.methods.base import AnalysisCost, Decision, ExpertRecord, WeightContext
from lean_merge.methods.evidence import EvidenceMethod
from lean_merge.methods.facts import Compared, Evidence, FactorsInMemory, Facts, Portrait
from lean_merge.methods.ip_parameters import IPMergingParameters
from lean_merge.methods.registry import register
from lean_merge.methods.spectra import (
    ANGLE,
    EXACT_BELOW,
    MAX_DEPTH,
    MAX_SUBSPACE,
    MIN_DEPTH,
    Effort,
    Spectrum,
    Verdict,
    find_spectra,
    finish_spectra,
)
from lean_merge.methods.updates import Combined, LowRank

START_RANK = 64
"""Directions computed at first, where the threshold and temperature ask for no more."""
CLEAR = 0.02
"""How far from the threshold a similarity must be to count as decided."""
GATHERED_FOR = 0.4
"""Similarity for which the directions that evidence begins with suffice."""
GATHERED_FROM = 0.2
"""Similarity from which more are gathered where these do not suffice. Below, directions that align
by chance carry so much of the update that a doubled rank would not either."""


@cache
def _likely_rank(common: IPMergingParameters, threshold: float, shape: tuple[int, int]) -> int:
    """The rank that suffices if only s_1 stands out, and by no more than its threshold.

    Few shapes are asked about many times.
    """
    largest = min(MAX_SUBSPACE, *shape)
    rank = min(START_RANK, largest)
    while rank < largest:
        law = torch.full((rank,), shape[1] ** -0.5, dtype=torch.float64)
        law[0] = max(threshold, shape[1] ** -0.5)
        if is_small(omitted_by(common, law, largest, shape)):
            break
        rank = min(2 * rank, largest)
    return rank


@register
class IPMerging(EvidenceMethod[IPMergingParameters]):
    """Merge the experts' task vectors inside the subspace that the MLLM's own tuning spans."""

    name: ClassVar[str] = "ip_merging"
    reference: ClassVar[str] = "arXiv:2510.14387"
    parameters_type = IPMergingParameters
    gathered_by: ClassVar[tuple[str, ...]] = (
        "rank",
        "svd",
        "nuclear",
        "temperature",
        "importance",
        "similarity_weight",
        "select_by",
    )

    def _effort(self, shape: tuple[int, int], threshold: float | None = None) -> Effort:
        """How many directions to compute: forced, all, or what the threshold makes likely."""
        roles, forced = len(self.parameters) + 1, self.common.rank != "auto"
        if threshold is None:
            # A threshold that is to be found is hardly below what evidence is gathered for.
            bounds = [p.bound for p in self.parameters]
            threshold = min(GATHERED_FOR if math.isinf(each) else each for each in bounds)
        start = int(self.common.rank) if forced else _likely_rank(self.common, threshold, shape)
        whole = self.common.svd == "exact" or self.common.nuclear == "top_q"
        return Effort.of(shape, roles=roles, start=start, forced=forced, whole=whole)

    def cost(self, shape: tuple[int, int], *, item: int) -> AnalysisCost:
        """The cost of the deepest look that the parameters allow."""
        return self._effort(shape).cost(
            item=item, images=self._projects, usual_depth=self._usual_depth
        )

    @property
    def _usual_depth(self) -> int:
        """Krylov blocks of a sketch of most of the weights that are merged.

        Where the largest similarity is compared, any direction may still rise, up to the last one.
        """
        return MAX_DEPTH if self.common.select_by == "max" else MIN_DEPTH

    def largest_rank(self, shape: tuple[int, int]) -> int | None:
        """As many as there are directions of the MLLM to project on; None without projection."""
        return self._effort(shape).largest if self._projects else None

    def reads_task_vectors(self) -> tuple[bool, ...]:
        """The experts' without projection; with it, everything is in the factors."""
        return False, *(not self._projects and p.scale != 0.0 for p in self.parameters)

    @property
    def _projects(self) -> bool:
        return "project" in self.common.stages

    def analyze(
        self, weight: WeightContext
    ) -> Generator[Sequence[Pass | None], Sequence[Products | None], Decision]:
        """Steps 1 to 7 for one logical weight; step 8, the sum, is the engine's.

        The look ends as soon as it is clear what to do.
        """

        def facts(spectra: list[Spectrum]) -> Facts:
            return facts_of(weight.shape, spectra, weight.squared_norms())

        def judge(spectra: list[Spectrum], depth: int, may_grow: bool) -> Verdict:
            aligned = align(self.parameters, facts(spectra))
            return self._judge(aligned, spectra, depth, may_grow)

        effort = self._effort(weight.shape)
        spectra = yield from find_spectra(weight, effort, judge)
        aligned = align(self.parameters, facts(spectra))
        if not any(alignment.selected for alignment in aligned):
            return self._decision(facts(spectra), aligned)
        kept = self._kept(aligned)
        carried = None if kept is None else spectra[0].vectors[:, kept]
        spectra, images = yield from finish_spectra(weight, effort, spectra, carried)
        return self._decision(facts(spectra), aligned, kept, carried, images)

    def gather(
        self, weight: WeightContext
    ) -> Generator[Sequence[Pass | None], Sequence[Products | None], Evidence]:
        """Steps 1 to 3 at the accuracy of a selected weight, and dM_k V_V of the directions."""
        last = Verdict.DONE

        def judge(spectra: list[Spectrum], depth: int, may_grow: bool) -> Verdict:
            nonlocal last
            found = facts_of(weight.shape, spectra, weight.squared_norms())
            last = self._gathered(found, spectra, may_grow)
            return last

        effort = self._effort(weight.shape, GATHERED_FOR)
        spectra = yield from find_spectra(weight, effort, judge)
        stored = min(self.most_stored(weight.shape), spectra[0].sigma.numel())
        carried = spectra[0].vectors[:, :stored]
        spectra, images = yield from finish_spectra(weight, effort, spectra, carried)
        facts = replace(
            facts_of(weight.shape, spectra, weight.squared_norms()),
            is_whole=effort.exact,
            is_exhausted=last is Verdict.MORE,
            stored=stored,
        )
        factors = FactorsInMemory(carried.cpu(), tuple(image.cpu() for image in images))
        return Evidence(facts, factors)

    def gathering_cost(self, shape: tuple[int, int], *, item: int) -> AnalysisCost:
        """The same sketches, and images of all directions, which `cost` counts already."""
        effort = self._effort(shape, GATHERED_FOR)
        return effort.cost(item=item, images=True, usual_depth=self._usual_depth)

    def most_stored(self, shape: tuple[int, int]) -> int:
        """Of whole spectra no more than of sketched ones.

        Small weights have all of them: what they take is little, and every decision is exact.
        """
        effort = self._effort(shape, GATHERED_FOR)
        if not effort.exact or min(shape) <= EXACT_BELOW or self.common.rank != "auto":
            return effort.largest
        return _likely_rank(self.common, GATHERED_FOR, shape)

    def lacks(self, facts: Facts) -> str | None:
        """Where another look would tell more than these facts, and it matters."""
        effort = self._effort(facts.shape)
        aligned = align(self.parameters, facts)
        if not any(alignment.subspace for alignment in aligned) or facts.is_whole:
            return self._lacks_factors(aligned, facts)
        if self.common.svd == "exact" or self.common.nuclear == "top_q":
            return "whole spectra are asked for"
        computed = facts.roles[0].sigma.numel()
        if self.common.rank != "auto" and effort.largest > computed:
            return f"a rank of {effort.largest} is asked for"
        if self.common.select_by == "max" and not facts.is_exhausted:
            return "any direction may be the one that is compared"
        selected = [alignment for alignment in aligned if alignment.selected]
        if effort.largest > computed and not all(is_small(a.omitted) for a in selected):
            return "directions beyond the stored ones carry a part of the update"
        if not facts.is_exhausted and any(a.angle_error > ANGLE for a in selected):
            return "directions that carry the update are not settled"
        return self._lacks_factors(aligned, facts)

    def _lacks_factors(self, aligned: Sequence[Alignment], facts: Facts) -> str | None:
        kept = self._kept(aligned)
        if kept is None or int(kept.max()) < facts.stored:
            return None
        return "directions whose factors are not stored carry a part of the update"

    def decide(self, evidence: Evidence) -> Decision:
        """Steps 4 to 7, without a look at the weight."""
        aligned = align(self.parameters, evidence.facts)
        kept, factors = self._kept(aligned), evidence.factors
        if kept is None:
            return self._decision(evidence.facts, aligned)
        images = [factors.images(k, kept) if a.selected else None for k, a in enumerate(aligned)]
        return self._decision(evidence.facts, aligned, kept, factors.vectors(kept), images)

    @property
    def is_settled(self) -> bool:
        """Whether every threshold is a number."""
        return all(math.isfinite(own.bound) for own in self.parameters)

    def settled(self, thresholds: Sequence[float]) -> IPMerging:
        """With these in the place of thresholds that are to be found."""
        pairs = zip(self.parameters, thresholds, strict=True)
        return IPMerging(
            [p if math.isfinite(p.bound) else replace(p, threshold=t) for p, t in pairs]
        )

    def verdicts(self, facts: Facts) -> tuple[ExpertRecord, ...]:
        """Step 4 of every expert, and lambda."""
        return records(self.parameters, facts, align(self.parameters, facts), None)

    def compared(self, facts: Facts) -> tuple[Compared | None, ...]:
        """s_1, or the largest s_i."""
        return compare(self.parameters, facts)

    def kept(self, facts: Facts) -> int:
        """Directions of the MLLM that the update lies in; 0 where it is none, or whole."""
        kept = self._kept(align(self.parameters, facts))
        return 0 if kept is None else kept.numel()

    def adds(self, facts: Facts) -> tuple[bool, ...]:
        """The selected experts' without projection."""
        aligned = align(self.parameters, facts)
        adds = zip(self.reads_task_vectors()[1:], aligned, strict=True)
        return False, *(reads and alignment.selected for reads, alignment in adds)

    def portrays(self, evidence: Evidence) -> tuple[Portrait | None, ...]:
        """Of every expert."""
        return portray(self.parameters, evidence)

    def _judge(
        self, aligned: list[Alignment], spectra: list[Spectrum], depth: int, may_grow: bool
    ) -> Verdict:
        """Whether more passes could change any expert's selection, or its update much."""
        if may_grow and any(a.selected and not is_small(a.omitted) for a in aligned):
            return Verdict.GROW
        if self.common.select_by == "max":
            return Verdict.MORE
        verdict = Verdict.LEFT
        for k, alignment in enumerate(aligned):
            if alignment.subspace == 0:
                continue
            below = self.parameters[k].bound - CLEAR
            first = _first_angle(spectra, k)
            if alignment.compared + first < below:
                continue
            if depth >= MIN_DEPTH:
                # The subspaces hold the first directions by now, if not yet told apart.
                largest = _largest_principal_cosine(spectra[0], spectra[k + 1])
                if largest < below - 4 * CLEAR:
                    continue
            if max(alignment.angle_error, first) > ANGLE:
                return Verdict.MORE
            verdict = Verdict.DONE
        return verdict

    def _gathered(self, facts: Facts, spectra: list[Spectrum], may_grow: bool) -> Verdict:
        """Whether more passes could change anything, if every expert were selected."""
        aligned = align(self.parameters, facts)
        likely = [alignment for alignment in aligned if alignment.compared >= GATHERED_FROM]
        if may_grow and not all(is_small(alignment.omitted) for alignment in likely):
            return Verdict.GROW
        if self.common.select_by == "max":
            return Verdict.MORE
        angles = [
            max(alignment.angle_error, _first_angle(spectra, k))
            for k, alignment in enumerate(aligned)
            if alignment.subspace
        ]
        return Verdict.MORE if max(angles, default=0.0) > ANGLE else Verdict.DONE

    def _kept(self, aligned: Sequence[Alignment]) -> Tensor | None:
        """The directions that the update keeps; None where it is none, or of full rank."""
        selected = [alignment for alignment in aligned if alignment.selected]
        return kept_directions(selected) if selected and self._projects else None

    def _decision(
        self,
        facts: Facts,
        aligned: Sequence[Alignment],
        kept: Tensor | None = None,
        vectors: Tensor | None = None,
        images: Sequence[Tensor | None] = (),
    ) -> Decision:
        """Steps 5, 7 and 8: in coefficients, or in factors of the `kept` directions.

        `vectors` [in, n] are theirs, and `images` [out, n] what each expert makes of these.
        """
        if not any(alignment.selected for alignment in aligned):
            return Decision(experts=records(self.parameters, facts, aligned, None))
        rescales = "rescale" in self.common.stages
        scales = [
            own.scale * (ratio(own, facts, k) if rescales else 1.0) if alignment.selected else 0.0
            for k, (own, alignment) in enumerate(zip(self.parameters, aligned, strict=True))
        ]
        if kept is None or vectors is None:
            squares = facts.squared_norms[1:]
            norms = [abs(s) * math.sqrt(n) for s, n in zip(scales, squares, strict=True)]
            return Decision(
                experts=records(self.parameters, facts, aligned, norms),
                update=Combined((0.0, *scales)) if any(scales) else None,
            )
        left = torch.zeros(facts.shape[0], kept.numel(), device=vectors.device)
        norms = []
        for scale, alignment, image in zip(scales, aligned, images, strict=True):
            if not alignment.selected or image is None:
                norms.append(0.0)
                continue
            part = image * (scale * padded(alignment.gamma, kept) ** 2).float().to(vectors.device)
            norms.append(float(part.cpu().double().norm()))
            left += part
        return Decision(
            experts=records(self.parameters, facts, aligned, norms),
            update=LowRank(left, vectors.T.contiguous()),
        )


def _first_angle(spectra: Sequence[Spectrum], k: int) -> float:
    """The larger error of the two first directions that s_1 of an expert compares."""
    return float(max(spectra[0].angles[0], spectra[k + 1].angles[0]))


def _largest_principal_cosine(first: Spectrum, second: Spectrum) -> float:
    """Cosine of the smallest angle between the two computed subspaces.

    No s_1 is larger once they hold v_1, long before it is told apart from its neighbours.
    """
    return float(torch.linalg.matrix_norm(first.vectors.T @ second.vectors, ord=2))


__all__ = ["IPMerging", "IPMergingParameters"]
