"""Rows of a LoRA adapter's task vector, formed from its factors tile by tile."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from lean_merge.checkpoints.dtypes import FLOATING, torch_dtype
from lean_merge.checkpoints.header import TensorSpec
from lean_merge.checkpoints.reader import TensorReader, as_bytes
from lean_merge.checkpoints.rows import Buffer, WeightSource


@dataclass(frozen=True, slots=True)
class LoraRows(WeightSource):
    """Rows [first, first + count) of scaling * B A, with A [r, in] and B [*, r] as stored."""

    left: TensorSpec
    """B."""
    right: TensorSpec
    """A."""
    scaling: float
    first: int
    count: int

    is_difference: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """Of B."""
        return self.left.name

    @property
    def file(self) -> Path:
        """Of B."""
        return self.left.file

    @property
    def shape(self) -> tuple[int, int]:
        """out, in of the logical weight."""
        return self.count, self.right.shape[1]

    @property
    def dtype(self) -> str:
        """Float32: a product rounded to a 16-bit format would no longer have rank r."""
        return "F32"

    @property
    def stored(self) -> tuple[TensorSpec, ...]:
        """Both factors."""
        return self.left, self.right

    @property
    def _row_bytes(self) -> int:
        return self.left.shape[1] * torch_dtype(self.left.dtype).itemsize

    def nbytes(self, rows: slice) -> int:
        """The rows of B, and all of A."""
        return int((rows.stop - rows.start) * self._row_bytes + self.right.nbytes)

    def scratch(self, count: int) -> int:
        """Both factors, as they are stored and in float32."""
        numbers = count * self.left.shape[1] + self.right.shape[0] * self.right.shape[1]
        return count * self._row_bytes + self.right.nbytes + 4 * numbers

    def read(self, rows: slice, reader: TensorReader, buffer: Buffer, name: str) -> Tensor:
        """The rows of the product, summed over r in float32."""
        rank, width = self.right.shape
        count = rows.stop - rows.start
        left = buffer(f"{name} left", (count, rank), torch_dtype(self.left.dtype))
        reader.read_into(self.left, (self.first + rows.start) * self._row_bytes, as_bytes(left))
        right = buffer(f"{name} right", (rank, width), torch_dtype(self.right.dtype))
        reader.read_into(self.right, 0, as_bytes(right))
        scaled = buffer(f"{name} left wide", (count, rank), torch.float32)
        scaled.copy_(left).mul_(self.scaling)
        wide = buffer(f"{name} right wide", (rank, width), torch.float32).copy_(right)
        return torch.mm(scaled, wide, out=buffer(name, (count, width), torch.float32))


@dataclass(frozen=True, slots=True)
class ZeroRows(WeightSource):
    """The rows of a task vector that an adapter leaves at zero; nothing is read."""

    of: TensorSpec
    """The base's tensor, whose dtype the zeros have."""
    count: int
    owner: Path
    """The adapter's file."""

    is_difference: ClassVar[bool] = True
    zero_because: ClassVar[str] = "the adapter does not target this weight"

    @property
    def name(self) -> str:
        """Of the base's tensor."""
        return self.of.name

    @property
    def file(self) -> Path:
        """Of the adapter."""
        return self.owner

    @property
    def shape(self) -> tuple[int, int]:
        """out, in of the logical weight."""
        return self.count, self.of.shape[-1]

    @property
    def dtype(self) -> str:
        """The base's, as its rows are given."""
        return self.of.dtype if self.of.dtype in FLOATING else "F32"

    @property
    def stored(self) -> tuple[TensorSpec, ...]:
        """Nothing."""
        return ()

    def nbytes(self, rows: slice) -> int:
        """0."""
        del rows
        return 0

    def read(self, rows: slice, reader: TensorReader, buffer: Buffer, name: str) -> Tensor:
        """Zeros."""
        del reader
        shape = (rows.stop - rows.start, self.shape[1])
        return buffer(name, shape, torch_dtype(self.dtype)).zero_()
