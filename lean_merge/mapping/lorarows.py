"""Rows of a LoRA adapter's task vector, formed from its factors tile by tile."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from lean_merge.checkpoints.dtypes import torch_dtype
from lean_merge.checkpoints.header import TensorSpec
from lean_merge.checkpoints.reader import TensorReader
from lean_merge.mapping.rows import Buffer, WeightSource


@dataclass(frozen=True, slots=True)
class LoraRows(WeightSource):
    """Rows of scaling * B A, of which `left` has those of B [out, r] and `right` is A [r, in]."""

    left: WeightSource
    right: WeightSource
    scaling: float
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
        return self.left.shape[0], self.right.shape[1]

    @property
    def dtype(self) -> str:
        """Float32: a product rounded to a 16-bit format would no longer have rank r."""
        return "F32"

    @property
    def stored(self) -> tuple[TensorSpec, ...]:
        """Both factors."""
        return *self.left.stored, *self.right.stored

    @property
    def loaded(self) -> int:
        """The rows of B, and all of A."""
        return sum(each.nbytes(slice(0, each.shape[0])) for each in (self.left, self.right))

    @property
    def held(self) -> int:
        """Both factors as they are stored and in float32."""
        return self.loaded + sum(4 * math.prod(each.shape) for each in (self.left, self.right))

    def load(self, reader: TensorReader) -> LoraRows:
        """With both factors."""
        left, right = (_whole(each, reader) for each in (self.left, self.right))
        return replace(self, factors=(left.mul_(self.scaling), right))

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


def _whole(source: WeightSource, reader: TensorReader) -> Tensor:
    """All rows of a factor in float32, in memory of their own."""
    rows = slice(0, source.shape[0])
    return source.read(rows, reader, _fresh, "factor").to(torch.float32, copy=True)


def _fresh(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    del name
    return torch.empty(shape, dtype=dtype)


@dataclass(frozen=True, slots=True)
class ZeroRows(WeightSource):
    """The rows of a task vector that an adapter leaves at zero; nothing is read."""

    like: WeightSource
    """The base's rows, whose shape and dtype the zeros have."""
    owner: Path
    """The adapter's file."""

    is_difference: ClassVar[bool] = True
    zero_because: ClassVar[str] = "the adapter does not target this weight"

    @property
    def name(self) -> str:
        """Of the base's tensor."""
        return self.like.name

    @property
    def file(self) -> Path:
        """Of the adapter."""
        return self.owner

    @property
    def shape(self) -> tuple[int, int]:
        """out, in of the logical weight."""
        return self.like.shape

    @property
    def dtype(self) -> str:
        """The base's."""
        return self.like.dtype

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
