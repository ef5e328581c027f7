"""The MLLM's rows of one tile, read and written strip by strip wherever they are stored."""

from __future__ import annotations

import torch
from torch import Tensor

from lean_merge.checkpoints import TensorReader, as_bytes
from lean_merge.engine.workers import Workers
from lean_merge.mapping import LogicalWeight
from lean_merge.store import WriteBytes


class TileStore:
    """One tile's rows in the input and in the output, in this thread.

    Rows that are stored as columns are read, and written, a whole tile at a time: a few of them
    would be a few bytes from each of very many places.

    Parameters
    ----------
    weight
        The logical weight.
    tile
        Its rows.
    dtype, write
        Of the output, and what writes its tensor's bytes.
    reader, workers
        Who reads, and whose buffers are used.
    """

    def __init__(
        self,
        weight: LogicalWeight,
        tile: slice,
        *,
        dtype: torch.dtype,
        write: WriteBytes,
        reader: TensorReader,
        workers: Workers,
    ) -> None:
        self.rows = tile
        self._weight = weight
        self._place = weight.place
        self._dtype = dtype
        self._output = write
        self._reader = reader
        self._workers = workers
        self._whole = self._load(tile) if weight.mllm.in_columns else None
        self._turned: Tensor | None = None
        if self._place.width:
            shape = (weight.shape[1], tile.stop - tile.start)
            self._turned = workers.buffer("turned", shape, dtype)

    def _load(self, rows: slice) -> Tensor:
        return self._weight.mllm.read(rows, self._reader, self._workers.buffer, "mllm")

    def within(self, rows: slice) -> slice:
        """`rows` of the weight counted from the tile's first."""
        return slice(rows.start - self.rows.start, rows.stop - self.rows.start)

    def read(self, rows: slice) -> Tensor:
        """The MLLM's rows [t, in] as they are stored; valid until the next call."""
        return self._load(rows) if self._whole is None else self._whole[self.within(rows)]

    def write(self, rows: slice, values: Tensor) -> None:
        """Write rows [t, in] of the output's dtype; strips must come in order."""
        if self._turned is None:
            self._write(rows, values)
            return
        self._turned[:, self.within(rows)] = values.T
        if rows.stop == self.rows.stop:
            self._write(self.rows, self._turned)

    def _write(self, rows: slice, numbers: Tensor) -> None:
        item = self._dtype.itemsize
        spans = [(first * item, count * item) for first, count in self._place.spans(rows)]
        self._output(0, as_bytes(numbers), spans)
