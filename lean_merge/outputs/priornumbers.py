"""The numbers of a prior: where a weight lies in the MLLM's tensor, and how they are stored."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lean_merge.checkpoints import as_bytes
from lean_merge.errors import DataError
from lean_merge.mapping import LogicalWeight
from lean_merge.methods import Decision
from lean_merge.outputs.base import ReadRows
from lean_merge.store import WriteBytes
from lean_merge.tasks.tiles import STRIP_ELEMENTS, strips, tile_rows

_LARGEST_FLOAT8 = 448.0
Runs = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Span:
    """The place of one logical weight in the MLLM's stored tensor.

    Attributes
    ----------
    matrix
        Its matrix in a stack; None where the tensor is no stack.
    dim
        0 if its rows are rows of that matrix, 1 if they are columns.
    runs
        The (start, stop) of its rows along `dim`, in order.
    """

    matrix: int | None
    dim: int
    runs: Runs

    @classmethod
    def of(cls, weight: LogicalWeight) -> Span:
        """Find where the rows of a weight lie."""
        place = weight.place
        *stack, rows, columns = place.tensor.shape
        if place.width:
            matrix, start = divmod(place.first, rows * columns)
            return cls(matrix if stack else None, 1, ((start, start + place.shape[0]),))
        matrix = place.first // (rows * columns)
        runs: list[tuple[int, int]] = []
        for first, count in place.spans(slice(0, place.shape[0])):
            start = first // columns - matrix * rows
            stop = start + count // columns
            if runs and runs[-1][1] == start:
                start = runs.pop()[0]
            runs.append((start, stop))
        return cls(matrix if stack else None, 0, tuple(runs))

    def within(self, rows: slice) -> Iterator[tuple[slice, slice]]:
        """Yield the parts of `rows` of `dim` that are the weight's, and its own rows there."""
        done = 0
        for start, stop in self.runs:
            first, last = max(start, rows.start), min(stop, rows.stop)
            if first < last:
                own = slice(done + first - start, done + last - start)
                yield slice(first, last), own
            done += stop - start


@dataclass(frozen=True, slots=True)
class Encoded:
    """Numbers [t, n] as a prior stores them, with a scale [t, 1] of each row in float8."""

    numbers: Tensor
    scales: Tensor | None

    @classmethod
    def of(cls, values: Tensor, dtype: str, name: str) -> Encoded:
        """Encode rows [t, n] in float32. Raises DataError for what the dtype cannot hold."""
        scales, numbers = None, values
        if dtype == "float8_e4m3fn":
            largest = values.abs().amax(dim=1, keepdim=True)
            scales = torch.where(largest > 0, largest / _LARGEST_FLOAT8, torch.ones_like(largest))
            # A scale may be rounded, and the largest number must not pass float8's largest.
            numbers = (values / scales).clamp(-_LARGEST_FLOAT8, _LARGEST_FLOAT8)
        encoded = numbers.to(getattr(torch, dtype)).contiguous()
        if not math.isfinite(float(encoded.float().abs().sum())):
            raise DataError(
                f"The difference of {name} is NaN, Inf or beyond {dtype}; check the numbers of "
                "this weight in both checkpoints, or give --dtype float32."
            )
        return cls(encoded, scales)

    @property
    def decoded(self) -> Tensor:
        """Return the numbers that a reader gets, in float32."""
        plain = self.numbers.float()
        return plain if self.scales is None else plain.mul_(self.scales)


def difference_rows(
    weight: LogicalWeight, decision: Decision, read: ReadRows
) -> Iterator[tuple[slice, Tensor]]:
    """Yield the rows of a weight's update in order, with their numbers [t, in] in float32."""
    out_features, in_features = weight.shape
    # Columns are read a tile at a time, since a few rows of them are a few bytes in many places.
    rows_at_once = tile_rows(in_features) * in_features if weight.in_columns else STRIP_ELEMENTS
    update = decision.update
    for rows in strips(slice(0, out_features), in_features, rows_at_once):
        shape = (rows.stop - rows.start, in_features)
        values = torch.zeros(shape, dtype=torch.float32)
        if update is not None:
            wanted = update.reads or (False,) * len(weight.others)
            scratch = torch.empty((update.scratch, *shape), dtype=torch.float32)
            vectors: list[Tensor | None] = []
            for source, is_wanted in zip(weight.others, wanted, strict=True):
                if not is_wanted:
                    vectors.append(None)
                    continue
                # Rows are valid until the next are read.
                vector = read(source, rows).to(torch.float32, copy=True)
                if not source.is_difference:
                    vector -= read(weight.base, rows).float()
                vectors.append(vector)
            update.rows(rows, vectors, scratch, values)
        yield rows, values


def lost_by_rounding(left: Tensor, right: Tensor, dtype: str, name: str) -> float:
    """Return ||left @ right^T - rounded||_F^2 of factors [out, r] and [in, r], from Gram matrices.

    It is nearly at a right angle to what the rank cuts off, so the two add up.
    """
    if dtype == "float32":
        return 0.0
    exact = left, right
    stored = (
        Encoded.of(left.contiguous(), dtype, name).decoded,
        Encoded.of(right.T.contiguous(), dtype, name).decoded.T,
    )

    def inner(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
        first, second = (x.double().T @ y.double() for x, y in zip(a, b, strict=True))
        return float((first * second).sum())

    return max(0.0, inner(exact, exact) + inner(stored, stored) - 2 * inner(exact, stored))


def write_rows(
    weight: LogicalWeight,
    rows: slice,
    encoded: Encoded,
    writers: Mapping[str, WriteBytes],
    name: str,
) -> None:
    """Write encoded rows [t, in] of a weight at their place in the tensor."""
    place, item = weight.place, encoded.numbers.element_size()
    turned = bool(place.width)
    numbers = encoded.numbers.T.contiguous() if turned else encoded.numbers
    spans = [(first * item, count * item) for first, count in place.spans(rows)]
    writers[name](0, as_bytes(numbers), spans)
    if encoded.scales is None:
        return
    *_, height, width = place.tensor.shape
    if turned:
        matrix, start = divmod(place.first, height * width)
        spans = [((matrix * width + start + rows.start) * 4, (rows.stop - rows.start) * 4)]
    else:
        spans = [(f // width * 4, count // width * 4) for f, count in place.spans(rows)]
    writers[f"{name}.scale"](0, as_bytes(encoded.scales.contiguous()), spans)


def squared_norm(values: Tensor) -> float:
    return float(values.double().square().sum())
