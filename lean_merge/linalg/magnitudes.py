"""Find the k-th largest magnitude exactly by counting bit patterns.

Without the sign, the bits of floating-point numbers are in the same order as their magnitudes. So
counts of bit patterns, which add up over rows and over weights, tell the k-th largest magnitude
exactly. For 16-bit numbers, whose magnitudes have 32,768 patterns, one round of counting suffices.
For float32, a first round counts by the upper bits and a second one by the lower bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lean_merge.linalg.passes import Pass, Products

UPPER = 1 << 15
"""The number of patterns of a magnitude's upper 15 bits; 16-bit dtypes have no others."""
LOWER = 1 << 16
"""The number of patterns of the lower 16 bits of a magnitude in float32."""

Ranks = Callable[[int], Sequence[int]]
"""A function from how many numbers there are to the ranks to find; rank 1 is the largest."""


def count_upper(rows: slice, values: Tensor) -> Tensor:
    """Count `values` by the upper 15 bits of their magnitudes: [32768] int64.

    Parameters
    ----------
    rows
        This is not used, but every `Reduction` is given it.
    values : Tensor of float32, bfloat16 or float16
    """
    del rows
    bits = _halves(values)[:, -1] & (UPPER - 1)
    return torch.from_numpy(np.bincount(bits, minlength=UPPER))


def count_lower(rows: slice, values: Tensor, *, uppers: Sequence[int]) -> Tensor:
    """Count float32 `values` by their lower 16 bits: [len(uppers), 65536] int64.

    Row i counts those whose magnitudes have the upper bits `uppers[i]`.
    """
    del rows
    lower, upper = _halves(values).T
    pattern = upper & (UPPER - 1)
    found = [lower[np.flatnonzero(pattern == each)] for each in uppers]
    return torch.from_numpy(np.stack([np.bincount(each, minlength=LOWER) for each in found]))


def _halves(values: Tensor) -> NDArray[np.uint16]:
    """Return the 16-bit words [n, 1 or 2] of `values`; the last of each number has its sign."""
    words = values.contiguous().view(torch.int16).cpu().numpy().view(np.uint16)
    return words.reshape(-1, values.dtype.itemsize // 2)


def largest_magnitudes(
    ranks: Sequence[Ranks | None], dtype: torch.dtype
) -> Generator[Sequence[Pass | None], Sequence[Products | None], tuple[tuple[float, ...], ...]]:
    """Find the k-th largest magnitudes of several matrices of `dtype`, each for its own `ranks` k.

    A matrix whose ranks are None is not read.

    The generator asks for one pass, or for two if `dtype` is float32. It may be sent the products
    of one weight, or their sums over many weights; then the magnitudes are those of all together.

    Returns
    -------
    tuple of tuple of float
        For each matrix, its magnitudes in the order of `ranks`; rank 0 gives infinity.
    """
    got = yield [own and Pass(reduce=count_upper) for own in ranks]
    pairs = zip(got, ranks, strict=True)
    places = [_places(products, own) if own else [] for products, own in pairs]
    if dtype is torch.float32:
        uppers = [[bits for bits, _ in each] for each in places]
        got = yield [
            Pass(reduce=partial(count_lower, uppers=each)) if each else None for each in uppers
        ]
        places = [
            [
                (place[0] << 16 | _kth(counts, place[1])[0], 0)
                for place, counts in zip(each, _reduced(products) if each else (), strict=True)
            ]
            for each, products in zip(places, got, strict=True)
        ]
    return tuple(tuple(_magnitude(bits, dtype) for bits, _ in each) for each in places)


def counting_bytes(matrices: int, ranks: int) -> int:
    """Return how many bytes `largest_magnitudes` holds at most, with partial sums."""
    return matrices * max(1, ranks) * 8 * LOWER * 8


def _places(products: Products | None, ranks: Ranks) -> list[tuple[int, int]]:
    """Return for each rank its magnitude's upper bits, and its rank among those that share them."""
    counts = _reduced(products)
    return [_kth(counts, rank) for rank in ranks(int(counts.sum()))]


def _kth(counts: Tensor, rank: int) -> tuple[int, int]:
    """Return the bin that holds the `rank`-th largest, counted from 1, and its rank in that bin."""
    down_to = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(down_to, rank))
    above = int(down_to[place - 1]) if place else 0
    return counts.numel() - 1 - place, rank - above


def _reduced(products: Products | None) -> Tensor:
    assert products is not None and products.reduced is not None
    return products.reduced.cpu()


def _magnitude(bits: int, dtype: torch.dtype) -> float:
    """Return the magnitude that has these bits; the bits of NaN stand for rank 0: infinity."""
    integer = torch.int32 if dtype.itemsize == 4 else torch.int16
    magnitude = float(torch.tensor([bits], dtype=integer).view(dtype))
    return math.inf if math.isnan(magnitude) else magnitude
