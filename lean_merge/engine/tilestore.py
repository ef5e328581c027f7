"""Read the MLLM's rows of one tile, and write the output's, strip by strip."""

from __future__ import annotations

import torch
from torch import Tensor

from lean_merge.checkpoints import TensorReader, as_bytes
from lean_merge.engine.workers import Workers
from lean_merge.mapping import LogicalWeight
from lean_merge.store import WriteBytes


class TileStore:
    """The rows of one tile in the input and in the output, for use by one thread.

    Rows that are stored as columns are read and written a whole tile at a time, because a few rows
    would be a few bytes in each of very many places.

    Parameters
    ----------
    weight
        The logical weight.
    tile
        The rows of the weight that make up the tile.
    dtype, write
        The output's dtype, and the function that writes the bytes of its tensor.
    reader, workers
        The reader of the files, and the workers whose buffers are used.
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
        """Return the weight's `rows`, counted from the tile's first row."""
        return slice(rows.start - self.rows.start, rows.stop - self.rows.start)

    def read(self, rows: slice) -> Tensor:
        """Return the MLLM's rows [t, in] in their stored dtype, valid until the next call."""
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
