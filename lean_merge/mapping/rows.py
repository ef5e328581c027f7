"""How the rows of one logical weight of one role are had, whatever they are stored as."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from lean_merge.checkpoints.dtypes import torch_dtype
from lean_merge.checkpoints.header import TensorSpec
from lean_merge.checkpoints.reader import TensorReader, as_bytes
from lean_merge.mapping.placement import Place

Buffer = Callable[[str, tuple[int, ...], torch.dtype], Tensor]
"""Gives the calling thread's reused buffer of a name as an uninitialised tensor on the CPU."""


class WeightSource(abc.ABC):
    """The rows of one logical weight [out, in] of one role, counted from 0.

    A new kind of storage is a subclass. Planning asks for bytes: `stored`, `loaded`, `held`,
    `nbytes` and `scratch`. The engine calls `load` once for each weight, and then `read` of what
    that returned, from many threads.
    """

    __slots__ = ()

    is_difference: ClassVar[bool] = False
    """Whether the rows are those of the task vector, so that no base is subtracted from them."""
    zero_because: ClassVar[str] = ""
    """For a difference of zeros that nothing need be read for: why it is one, in words."""

    @property
    def in_columns(self) -> bool:
        """Whether its rows are columns of what is stored, so that few cost as much as many."""
        return False

    @property
    def extents(self) -> tuple[TensorSpec, ...]:
        """The parts of `stored` that are read, named as their tensors."""
        return self.stored

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """Of the stored tensor, for messages."""

    @property
    @abc.abstractmethod
    def file(self) -> Path:
        """That holds it, for messages."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, int]:
        """out, in of the logical weight."""

    @property
    @abc.abstractmethod
    def dtype(self) -> str:
        """The safetensors dtype in which `read` gives the rows."""

    @property
    @abc.abstractmethod
    def stored(self) -> tuple[TensorSpec, ...]:
        """The tensors that `read` reads of, to be fetched ahead."""

    @property
    def loaded(self) -> int:
        """How many bytes `load` reads."""
        return 0

    @property
    def held(self) -> int:
        """Bytes of memory that `load` takes, and what it returns keeps, at most."""
        return 0

    def load(self, reader: TensorReader) -> WeightSource:
        """The same with what all its rows need in memory, such as scales or a factor.

        Raises
        ------
        CheckpointError, DataError
            As `read`.
        """
        del reader
        return self

    @abc.abstractmethod
    def nbytes(self, rows: slice) -> int:
        """How many bytes one `read` of `rows` reads."""

    def scratch(self, count: int) -> int:
        """Bytes of the buffers that reading `count` rows takes beside that of the rows."""
        del count
        return 0

    @abc.abstractmethod
    def read(self, rows: slice, reader: TensorReader, buffer: Buffer, name: str) -> Tensor:
        """`rows` [t, in] in `dtype`, valid until this thread's buffer `name` is used again.

        Raises
        ------
        CheckpointError
            The file has become shorter or cannot be read.
        DataError
            What the numbers are computed from is NaN, Inf or otherwise impossible.
        """


@dataclass(frozen=True, slots=True)
class PlainRows(WeightSource):
    """Rows [first, first + count) of a stored matrix, as they are.

    A tensor of more dimensions is one matrix: the rows of its first member, of its second, ...
    """

    tensor: TensorSpec
    first: int
    count: int

    @property
    def name(self) -> str:
        """Of the stored tensor."""
        return self.tensor.name

    @property
    def file(self) -> Path:
        """Of the stored tensor."""
        return self.tensor.file

    @property
    def shape(self) -> tuple[int, int]:
        """out, in of the logical weight."""
        return self.count, self.tensor.shape[-1]

    @property
    def dtype(self) -> str:
        """Of the stored tensor."""
        return self.tensor.dtype

    @property
    def stored(self) -> tuple[TensorSpec, ...]:
        """The stored tensor."""
        return (self.tensor,)

    @property
    def extents(self) -> tuple[TensorSpec, ...]:
        """Its rows."""
        width = self.tensor.shape[-1]
        return (_extent(self.tensor, self.first * width, self.count * width),)

    def nbytes(self, rows: slice) -> int:
        """The bytes of the rows."""
        return len(range(rows.start, rows.stop)) * self._row_bytes

    @property
    def _row_bytes(self) -> int:
        return self.tensor.shape[-1] * torch_dtype(self.tensor.dtype).itemsize

    def read(self, rows: slice, reader: TensorReader, buffer: Buffer, name: str) -> Tensor:
        """The rows as they are stored."""
        shape = (rows.stop - rows.start, self.tensor.shape[-1])
        out = buffer(name, shape, torch_dtype(self.tensor.dtype))
        reader.read_into(self.tensor, (self.first + rows.start) * self._row_bytes, as_bytes(out))
        return out


@dataclass(frozen=True, slots=True)
class PlacedRows(WeightSource):
    """Rows that lie apart in a stored tensor, or that are stored as columns."""

    place: Place

    @property
    def name(self) -> str:
        """Of the stored tensor."""
        return self.place.tensor.name

    @property
    def file(self) -> Path:
        """Of the stored tensor."""
        return self.place.tensor.file

    @property
    def shape(self) -> tuple[int, int]:
        """out, in of the logical weight."""
        return self.place.shape

    @property
    def dtype(self) -> str:
        """Of the stored tensor."""
        return self.place.tensor.dtype

    @property
    def stored(self) -> tuple[TensorSpec, ...]:
        """The stored tensor."""
        return (self.place.tensor,)

    @property
    def in_columns(self) -> bool:
        """As its place says."""
        return bool(self.place.width)

    @property
    def extents(self) -> tuple[TensorSpec, ...]:
        """From its first number to its last."""
        return (_extent(self.place.tensor, *self.place.extent),)

    def nbytes(self, rows: slice) -> int:
        """The bytes of the rows: what lies between them is not read."""
        item = torch_dtype(self.dtype).itemsize
        return len(range(rows.start, rows.stop)) * self.shape[1] * item

    def read(self, rows: slice, reader: TensorReader, buffer: Buffer, name: str) -> Tensor:
        """The rows; a transposed view where they are stored as columns."""
        count, width = rows.stop - rows.start, self.shape[1]
        dtype = torch_dtype(self.dtype)
        columns = bool(self.place.width)
        out = buffer(name, (width, count) if columns else (count, width), dtype)
        item = dtype.itemsize
        spans = [(first * item, length * item) for first, length in self.place.spans(rows)]
        reader.read_spans(self.place.tensor, spans, as_bytes(out))
        return out.T if columns else out


def _extent(tensor: TensorSpec, first: int, count: int) -> TensorSpec:
    """`count` numbers of a tensor as if they were one."""
    item = torch_dtype(tensor.dtype).itemsize
    return replace(tensor, shape=(count,), offset=tensor.offset + first * item, nbytes=count * item)


def source(place: Place) -> WeightSource:
    """How the rows of a logical weight are had, given where it lies."""
    if place.is_block:
        return PlainRows(place.tensor, place.first // place.shape[1], place.shape[0])
    return PlacedRows(place)
