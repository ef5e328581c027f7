"""Compute whole spectra of matrices that fit in memory, as a reference and for small weights."""

from __future__ import annotations

import torch
from torch import Tensor

from lean_merge.linalg.passes import gram64, has_float64

_RANK_EPS = torch.finfo(torch.float32).eps


def exact_spectrum(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return all singular values [min(out, in)] and the leading `count` right vectors [in, count].

    They come from a float64 eigendecomposition of the smaller Gram matrix of `matrix` [out, in].
    Singular values below 1e-8 of the largest are lost in rounding, which is far below the numerical
    rank's threshold. The values are float64 on the CPU, and the vectors are float32.
    """
    device = matrix.device
    work = matrix if has_float64(device) else matrix.cpu()
    wide = matrix.shape[1] > matrix.shape[0]
    tall = work.T if wide else work
    # The device solves the eigenproblem if it has float64.
    values, vectors = torch.linalg.eigh(gram64(tall, tall).to(work.device))
    sigma, leading = values.flip(0).clamp_min(0).sqrt(), vectors.flip(1)[:, :count]
    if wide:
        # Their error, eps sigma_1 / sigma_i, is far below 1e-3 if sigma_i counts for the rank.
        inverse = torch.where(sigma > 0, 1 / sigma, 0.0)[:count]
        leading = (tall @ leading.float()) * inverse.float()
    return sigma.cpu(), leading.float().to(device)


def numerical_rank(sigma: Tensor, shape: tuple[int, int]) -> int:
    """Count the sigma_i > sigma_1 * max(out, in) * eps, with float32's eps (method.md, step 2).

    Task vectors are differences of numbers stored with at most float32's precision.
    """
    if sigma.numel() == 0 or float(sigma[0]) == 0.0:
        return 0
    return int((sigma > sigma[0] * max(shape) * _RANK_EPS).sum())
