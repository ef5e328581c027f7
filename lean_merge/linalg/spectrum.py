"""Whole spectra of matrices that fit: the reference, and the small weights' shortest way."""

from __future__ import annotations

import torch
from torch import Tensor

from lean_merge.linalg.passes import gram64, has_float64

_RANK_EPS = torch.finfo(torch.float32).eps


def exact_spectrum(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """All singular values [min(out, in)] and the leading `count` right vectors [in, count].

    Eigen-decomposition in float64 of the smaller Gram matrix of `matrix` [out, in]; singular values
    below 1e-8 of the largest are lost in rounding, far below the numerical rank's threshold.
    Values are float64 on the CPU, vectors float32.
    """
    device = matrix.device
    work = matrix if has_float64(device) else matrix.cpu()
    wide = matrix.shape[1] > matrix.shape[0]
    tall = work.T if wide else work
    # A large eigenproblem is the device's, if it can.
    values, vectors = torch.linalg.eigh(gram64(tall, tall).to(work.device))
    sigma, leading = values.flip(0).clamp_min(0).sqrt(), vectors.flip(1)[:, :count]
    if wide:
        leading = _images(tall, leading, sigma[:count])
    return sigma.cpu(), leading.float().to(device)


def _images(matrix: Tensor, vectors: Tensor, sigma: Tensor) -> Tensor:
    """matrix @ vectors / sigma [n, k] in float32.

    Its error of eps sigma_1 / sigma_i is far below 1e-3 wherever sigma_i counts for the rank.
    """
    inverse = torch.where(sigma > 0, 1 / sigma, torch.zeros_like(sigma))
    return (matrix @ vectors.float()) * inverse.float()


def numerical_rank(sigma: Tensor, shape: tuple[int, int]) -> int:
    """Count of sigma_i > sigma_1 * max(out, in) * eps, eps that of float32 (method.md, step 2).

    Task vectors are differences of numbers stored with at most float32's precision.
    """
    if sigma.numel() == 0 or float(sigma[0]) == 0.0:
        return 0
    return int((sigma > sigma[0] * max(shape) * _RANK_EPS).sum())
