"""Naive whole-matrix float64 twins of the methods: the independent reference of the tests.

Written from the formulas of the paper with numpy alone; nothing here is shared with the package.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


@dataclass
class Oracle:
    """One weight and one expert, by the book."""

    similarity: Matrix
    selected: bool
    ratio: float
    ratio_top_q: float
    subspace: int
    gap: bool
    update: Matrix


_KNOWN: dict[bytes, tuple[Matrix, Matrix]] = {}
"""The last decompositions; many tests ask for those of the same matrices."""


def _decomposed(matrix: Matrix) -> tuple[Matrix, Matrix]:
    """Return the singular values and the right singular vectors, as rows, of numpy's full SVD."""
    key = hashlib.sha256(repr(matrix.shape).encode() + matrix.tobytes()).digest()
    if key not in _KNOWN:
        if len(_KNOWN) == 32:
            del _KNOWN[next(iter(_KNOWN))]
        _KNOWN[key] = np.linalg.svd(matrix, full_matrices=False)[1:]
    return _KNOWN[key]


def ip_merging(
    base: Matrix,
    mllm: Matrix,
    expert: Matrix,
    *,
    threshold: float = 0.4,
    scale: float = 1.0,
    temperature: float = 32.0,
    select_by: str = "first",
    nuclear: str = "full",
    importance: str = "softmax",
    similarity_weight: str = "none",
    stages: tuple[str, ...] = ("select", "rescale", "project"),
) -> Oracle:
    """Steps 1 to 7 of the method for W in [out, in] orientation."""
    task_mllm, task_expert = mllm - base, expert - base
    sigma_v, right_v = _decomposed(task_mllm)
    sigma_m, right_m = _decomposed(task_expert)

    def rank(sigma: Matrix) -> int:
        if sigma[0] == 0:
            return 0
        eps = np.finfo(np.float32).eps
        return int((sigma > sigma[0] * max(base.shape) * eps).sum())

    q = min(1024, rank(sigma_v), rank(sigma_m))
    if q == 0:
        return Oracle(np.zeros(0), False, np.nan, np.nan, 0, False, np.zeros_like(base))
    similarity = np.abs(np.einsum("ij,ij->i", right_v[:q], right_m[:q]))
    if similarity_weight == "sigma":
        similarity = similarity * np.sqrt(sigma_v[:q] * sigma_m[:q] / (sigma_v[0] * sigma_m[0]))
    selected = (similarity[0] if select_by == "first" else similarity.max()) >= threshold
    full = sigma_v.sum() / sigma_m.sum()
    top_q = sigma_v[:q].sum() / sigma_m[:q].sum()
    ratio = (full if nuclear == "full" else top_q) if "rescale" in stages else 1.0
    if importance == "softmax":
        weights = np.exp(temperature * (similarity - similarity.max()))
        gamma = weights / weights.sum()
    else:
        gamma = np.exp(temperature * (similarity - similarity.max()))
    update = task_expert
    if "project" in stages:
        update = (task_expert @ right_v[:q].T * gamma**2) @ right_v[:q]
    gaps = [len(s) > 1 and (s[0] - s[1]) / s[0] < 0.05 for s in (sigma_v, sigma_m)]
    return Oracle(
        similarity=similarity,
        selected=bool(selected),
        ratio=full,
        ratio_top_q=top_q,
        subspace=q,
        gap=any(gaps),
        update=scale * ratio * update if selected else np.zeros_like(base),
    )


def magnitude_kept(task_vectors: Sequence[Matrix], density: float) -> float:
    """The smallest magnitude that is kept of these matrices together; infinity if none is."""
    magnitudes = np.sort(np.concatenate([np.abs(each).ravel() for each in task_vectors]))
    kept = round(density * len(magnitudes))
    return float(magnitudes[-kept]) if kept else np.inf


def ties(
    task_vectors: Sequence[Matrix],
    *,
    weights: Sequence[float],
    density: float = 0.2,
    scale: float = 1.0,
    thresholds: Sequence[float] | None = None,
) -> Matrix:
    """The update of the MLLM, whose task vector is the first.

    `thresholds` are those of the whole model, if that is trimmed together.
    """
    if thresholds is None:
        thresholds = [magnitude_kept([each], density) for each in task_vectors]
    weighed = [
        weight * np.where(np.abs(each) >= threshold, each, 0.0)
        for weight, each, threshold in zip(weights, task_vectors, thresholds, strict=True)
    ]
    sign = np.where(sum(weighed) >= 0, 1.0, -1.0)
    agree = [each * sign > 0 for each in weighed]
    total = sum(np.where(own, each, 0.0) for own, each in zip(agree, weighed, strict=True))
    share = sum(np.where(own, weight, 0.0) for own, weight in zip(agree, weights, strict=True))
    merged: Matrix = np.divide(total, share, out=np.zeros_like(total), where=share > 0)
    return scale * merged - task_vectors[0]
