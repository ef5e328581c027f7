"""IP-Merging: identify, rescale, project, merge (Hu et al., NeurIPS 2025, arXiv:2510.14387).

The steps in the comments are those of docs/method.md. How the spectra are found is told in
`spectra`; here is what is made of them.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lean_merge.errors import RecipeError, shown
from lean_merge.linalg import (
    Omitted,
    Pass,
    Products,
    corresponding_cosines,
    importance,
    log_omitted,
    omitted_errors,
)
from lean_merge.methods.base import (
    AnalysisCost,
    Decision,
    ExpertRecord,
    Method,
    WeightContext,
    per_expert,
)
from lean_merge.methods.registry import register
from lean_merge.methods.spectra import (
    ANGLE,
    MAX_SUBSPACE,
    MIN_DEPTH,
    Effort,
    Spectrum,
    Verdict,
    find_spectra,
    finish_spectra,
)

START_RANK = 64
"""Directions computed at first, where the threshold and temperature ask for no more."""
OMITTED = Omitted(share=3e-3, deviation=2e-2)
"""Modelled errors of the update beyond which a larger rank is asked for."""
DROPPED = 2e-4
"""Share of the importance gamma^2 whose directions are left out of the stored update."""
CLEAR = 0.02
"""How far from the threshold a similarity must be to count as decided."""

STAGES = ("select", "rescale", "project")
_STAGE_SETS = (
    frozenset({"select"}),
    frozenset({"select", "rescale"}),
    frozenset({"select", "project"}),
    frozenset(STAGES),
)
_CHOICES = {
    "select_by": ("first", "max"),
    "nuclear": ("full", "top_q"),
    "importance": ("softmax", "relative"),
    "similarity_weight": ("none", "sigma"),
    "svd": ("randomized", "exact"),
}


@dataclass(frozen=True, slots=True)
class IPMergingParameters:
    """Parameters of IP-Merging; steps as in docs/method.md.

    threshold : S_alpha of step 4, in 0 .. 1, of each expert by itself.
    scale : factor of the update in step 8, of each expert by itself.
    select_by : compare `first`, s_1, or `max`, the largest computed s_i, with the threshold.
    temperature : tau of step 6.
    importance : `softmax`, or `relative`, gamma_i = exp(tau (s_i - max s)).
    nuclear : sum `full` spectra in step 5, or `top_q` leading singular values.
    similarity_weight : `none`, or `sigma`, weigh s_i by the geometric mean of relative sigmas.
    stages : select; select,rescale; select,project; or all three (the paper's Table 5).
    rank : `auto`, or the number of directions to compute.
    svd : `randomized`, or `exact` for small models and as a reference.
    """

    threshold: float = per_expert(0.4)
    scale: float = per_expert(1.0)
    select_by: str = "first"
    temperature: float = 32.0
    importance: str = "softmax"
    nuclear: str = "full"
    similarity_weight: str = "none"
    stages: tuple[str, ...] = STAGES
    rank: int | str = "auto"
    svd: str = "randomized"

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise RecipeError(f"threshold must lie in 0 .. 1, not {self.threshold}.")
        if not -100 <= self.scale <= 100:
            raise RecipeError(f"scale must lie in -100 .. 100, not {self.scale}.")
        if not 0 <= self.temperature <= 10_000:
            raise RecipeError(f"temperature must lie in 0 .. 10000, not {self.temperature}.")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise RecipeError(
                    f"{name} must be one of {', '.join(choices)}, not {shown(getattr(self, name))}."
                )
        if frozenset(self.stages) not in _STAGE_SETS or len(set(self.stages)) != len(self.stages):
            raise RecipeError(
                f"stages {shown(','.join(map(str, self.stages)))} is not defined; choose select; "
                "select,rescale; select,project; or select,rescale,project."
            )
        if self.rank != "auto" and not (type(self.rank) is int and self.rank >= 1):
            raise RecipeError(
                f"rank must be 'auto' or a whole number from 1, not {shown(self.rank)}."
            )


@dataclass(frozen=True, slots=True)
class _Alignment:
    """How one expert's directions lie to the MLLM's (steps 2, 3, 4 and 6)."""

    similarity: Tensor
    gamma: Tensor
    compared: float
    selected: bool
    subspace: int
    omitted: Omitted
    angle_error: float


@register
class IPMerging(Method[IPMergingParameters]):
    """Merge the experts' task vectors inside the subspace that the MLLM's own tuning spans."""

    name: ClassVar[str] = "ip_merging"
    reference: ClassVar[str] = "arXiv:2510.14387"
    parameters_type = IPMergingParameters

    def _effort(self, shape: tuple[int, int]) -> Effort:
        """How many directions to compute: forced, all, or what the threshold makes likely."""
        roles, forced = len(self.parameters) + 1, self.common.rank != "auto"
        start = int(self.common.rank) if forced else self._likely_rank(shape)
        whole = self.common.svd == "exact" or self.common.nuclear == "top_q"
        return Effort.of(shape, roles=roles, start=start, forced=forced, whole=whole)

    def _likely_rank(self, shape: tuple[int, int]) -> int:
        """The rank that suffices if only s_1 stands out, and by no more than its threshold."""
        largest = min(MAX_SUBSPACE, *shape)
        rank = min(START_RANK, largest)
        threshold = min(p.threshold for p in self.parameters)
        while rank < largest:
            law = torch.full((rank,), shape[1] ** -0.5, dtype=torch.float64)
            law[0] = max(threshold, shape[1] ** -0.5)
            if _is_small(self._omitted(law, largest, shape)):
                break
            rank = min(2 * rank, largest)
        return rank

    def _omitted(self, similarity: Tensor, subspace: int, shape: tuple[int, int]) -> Omitted:
        return omitted_errors(
            similarity,
            omitted=subspace - similarity.numel(),
            in_features=shape[1],
            temperature=self.common.temperature,
            relative=self.common.importance == "relative",
        )

    def cost(self, shape: tuple[int, int], *, item: int) -> AnalysisCost:
        """That of the deepest look that the parameters allow."""
        return self._effort(shape).cost(item=item)

    def largest_rank(self, shape: tuple[int, int]) -> int:
        """As many as there are directions of the MLLM to project on."""
        return self._effort(shape).largest

    def reads_task_vectors(self) -> tuple[bool, ...]:
        """The experts' without projection; with it, everything is in the factors."""
        whole = "project" not in self.common.stages
        return False, *(whole and p.scale != 0.0 for p in self.parameters)

    def analyze(
        self, weight: WeightContext
    ) -> Generator[Sequence[Pass | None], Sequence[Products | None], Decision]:
        """Steps 1 to 7 for one logical weight; step 8, the sum, is the engine's."""

        def judge(spectra: list[Spectrum], depth: int, may_grow: bool) -> Verdict:
            return self._judge(self._align(weight, spectra), spectra, depth, may_grow)

        effort = self._effort(weight.shape)
        spectra = yield from find_spectra(weight, effort, judge)
        aligned = self._align(weight, spectra)
        if not any(alignment.selected for alignment in aligned):
            return Decision(experts=self._records(spectra, aligned, None))
        kept = carried = None
        if "project" in self.common.stages:
            kept = _kept_directions([a for a in aligned if a.selected])
            carried = spectra[0].vectors[:, kept]
        spectra, images = yield from finish_spectra(weight, effort, spectra, carried)
        return self._decide(weight, spectra, aligned, kept, images)

    def _align(self, weight: WeightContext, spectra: list[Spectrum]) -> list[_Alignment]:
        """Steps 2 to 4 and 6 for every expert."""
        return [self._align_one(weight, spectra, k) for k in range(len(spectra) - 1)]

    def _align_one(self, weight: WeightContext, spectra: list[Spectrum], k: int) -> _Alignment:
        mllm, expert = spectra[0], spectra[k + 1]
        subspace = min(MAX_SUBSPACE, mllm.rank, expert.rank)
        if subspace == 0:
            empty = torch.zeros(0, dtype=torch.float64)
            return _Alignment(empty, empty, 0.0, False, 0, Omitted(0.0, 0.0), 0.0)
        similarity = corresponding_cosines(mllm.vectors, expert.vectors)[:subspace]
        computed = similarity.numel()
        if self.common.similarity_weight == "sigma":
            product = mllm.sigma[:computed] * expert.sigma[:computed]
            relative = product / (mllm.sigma[0] * expert.sigma[0])
            similarity = similarity * relative.sqrt()
        compared = float(similarity[0] if self.common.select_by == "first" else similarity.max())
        relative_importance = self.common.importance == "relative"
        omitted = subspace - computed
        tail = log_omitted(
            omitted, in_features=weight.shape[1], temperature=self.common.temperature
        )
        gamma = importance(
            similarity,
            temperature=self.common.temperature,
            relative=relative_importance,
            log_tail=tail,
        )
        angles = torch.maximum(mllm.angles[:computed], expert.angles[:computed])
        return _Alignment(
            similarity=similarity,
            gamma=gamma,
            compared=compared,
            selected=compared >= self.parameters[k].threshold,
            subspace=subspace,
            omitted=self._omitted(similarity, subspace, weight.shape),
            angle_error=float(angles[gamma**2 >= 0.02 * (gamma**2).max()].max()),
        )

    def _judge(
        self, aligned: list[_Alignment], spectra: list[Spectrum], depth: int, may_grow: bool
    ) -> Verdict:
        """Whether more passes could change any expert's selection, or its update much."""
        if may_grow and any(a.selected and not _is_small(a.omitted) for a in aligned):
            return Verdict.GROW
        if self.common.select_by == "max":
            # Any computed direction may still rise, so that the sketch goes to its full depth.
            return Verdict.MORE
        verdict = Verdict.LEFT
        for k, alignment in enumerate(aligned):
            if alignment.subspace == 0:
                continue
            below = self.parameters[k].threshold - CLEAR
            first = float(max(spectra[0].angles[0], spectra[k + 1].angles[0]))
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

    def _decide(
        self,
        weight: WeightContext,
        spectra: list[Spectrum],
        aligned: list[_Alignment],
        kept: Tensor | None,
        images: list[Tensor],
    ) -> Decision:
        """Steps 5, 7 and 8, in factors."""
        scales = []
        for k, alignment in enumerate(aligned):
            if not alignment.selected:
                scales.append(0.0)
                continue
            ratio = self._ratio(spectra, alignment, k) if "rescale" in self.common.stages else 1.0
            scales.append(self.parameters[k].scale * ratio)
        if kept is None:
            norms = [
                abs(s) * math.sqrt(n)
                for s, n in zip(scales, weight.squared_norms()[1:], strict=True)
            ]
            return Decision(
                experts=self._records(spectra, aligned, norms),
                coefficients=(0.0, *scales),
            )
        left = torch.zeros(weight.shape[0], kept.numel(), device=weight.device)
        norms = []
        for scale, alignment, image in zip(scales, aligned, images, strict=True):
            if not alignment.selected:
                norms.append(0.0)
                continue
            gamma = _padded(alignment.gamma, kept)
            part = image * (scale * gamma**2).float().to(weight.device)
            norms.append(float(part.cpu().double().norm()))
            left += part
        right = spectra[0].vectors[:, kept].T.contiguous()
        return Decision(experts=self._records(spectra, aligned, norms), left=left, right=right)

    def _ratio(self, spectra: list[Spectrum], alignment: _Alignment, k: int) -> float:
        """lambda of step 5, as the `nuclear` parameter wants it."""
        full, top_q = _ratios(spectra, alignment, k)
        chosen = full if self.common.nuclear == "full" else top_q
        assert chosen is not None
        return chosen

    def _records(
        self,
        spectra: list[Spectrum],
        aligned: list[_Alignment],
        norms: list[float] | None,
    ) -> tuple[ExpertRecord, ...]:
        records = []
        for k, alignment in enumerate(aligned):
            if alignment.subspace == 0:
                role = 0 if spectra[0].rank == 0 else k + 1
                reason = f"the {'expert' if role else 'MLLM'}'s task vector is zero"
                if spectra[role].is_faint:
                    reason += " to within what a sketch can tell; --svd exact can tell more"
                records.append(ExpertRecord(False, reason, rank=0, update_norm=0.0))
                continue
            full, top_q = _ratios(spectra, alignment, k)
            sign = ">=" if alignment.selected else "<"
            threshold = self.parameters[k].threshold
            records.append(
                ExpertRecord(
                    selected=alignment.selected,
                    reason=f"similarity {alignment.compared:.4f} {sign} threshold {threshold:g}",
                    similarity_first=float(alignment.similarity[0]),
                    similarity_max=float(alignment.similarity.max()),
                    lambda_=full,
                    lambda_top_q=top_q,
                    lambda_doubt=_doubt(spectra, k) if alignment.selected else None,
                    rank=alignment.subspace,
                    computed_rank=alignment.similarity.numel(),
                    omitted_share=alignment.omitted.share + alignment.omitted.deviation
                    if alignment.selected
                    else None,
                    angle_error=alignment.angle_error if alignment.selected else None,
                    gap=not (spectra[0].has_gap and spectra[k + 1].has_gap),
                    update_norm=norms[k] if norms is not None else 0.0,
                )
            )
        return tuple(records)


def _largest_principal_cosine(first: Spectrum, second: Spectrum) -> float:
    """Cosine of the smallest angle between the two computed subspaces.

    No s_1 is larger once they hold v_1, long before it is told apart from its neighbours.
    """
    return float(torch.linalg.matrix_norm(first.vectors.T @ second.vectors, ord=2))


def _is_small(omitted: Omitted) -> bool:
    return omitted.share <= OMITTED.share and omitted.deviation <= OMITTED.deviation


def _kept_directions(selected: Sequence[_Alignment]) -> Tensor:
    """Indices that carry all but `DROPPED` of some selected expert's importance."""
    kept: set[int] = set()
    for alignment in selected:
        fourth = alignment.gamma**4
        order = torch.argsort(fourth, descending=True)
        missing = fourth.sum() - torch.cumsum(fourth[order], 0)
        count = int((missing > DROPPED**2 * fourth.sum()).sum()) + 1
        kept.update(order[:count].tolist())
    return torch.tensor(sorted(kept))


def _padded(gamma: Tensor, kept: Tensor) -> Tensor:
    """gamma at the kept directions, zero where this expert computed fewer."""
    padded = torch.zeros(max(int(kept.max()) + 1, gamma.numel()), dtype=gamma.dtype)
    padded[: gamma.numel()] = gamma
    return padded[kept]


def _doubt(spectra: list[Spectrum], k: int) -> float:
    """Share of lambda's two sums that rounding may have made."""
    return max(
        0.0 if each.sums is None else each.sums.doubt for each in (spectra[0], spectra[k + 1])
    )


def _ratios(
    spectra: list[Spectrum], alignment: _Alignment, k: int
) -> tuple[float | None, float | None]:
    mllm, expert = spectra[0].sums, spectra[k + 1].sums
    if mllm is None or expert is None or expert.nuclear == 0.0:
        return None, None
    top = expert.leading(alignment.subspace)
    return mllm.nuclear / expert.nuclear, mllm.leading(alignment.subspace) / top
