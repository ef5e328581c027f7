"""The task vectors of one logical weight, tile by tile, resident or read again for every pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lean_merge.budget import LANES, strip_rows, tile_rows
from lean_merge.checkpoints import (
    RowSlice,
    TensorReader,
    TensorSpec,
    as_bytes,
    common_dtype,
    torch_dtype,
)
from lean_merge.engine.workers import Workers
from lean_merge.errors import DataError
from lean_merge.linalg import Pass, Products

_WIDTH = 32
"""Widths of products are padded to a multiple of this."""
_UNDERFLOWN = 1e-30
"""Squares of norms that float32 holds only in part."""


@dataclass(frozen=True, slots=True)
class Sources:
    """Where one logical weight lies in the checkpoints: rows `rows` of each tensor [*, in]."""

    rows: RowSlice
    base: TensorSpec
    others: tuple[TensorSpec, ...]
    """The MLLM's tensor, then the experts'."""

    @property
    def shape(self) -> tuple[int, int]:
        """out, in of the logical weight."""
        return self.rows.stop - self.rows.start, self.base.shape[1]


class TaskVectors:
    """Row tiles of W_role - W_0 for the MLLM and every expert.

    Parameters
    ----------
    sources
        Where the numbers are.
    reader, workers
        Who reads, and who computes.
    arena : Tensor, uint8, 1-D
        Reused memory for resident tiles, on the device of the arithmetic.
    resident : int
        How many tiles, from the first, to keep there.
    dtype : torch.dtype
        Arithmetic dtype of the products.
    """

    def __init__(
        self,
        sources: Sources,
        *,
        reader: TensorReader,
        workers: Workers,
        arena: Tensor,
        resident: int,
        dtype: torch.dtype,
    ) -> None:
        self.sources = sources
        self.shape = sources.shape
        self.dtype = dtype
        self.device = arena.device
        self.task_dtype = common_dtype(s.dtype for s in (sources.base, *sources.others))
        self._reader = reader
        self._workers = workers
        rows = tile_rows(self.shape[1])
        self.tiles = [
            slice(start, min(start + rows, self.shape[0]))
            for start in range(0, self.shape[0], rows)
        ]
        self._resident = self._lay_out(arena, min(resident, len(self.tiles)))
        self._formed = [False] * len(self.tiles)
        self._squares: list[list[float | None]] = [[None] * len(sources.others) for _ in self.tiles]

    def _lay_out(self, arena: Tensor, count: int) -> list[list[Tensor]]:
        views, offset = [], 0
        for tile in self.tiles[:count]:
            shape = (tile.stop - tile.start, self.shape[1])
            size = math.prod(shape) * self.task_dtype.itemsize
            of_tile = []
            for _ in self.sources.others:
                of_tile.append(arena[offset : offset + size].view(self.task_dtype).view(shape))
                offset += size
            views.append(of_tile)
        return views

    def squared_norms(self) -> list[float]:
        """||W_role - W_0||_F^2 of every role; NaN for one whose tiles were not all read."""
        return [
            math.fsum(math.nan if square is None else square for square in of_role)
            for of_role in zip(*self._squares, strict=True)
        ]

    def tile(self, index: int, wanted: Sequence[bool]) -> list[Tensor | None]:
        """The wanted task vectors of one tile, in this thread; valid until its next call."""
        if index < len(self._resident):
            if not self._formed[index]:
                self._form(index, [True] * len(wanted))
                self._formed[index] = True
            return [*self._resident[index]]
        return self._form(index, wanted)

    def _form(self, index: int, wanted: Sequence[bool]) -> list[Tensor | None]:
        tile = self.tiles[index]
        shape = (tile.stop - tile.start, self.shape[1])
        base = self._read(self.sources.base, tile, "base")
        formed: list[Tensor | None] = []
        for role, spec in enumerate(self.sources.others):
            if not wanted[role]:
                formed.append(None)
                continue
            if index < len(self._resident) and self.device.type == "cpu":
                out = self._resident[index][role]
            else:
                out = self._workers.buffer(f"task {role}", shape, self.task_dtype)
            torch.sub(self._read(spec, tile, "role"), base, out=out)
            if self._squares[index][role] is None:
                self._squares[index][role] = self._squared_norm(out, spec, tile)
            if self.device.type != "cpu":
                out = self._to_device(index, role, out)
            formed.append(out)
        return formed

    def _to_device(self, index: int, role: int, tile: Tensor) -> Tensor:
        if index < len(self._resident):
            return self._resident[index][role].copy_(tile)
        return tile.to(self.device)

    def _read(self, spec: TensorSpec, tile: slice, name: str) -> Tensor:
        raw = read_rows(self._reader, self._workers, spec, self._stored(tile), name)
        if raw.dtype == self.task_dtype:
            return raw
        wide = self._workers.buffer(f"{name} wide", tuple(raw.shape), self.task_dtype)
        return wide.copy_(raw)

    def _stored(self, tile: slice) -> slice:
        start = self.sources.rows.start
        return slice(start + tile.start, start + tile.stop)

    def _squared_norm(self, task_vector: Tensor, spec: TensorSpec, tile: slice) -> float:
        square = float(torch.linalg.vector_norm(task_vector, dtype=torch.float32)) ** 2
        if square > _UNDERFLOWN and math.isfinite(square):
            return square
        if square <= _UNDERFLOWN and not bool((task_vector != 0).any()):
            return 0.0
        self._refuse_non_finite(spec, tile)
        # Finite numbers whose squares overflow float32 or underflow it, or whose difference
        # overflows their dtype.
        square = float(torch.linalg.vector_norm(task_vector, dtype=torch.float64)) ** 2
        if not math.isfinite(square):
            name = str(self.task_dtype).removeprefix("torch.")
            raise DataError(
                f"{spec.file}: tensor {spec.name} differs from the base's by more than {name} can "
                "hold; check both, or convert the checkpoints to float32 first."
            )
        return square

    def _refuse_non_finite(self, spec: TensorSpec, tile: slice) -> None:
        for suspect in (self.sources.base, spec):
            raw = read_rows(self._reader, self._workers, suspect, self._stored(tile), "suspect")
            if not bool(torch.isfinite(raw).all()):
                raise DataError(
                    f"{suspect.file}: tensor {suspect.name} holds NaN or Inf; it cannot be merged. "
                    "Restore the file from its source."
                )

    def run(self, wanted: Sequence[Pass | None]) -> list[Products | None]:
        """One pass over the rows for all task vectors together.

        Tile t adds to lane t mod LANES, and lanes are summed in order, so that the result depends
        neither on how many threads there are nor on which tiles are resident.
        """
        sums = [_Sums(self, request) for request in wanted]
        if self.device.type == "cpu":
            self._workers.map(lambda lane: self._run_lane(lane, sums), range(LANES))
        else:
            for lane in range(LANES):
                self._run_lane(lane, sums)
        finished = [one.finish() for one in sums]
        for spec, products in zip(self.sources.others, finished, strict=True):
            if products is not None and not products.is_finite():
                raise DataError(
                    f"{spec.file}: the task vector of {spec.name} is so large that its products "
                    "overflow float32; compare the tensor with the base's, and restore the wrong "
                    "one."
                )
        return finished

    def _run_lane(self, lane: int, sums: list[_Sums]) -> None:
        wanted = [one.request is not None for one in sums]
        for index in range(lane, len(self.tiles), LANES):
            for one, task_vector in zip(sums, self.tile(index, wanted), strict=True):
                if task_vector is not None:
                    one.add(lane, self.tiles[index], task_vector)


class _Sums:
    """The products of one task vector's pass while tiles come in."""

    def __init__(self, owner: TaskVectors, request: Pass | None) -> None:
        self.request = request
        self._dtype = owner.dtype
        if request is None:
            return
        out_features, in_features = owner.shape
        device = owner.device

        def empty(rows: int, like: Tensor | None, dtype: torch.dtype) -> Tensor | None:
            if like is None:
                return None
            return torch.empty(rows, like.shape[1], dtype=dtype, device=device)

        def lanes(like: Tensor | None) -> list[Tensor]:
            if like is None:
                return []
            shape = in_features, like.shape[1]
            return [torch.zeros(shape, device=device) for _ in range(LANES)]

        self._right = None if request.times is None else _padded(request.times)
        self._y = empty(out_features, request.gram, owner.dtype)
        self._times = empty(out_features, request.times, torch.float32)
        self._z = lanes(request.gram)
        self._projected = lanes(request.project)
        self._dense = (
            torch.empty(out_features, in_features, device=device) if request.dense else None
        )

    def add(self, lane: int, rows: slice, tile: Tensor) -> None:
        """Take in one tile [t, in]."""
        request = self.request
        if request is None:
            return
        if self._dense is not None:
            self._dense[rows] = tile
        whole, tile = tile, tile.to(self._dtype)
        if request.gram is not None and self._y is not None:
            y = torch.mm(tile, request.gram, out=self._y[rows])
            self._z[lane].add_(tile.T @ y)
        if request.project is not None:
            self._projected[lane].add_(tile.T @ request.project[rows])
        if self._right is not None and self._times is not None:
            self._times[rows] = _product(whole, tile, self._right)[:, : self._times.shape[1]]

    def finish(self) -> Products | None:
        """The lanes summed in order."""
        if self.request is None:
            return None
        return Products(
            y=self._y,
            z=_ordered_sum(self._z),
            projected=_ordered_sum(self._projected),
            times=self._times,
            dense=self._dense,
        )


def _product(whole: Tensor, tile: Tensor, right: Tensor) -> Tensor:
    """tile @ right in the dtype of `right`: the arithmetic one, or float32, strip by strip."""
    if right.dtype == tile.dtype:
        return tile @ right
    strips = torch.split(whole, strip_rows(whole.shape[1]))
    return torch.cat([strip.to(right.dtype) @ right for strip in strips])


def _padded(columns: Tensor) -> Tensor:
    """`columns` [in, r] with zero columns up to a multiple of `_WIDTH`.

    Kernels are compiled for every shape and kept; r differs from weight to weight.
    """
    missing = -columns.shape[1] % _WIDTH
    return torch.nn.functional.pad(columns, (0, missing)) if missing else columns


def _ordered_sum(lanes: list[Tensor]) -> Tensor | None:
    if not lanes:
        return None
    total = lanes[0]
    for lane in lanes[1:]:
        total += lane
    return total


def read_rows(
    reader: TensorReader, workers: Workers, spec: TensorSpec, rows: slice, name: str
) -> Tensor:
    """Rows of a stored tensor [*, in] in this thread's reused buffer `name`."""
    dtype = torch_dtype(spec.dtype)
    shape = (rows.stop - rows.start, spec.shape[1])
    buffer = workers.buffer(name, shape, dtype)
    reader.read_into(spec, rows.start * spec.shape[1] * dtype.itemsize, as_bytes(buffer))
    return buffer
