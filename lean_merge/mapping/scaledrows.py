"""Rows of fp8 weights, multiplied by their scales tile by tile, wherever they are stored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lean_merge.checkpoints.dtypes import torch_dtype
from lean_merge.checkpoints.header import TensorSpec
from lean_merge.checkpoints.quantised import Scale
from lean_merge.checkpoints.reader import TensorReader, as_bytes
from lean_merge.errors import DataError
from lean_merge.mapping.rows import Buffer, PlacedRows, source


@dataclass(frozen=True, slots=True)
class ScaledRows(PlacedRows):
    """Rows of an fp8 tensor, wherever they lie in one matrix of it, as float32 numbers."""

    scale: Scale
    factors: Tensor | None = field(default=None, compare=False, repr=False)
    """One for each block of the stored rows from the first to the last, once they are loaded."""

    @property
    def tensor(self) -> TensorSpec:
        """That holds the rows."""
        return self.place.tensor

    @property
    def dtype(self) -> str:
        """Float32, in which a product of fp8 and a scale is exact but for one rounding."""
        return "F32"

    @property
    def stored(self) -> tuple[TensorSpec, ...]:
        """The tensor and its scales."""
        return self.tensor, self.scale.tensor

    @property
    def extents(self) -> tuple[TensorSpec, ...]:
        """The numbers from its first to its last, and the scales."""
        return *source(self.place).extents, self.scale.tensor

    @property
    def _origin(self) -> tuple[int, int, int]:
        """Its first number: which matrix of the stack, stored row and column."""
        height, width = (1, *self.tensor.shape)[-2:]
        row, column = divmod(self.place.first, width)
        return *divmod(row, height), column

    @property
    def _stored_rows(self) -> tuple[int, int]:
        """The first row of its matrix that it touches, and the one after the last."""
        _, row, _ = self._origin
        first, count = self.place.extent
        width = self.tensor.shape[-1]
        return row, row + (first + count - 1) // width - first // width + 1

    @property
    def _blocks(self) -> slice:
        """The rows of blocks that it touches, counted over the whole stack."""
        high = self.scale.block[0]
        before = self._origin[0] * -(-(1, *self.tensor.shape)[-2] // high)
        start, stop = self._stored_rows
        return slice(before + start // high, before + -(-stop // high))

    @property
    def _blocks_wide(self) -> int:
        return -(-self.tensor.shape[-1] // self.scale.block[1])

    @property
    def _count(self) -> int:
        """How many factors it keeps."""
        return int(self._blocks.stop - self._blocks.start) * self._blocks_wide

    @property
    def loaded(self) -> int:
        """The bytes of its factors."""
        return self._count * torch_dtype(self.scale.tensor.dtype).itemsize

    @property
    def held(self) -> int:
        """The factors as they are stored and in float32."""
        return self.loaded + 4 * self._count

    def load(self, reader: TensorReader) -> ScaledRows:
        """With its factors. Raises DataError for a factor that is none."""
        factors = _load(self.scale, self.name, self._blocks, self._blocks_wide, reader)
        return replace(self, factors=factors)

    def nbytes(self, rows: slice) -> int:
        """The bytes of the rows: what lies between them is not read."""
        return int(rows.stop - rows.start) * self.shape[1]

    def scratch(self, count: int) -> int:
        """The stored numbers."""
        return count * self.shape[1]

    def read(self, rows: slice, reader: TensorReader, buffer: Buffer, name: str) -> Tensor:
        """The rows times their scales, a transposed view where they are columns; `load` first."""
        assert self.factors is not None
        count, width = rows.stop - rows.start, self.shape[1]
        shape = (width, count) if self.in_columns else (count, width)
        codes = buffer(f"{name} codes", shape, torch_dtype(self.tensor.dtype))
        reader.read_spans(self.tensor, list(self.place.spans(rows)), as_bytes(codes))
        out = buffer(name, shape, torch.float32).copy_(codes)
        if not self.in_columns:
            for part, block in self._strips(rows):
                _multiply(out[part], self.factors[block], self.scale.block[1])
            return out
        for part, block in self._column_strips(rows):
            _multiply(out[:, part].T, self.factors[:, block], self.scale.block[0])
        return out.T

    def _strips(self, rows: slice) -> Iterator[tuple[slice, int]]:
        """Rows that lie together in one row of blocks, from the first of `rows`; and which."""
        (_, first, _), (high, _) = self._origin, self.scale.block
        run, period = self.place.run, self.place.period
        at = rows.start
        while at < rows.stop:
            row = first + at // run * period + at % run
            stop = min(rows.stop, (at // run + 1) * run, at + high - row % high)
            yield slice(at - rows.start, stop - rows.start), row // high - first // high
            at = stop

    def _column_strips(self, rows: slice) -> Iterator[tuple[slice, int]]:
        """Columns that lie in one column of blocks, from the first of `rows`; and which."""
        (_, _, first), (_, wide) = self._origin, self.scale.block
        at = rows.start
        while at < rows.stop:
            stop = min(rows.stop, at + wide - (first + at) % wide)
            yield slice(at - rows.start, stop - rows.start), (first + at) // wide
            at = stop


def _load(scale: Scale, name: str, blocks: slice, wide: int, reader: TensorReader) -> Tensor:
    """The factors of some rows of `wide` blocks, in float32. Raises DataError for one that is none.

    `name` is that of the tensor that they belong to.
    """
    tensor = scale.tensor
    raw = torch.empty((blocks.stop - blocks.start, wide), dtype=torch_dtype(tensor.dtype))
    reader.read_into(tensor, blocks.start * wide * raw.element_size(), as_bytes(raw))
    factors = raw.float()
    if not bool(((factors > 0) & torch.isfinite(factors)).all()):
        raise DataError(
            f"{tensor.file}: scales {tensor.name} of {name} hold a number that is zero, negative, "
            "NaN or Inf, so the weight is not known; restore the file from its source."
        )
    return factors


def _multiply(strip: Tensor, factor: Tensor, wide: int) -> None:
    """Multiply `strip` [t, n], in place, by `factor`: one number for each `wide` columns."""
    full = strip.shape[1] // wide
    strip[:, : full * wide].view(strip.shape[0], full, wide).mul_(factor[:full, None])
    if full < factor.shape[0]:
        strip[:, full * wide :].mul_(factor[full])
