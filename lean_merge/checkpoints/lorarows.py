"""Rows of a LoRA adapter's task vector, formed from its factors tile by tile."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
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
    factors: tuple[Tensor, Tensor] | None = field(default=None, compare=False, repr=False)
    """scaling * B and A, float32, once they are loaded."""

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

    @property
    def loaded(self) -> int:
        """The rows of B, and all of A."""
        return self.count * self._row_bytes + self.right.nbytes

    @property
    def held(self) -> int:
        """Both factors as they are stored and in float32."""
        rank, width = self.right.shape
        return self.loaded + 4 * rank * (self.count + width)

    def load(self, reader: TensorReader) -> LoraRows:
        """With both factors."""
        rank, width = self.right.shape
        left = torch.empty(self.count, rank, dtype=torch_dtype(self.left.dtype))
        reader.read_into(self.left, self.first * self._row_bytes, as_bytes(left))
        right = torch.empty(rank, width, dtype=torch_dtype(self.right.dtype))
        reader.read_into(self.right, 0, as_bytes(right))
        return replace(self, factors=(left.float().mul_(self.scaling), right.float()))

    def nbytes(self, rows: slice) -> int:
        """0: the factors are in memory."""
        del rows
        return 0

    def read(self, rows: slice, reader: TensorReader, buffer: Buffer, name: str) -> Tensor:
        """The rows of the product, summed over r in float32; `load` comes first."""
        del reader
        assert self.factors is not None
        left, right = self.factors
        shape = (rows.stop - rows.start, right.shape[1])
        return torch.mm(left[rows], right, out=buffer(name, shape, torch.float32))


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
