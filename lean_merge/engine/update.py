"""Writing one tensor: its bytes copied, or its rows with the update added and rounded once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lean_merge.checkpoints import FLOATING, TensorReader, TensorSpec, as_bytes, torch_dtype
from lean_merge.engine.rounding import round_stochastic, rounding_generator
from lean_merge.engine.taskvectors import TaskVectors
from lean_merge.engine.tilestore import TileStore
from lean_merge.engine.workers import Tools, Workers
from lean_merge.errors import DataError
from lean_merge.mapping import WeightSource
from lean_merge.methods import Decision, Update
from lean_merge.outputs.base import WriteBytes
from lean_merge.plan.budget import COPY_BUFFER
from lean_merge.tasks import CopyTask, Written
from lean_merge.tasks.tiles import READ_ELEMENTS, STRIP_ELEMENTS, strips

_LOOKED_AT = FLOATING | {"F64"}


@dataclass(frozen=True, slots=True)
class OutputRows:
    """How one logical weight's rows are written."""

    dtype: torch.dtype
    rounding: str
    seed: int
    write: WriteBytes


def begin_copy(task: CopyTask, write: WriteBytes, tools: Tools) -> Callable[[], None]:
    """Begin to write a tensor out of scope as it goes over; what is returned waits for the end."""
    reader, workers = tools.reader, tools.workers
    if not task.decoded:
        return copy_tensor(
            task.source, write, reader=reader, workers=workers, non_finite=tools.non_finite
        )
    dtype = torch_dtype(task.tensor.dtype)
    return convert_tensor(task.decoded, dtype, write, reader=reader, workers=workers)


def copy_tensor(
    spec: TensorSpec,
    write: WriteBytes,
    *,
    reader: TensorReader,
    workers: Workers,
    non_finite: set[str],
) -> Callable[[], None]:
    """Begin to copy a tensor's bytes as they are; what is returned waits for the end.

    The tensor's name is added to `non_finite` if a number in it is NaN or Inf.
    """
    dtype = torch_dtype(spec.dtype) if spec.dtype in _LOOKED_AT else None

    def copy(start: int) -> None:
        buffer = workers.buffer("copy", (COPY_BUFFER,), torch.uint8)
        part = as_bytes(buffer)[: min(COPY_BUFFER, spec.nbytes - start)]
        reader.read_into(spec, start, part)
        write(start, part)
        if dtype is not None:
            # Extremes need no temporary and pass on NaN.
            ends = torch.aminmax(buffer[: len(part)].view(dtype))
            if not (math.isfinite(float(ends.min)) and math.isfinite(float(ends.max))):
                non_finite.add(spec.name)

    return workers.later(copy, range(0, spec.nbytes, COPY_BUFFER)).wait


def convert_tensor(
    parts: Sequence[WeightSource],
    dtype: torch.dtype,
    write: WriteBytes,
    *,
    reader: TensorReader,
    workers: Workers,
) -> Callable[[], None]:
    """Begin to write the matrices of one tensor, one after the other, in `dtype`.

    What is returned waits for the end.

    Raises
    ------
    DataError
        A number is NaN or Inf, or overflows the dtype; a scale is none.
    """
    pieces: list[tuple[WeightSource, slice, int]] = []
    offset = 0
    for part in parts:
        source = part.load(reader)
        out_features, in_features = source.shape
        for rows in strips(slice(0, out_features), in_features, READ_ELEMENTS):
            pieces.append((source, rows, offset))
            offset += (rows.stop - rows.start) * in_features * dtype.itemsize

    def convert(piece: tuple[WeightSource, slice, int]) -> None:
        source, rows, start = piece
        values = source.read(rows, reader, workers.buffer, "copy")
        rounded = workers.buffer("copy rounded", tuple(values.shape), dtype).copy_(values)
        if not bool(torch.isfinite(rounded.sum(dtype=torch.float32))):
            _check_converted(source, rounded)
        write(start, as_bytes(rounded))

    return workers.later(convert, pieces).wait


def _check_converted(source: WeightSource, rounded: Tensor) -> None:
    """Refuse numbers that are none; a sum may overflow without any."""
    if not bool(torch.isfinite(rounded).all()):
        raise DataError(
            f"{source.file}: tensor {source.name} holds NaN or Inf, or overflows "
            f"{torch_name(rounded.dtype)}; restore the file from its source, or choose another "
            "--out-dtype."
        )


def write_rows(
    vectors: TaskVectors,
    decision: Decision,
    output: OutputRows,
    *,
    reader: TensorReader,
    workers: Workers,
) -> Callable[[], Written]:
    """Begin to write W_mllm + update, rounded once, for all rows of one logical weight.

    Without an update the rows are the MLLM's own, byte for byte where the dtype is the same. What
    is returned waits for the end. Task vectors are needed no longer when this returns. All is done
    on the CPU, where the MLLM's bytes are and the output's are to be; so are the factors of the
    decision.

    Raises
    ------
    DataError
        A result is NaN or Inf, or overflows the output dtype.
    """
    writer = _RowWriter(vectors, decision, output, reader, workers)
    tiles = range(len(vectors.tiles))
    if writer.reads_task_vectors:
        batch = workers.start(writer.write_tile, tiles)
        batch.wait()
    else:
        batch = workers.later(writer.write_tile, tiles)
    return lambda: Written.of(batch.results())


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
        self._update = decision.update
        self._output = output
        self._reader = reader
        self._workers = workers
        self._wanted = () if self._update is None else self._update.reads
        # Rows that no pass has read have not been checked for NaN and Inf.
        self._seen = not math.isnan(vectors.squared_norms()[0])

    @property
    def reads_task_vectors(self) -> bool:
        """Whether the task vectors must stay until all tiles are written."""
        return any(self._wanted)

    def write_tile(self, index: int) -> Written:
        """Write one tile, strip by strip."""
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
        task_vectors: list[Tensor | None] = []
        if self.reads_task_vectors:
            task_vectors = self._vectors.tile(index, self._wanted)
        generator = None
        if self._output.rounding == "stochastic":
            generator = rounding_generator(self._output.seed, self._vectors.weight.canonical, index)
        along = squared = 0.0
        for rows in strips(tile, self._vectors.shape[1], STRIP_ELEMENTS):
            of_strip = [None if t is None else t[store.within(rows)] for t in task_vectors]
            part = self._write_strip(self._update, rows, store, of_strip, generator)
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
        before = self._workers.buffer("before", shape, torch.float32).copy_(store.read(rows))
        after = self._workers.buffer("after", shape, torch.float32)
        torch.add(before, update, out=after)
        rounded = self._rounded(after, generator)
        change = self._workers.buffer("change", shape, torch.float32).copy_(rounded).sub_(before)
        along, squared = _dot(change, update), _dot(update, update)
        # Any NaN or Inf in the result is one in the product, which else is finite unless huge.
        if not math.isfinite(along):
            self._check_finite(after, rounded)
        store.write(rows, rounded)
        return Written(along, squared)

    def _write_unchanged(self, rows: slice, store: TileStore) -> None:
        """The MLLM's rows: as they are, or in another dtype."""
        weights = store.read(rows)
        if not self._seen or weights.dtype != self._output.dtype:
            values = self._workers.buffer("before", tuple(weights.shape), torch.float32)
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
        """Refuse `rounded` if it holds NaN or Inf, saying which of the two ways they came."""
        if bool(torch.isfinite(rounded).all()):
            return
        source = self._vectors.weight.mllm
        if not bool(torch.isfinite(values).all()):
            raise DataError(
                f"{source.file}: merging tensor {source.name} gives NaN or Inf; check its numbers, "
                "and those of the same weight in the other checkpoints."
            )
        raise DataError(
            f"{source.file}: tensor {source.name} overflows {torch_name(self._output.dtype)}; "
            "choose another --out-dtype, such as bfloat16 or float32."
        )


def _dot(first: Tensor, second: Tensor) -> float:
    """Inner product of a strip, in float32: its sum is short."""
    return float(torch.dot(first.view(-1), second.view(-1)))


def torch_name(dtype: torch.dtype) -> str:
    """The name of a dtype as users write it: float16."""
    return str(dtype).removeprefix("torch.")


__all__ = [
    "OutputRows",
    "begin_copy",
    "convert_tensor",
    "copy_tensor",
    "write_rows",
]
