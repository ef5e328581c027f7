"""Decompose whole matrices that fit in memory, and products of factors, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lean_merge.linalg.passes import CHUNK, gram64, has_float64
from lean_merge.linalg.spectrum import numerical_rank

_NULL = 1e-10
"""A Gram matrix is singular in directions whose eigenvalue is below this share of the largest."""


@dataclass(frozen=True, slots=True)
class Decomposed:
    """The leading singular triplets of a matrix [out, in].

    Attributes
    ----------
    left, right : Tensor [out, k], [in, k]
        Singular vectors as columns.
    sigma : Tensor [k], float64, on the CPU
        Singular values, descending.
    spectrum : Tensor, float64, on the CPU
        All singular values that are known, descending.
    rank : int
        Numerical rank of the whole matrix.
    """

    left: Tensor
    right: Tensor
    sigma: Tensor
    spectrum: Tensor
    rank: int


def decompose(matrix: Tensor, count: int, *, dtype: torch.dtype) -> Decomposed:
    """Return the leading `count` singular triplets of `matrix` [out, in], with vectors in `dtype`.

    They come from an eigendecomposition of the smaller Gram matrix in float64. Directions beyond
    the numerical rank are left out, because they are arbitrary.
    """
    wide = matrix.shape[1] > matrix.shape[0]
    tall = matrix.T if wide else matrix
    values, vectors = _eigh(gram64(tall, tall), matrix.device)
    sigma = values.flip(0).clamp_min(0).sqrt()
    rank = numerical_rank(sigma, (matrix.shape[0], matrix.shape[1]))
    kept = min(rank, count)
    near = vectors.flip(1)[:, :kept]
    far = product64(tall, near / sigma[:kept], dtype=dtype)
    near = near.to(dtype).to(matrix.device)
    left, right = (near, far) if wide else (far, near)
    return Decomposed(left, right, sigma[:kept].cpu(), sigma.cpu(), rank)


def decompose_product(images: Tensor, vectors: Tensor, *, count: int, rank: int) -> Decomposed:
    """Return the `count` leading singular triplets of images @ vectors.T.

    Parameters
    ----------
    images, vectors : Tensor [out, r], [in, r], float32
        Factors; the columns of `vectors` are orthonormal.
    rank : int
        The numerical rank to report; the product itself may be a part of a larger matrix.
    """
    values, turn = torch.linalg.eigh(gram64(images, images))
    sigma, turn = values.flip(0).clamp_min(0).sqrt(), turn.flip(1)
    count = min(count, int((sigma > 0).sum()))
    sigma, turn = sigma[:count], turn[:, :count]
    left = images @ (turn / sigma).float().to(images.device)
    return Decomposed(left, vectors @ turn.float().to(vectors.device), sigma, sigma, rank)


def inverse_root(gram: Tensor) -> Tensor:
    """Return the pseudo-inverse of the square root of a positive semidefinite `gram` [m, m].

    X @ inverse_root(X.T @ X) is the polar factor of X, the nearest matrix with orthonormal columns
    (Higham 1986). Directions in which X is singular, for which there is no nearest, are left at
    zero.
    """
    values, vectors = torch.linalg.eigh(gram)
    kept = values > _NULL * values[-1:]
    vectors = vectors[:, kept]
    root: Tensor = (vectors / values[kept].sqrt()) @ vectors.T
    return root


def product64(first: Tensor, second: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Return first [n, m] @ second [m, k] in `dtype` on the device of `first`.

    The product is computed in float64, some rows at a time, where `second` is float64.
    """
    out = torch.empty(first.shape[0], second.shape[1], dtype=dtype, device=first.device)
    for start in range(0, first.shape[0], CHUNK):
        rows = slice(start, start + CHUNK)
        out[rows] = first[rows].to(second.device, second.dtype) @ second
    return out


def _eigh(gram: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Solve the eigenproblem of `gram` on `device`, or on the CPU where that lacks float64."""
    values, vectors = torch.linalg.eigh(gram.to(device) if has_float64(device) else gram)
    return values, vectors


__all__ = ["Decomposed", "decompose", "decompose_product", "inverse_root", "product64"]
