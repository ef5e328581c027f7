"""IP-Merging: identify, rescale, project, merge (Hu et al., NeurIPS 2025, arXiv:2510.14387).

The step numbers in the docstrings are those of docs/method.md. The module `spectra` computes the
spectra, and `alignment` compares them; this module decides, and builds the update.
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
from lean_merge.methods.accuracy import accuracy_warnings
from lean_merge.methods.alignment import (
    Alignment,
    align,
    compared_similarities,
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
from lean_merge.methods.combination import LinearRule, added
from lean_merge.methods.evidence import EvidenceMethod
from lean_merge.methods.facts import Compared, Evidence, FactorsInMemory, Facts, Portrait
from lean_merge.methods.ip_parameters import PUBLISHED, IPMergingParameters
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
    outside,
)
from lean_merge.methods.updates import Combined, LowRank

START_RANK = 64
"""So many directions are computed first, unless the threshold and temperature need more."""
CLEAR = 0.02
"""A similarity counts as decided if it is at least this far from the threshold."""
GATHERED_FOR = 0.4
"""The directions that evidence begins with suffice for similarities of at least this much."""
GATHERED_FROM = 0.2
"""From this similarity on, more directions are gathered if the first ones do not suffice. Below it,
directions that align by chance carry so much of the update that twice the rank would not suffice
either."""


@cache
def _likely_rank(common: IPMergingParameters, threshold: float, shape: tuple[int, int]) -> int:
    """Return the rank that suffices if s_1 equals the threshold and all other s_i are chance.

    The result is cached, because many weights share a few shapes.
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
    evidence: ClassVar[str] = "published and here"
    needs_mllm: ClassVar[bool] = True
    gathered_by: ClassVar[tuple[str, ...]] = (
        "rank",
        "svd",
        "nuclear",
        "temperature",
        "importance",
        "similarity_weight",
        "select_by",
        "variant",
    )

    def _effort(self, shape: tuple[int, int], threshold: float | None = None) -> Effort:
        """Choose how many directions to compute: the given rank, all, or the likely number."""
        roles, forced = len(self.parameters) + 1, self.common.rank != "auto"
        if threshold is None:
            # A threshold that is to be found is hardly below what evidence is gathered for.
            bounds = [p.bound for p in self.parameters]
            threshold = min(GATHERED_FOR if math.isinf(each) else each for each in bounds)
        start = int(self.common.rank) if forced else _likely_rank(self.common, threshold, shape)
        whole = self.common.svd == "exact" or self.common.nuclear == "top_q"
        return Effort.of(shape, roles=roles, start=start, forced=forced, whole=whole)

    def cost(self, shape: tuple[int, int], *, item: int) -> AnalysisCost:
        """Return the cost of the deepest sketches that the parameters allow."""
        return self._effort(shape).cost(
            item=item, images=self._projects, usual_depth=self._usual_depth
        )

    def beside_matrices(self) -> LinearRule:
        """Return the rule that adds the experts' task vectors, whatever is selected elsewhere."""
        return added(self)

    @property
    def _usual_depth(self) -> int:
        """Return how many Krylov blocks a sketch has for most of the weights that are merged.

        If the largest similarity is compared, every block may still change which one it is, so that
        sketches go to the largest depth.
        """
        return MAX_DEPTH if self.common.select_by == "max" else MIN_DEPTH

    def largest_rank(self, shape: tuple[int, int]) -> int | None:
        """Return how many of the MLLM's directions are projected on; None without projection."""
        return self._effort(shape).largest if self._projects else None

    def reads_task_vectors(self) -> tuple[bool, ...]:
        """Tell which task vectors an update reads: the experts' if nothing is projected, else none.

        A projected update is held in its factors, which need no more rows.
        """
        return False, *(not self._projects and p.scale != 0.0 for p in self.parameters)

    @property
    def _projects(self) -> bool:
        return "project" in self.common.stages

    def warnings(self, records: Sequence[ExpertRecord]) -> list[str]:
        """Warn of sketches that did not become accurate."""
        return accuracy_warnings(records)

    def analyze(
        self, weight: WeightContext
    ) -> Generator[Sequence[Pass | None], Sequence[Products | None], Decision]:
        """Carry out steps 1 to 7 for one logical weight; the engine does the sum of step 8.

        The passes end as soon as the decision is clear.
        """

        def facts(spectra: list[Spectrum]) -> Facts:
            return facts_of(weight.shape, spectra, weight.squared_norms())

        def judge(spectra: list[Spectrum], depth: int, may_grow: bool) -> Verdict:
            aligned = align(self.parameters, facts(spectra))
            return self._judge(aligned, spectra, depth, may_grow)

        def leaves(spectra: list[Spectrum]) -> bool:
            return self._leaves(align(self.parameters, facts(spectra)), spectra, facts(spectra))

        effort = self._effort(weight.shape)
        spectra = yield from find_spectra(weight, effort, judge, leaves=leaves)
        aligned = align(self.parameters, facts(spectra))
        if not any(alignment.selected for alignment in aligned):
            return self._decision(facts(spectra), aligned)
        kept = self._kept(aligned)
        vectors = None if kept is None else spectra[0].vectors[:, kept]
        carried = [None, *(self._carried(vectors, expert) for expert in spectra[1:])]
        spectra, images = yield from finish_spectra(weight, effort, spectra, carried)
        return self._decision(facts(spectra), aligned, kept, vectors, images[1:])

    def _carried(self, vectors: Tensor | None, expert: Spectrum) -> Tensor | None:
        """Return the vectors [in, r] whose images under the expert's task vector are projected.

        If the task vector is cut to its leading directions, their components along these are
        taken, which gives the same images.
        """
        if vectors is None or not self._cuts(expert.rank):
            return vectors
        return expert.vectors @ (expert.vectors.T @ vectors)

    def _cuts(self, rank: int) -> bool:
        """Return whether a task vector of this rank is cut before it is projected."""
        return self.common.variant == PUBLISHED and rank > MAX_SUBSPACE

    def gather(
        self, weight: WeightContext
    ) -> Generator[Sequence[Pass | None], Sequence[Products | None], Evidence]:
        """Carry out steps 1 to 3 as accurately as for a selected weight, and compute dM_k V_V."""
        last = Verdict.DONE

        def judge(spectra: list[Spectrum], depth: int, may_grow: bool) -> Verdict:
            nonlocal last
            found = facts_of(weight.shape, spectra, weight.squared_norms())
            last = self._gathered(found, spectra, may_grow)
            return last

        effort = self._effort(weight.shape, GATHERED_FOR)
        spectra = yield from find_spectra(weight, effort, judge)
        stored = min(self.most_stored(weight.shape), spectra[0].sigma.numel())
        vectors = spectra[0].vectors[:, :stored]
        carried = [None, *[vectors] * len(self.parameters)]
        spectra, images = yield from finish_spectra(weight, effort, spectra, carried)
        facts = replace(
            facts_of(weight.shape, spectra, weight.squared_norms()),
            is_whole=effort.exact,
            is_exhausted=last is Verdict.MORE,
            stored=stored,
        )
        of_experts = tuple(image.cpu() for image in images if image is not None)
        factors = FactorsInMemory(vectors.cpu(), of_experts)
        return Evidence(facts, factors)

    def gathering_cost(self, shape: tuple[int, int], *, item: int) -> AnalysisCost:
        """Return the cost of the sketches and of each expert's images of the directions."""
        effort = self._effort(shape, GATHERED_FOR)
        return effort.cost(item=item, images=True, usual_depth=self._usual_depth)

    def most_stored(self, shape: tuple[int, int]) -> int:
        """Return how many directions the evidence stores at most.

        A small weight stores all of its directions: they take little memory and make every decision
        exact. A larger weight stores no more directions of a whole spectrum than of a sketch.
        """
        effort = self._effort(shape, GATHERED_FOR)
        if not effort.exact or min(shape) <= EXACT_BELOW or self.common.rank != "auto":
            return effort.largest
        return _likely_rank(self.common, GATHERED_FOR, shape)

    def lacks(self, facts: Facts) -> str | None:
        """Return why the weight must be analyzed again for a decision; None if it need not be."""
        effort = self._effort(facts.shape)
        aligned = align(self.parameters, facts)
        pairs = zip(aligned, facts.roles[1:], strict=True)
        if any(alignment.selected and self._cuts(expert.rank) for alignment, expert in pairs):
            return "the experts' task vectors are cut before they are projected"
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
        """Carry out steps 4 to 7 from the evidence, without reading the weight."""
        aligned = align(self.parameters, evidence.facts)
        kept, factors = self._kept(aligned), evidence.factors
        if kept is None:
            return self._decision(evidence.facts, aligned)
        images = [factors.images(k, kept) if a.selected else None for k, a in enumerate(aligned)]
        return self._decision(evidence.facts, aligned, kept, factors.vectors(kept), images)

    @property
    def is_settled(self) -> bool:
        """Return whether every threshold is a number."""
        return all(math.isfinite(own.bound) for own in self.parameters)

    def settled(self, thresholds: Sequence[float]) -> IPMerging:
        """Return this method with `thresholds`, one for each expert, in place of unknown ones."""
        pairs = zip(self.parameters, thresholds, strict=True)
        return IPMerging(
            [p if math.isfinite(p.bound) else replace(p, threshold=t) for p, t in pairs]
        )

    def verdicts(self, facts: Facts) -> tuple[ExpertRecord, ...]:
        """Return each expert's record: whether it is selected (step 4), and its lambda (step 5)."""
        return records(self.parameters, facts, align(self.parameters, facts), None)

    def compared(self, facts: Facts) -> tuple[Compared | None, ...]:
        """Return for each expert the similarity to compare: s_1, or the largest s_i."""
        return compared_similarities(self.parameters, facts)

    def kept(self, facts: Facts) -> int:
        """Return how many of the MLLM's directions the update uses.

        It is 0 if there is no update, or if the update is not projected.
        """
        kept = self._kept(align(self.parameters, facts))
        return 0 if kept is None else kept.numel()

    def adds(self, facts: Facts) -> tuple[bool, ...]:
        """Tell which task vectors the update adds: if nothing is projected, the selected ones."""
        aligned = align(self.parameters, facts)
        adds = zip(self.reads_task_vectors()[1:], aligned, strict=True)
        return False, *(reads and alignment.selected for reads, alignment in adds)

    def portrays(self, evidence: Evidence) -> tuple[Portrait | None, ...]:
        """Describe the update that each expert would give; None where a task vector is zero."""
        return portray(self.parameters, evidence)

    def _leaves(self, aligned: list[Alignment], spectra: list[Spectrum], facts: Facts) -> bool:
        """Return whether one Krylov block shows that no expert can reach its threshold.

        The blocks hold the first directions but for small angles, so that these cannot be closer
        than the blocks are by more than the sines of those angles.
        """
        common = self.common
        if common.rank != "auto" or common.select_by == "max":
            return False
        if not all(alignment.subspace for alignment in aligned):
            return False
        sines = list(map(outside, spectra, facts.squared_norms))
        return all(
            not alignment.selected
            and _largest_principal_cosine(spectra[0], spectra[k + 1]) + sines[0] + sines[k + 1]
            < self.parameters[k].bound - CLEAR
            for k, alignment in enumerate(aligned)
        )

    def _judge(
        self, aligned: list[Alignment], spectra: list[Spectrum], depth: int, may_grow: bool
    ) -> Verdict:
        """Say what to do next: whether more passes could change a selection or an update much."""
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
                # By now the subspaces contain the first directions, if not yet separated.
                largest = _largest_principal_cosine(spectra[0], spectra[k + 1])
                if largest < below - 4 * CLEAR:
                    continue
            if max(alignment.angle_error, first) > ANGLE:
                return Verdict.MORE
            verdict = Verdict.DONE
        return verdict

    def _gathered(self, facts: Facts, spectra: list[Spectrum], may_grow: bool) -> Verdict:
        """Say what to do next: whether more passes could change the update of any expert."""
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
        """Return the directions that the update keeps; None if it is empty or not projected."""
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
        """Carry out steps 5, 7 and 8, and give the update as coefficients or as factors.

        Factors need the right singular vectors `vectors` [in, n] of the `kept` directions, and for
        each expert the images [out, n] of those vectors under its task vector.
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
        left = torch.zeros(facts.shape[0], kept.numel(), dtype=torch.float32, device=vectors.device)
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
    """Return the larger angle error of the two first directions, which s_1 compares."""
    return float(max(spectra[0].angles[0], spectra[k + 1].angles[0]))


def _largest_principal_cosine(first: Spectrum, second: Spectrum) -> float:
    """Return the cosine of the smallest angle between the two computed subspaces.

    As soon as the subspaces contain the first directions, s_1 cannot exceed it. That is long before
    these directions are separated from their neighbours.
    """
    return float(torch.linalg.matrix_norm(first.vectors.T @ second.vectors, ord=2))


__all__ = ["IPMerging", "IPMergingParameters"]
