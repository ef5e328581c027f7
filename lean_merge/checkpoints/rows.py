"""Read the rows of one role's logical weight, whatever way they are stored."""

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
"""A function that returns the calling thread's reused buffer of a name, uninitialised."""


def fresh_buffer(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return new memory on the CPU: a `Buffer` for rows that are read once."""
    del name
    return torch.empty(shape, dtype=dtype, device="cpu")


@dataclass(frozen=True, slots=True)
class Place:
    """The place of one logical weight [out, in] in a stored tensor.

    Attributes
    ----------
    tensor
        The stored tensor.
    shape
        The weight's out and in.
    first
        The index of the weight's first number in the flattened tensor.
    run, period
        Row i of the weight begins `i // run * period + i % run` rows after its first. All rows lie
        together if `run` is out.
    width
        If it is 0, the weight's rows are stored as rows. Else they are stored as columns, and it is
        the distance from one number of such a column to the next.
    """

    tensor: TensorSpec
    shape: tuple[int, int]
    first: int
    run: int
    period: int
    width: int = 0

    @property
    def extent(self) -> tuple[int, int]:
        """Return (first, count) of the stored numbers from the weight's first to its last."""
        out, into = self.shape
        if self.width:
            return self.first, (into - 1) * self.width + out
        last = (out - 1) // self.run * self.period + (out - 1) % self.run
        return self.first, (last + 1) * into

    def spans(self, rows: slice) -> Iterator[tuple[int, int]]:
        """Yield (first, count) of the stored numbers of `rows`.

        In order they fill [t, in], or [in, t] if the rows are stored as columns.
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
    """Return the place of `count` rows of a matrix that lie together, by default of all its rows.

    A tensor of more dimensions counts as one matrix, with the rows of its matrices in order.
    """
    width = tensor.shape[-1]
    count = tensor.shape[0] if count is None else count
    return Place(tensor, (count, width), start * width, count, count)


class WeightSource(abc.ABC):
    """A source of the rows of one role's logical weight [out, in], counted from 0.

    A new kind of storage is a subclass. Planning asks it for tensors and bytes: `stored`, `loaded`,
    `held`, `nbytes` and `scratch`. The engine calls `load` once for each weight, and then, from
    many threads, `read` of the source that `load` returned.
    """

    __slots__ = ()

    is_difference: ClassVar[bool] = False
    """True if the rows are those of the task vector, so that no base is subtracted from them."""
    zero_because: ClassVar[str] = ""
    """The reason, in words, why a difference is zero; empty unless it is known to be."""

    @property
    def parts(self) -> tuple[WeightSource, ...]:
        """The sources whose rows make up its own; by default this one alone."""
        return (self,)

    @property
    def in_columns(self) -> bool:
        """Return whether its rows are stored as columns, so that few cost as much as many."""
        return False

    @property
    def extents(self) -> tuple[TensorSpec, ...]:
        """Return the parts of `stored` that are read, which have their tensors' names."""
        return self.stored

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """Return the stored tensor's name, for messages."""

    @property
    @abc.abstractmethod
    def file(self) -> Path:
        """Return the stored tensor's file, for messages."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, int]:
        """Return the logical weight's out and in."""

    @property
    @abc.abstractmethod
    def dtype(self) -> str:
        """Return the safetensors dtype of the rows that `read` returns."""

    @property
    @abc.abstractmethod
    def stored(self) -> tuple[TensorSpec, ...]:
        """Return the tensors that `load` and `read` read, so that they can be fetched ahead."""

    @property
    def loaded(self) -> int:
        """Return how many bytes `load` reads."""
        return 0

    @property
    def held(self) -> int:
        """Return the most bytes of memory that `load` takes, and that its result keeps."""
        return 0

    def load(self, reader: TensorReader) -> WeightSource:
        """Return this source with the data that all rows need, such as scales or a factor.

        Raises
        ------
        CheckpointError, DataError
            The errors are those of `read`.
        """
        del reader
        return self

    @abc.abstractmethod
    def nbytes(self, rows: slice) -> int:
        """Return how many bytes one `read` of `rows` reads."""

    def scratch(self, count: int) -> int:
        """Return the bytes of buffers that reading `count` rows takes, beside that of the rows."""
        del count
        return 0

    @abc.abstractmethod
    def read(self, rows: slice, reader: TensorReader, buffer: Buffer, name: str) -> Tensor:
        """Return `rows` [t, in] in `dtype`, valid until this thread's buffer `name` is used again.

        Raises
        ------
        CheckpointError
            The file has become shorter or cannot be read.
        DataError
            A number from which the rows are computed is NaN, Inf or otherwise impossible.
        """


@dataclass(frozen=True, slots=True)
class StoredRows(WeightSource):
    """A source of rows that are stored as they are, in one block or spread over their tensor."""

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
        """Return the bytes of the rows; bytes between them are not read."""
        item = torch_dtype(self.place.tensor.dtype).itemsize
        return int(rows.stop - rows.start) * self.shape[1] * item

    def read(self, rows: slice, reader: TensorReader, buffer: Buffer, name: str) -> Tensor:
        """Return the rows; they are a transposed view if they are stored as columns."""
        out = self._fill(rows, reader, buffer, name)
        return out.T if self.in_columns else out

    def _fill(self, rows: slice, reader: TensorReader, buffer: Buffer, name: str) -> Tensor:
        """Return the stored numbers of `rows` in a buffer: [t, in], or [in, t] for columns."""
        count, width = rows.stop - rows.start, self.shape[1]
        dtype = torch_dtype(self.place.tensor.dtype)
        out = buffer(name, (width, count) if self.in_columns else (count, width), dtype)
        item = dtype.itemsize
        spans = [(first * item, length * item) for first, length in self.place.spans(rows)]
        reader.read_spans(self.place.tensor, spans, as_bytes(out))
        return out


@dataclass(frozen=True, slots=True)
class DifferenceRows(WeightSource):
    """The rows of one role less those of the parent that it was tuned from, in float32."""

    own: WeightSource
    parent: WeightSource

    is_difference: ClassVar[bool] = True

    @property
    def parts(self) -> tuple[WeightSource, ...]:
        return self.own, self.parent

    @property
    def in_columns(self) -> bool:
        return self.own.in_columns or self.parent.in_columns

    @property
    def name(self) -> str:
        return self.own.name

    @property
    def file(self) -> Path:
        return self.own.file

    @property
    def shape(self) -> tuple[int, int]:
        return self.own.shape

    @property
    def dtype(self) -> str:
        return "F32"

    @property
    def stored(self) -> tuple[TensorSpec, ...]:
        return *self.own.stored, *self.parent.stored

    @property
    def extents(self) -> tuple[TensorSpec, ...]:
        return *self.own.extents, *self.parent.extents

    @property
    def loaded(self) -> int:
        return self.own.loaded + self.parent.loaded

    @property
    def held(self) -> int:
        return self.own.held + self.parent.held

    def load(self, reader: TensorReader) -> DifferenceRows:
        return DifferenceRows(self.own.load(reader), self.parent.load(reader))

    def nbytes(self, rows: slice) -> int:
        return self.own.nbytes(rows) + self.parent.nbytes(rows)

    def scratch(self, count: int) -> int:
        """The bytes of the rows of each part, and of what reading them takes."""
        size = count * self.shape[1]
        return sum(
            part.scratch(count) + size * torch_dtype(part.dtype).itemsize for part in self.parts
        )

    def read(self, rows: slice, reader: TensorReader, buffer: Buffer, name: str) -> Tensor:
        out = buffer(name, (rows.stop - rows.start, self.shape[1]), torch.float32)
        out.copy_(self.own.read(rows, reader, buffer, f"{name} own"))
        return out.sub_(self.parent.read(rows, reader, buffer, f"{name} parent"))
