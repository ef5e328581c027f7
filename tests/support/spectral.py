"""Naive whole-matrix float64 twins of the methods that decompose task vectors.

Written from the formulas of the papers with numpy alone; nothing here is shared with the package.
Task vectors are all [out, in], the MLLM's first, and what is returned is the MLLM's update.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from support.oracle import Matrix

Svd = tuple[Matrix, Matrix, Matrix]


def svd(matrix: Matrix) -> Svd:
    """U, S and V^T, thin."""
    left, sigma, right = np.linalg.svd(matrix, full_matrices=False)
    return left, sigma, right


def rank_one(
    task_vectors: Sequence[Matrix], *, scale: float = 0.05, rank: int = 1, stretch: bool = True
) -> Matrix:
    """The sum over experts of their leading directions."""
    update = np.zeros_like(task_vectors[0])
    for task_vector in task_vectors[1:]:
        left, sigma, right = svd(task_vector)
        part = (left[:, :rank] * sigma[:rank]) @ right[:rank]
        if stretch and np.linalg.norm(part):
            part = part * (np.linalg.norm(task_vector) / np.linalg.norm(part))
        update = update + scale * part
    return update


def star(task_vectors: Sequence[Matrix], *, eta: float = 0.4, scale: float = 1.0) -> Matrix:
    """The sum over experts of their large singular values, rescaled."""
    update = np.zeros_like(task_vectors[0])
    for task_vector in task_vectors[1:]:
        left, sigma, right = svd(task_vector)
        if not sigma.sum():
            continue
        kept = 1
        while sigma[:kept].sum() < eta * sigma.sum():
            kept += 1
        stretched = sigma[:kept] * sigma.sum() / sigma[:kept].sum()
        update = update + scale * (left[:, :kept] * stretched) @ right[:kept]
    return update


def nearest_orthogonal(matrix: Matrix) -> Matrix:
    """The polar factor, without directions that are null."""
    left, sigma, right = svd(matrix)
    kept = sigma > 1e-5 * sigma[0]
    return left[:, kept] @ right[kept]


def tsv_m(task_vectors: Sequence[Matrix], *, scale: float = 1.0, rank: int | None = None) -> Matrix:
    """Leading directions of all, made orthogonal."""
    kept = min(task_vectors[0].shape) // len(task_vectors) if rank is None else rank
    lefts, sigmas, rights = [], [], []
    for task_vector in task_vectors:
        left, sigma, right = svd(task_vector)
        count = min(kept, int((sigma > 1e-5 * sigma[0]).sum())) if sigma[0] else 0
        lefts.append(left[:, :count])
        sigmas.append(sigma[:count])
        rights.append(right[:count])
    left = nearest_orthogonal(np.hstack(lefts))
    right = nearest_orthogonal(np.vstack(rights))
    return scale * (left * np.concatenate(sigmas)) @ right - task_vectors[0]


def iso_c(task_vectors: Sequence[Matrix], *, scale: float = 1.0) -> Matrix:
    """All directions of the sum at one size, but those beyond its numerical rank in float32."""
    left, sigma, right = svd(sum(task_vectors))  # type: ignore[arg-type]
    kept = sigma > sigma[0] * max(task_vectors[0].shape) * np.finfo(np.float32).eps
    return scale * sigma.mean() * left[:, kept] @ right[kept] - task_vectors[0]


def wudi(
    task_vectors: Sequence[Matrix],
    *,
    scale: float = 1.0,
    steps: float = 300.0,
    keep: float = 0.85,
    start: str = "sum",
) -> Matrix:
    """The end of a gradient descent, by the eigenvectors of C [in, in]."""
    first: Matrix = sum(task_vectors)  # type: ignore[assignment]
    first = first if start == "sum" else first / len(task_vectors)
    live = [each for each in task_vectors if each.any()]
    c = sum(each.T @ each / np.sum(each**2) for each in live)
    d = sum(each @ each.T @ each / np.sum(each**2) for each in live)
    values, vectors = np.linalg.eigh(c)
    count = round(keep * len(values))
    q = vectors[:, len(values) - count :]
    eigen = np.clip(values[len(values) - count :], 0, None)
    f = -np.expm1(-steps * eigen)
    ratio = np.array([g / e if e > 1e-300 else steps for g, e in zip(f, eigen, strict=True)])
    merged = first - (first @ q * f) @ q.T + (d @ q * ratio) @ q.T
    return scale * merged - task_vectors[0]


def optmerge(
    task_vectors: Sequence[Matrix],
    *,
    scale: float = 1.0,
    steps: float = 300.0,
    start: str = "mean",
    rank: int | None = None,
) -> Matrix:
    """The same on task vectors that are cut."""
    kept = min(task_vectors[0].shape) // len(task_vectors) if rank is None else rank
    cut = []
    for task_vector in task_vectors:
        left, sigma, right = svd(task_vector)
        cut.append((left[:, :kept] * sigma[:kept]) @ right[:kept])
    return wudi(cut, scale=scale, steps=steps, keep=1.0, start=start) + cut[0] - task_vectors[0]


def svc(
    task_vectors: Sequence[Matrix],
    *,
    scale: float = 1.0,
    alpha: float | None = None,
    rank: int | None = None,
) -> Matrix:
    """Singular values of the sum, each divided by how often it was counted."""
    count = len(task_vectors)
    alpha = 1 / count if alpha is None else alpha
    left, sigma, right = svd(sum(task_vectors))  # type: ignore[arg-type]
    calibrated = sigma.copy()
    for j in range(len(sigma) if rank is None else rank):
        parts = [left[:, j] @ each for each in task_vectors]
        whole = sum(parts)
        shares = [float(whole @ each / (each @ each)) if each.any() else 0.0 for each in parts]
        calibrated[j] *= count / sum(max(alpha, share) for share in shares)
    return scale * (left * calibrated) @ right - task_vectors[0]


SPECTRAL: dict[str, Callable[..., Any]] = {
    "rank_one": rank_one,
    "star": star,
    "tsv_m": tsv_m,
    "iso_c": iso_c,
    "wudi": wudi,
    "optmerge": optmerge,
    "svc": svc,
}
