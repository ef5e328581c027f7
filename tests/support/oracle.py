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


def uniform(shape: tuple[int, int], *, seed: int, name: str, purpose: str) -> Matrix:
    """The random numbers of a whole weight: 32 bits each of one stream, rounded to float32."""
    rows, columns = shape
    key = hashlib.sha256(f"{seed}\0{name}\0{purpose}".encode()).digest()

    class Key(np.random.bit_generator.ISeedSequence):
        def generate_state(self, n_words: int, dtype: object = np.uint32) -> object:
            return np.frombuffer(key, dtype=dtype)[:n_words]

    draws = (columns + 1) // 2
    raw = np.random.PCG64(Key()).random_raw(rows * draws)
    halves = np.stack([raw & 0xFFFFFFFF, raw >> 32], axis=1).reshape(rows, 2 * draws)
    signed = halves.astype(np.uint32).astype(np.int32).astype(np.float32)
    numbers = signed * np.float32(2.0**-32) + np.float32(0.5)
    return numbers[:, :columns].astype(np.float64)


def in_band(task_vector: Matrix, density: float, gamma: float) -> Matrix:
    """What Model Breadcrumbs keeps: neither the largest entries nor the small ones."""
    count = task_vector.size
    kept = round(density * count)
    dropped = min(round(gamma * count), count - kept)
    magnitudes = np.abs(task_vector)
    middle = np.sort(magnitudes.ravel())[::-1][dropped : dropped + kept]
    if not kept:
        return np.zeros_like(task_vector)
    stays = (magnitudes >= middle.min()) & (magnitudes <= middle.max())
    return np.where(stays, task_vector, 0.0)


def dropped(
    task_vector: Matrix, probabilities: Matrix | float, chance: Matrix, rescale: str
) -> Matrix:
    """What DARE and DELLA keep, if each entry stays with its probability."""
    kept = np.where(chance < probabilities, task_vector, 0.0)
    if rescale == "density":
        return kept / probabilities
    if rescale == "l1" and kept.any():
        return kept * (np.abs(task_vector).sum() / np.abs(kept).sum())
    return kept


def della_probabilities(task_vector: Matrix, density: float, epsilon: float) -> Matrix | float:
    """The probability with which each entry stays, by the rank in its row."""
    if density == 1 or task_vector.shape[1] == 1:
        return density
    order = np.argsort(np.abs(task_vector), axis=1, kind="stable")
    ranks = np.argsort(order, axis=1, kind="stable")
    return density - epsilon + 2 * epsilon * ranks / (task_vector.shape[1] - 1)


def merged(
    sparse: Sequence[Matrix],
    *,
    weights: Sequence[float],
    elects: bool,
    normalize: bool,
    scale: float = 1.0,
) -> Matrix:
    """The merged task vector of sparse ones."""
    weighed = [weight * each for weight, each in zip(weights, sparse, strict=True)]
    if not elects:
        return scale * sum(weighed) / (sum(weights) if normalize else 1.0)
    sign = np.where(sum(weighed) >= 0, 1.0, -1.0)
    agree = [each * sign > 0 for each in weighed]
    total = sum(np.where(own, each, 0.0) for own, each in zip(agree, weighed, strict=True))
    share = sum(np.where(own, weight, 0.0) for own, weight in zip(agree, weights, strict=True))
    return scale * (total / np.where(share > 0, share, 1.0) if normalize else total)


def slerp(mllm: Matrix, expert: Matrix, t: float) -> Matrix:
    """The weight at `t` on the great circle, or on the line where both are nearly parallel."""
    lengths = [float(np.linalg.norm(each)) for each in (mllm, expert)]
    cosine = float(
        (mllm * expert).sum() / np.prod([each if each > 1e-8 else 1 for each in lengths])
    )
    if abs(cosine) > 0.9995:
        return (1 - t) * mllm + t * expert
    angle = np.arccos(cosine)
    return (np.sin((1 - t) * angle) * mllm + np.sin(t * angle) * expert) / np.sin(angle)
