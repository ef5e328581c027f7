"""Exact order statistics of magnitudes, against sorting."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lean_merge.linalg import Pass, Products
from lean_merge.linalg.magnitudes import largest_magnitudes

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def found(matrices: Sequence[Sequence[Tensor]], ranks: Sequence[int]) -> list[list[float]]:
    """The magnitudes of each matrix, which is given in pieces; and how many passes it took."""
    asked = largest_magnitudes([lambda count: ranks] * len(matrices), matrices[0][0].dtype)
    wanted = next(asked)
    while True:
        sums: list[Products | None] = []
        for pieces, request in zip(matrices, wanted, strict=True):
            assert isinstance(request, Pass) and request.reduce is not None
            parts = [request.reduce(slice(0, len(piece)), piece) for piece in pieces]
            sums.append(Products(reduced=sum(parts[1:], parts[0])))
        try:
            wanted = asked.send(sums)
        except StopIteration as end:
            return [list(each) for each in end.value]


def by_sorting(pieces: Sequence[Tensor], ranks: Sequence[int]) -> list[float]:
    ordered = torch.cat([each.flatten() for each in pieces]).float().abs().sort(descending=True)
    return [float(ordered.values[rank - 1]) if rank else torch.inf for rank in ranks]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_rank_of_random_numbers(dtype: torch.dtype):
    """Over many magnitudes, with many ties, zeros of both signs and subnormal numbers."""
    generator = torch.Generator().manual_seed(1)
    wide = torch.randn(50, 40, generator=generator) * torch.logspace(-40, 4, 40)
    few = torch.randint(-3, 4, (50, 40), generator=generator) * -0.125
    matrices = [[each[:7].to(dtype), each[7:].to(dtype)] for each in (wide, few)]
    ranks = [0, 1, 2, 400, 400, 1999, 2000]
    assert found(matrices, ranks) == [by_sorting(each, ranks) for each in matrices]


@settings(deadline=None)
@given(
    st.lists(st.floats(width=16, allow_nan=False, allow_infinity=False), min_size=1, max_size=30),
    st.data(),
    st.sampled_from(DTYPES),
)
def test_any_numbers(numbers: list[float], data: st.DataObject, dtype: torch.dtype):
    values = torch.tensor([numbers]).to(dtype)
    ranks = data.draw(st.lists(st.integers(0, len(numbers)), min_size=1, max_size=3))
    assert found([[values]], ranks) == [by_sorting([values], ranks)]
