"""Cut a product of two factors to the smallest sufficient rank, without forming the product."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_NOTHING = 1e-14
"""A direction with a smaller share of the energy is rounding error of the Gram matrices."""


@dataclass(frozen=True, slots=True)
class Truncation:
    """The product left @ right cut to rank k, which is (left @ of_left) @ (of_right @ right).

    Attributes
    ----------
    of_left : Tensor [r, k], of_right : Tensor [k, r], float32
        of_right @ right has orthonormal rows.
    error : float
        Relative Frobenius norm of what was cut off.
    """

    of_left: Tensor
    of_right: Tensor
    error: float

    @property
    def rank(self) -> int:
        """Return the rank k."""
        return int(self.of_left.shape[1])


def truncate(left: Tensor, right: Tensor, *, error: float, rank: int | None = None) -> Truncation:
    """Cut left [out, r] @ right [r, in] to `rank`, or to the smallest with at most `error`.

    The singular value decomposition of the product comes from the two Gram matrices [r, r] in
    float64, so the cut is the best of its rank (Eckart and Young 1936) and its error exact up to
    about 1e-7.

    Parameters
    ----------
    left, right : Tensor [out, r], [r, in], float32
    error : float
        The largest relative Frobenius norm that may be cut off, if no rank is given.
    rank : int, optional
        Keep this many directions, or all if there are fewer.
    """
    of_left, of_right = _gram(left), _gram(right.T)
    squares, axes = torch.linalg.eigh(of_right)
    kept = squares > _NOTHING * squares[-1]
    root = squares[kept].sqrt()
    to_basis, from_basis = axes[:, kept] * root, axes[:, kept] / root
    energy, turn = torch.linalg.eigh(to_basis.T @ of_left @ to_basis)
    energy, turn = energy.flip(0).clamp(min=0.0), turn.flip(1)
    # tails[k] is the energy that is cut off if k = 0 .. r directions are kept; the smallest are
    # added first.
    tails = torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)])
    total = float(tails[0])
    if total == 0.0:
        count = 0
    elif rank is None:
        count = int((tails > error**2 * total).sum())
    else:
        count = min(rank, int((energy > _NOTHING * total).sum()))
    return Truncation(
        of_left=(to_basis @ turn[:, :count]).float(),
        of_right=(from_basis @ turn[:, :count]).T.float().contiguous(),
        error=math.sqrt(float(tails[count]) / total) if total else 0.0,
    )


_STRIP = 1 << 17
"""At most about this many numbers of a factor are held in float64 at once."""


def _gram(factor: Tensor) -> Tensor:
    """Return factor.T @ factor [r, r] in float64 on the CPU."""
    columns = factor.shape[1]
    gram = torch.zeros(columns, columns, dtype=torch.float64)
    height = max(1, _STRIP // max(1, columns))
    for start in range(0, factor.shape[0], height):
        strip = factor[start : start + height].cpu().double()
        gram.addmm_(strip.T, strip)
    return gram
