"""Whole spectra of matrices that fit: the reference, and the small weights' shortest way."""

from __future__ import annotations

import torch
from torch import Tensor

from lean_merge.linalg.passes import gram64

_RANK_EPS = torch.finfo(torch.float32).eps


def exact_spectrum(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """All singular values [min(out, in)] and the leading `count` right vectors [in, count].

    Eigen-decomposition in float64 of the smaller Gram matrix of `matrix` [out, in]; singular values
    below 1e-8 of the largest are lost in rounding, far below the numerical rank's threshold.
    Values are float64, vectors float32.
    """
    out_features, in_features = matrix.shape
    if in_features <= out_features:
        values, vectors = torch.linalg.eigh(gram64(matrix, matrix))
        sigma = values.flip(0).clamp_min(0).sqrt()
        return sigma, vectors.flip(1)[:, :count].float()
    transposed = matrix.T
    values, left = torch.linalg.eigh(gram64(transposed, transposed))
    sigma = values.flip(0).clamp_min(0).sqrt()
    leading = sigma[:count]
    inverse = torch.where(leading > 0, 1 / leading, torch.zeros_like(leading))
    vectors = torch.empty(in_features, leading.numel(), device=matrix.device)
    weights = left.flip(1)[:, :count] * inverse
    for start in range(0, in_features, 2048):
        rows = slice(start, start + 2048)
        vectors[rows] = (transposed[rows].double() @ weights).float()
    return sigma, vectors


def numerical_rank(sigma: Tensor, shape: tuple[int, int]) -> int:
    """Count of sigma_i > sigma_1 * max(out, in) * eps, eps that of float32 (method.md, step 2).

    Task vectors are differences of numbers stored with at most float32's precision.
    """
    if sigma.numel() == 0 or float(sigma[0]) == 0.0:
        return 0
    return int((sigma > sigma[0] * max(shape) * _RANK_EPS).sum())
