"""Products of task vectors that grow tile by tile, in sums whose order is always the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from lean_merge.linalg import Pass, Products, Reduction
from lean_merge.tasks.tiles import LANES, READ_ELEMENTS, STRIP_ELEMENTS, strips

_WIDTH = 32
"""Products are padded to a width that is a multiple of this."""


class Summing(Protocol):
    """A matrix whose rows are summed: its shape, and where and in which dtype that is done."""

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device

    @property
    def lanes(self) -> range:
        """Return the lanes that get at least one tile."""

    def buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return memory on the device that computes."""


class Sums:
    """The products of one task vector in one pass, which grow tile by tile."""

    def __init__(
        self,
        owner: Summing,
        role: int,
        request: Pass | None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.request = request
        self._dtype = dtype or owner.dtype
        self._buffer = owner.buffer
        if request is None:
            return
        out_features, in_features = owner.shape
        device = owner.device

        def empty(rows: int, like: Tensor | None, dtype: torch.dtype) -> Tensor | None:
            if like is None:
                return None
            return torch.empty(rows, like.shape[1], dtype=dtype, device=device)

        def lanes(name: str, like: Tensor | None) -> list[Tensor]:
            if like is None:
                return []
            # Few rows times a strip take less time than the strip times few columns.
            shape = like.shape[1], in_features
            return [
                owner.buffer(f"{name} {role} {lane}", shape, torch.float32).T
                for lane in owner.lanes
            ]

        # Strips that fit a cache are multiplied twice as fast; others do better with fewer calls.
        self._in_strips = device.type == "cpu" and self._dtype is torch.float32
        self._right = None if request.times is None else _padded(request.times)
        self._y = empty(out_features, request.gram, self._dtype)
        self._times = empty(out_features, request.times, torch.float32)
        self._z = lanes("gram", request.gram)
        self._projected = lanes("project", request.project)
        self._reduced: list[Tensor | None] = [None] * LANES
        self._dense = (
            torch.empty(out_features, in_features, dtype=torch.float32, device=device)
            if request.dense
            else None
        )

    def add(self, lane: int, rows: slice, tile: Tensor, *, first: bool) -> None:
        """Add one tile [t, in]; `first` tells whether it is the first of its lane."""
        request = self.request
        if request is None:
            return
        if self._dense is not None:
            self._dense[rows] = tile
        if request.reduce is not None:
            self._reduce(request.reduce, lane, rows, tile)
        if request.gram is None and request.project is None and self._right is None:
            return
        pieces = strips(rows, tile.shape[1], READ_ELEMENTS) if self._in_strips else [rows]
        for piece in pieces:
            part = tile[piece.start - rows.start : piece.stop - rows.start]
            self._multiply(request, lane, piece, part, first=first and piece.start == rows.start)

    def _multiply(
        self, request: Pass, lane: int, rows: slice, whole: Tensor, *, first: bool
    ) -> None:
        """Add the products of some rows; `first` tells whether they are the first of their lane."""
        part = whole
        if part.dtype is not self._dtype:
            part = self._buffer("widened", tuple(part.shape), self._dtype).copy_(part)
        if request.gram is not None and self._y is not None:
            y = torch.mm(part, request.gram, out=self._y[rows])
            self._accumulate(self._z[lane], part, y, first=first)
        if request.project is not None:
            self._accumulate(self._projected[lane], part, request.project[rows], first=first)
        if self._right is not None and self._times is not None:
            self._times[rows] = _product(whole, part, self._right)[:, : self._times.shape[1]]

    def _reduce(self, reduce: Reduction, lane: int, rows: slice, tile: Tensor) -> None:
        for strip in strips(rows, tile.shape[1], STRIP_ELEMENTS):
            part = reduce(strip, tile[strip.start - rows.start : strip.stop - rows.start])
            total = self._reduced[lane]
            self._reduced[lane] = part if total is None else total.add_(part)

    def _accumulate(self, total: Tensor, tile: Tensor, left: Tensor, *, first: bool) -> None:
        """Add tile^T left to `total`, or set `total` to it if the tile is the `first`."""
        if self._dtype is torch.float32:
            torch.addmm(total, tile.T, left, beta=0 if first else 1, out=total)
            return
        product = self._buffer("product", tuple(total.shape), self._dtype)
        torch.mm(tile.T, left, out=product)
        if first:
            total.copy_(product)
        else:
            total.add_(product)

    def finish(self, inner: Tensor | None) -> Products | None:
        """Sum the lanes in order, and return the products together with `inner`."""
        if self.request is None:
            return None
        return Products(
            y=self._y,
            z=_ordered_sum(self._z),
            projected=_ordered_sum(self._projected),
            times=self._times,
            dense=self._dense,
            reduced=_ordered_sum([lane for lane in self._reduced if lane is not None]),
            inner=inner,
        )


class InnerSums:
    """The inner products of all task vectors that ask for them, which grow tile by tile."""

    def __init__(self, owner: Summing, wanted: Sequence[bool]) -> None:
        self._wanted = [role for role, one in enumerate(wanted) if one]
        self._roles = len(wanted)
        size = len(self._wanted)
        self._lanes = [torch.zeros(size, size, dtype=torch.float64) for _ in owner.lanes]

    def add(self, lane: int, tile: Sequence[Tensor | None]) -> None:
        """Add one tile of all task vectors."""
        columns = [task_vector for role in self._wanted if (task_vector := tile[role]) is not None]
        if not columns:
            return
        for rows in strips(slice(0, columns[0].shape[0]), columns[0].shape[1], STRIP_ELEMENTS):
            strip = torch.stack([each[rows].cpu().double().view(-1) for each in columns])
            self._lanes[lane].addmm_(strip, strip.T)

    def finish(self) -> list[Tensor | None]:
        """Sum the lanes in order, and return each task vector's inner products with all."""
        total = _ordered_sum(self._lanes)
        assert total is not None
        rows: list[Tensor | None] = [None] * self._roles
        for own, role in zip(total, self._wanted, strict=True):
            row = torch.full((self._roles,), math.nan, dtype=torch.float64)
            row[self._wanted] = own
            rows[role] = row
        return rows


def _product(whole: Tensor, tile: Tensor, right: Tensor) -> Tensor:
    """Return tile @ right in the dtype of `right`.

    If that is float32 and not the arithmetic dtype, multiply `whole` strip by strip instead.
    """
    if right.dtype == tile.dtype:
        return tile @ right
    cut = strips(slice(0, whole.shape[0]), whole.shape[1], READ_ELEMENTS)
    return torch.cat([whole[rows].to(right.dtype) @ right for rows in cut])


def _padded(columns: Tensor) -> Tensor:
    """Append zero columns to `columns` [in, r] up to a multiple of `_WIDTH`.

    Kernels are compiled and kept for every shape, and r differs from weight to weight.
    """
    missing = -columns.shape[1] % _WIDTH
    return torch.nn.functional.pad(columns, (0, missing)) if missing else columns


def _ordered_sum(lanes: list[Tensor]) -> Tensor | None:
    if not lanes:
        return None
    total = lanes[0].clone(memory_format=torch.contiguous_format)
    for lane in lanes[1:]:
        total += lane
    return total
