"""How the rows of one logical weight of one role are had, whatever they are stored as."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from lean_merge.checkpoints.dtypes import torch_dtype
from lean_merge.checkpoints.header import TensorSpec
from lean_merge.checkpoints.reader import TensorReader, as_bytes

Buffer = Callable[[str, tuple[int, ...], torch.dtype], Tensor]
"""Gives the calling thread's reused buffer of a name as an uninitialised tensor on the CPU."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where one logical weight [out, in] lies in a stored tensor.

    Attributes
    ----------
    tensor
        The stored tensor.
    shape
        The weight's out and in.
    first
        Index of the weight's first number in the flattened tensor.
    run, period
        Row i of the weight begins `i // run * period + i % run` rows after its first. All rows lie
        together where `run` is out.
    width
        0 where its rows are stored as rows. Else they are stored as columns, and this many numbers
        lie from one to the next number of such a column.
    """

    tensor: TensorSpec
    shape: tuple[int, int]
    first: int
    run: int
    period: int
    width: int = 0

    @property
    def extent(self) -> tuple[int, int]:
        """(first, count) of the stored numbers from the weight's first to its last."""
        out, into = self.shape
        if self.width:
            return self.first, (into - 1) * self.width + out
        last = (out - 1) // self.run * self.period + (out - 1) % self.run
        return self.first, (last + 1) * into

    def spans(self, rows: slice) -> Iterator[tuple[int, int]]:
        """(first, count) of the stored numbers of `rows`.

        In order they fill [t, in], or [in, t] where the rows are stored as columns.
        """
        if self.width:
            for column in range(self.shape[1]):
                yield self.first + column * self.width + rows.start, rows.stop - rows.start
            return
        at = rows.start
        while at < rows.stop:
            stop = min(rows.stop, (at // self.run + 1) * self.run)
            row = at // self.run * self.period + at % self.run
            yield self.first + row * self.shape[1], (stop - at) * self.shape[1]
            at = stop


def row_block(tensor: TensorSpec, start: int = 0, count: int | None = None) -> Place:
    """The place of `count` rows of a matrix that lie together; all its rows if not said otherwise.

    A tensor of more dimensions is one matrix: the rows of its first member, of its second, ...
    """
    width = tensor.shape[-1]
    count = tensor.shape[0] if count is None else count
    return Place(tensor, (count, width), start * width, count, count)


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
        """The stored tensor's name, for messages."""

    @property
    @abc.abstractmethod
    def file(self) -> Path:
        """The stored tensor's file, for messages."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, int]:
        """The logical weight's out and in."""

    @property
    @abc.abstractmethod
    def dtype(self) -> str:
        """The safetensors dtype in which `read` gives the rows."""

    @property
    @abc.abstractmethod
    def stored(self) -> tuple[TensorSpec, ...]:
        """The tensors that `load` and `read` read, to be fetched ahead."""

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
            The same as `read`.
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
class StoredRows(WeightSource):
    """Rows as they are stored, in one block or spread over their tensor."""

    place: Place

    @property
    def name(self) -> str:
        return self.place.tensor.name

    @property
    def file(self) -> Path:
        return self.place.tensor.file

    @property
    def shape(self) -> tuple[int, int]:
        return self.place.shape

    @property
    def dtype(self) -> str:
        return self.place.tensor.dtype

    @property
    def stored(self) -> tuple[TensorSpec, ...]:
        return (self.place.tensor,)

    @property
    def in_columns(self) -> bool:
        return bool(self.place.width)

    @property
    def extents(self) -> tuple[TensorSpec, ...]:
        tensor, (first, count) = self.place.tensor, self.place.extent
        item = torch_dtype(tensor.dtype).itemsize
        offset, nbytes = tensor.offset + first * item, count * item
        return (replace(tensor, shape=(count,), offset=offset, nbytes=nbytes),)

    def nbytes(self, rows: slice) -> int:
        """The bytes of the rows: what lies between them is not read."""
        item = torch_dtype(self.place.tensor.dtype).itemsize
        return int(rows.stop - rows.start) * self.shape[1] * item

    def read(self, rows: slice, reader: TensorReader, buffer: Buffer, name: str) -> Tensor:
        """The rows; a transposed view where they are stored as columns."""
        out = self._fill(rows, reader, buffer, name)
        return out.T if self.in_columns else out

    def _fill(self, rows: slice, reader: TensorReader, buffer: Buffer, name: str) -> Tensor:
        """The stored numbers of `rows` in a buffer: [t, in], or [in, t] of columns."""
        count, width = rows.stop - rows.start, self.shape[1]
        dtype = torch_dtype(self.place.tensor.dtype)
        out = buffer(name, (width, count) if self.in_columns else (count, width), dtype)
        item = dtype.itemsize
        spans = [(first * item, length * item) for first, length in self.place.spans(rows)]
        reader.read_spans(self.place.tensor, spans, as_bytes(out))
        return out
