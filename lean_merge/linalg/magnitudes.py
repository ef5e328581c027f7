"""Exact order statistics of magnitudes, from counts of their bits.

The bits of a floating-point number, its sign left out, are ordered as its magnitude is. So counts
of bit patterns, which add up over rows and over weights, tell the k-th largest magnitude exactly:
in one round for numbers of 16 bits, whose magnitudes have 32,768 patterns, and in two for float32,
where the first round counts by the upper bits and the second by the lower ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from functools import partial

import torch
from torch import Tensor

from lean_merge.linalg.passes import Pass, Products

UPPER = 1 << 15
"""Patterns of the upper 15 bits of a magnitude, which are all of it in 16-bit dtypes."""
LOWER = 1 << 16
"""Patterns of the lower 16 bits of a magnitude in float32."""

Ranks = Callable[[int], Sequence[int]]
"""Given how many numbers there are, which of them are asked for: 1 for the largest."""


def count_upper(rows: slice, values: Tensor) -> Tensor:
    """Counts [32768] int64 of `values` by the upper 15 bits of their magnitudes.

    Parameters
    ----------
    rows
        Not used; a `Reduction` is told which rows it is given.
    values : Tensor of float32, bfloat16 or float16
    """
    del rows
    if values.dtype is torch.float32:
        bits = (values.view(torch.int32) >> 16) & (UPPER - 1)
    else:
        bits = values.view(torch.int16) & (UPPER - 1)
    return torch.bincount(bits.view(-1), minlength=UPPER)


def count_lower(rows: slice, values: Tensor, *, uppers: Sequence[int]) -> Tensor:
    """Counts [len(uppers), 65536] int64 of float32 `values` by the lower 16 bits.

    Row i counts those whose magnitudes have the upper bits `uppers[i]`.
    """
    del rows
    bits = values.view(torch.int32).view(-1)
    pattern = (bits >> 16) & (UPPER - 1)
    return torch.stack(
        [torch.bincount(bits[pattern == upper] & (LOWER - 1), minlength=LOWER) for upper in uppers]
    )


def largest_magnitudes(
    ranks: Ranks, dtype: torch.dtype, *, count: int
) -> Generator[Sequence[Pass | None], Sequence[Products | None], tuple[tuple[float, ...], ...]]:
    """The `ranks`-th largest magnitudes of each of `count` matrices of `dtype`.

    The generator asks for one pass, or for two where `dtype` is float32. What it is sent may be the
    products of one weight, or their sums over many: the magnitudes are then those of all.

    Returns
    -------
    tuple of tuple of float
        For each matrix its magnitudes, in the order of `ranks`; infinity for the rank 0.
    """
    got = yield [Pass(reduce=count_upper)] * count
    places = [_places(products, ranks) for products in got]
    if dtype is torch.float32:
        uppers = [[bits for bits, _ in each] for each in places]
        got = yield [Pass(reduce=partial(count_lower, uppers=each)) for each in uppers]
        places = [
            [
                (place[0] << 16 | _kth(counts, place[1])[0], 0)
                for place, counts in zip(each, _reduced(products), strict=True)
            ]
            for each, products in zip(places, got, strict=True)
        ]
    return tuple(tuple(_magnitude(bits, dtype) for bits, _ in each) for each in places)


def counting_bytes(matrices: int, ranks: int) -> int:
    """Bytes that `largest_magnitudes` holds of so many matrices, with partial sums, at most."""
    return matrices * max(1, ranks) * 8 * LOWER * 8


def _places(products: Products | None, ranks: Ranks) -> list[tuple[int, int]]:
    """For each rank the upper bits of its magnitude, and its rank among those that share them."""
    counts = _reduced(products)
    return [_kth(counts, rank) for rank in ranks(int(counts.sum()))]


def _kth(counts: Tensor, rank: int) -> tuple[int, int]:
    """The bin of the `rank`-th largest, counted from 1, and its rank inside that bin."""
    down_to = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(down_to, rank))
    above = int(down_to[place - 1]) if place else 0
    return counts.numel() - 1 - place, rank - above


def _reduced(products: Products | None) -> Tensor:
    assert products is not None and products.reduced is not None
    return products.reduced.cpu()


def _magnitude(bits: int, dtype: torch.dtype) -> float:
    """The magnitude of these bits; infinity for those of NaN, which stand for the rank 0."""
    integer = torch.int32 if dtype.itemsize == 4 else torch.int16
    magnitude = float(torch.tensor([bits], dtype=integer).view(dtype))
    return math.inf if math.isnan(magnitude) else magnitude
