"""Functions of a positive semidefinite matrix: by eigenvectors, or by a Chebyshev series.

The series needs no eigenvectors, but as many products as its degree, which grows with the square
root of the largest eigenvalue. So the leading directions are taken out first, where that pays.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]
"""A function of eigenvalues [m] float64."""
Multiply = Callable[[Tensor, Tensor], Tensor]
"""A product of two matrices."""


def through_eigenvectors(gram: Tensor, function: Function, *, count: int) -> Tensor:
    """Return f(gram) [m, m] float64 on the span of the `count` largest eigenvalues, zero elsewhere.

    `gram` [m, m] is float64. Eigenvalues that rounding made negative count as zero.
    """
    values, vectors = torch.linalg.eigh(gram)
    chosen = vectors[:, max(0, len(values) - count) :]
    weights = function(values[max(0, len(values) - count) :].clamp_min(0))
    found: Tensor = (chosen * weights) @ chosen.T
    return found


def decay_integral(steps: float) -> Function:
    """Return the function (1 - exp(-T L)) / L, which is T at L = 0, for T = `steps`."""

    def function(values: Tensor) -> Tensor:
        safe = torch.where(values > 0, values, 1.0)
        decayed: Tensor = torch.where(values > 0, -torch.expm1(-steps * values) / safe, steps)
        return decayed

    return function


def chebyshev(function: Function, bound: float, *, tolerance: float) -> Tensor:
    """Return coefficients of the Chebyshev series of `function` on [0, bound].

    The series ends where the coefficients that follow add up to less than `tolerance` times the
    largest magnitude of the function (Trefethen 2013, chapters 3 and 8).
    """
    degree = 16
    while True:
        angles = (torch.arange(degree, dtype=torch.float64) + 0.5) * (math.pi / degree)
        values = function((torch.cos(angles) + 1) * (bound / 2))
        orders = torch.arange(degree, dtype=torch.float64)
        coefficients = 2 / degree * (torch.cos(orders[:, None] * angles) @ values)
        coefficients[0] /= 2
        tails = coefficients.abs().flip(0).cumsum(0).flip(0)
        enough = tails <= tolerance * float(values.abs().max())
        if bool(enough.any()) or degree >= 4096:
            count = int(enough.long().argmax()) if bool(enough.any()) else degree
            return coefficients[: max(1, count)]
        degree *= 2


def by_series(
    left: Tensor, gram: Tensor, coefficients: Tensor, bound: float, multiply: Multiply
) -> Tensor:
    """Return left [n, m] @ f(gram), given the Chebyshev series of f on [0, bound].

    Clenshaw's recurrence takes a product with `gram` for each coefficient but the first.
    """
    first = torch.zeros_like(left)
    second = torch.zeros_like(left)
    for coefficient in coefficients.flip(0)[:-1].tolist():
        # b_k = a_k left + 2 x b_(k+1) - b_(k+2), where x = 2 gram / bound - 1.
        product = multiply(first, gram).mul_(4 / bound).sub_(first, alpha=2.0)
        product.add_(left, alpha=coefficient).sub_(second)
        first, second = product, first
    product = multiply(first, gram).mul_(2 / bound).sub_(first)
    return product.add_(left, alpha=float(coefficients[0])).sub_(second)


def leading_directions(gram: Tensor, start: Tensor, *, depth: int) -> tuple[Tensor, Tensor]:
    """Return Ritz values, descending, and vectors [m, k] of a block Krylov subspace of `gram`.

    The subspace has `depth` blocks of the width of `start` [m, b], which is orthonormalised here
    against all before it, twice. Everything is float64.
    """
    basis = torch.linalg.qr(start)[0]
    block = basis
    for _ in range(depth - 1):
        block = gram @ block
        for _ in range(2):
            block = block - basis @ (basis.T @ block)
            block = torch.linalg.qr(block)[0]
        basis = torch.cat([basis, block], dim=1)
    values, turn = torch.linalg.eigh(basis.T @ (gram @ basis))
    return values.flip(0), basis @ turn.flip(1)


def apply_function(
    left: Tensor,
    gram: Tensor,
    function: Function,
    start: Tensor,
    multiply: Multiply,
    *,
    tolerance: float,
    depth: int = 6,
) -> Tensor:
    """Return left [n, m] @ f(gram) by leading directions and a series for the rest.

    Directions count as found where the residual of their Ritz pair is below `tolerance`, as a share
    of the largest eigenvalue; they are taken out of `gram`, whose largest eigenvalue on the rest
    bounds the series. Without any, the series does it all.

    Parameters
    ----------
    left, gram : Tensor [n, m], [m, m], float64
    start : Tensor [m, b], float64
        Any block of full rank.
    """
    values, vectors = leading_directions(gram, start, depth=depth)
    residuals = (gram @ vectors - vectors * values).norm(dim=0)
    sound = (residuals <= tolerance * values[0].clamp_min(1e-300)).long().cumprod(0)
    count = int(sound.sum())
    values, vectors = values[:count], vectors[:, :count]
    inside = left @ vectors
    found = (inside * function(values.clamp_min(0))) @ vectors.T
    rest = left - inside @ vectors.T
    deflated = gram - (vectors * values) @ vectors.T
    bound = _largest(deflated, start[:, :1])
    if bound <= 0.0:
        return found + float(function(torch.zeros(1, dtype=torch.float64))) * rest
    series = chebyshev(function, bound, tolerance=tolerance)
    return found + by_series(rest, deflated, series, bound, multiply)


def _largest(gram: Tensor, start: Tensor) -> float:
    """Bound the largest eigenvalue by that of a short Krylov subspace and its residual."""
    values, vectors = leading_directions(gram, start, depth=12)
    top = vectors[:, :1]
    residual = float((gram @ top - values[0] * top).norm())
    return 1.02 * (float(values[0]) + residual)
