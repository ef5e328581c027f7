"""Compare the experts' singular directions of one weight with the MLLM's.

The step numbers in the docstrings are those of docs/method.md.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lean_merge.linalg import gram64
from lean_merge.linalg.similarity import (
    Omitted,
    corresponding_cosines,
    importance,
    log_omitted,
    omitted_errors,
)
from lean_merge.methods.base import ExpertRecord
from lean_merge.methods.facts import Compared, Evidence, Facts, Portrait, RoleFacts
from lean_merge.methods.ip_parameters import IPMergingParameters
from lean_merge.methods.spectra import MAX_SUBSPACE, SMALL_GAP, Spectrum

OMITTED = Omitted(share=3e-3, deviation=2e-2)
"""A larger rank is asked for where the modelled errors of the update exceed these."""
DROPPED = 2e-4
"""The stored update leaves out the directions that carry this share of the importance gamma^2."""


BY_CHANCE = 0.1
"""Directions that align by chance may carry at most this share of an update's norm."""


@dataclass(frozen=True, slots=True)
class Alignment:
    """The result of comparing one expert's directions with the MLLM's (steps 2, 3, 4 and 6)."""

    similarity: Tensor
    gamma: Tensor
    compared: float
    selected: bool
    subspace: int
    omitted: Omitted
    angle_error: float


def facts_of(
    shape: tuple[int, int], spectra: Sequence[Spectrum], squared_norms: Sequence[float]
) -> Facts:
    """Compare the spectra's vectors and collect the facts (steps 2 and 3, and the sums of 5)."""
    mllm, *experts = spectra
    similarity, leading = [], []
    for expert in experts:
        subspace = subspace_of(mllm.rank, expert.rank)
        similarity.append(corresponding_cosines(mllm.vectors, expert.vectors)[:subspace])
        sums = (mllm.sums, expert.sums)
        known = [each.leading(subspace) for each in sums if each is not None]
        leading.append((known[0], known[1]) if len(known) == 2 else None)
    return Facts(
        shape=shape,
        roles=tuple(map(_role_facts, spectra)),
        similarity=tuple(similarity),
        leading=tuple(leading),
        squared_norms=tuple(squared_norms),
    )


def _role_facts(spectrum: Spectrum) -> RoleFacts:
    return RoleFacts(
        sigma=spectrum.sigma,
        angles=spectrum.angles,
        rank=spectrum.rank,
        gap=spectrum.gap,
        nuclear=None if spectrum.sums is None else spectrum.sums.nuclear,
        doubt=0.0 if spectrum.sums is None else spectrum.sums.doubt,
        is_faint=spectrum.is_faint,
    )


def subspace_of(*ranks: int) -> int:
    """Return the size q of the compared subspaces, given the task vectors' ranks (step 2)."""
    return min(MAX_SUBSPACE, *ranks)


def align(parameters: Sequence[IPMergingParameters], facts: Facts) -> list[Alignment]:
    """Carry out steps 2 to 4 and 6 for every expert."""
    return [_align_one(own, facts, k) for k, own in enumerate(parameters)]


def _align_one(own: IPMergingParameters, facts: Facts, k: int) -> Alignment:
    mllm, expert = facts.roles[0], facts.roles[k + 1]
    subspace = subspace_of(mllm.rank, expert.rank)
    if subspace == 0:
        empty = torch.zeros(0, dtype=torch.float64)
        return Alignment(empty, empty, 0.0, False, 0, Omitted(0.0, 0.0), 0.0)
    # Stored evidence may hold more directions than the parameters ask for.
    similarity = facts.similarity[k][: None if own.rank == "auto" else int(own.rank)]
    computed = similarity.numel()
    if own.similarity_weight == "sigma":
        product = mllm.sigma[:computed] * expert.sigma[:computed]
        relative = product / (mllm.sigma[0] * expert.sigma[0])
        similarity = similarity * relative.sqrt()
    compared = float(similarity[0] if own.select_by == "first" else similarity.max())
    tail = log_omitted(subspace - computed, in_features=facts.shape[1], temperature=own.temperature)
    gamma = importance(
        similarity,
        temperature=own.temperature,
        relative=own.importance == "relative",
        log_tail=tail,
    )
    angles = torch.maximum(mllm.angles[:computed], expert.angles[:computed])
    return Alignment(
        similarity=similarity,
        gamma=gamma,
        compared=compared,
        selected=compared >= own.bound,
        subspace=subspace,
        omitted=omitted_by(own, similarity, subspace, facts.shape),
        angle_error=float(angles[gamma**2 >= 0.02 * (gamma**2).max()].max()),
    )


def omitted_by(
    own: IPMergingParameters, similarity: Tensor, subspace: int, shape: tuple[int, int]
) -> Omitted:
    """Estimate the update's errors when only these of all `subspace` similarities are known."""
    return omitted_errors(
        similarity,
        omitted=subspace - similarity.numel(),
        in_features=shape[1],
        temperature=own.temperature,
        relative=own.importance == "relative",
    )


def is_small(omitted: Omitted) -> bool:
    """Return whether the modelled errors are so small that no larger rank is needed."""
    return omitted.share <= OMITTED.share and omitted.deviation <= OMITTED.deviation


def kept_directions(selected: Sequence[Alignment]) -> Tensor:
    """Return the indices of the directions that the stored update keeps.

    For each selected expert they carry all but the share `DROPPED` of its importance.
    """
    kept: set[int] = set()
    for alignment in selected:
        fourth = alignment.gamma**4
        order = torch.argsort(fourth, descending=True)
        missing = fourth.sum() - torch.cumsum(fourth[order], 0)
        count = int((missing > DROPPED**2 * fourth.sum()).sum()) + 1
        kept.update(order[:count].tolist())
    return torch.tensor(sorted(kept))


def padded(gamma: Tensor, kept: Tensor) -> Tensor:
    """Return gamma at the kept directions; it is zero where fewer were computed."""
    values = torch.zeros(max(int(kept.max()) + 1, gamma.numel()), dtype=gamma.dtype)
    values[: gamma.numel()] = gamma
    return values[kept]


def ratios(facts: Facts, k: int) -> tuple[float | None, float | None]:
    """Return lambda of step 5 twice: from full spectra, and from the q leading singular values.

    Both are None where the sums of singular values are not known.
    """
    mllm, expert, leading = facts.roles[0].nuclear, facts.roles[k + 1].nuclear, facts.leading[k]
    if mllm is None or expert is None or leading is None or expert == 0.0:
        return None, None
    return mllm / expert, leading[0] / leading[1]


def ratio(own: IPMergingParameters, facts: Facts, k: int) -> float:
    """Return the one of the two `ratios` that the parameter `nuclear` chooses."""
    full, top_q = ratios(facts, k)
    chosen = full if own.nuclear == "full" else top_q
    assert chosen is not None
    return chosen


def records(
    parameters: Sequence[IPMergingParameters],
    facts: Facts,
    aligned: Sequence[Alignment],
    norms: Sequence[float] | None,
) -> tuple[ExpertRecord, ...]:
    """Return what the report says of every expert; `norms` are those of their updates, if known."""
    found = []
    for k, (own, alignment) in enumerate(zip(parameters, aligned, strict=True)):
        if alignment.subspace == 0:
            role = 0 if facts.roles[0].rank == 0 else k + 1
            reason = f"the {'expert' if role else 'MLLM'}'s task vector is zero"
            if facts.roles[role].is_faint:
                reason += " to within what a sketch can tell; --svd exact can tell more"
            found.append(ExpertRecord(False, reason, rank=0, update_norm=0.0))
            continue
        full, top_q = ratios(facts, k)
        sign = ">=" if alignment.selected else "<"
        omitted = alignment.omitted.share + alignment.omitted.deviation
        found.append(
            ExpertRecord(
                selected=alignment.selected,
                reason=f"similarity {alignment.compared:.4f} {sign} threshold {own.bound:g}",
                similarity_first=float(alignment.similarity[0]),
                similarity_max=float(alignment.similarity.max()),
                lambda_=full,
                lambda_top_q=top_q,
                lambda_doubt=_doubt(facts, k) if alignment.selected else None,
                rank=alignment.subspace,
                computed_rank=alignment.similarity.numel(),
                omitted_share=omitted if alignment.selected else None,
                angle_error=alignment.angle_error if alignment.selected else None,
                gap=facts.roles[0].gap < SMALL_GAP or facts.roles[k + 1].gap < SMALL_GAP,
                update_norm=norms[k] if norms is not None else 0.0,
            )
        )
    return tuple(found)


def _doubt(facts: Facts, k: int) -> float:
    """Return the largest share of lambda's two sums that may be rounding error."""
    return max(facts.roles[0].doubt, facts.roles[k + 1].doubt)


def portray(
    parameters: Sequence[IPMergingParameters], evidence: Evidence
) -> tuple[Portrait | None, ...]:
    """Describe the update that every expert would give if it were selected with all stages.

    The entry is None where a task vector is zero.
    """
    facts = evidence.facts
    every = torch.arange(facts.stored)
    portraits: list[Portrait | None] = []
    for k, (own, alignment) in enumerate(zip(parameters, align(parameters, facts), strict=True)):
        square = facts.squared_norms[k + 1]
        if alignment.subspace == 0 or square == 0.0:
            portraits.append(None)
            continue
        images = evidence.factors.images(k, every)
        gram = gram64(images, images)
        weights = padded(alignment.gamma, every) ** 2
        kept = weights[:, None] * gram * weights
        total, squares = float(kept.trace()), float(kept.square().sum())
        portraits.append(
            Portrait(
                gamma=alignment.gamma,
                update_norm=ratio(own, facts, k) * math.sqrt(total),
                update_relative=math.sqrt(total / square),
                effective_rank=total**2 / squares if squares > 0 else 0.0,
                energy_kept=total / square,
                energy_inside=min(1.0, float(gram.trace()) / square),
            )
        )
    return tuple(portraits)


def compared_similarities(
    parameters: Sequence[IPMergingParameters], facts: Facts
) -> tuple[Compared | None, ...]:
    """Return what is compared with each expert's threshold; None where a task vector is zero."""
    return tuple(
        None
        if alignment.subspace == 0
        else Compared(
            similarity=alignment.compared,
            directions=1 if own.select_by == "first" else alignment.similarity.numel(),
            bearable=_bearable(own, facts, alignment),
            threshold=own.bound,
        )
        for own, alignment in zip(parameters, align(parameters, facts), strict=True)
    )


def _bearable(own: IPMergingParameters, facts: Facts, alignment: Alignment) -> float:
    """Return the smallest bearable similarity, in steps of 0.01; see `Compared.bearable`.

    The model assumes that the first similarity alone is larger than chance makes it.
    """
    width, subspace = facts.shape[1], alignment.subspace
    computed = subspace if facts.is_whole else alignment.similarity.numel()

    def suffices(step: int) -> bool:
        law = torch.full((computed,), width**-0.5, dtype=torch.float64)
        law[0] = max(step / 100, width**-0.5)
        # law[0] is the similarity that is tried; law[1] is that of directions aligned by chance.
        alone = omitted_by(own, law[:2], subspace, facts.shape)
        return alone.share <= BY_CHANCE and is_small(omitted_by(own, law, subspace, facts.shape))

    step = bisect.bisect_left(range(101), True, key=suffices)
    return step / 100 if step <= 100 else 0.0
