"""Writing one tensor: its bytes copied, or its rows with the update added and rounded once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lean_merge.budget import COPY_BUFFER, strip_rows
from lean_merge.checkpoints import FLOATING, TensorReader, TensorSpec, as_bytes, torch_dtype
from lean_merge.engine.rounding import round_nearest, round_stochastic, rounding_generator
from lean_merge.engine.taskvectors import TaskVectors, read_rows
from lean_merge.engine.workers import Workers
from lean_merge.errors import DataError
from lean_merge.methods import Decision

WriteBytes = Callable[[int, memoryview], None]
"""Writes bytes at an offset from the tensor's start."""
_LOOKED_AT = FLOATING | {"F64"}


@dataclass(frozen=True, slots=True)
class Written:
    """What storing an update kept of it: sums over the rows written.

    `along` is <stored change, update>, `squared` is ||update||_F^2.
    """

    along: float
    squared: float


@dataclass(frozen=True, slots=True)
class OutputRows:
    """How one logical weight's rows are written."""

    source: TensorSpec
    dtype: torch.dtype
    rounding: str
    seed: int
    write: WriteBytes


def copy_tensor(reader: TensorReader, spec: TensorSpec, write: WriteBytes, buffer: Tensor) -> bool:
    """Copy a tensor's bytes through `buffer` (uint8) as they are; False if one is NaN or Inf."""
    view = as_bytes(buffer[:COPY_BUFFER])
    dtype = torch_dtype(spec.dtype) if spec.dtype in _LOOKED_AT else None
    finite = True
    for start in range(0, spec.nbytes, len(view)):
        part = view[: min(len(view), spec.nbytes - start)]
        reader.read_into(spec, start, part)
        write(start, part)
        if dtype is not None and finite:
            # Extremes need no temporary and pass on NaN.
            ends = torch.aminmax(buffer[: len(part)].view(dtype))
            finite = math.isfinite(float(ends.min)) and math.isfinite(float(ends.max))
    return finite


def write_rows(
    vectors: TaskVectors,
    decision: Decision,
    output: OutputRows,
    *,
    reader: TensorReader,
    workers: Workers,
) -> Written:
    """Write W_mllm + update, rounded once, for all rows of one logical weight.

    Without an update the rows are the MLLM's own, byte for byte where the dtype is the same.

    Raises
    ------
    DataError
        A result is NaN or Inf, or overflows the output dtype.
    """
    writer = _RowWriter(vectors, decision, output, reader, workers)
    parts = workers.map(writer.write_tile, range(len(vectors.tiles)))
    return Written(
        along=math.fsum(part.along for part in parts),
        squared=math.fsum(part.squared for part in parts),
    )


class _RowWriter:
    def __init__(
        self,
        vectors: TaskVectors,
        decision: Decision,
        output: OutputRows,
        reader: TensorReader,
        workers: Workers,
    ) -> None:
        self._vectors = vectors
        self._decision = decision
        self._output = output
        self._reader = reader
        self._workers = workers
        self._item = output.dtype.itemsize * vectors.shape[1]
        wanted = tuple(bool(c) for c in decision.coefficients)
        self._wanted = wanted or (False,) * len(vectors.sources.others)
        # Rows that no pass has read have not been checked for NaN and Inf.
        self._seen = not math.isnan(vectors.squared_norms()[0])

    def write_tile(self, index: int) -> Written:
        """Write one tile, strip by strip."""
        tile = self._vectors.tiles[index]
        first = self._vectors.sources.rows.start
        stored = slice(first + tile.start, first + tile.stop)
        source = self._output.source
        weights = read_rows(self._reader, self._workers, source, stored, "mllm")
        if not self._decision.merges:
            self._write_unchanged(stored.start, weights)
            return Written(0.0, 0.0)
        task_vectors: list[Tensor | None] = [None] * len(self._wanted)
        if any(self._wanted):
            task_vectors = self._vectors.tile(index, self._wanted)
        generator = None
        if self._output.rounding == "stochastic":
            generator = rounding_generator(
                self._output.seed, self._vectors.sources.rows.canonical, index
            )
        height = strip_rows(self._vectors.shape[1])
        along = squared = 0.0
        for start in range(0, tile.stop - tile.start, height):
            strip = slice(start, min(start + height, tile.stop - tile.start))
            part = self._write_strip(tile, strip, weights, task_vectors, generator)
            along, squared = along + part.along, squared + part.squared
        return Written(along, squared)

    def _write_strip(
        self,
        tile: slice,
        strip: slice,
        weights: Tensor,
        task_vectors: list[Tensor | None],
        generator: torch.Generator | None,
    ) -> Written:
        shape = (strip.stop - strip.start, self._vectors.shape[1])
        update = self._workers.buffer("update", shape, torch.float32)
        self._compute(
            slice(tile.start + strip.start, tile.start + strip.stop), strip, task_vectors, update
        )
        before = self._workers.buffer("before", shape, torch.float32).copy_(weights[strip])
        after = self._workers.buffer("after", shape, torch.float32)
        torch.add(before, update, out=after)
        rounded = self._checked(after, self._output.dtype, generator)
        row = self._vectors.sources.rows.start + tile.start + strip.start
        self._output.write(row * self._item, as_bytes(rounded))
        change = after.copy_(rounded).sub_(before)
        return Written(_dot(change, update), _dot(update, update))

    def _write_unchanged(self, first: int, weights: Tensor) -> None:
        """The MLLM's rows: as they are, or strip by strip in another dtype."""
        if self._seen and weights.dtype == self._output.dtype:
            self._output.write(first * self._item, as_bytes(weights))
            return
        height = strip_rows(self._vectors.shape[1])
        for start in range(0, weights.shape[0], height):
            rounded = self._checked(
                weights[start : start + height].float(), self._output.dtype, None
            )
            self._output.write((first + start) * self._item, as_bytes(rounded))

    def _compute(
        self, rows: slice, strip: slice, task_vectors: list[Tensor | None], out: Tensor
    ) -> None:
        strips = [None if t is None else t[strip] for t in task_vectors]
        if self._vectors.device.type == "cpu":
            self._decision.update(rows, strips, out)
            return
        on_device = torch.empty_like(out, device=self._vectors.device)
        self._decision.update(rows, strips, on_device)
        out.copy_(on_device)

    def _checked(
        self, values: Tensor, dtype: torch.dtype, generator: torch.Generator | None
    ) -> Tensor:
        if generator is None:
            rounded = round_nearest(values, dtype)
        else:
            rounded = round_stochastic(values, dtype, generator)
        # A sum is finite unless a term is not, or very many are huge; only then look closer.
        if math.isfinite(float(torch.linalg.vector_norm(rounded, ord=1, dtype=torch.float32))):
            return rounded
        if bool(torch.isfinite(rounded).all()):
            return rounded
        source = self._output.source
        if not bool(torch.isfinite(values).all()):
            raise DataError(
                f"{source.file}: merging tensor {source.name} gives NaN or Inf; check its numbers, "
                "and those of the same weight in the other checkpoints."
            )
        raise DataError(
            f"{source.file}: tensor {source.name} overflows {torch_name(dtype)}; choose another "
            "--out-dtype, such as bfloat16 or float32."
        )


def _dot(first: Tensor, second: Tensor) -> float:
    """Inner product in float64."""
    return float(torch.dot(first.double().view(-1), second.double().view(-1)))


def torch_name(dtype: torch.dtype) -> str:
    """The name of a dtype as users write it: float16."""
    return str(dtype).removeprefix("torch.")


__all__ = ["OutputRows", "Written", "copy_tensor", "write_rows"]
