"""Copy a tensor out of scope piece by piece, either its bytes or its decoded numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lean_merge.checkpoints import FLOATING, TensorReader, WeightSource, as_bytes, torch_dtype
from lean_merge.engine.workers import Workers
from lean_merge.errors import DataError
from lean_merge.plan.formulas import COPY_BUFFER
from lean_merge.store import WriteBytes
from lean_merge.tasks import CopyTask
from lean_merge.tasks.tiles import READ_ELEMENTS, strips

_LOOKED_AT = FLOATING | {"F64"}
Copying = tuple[Callable[[Any], bool], Sequence[Any]]
"""A function that copies one piece and tells whether its numbers are finite, and the pieces."""


def copy_pieces(
    task: CopyTask, write: WriteBytes, reader: TensorReader, workers: Workers
) -> Copying:
    """Cut a tensor into pieces that workers can copy in any order.

    The function that copies a piece raises DataError where the numbers of a tensor that is stored
    with scales are NaN or Inf, or overflow the output's dtype. Other tensors go over as they are.
    """
    if task.decoded:
        dtype = torch_dtype(task.tensor.dtype)
        return _numbers(task.decoded, dtype, write, reader, workers)
    return _bytes(task, write, reader, workers)


def _bytes(task: CopyTask, write: WriteBytes, reader: TensorReader, workers: Workers) -> Copying:
    spec = task.source
    dtype = torch_dtype(spec.dtype) if spec.dtype in _LOOKED_AT else None

    def copy(start: int) -> bool:
        buffer = workers.buffer("copy", (COPY_BUFFER,), torch.uint8)
        part = as_bytes(buffer)[: min(COPY_BUFFER, spec.nbytes - start)]
        reader.read_into(spec, start, part)
        write(start, part)
        if dtype is None:
            return True
        # The extremes are NaN if any number is, and finding them needs no temporary.
        ends = torch.aminmax(buffer[: len(part)].view(dtype))
        return math.isfinite(float(ends.min)) and math.isfinite(float(ends.max))

    return copy, range(0, spec.nbytes, COPY_BUFFER)


def _numbers(
    matrices: Sequence[WeightSource],
    dtype: torch.dtype,
    write: WriteBytes,
    reader: TensorReader,
    workers: Workers,
) -> Copying:
    """Cut the matrices of one tensor into strips, which are written in `dtype`."""
    pieces: list[tuple[WeightSource, slice, int]] = []
    offset = 0
    for matrix in matrices:
        source = matrix.load(reader)
        out_features, in_features = source.shape
        for rows in strips(slice(0, out_features), in_features, READ_ELEMENTS):
            pieces.append((source, rows, offset))
            offset += (rows.stop - rows.start) * in_features * dtype.itemsize

    def copy(piece: tuple[WeightSource, slice, int]) -> bool:
        source, rows, start = piece
        values = source.read(rows, reader, workers.buffer, "copy")
        rounded = workers.buffer("copy rounded", tuple(values.shape), dtype).copy_(values)
        if not bool(torch.isfinite(rounded.sum(dtype=torch.float32))):
            _check_finite(source, rounded)
        write(start, as_bytes(rounded))
        return True

    return copy, pieces


def _check_finite(source: WeightSource, rounded: Tensor) -> None:
    """Raise DataError if a number is NaN or Inf; the sum of finite numbers may overflow."""
    if not bool(torch.isfinite(rounded).all()):
        dtype = str(rounded.dtype).removeprefix("torch.")
        raise DataError(
            f"{source.file}: tensor {source.name} holds NaN or Inf, or overflows {dtype}; restore "
            "the file from its source, or choose another --out-dtype."
        )
