"""Write one tensor: copy its bytes, or add the update to its rows and round once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lean_merge.checkpoints import TensorReader
from lean_merge.engine.rounding import round_stochastic, rounding_generator
from lean_merge.engine.taskvectors import TaskVectors
from lean_merge.engine.tilestore import TileStore
from lean_merge.engine.workers import Workers
from lean_merge.errors import DataError
from lean_merge.methods import Update
from lean_merge.store import WriteBytes
from lean_merge.tasks import Written
from lean_merge.tasks.tiles import READ_ELEMENTS, strips


@dataclass(frozen=True, slots=True)
class OutputRows:
    """The dtype, rounding, seed and output with which one logical weight's rows are written."""

    dtype: torch.dtype
    rounding: str
    seed: int
    write: WriteBytes


class RowWriter:
    """A writer of W_mllm + update, rounded once, for all rows of one logical weight.

    Without an update the MLLM's own rows are written, byte for byte if the dtype is the same. The
    work is done on the CPU, which holds the MLLM's bytes and the output's; the update must be there
    too.
    """

    def __init__(
        self,
        vectors: TaskVectors,
        update: Update | None,
        output: OutputRows,
        reader: TensorReader,
        workers: Workers,
    ) -> None:
        self._vectors = vectors
        self._update = update
        self._output = output
        self._reader = reader
        self._workers = workers
        self._wanted = () if update is None else update.reads
        # If no pass has read the rows, they have not been checked for NaN and Inf.
        self._seen = not math.isnan(vectors.squared_norms()[0])

    @property
    def tiles(self) -> range:
        """Return the indices of the tiles."""
        return range(len(self._vectors.tiles))

    @property
    def reads_arena(self) -> bool:
        """Return whether tiles that stay in the arena are needed until all tiles are written."""
        return any(self._wanted) and self._vectors.stays

    def write_tile(self, index: int) -> Written:
        """Write one tile, strip by strip.

        Raises
        ------
        DataError
            A result is NaN or Inf, or overflows the output dtype.
        """
        tile = self._vectors.tiles[index]
        store = TileStore(
            self._vectors.weight,
            tile,
            dtype=self._output.dtype,
            write=self._output.write,
            reader=self._reader,
            workers=self._workers,
        )
        if self._update is None:
            for rows in strips(tile, self._vectors.shape[1], READ_ELEMENTS):
                self._write_unchanged(rows, store)
            return Written(0.0, 0.0)
        generator = None
        if self._output.rounding == "stochastic":
            generator = rounding_generator(self._output.seed, self._vectors.weight.canonical, index)
        along = squared = 0.0
        for rows, task_vectors in self._vectors.tile_strips(index, self._wanted):
            part = self._write_strip(self._update, rows, store, task_vectors, generator)
            along, squared = along + part.along, squared + part.squared
        return Written(along, squared)

    def _write_strip(
        self,
        of_weight: Update,
        rows: slice,
        store: TileStore,
        task_vectors: list[Tensor | None],
        generator: torch.Generator | None,
    ) -> Written:
        shape = (rows.stop - rows.start, self._vectors.shape[1])
        update = self._workers.buffer("update", shape, torch.float32)
        scratch = self._workers.buffer("scratch", (of_weight.scratch, *shape), torch.float32)
        of_weight.rows(rows, task_vectors, scratch, update)
        before = self._workers.buffer("wide", shape, torch.float32).copy_(store.read(rows))
        after = self._workers.buffer("after", shape, torch.float32)
        torch.add(before, update, out=after)
        rounded = self._rounded(after, generator)
        change = after.copy_(rounded).sub_(before)
        # The strips are so short that float32 suffices for their inner products.
        along, squared = (
            float(torch.dot(each.view(-1), update.view(-1))) for each in (change, update)
        )
        # A NaN or Inf in the result makes this product NaN or Inf; otherwise it is finite, unless
        # it is huge.
        if not math.isfinite(along):
            self._check_finite(torch.add(before, update, out=after), rounded)
        store.write(rows, rounded)
        return Written(along, squared)

    def _write_unchanged(self, rows: slice, store: TileStore) -> None:
        """Write the MLLM's rows as they are, or converted to another dtype."""
        weights = store.read(rows)
        if not self._seen or weights.dtype != self._output.dtype:
            values = self._workers.buffer("wide", tuple(weights.shape), torch.float32)
            values.copy_(weights)
            rounded = self._rounded(values, None)
            if not math.isfinite(float(rounded.sum(dtype=torch.float32))):
                self._check_finite(values, rounded)
            weights = rounded
        store.write(rows, weights)

    def _rounded(self, values: Tensor, generator: torch.Generator | None) -> Tensor:
        if generator is not None:
            return round_stochastic(values, self._output.dtype, generator)
        out = self._workers.buffer("rounded", tuple(values.shape), self._output.dtype)
        return out.copy_(values)

    def _check_finite(self, values: Tensor, rounded: Tensor) -> None:
        """Refuse `rounded` if it holds NaN or Inf, and say whether the rounding caused them."""
        if bool(torch.isfinite(rounded).all()):
            return
        source = self._vectors.weight.mllm
        if not bool(torch.isfinite(values).all()):
            raise DataError(
                f"{source.file}: merging tensor {source.name} gives NaN or Inf; check its numbers, "
                "and those of the same weight in the other checkpoints."
            )
        name = str(self._output.dtype).removeprefix("torch.")
        raise DataError(
            f"{source.file}: tensor {source.name} overflows {name}; "
            "choose another --out-dtype, such as bfloat16 or float32."
        )
