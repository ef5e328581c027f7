"""Rows of fp8 weights, multiplied by their scales tile by tile."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from lean_merge.checkpoints.dtypes import torch_dtype
from lean_merge.checkpoints.header import TensorSpec
from lean_merge.checkpoints.quantised import Scale
from lean_merge.checkpoints.reader import TensorReader, as_bytes
from lean_merge.checkpoints.rows import Buffer, WeightSource
from lean_merge.errors import DataError


@dataclass(frozen=True, slots=True)
class ScaledRows(WeightSource):
    """Rows [first, first + count) of an fp8 tensor [..., out, in], as float32 numbers.

    Rows are counted over the whole stack; those of one source lie in one matrix of it.
    """

    tensor: TensorSpec
    scale: Scale
    first: int
    count: int
    factors: Tensor | None = field(default=None, compare=False, repr=False)
    """One for each block that the rows touch, float32, once they are loaded."""

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
        """Float32, in which a product of fp8 and a scale is exact but for one rounding."""
        return "F32"

    @property
    def stored(self) -> tuple[TensorSpec, ...]:
        """The tensor and its scales."""
        return self.tensor, self.scale.tensor

    @property
    def _blocks_wide(self) -> int:
        return -(-self.shape[1] // self.scale.block[1])

    @property
    def _scale_bytes(self) -> int:
        """Bytes of the factors of one row of blocks."""
        return self._blocks_wide * torch_dtype(self.scale.tensor.dtype).itemsize

    def _block_rows(self, rows: slice) -> slice:
        """The rows of blocks that `rows` touch, counted over the whole stack."""
        matrix, start, stop = self._inside(rows)
        high = self.scale.block[0]
        before = matrix * -(-self.tensor.shape[-2] // high)
        return slice(before + start // high, before + -(-stop // high))

    def _inside(self, rows: slice) -> tuple[int, int, int]:
        """Which matrix of the stack, and the rows in it."""
        height = self.tensor.shape[-2] if len(self.tensor.shape) > 1 else 1
        matrix, start = divmod(self.first + rows.start, height)
        return matrix, start, start + rows.stop - rows.start

    @property
    def loaded(self) -> int:
        """The bytes of the factors of all blocks."""
        blocks = self._block_rows(slice(0, self.count))
        return int((blocks.stop - blocks.start) * self._scale_bytes)

    @property
    def held(self) -> int:
        """The factors as they are stored and in float32."""
        blocks = self._block_rows(slice(0, self.count))
        return self.loaded + 4 * int(blocks.stop - blocks.start) * self._blocks_wide

    def load(self, reader: TensorReader) -> ScaledRows:
        """With its factors. Raises DataError for a factor that is none."""
        tensor, blocks = self.scale.tensor, self._block_rows(slice(0, self.count))
        shape = (blocks.stop - blocks.start, self._blocks_wide)
        raw = torch.empty(shape, dtype=torch_dtype(tensor.dtype))
        reader.read_into(tensor, blocks.start * self._scale_bytes, as_bytes(raw))
        factors = raw.float()
        if not bool(((factors > 0) & torch.isfinite(factors)).all()):
            raise DataError(
                f"{tensor.file}: scales {tensor.name} of {self.name} hold a number that is zero, "
                "negative, NaN or Inf, so the weight is not known; restore the file from its "
                "source."
            )
        return replace(self, factors=factors)

    def nbytes(self, rows: slice) -> int:
        """The bytes of the rows."""
        return int(rows.stop - rows.start) * self.shape[1]

    def scratch(self, count: int) -> int:
        """The stored numbers."""
        return count * self.shape[1]

    def read(self, rows: slice, reader: TensorReader, buffer: Buffer, name: str) -> Tensor:
        """The rows times their scales; `load` comes first."""
        assert self.factors is not None
        width = self.shape[1]
        shape = (rows.stop - rows.start, width)
        codes = buffer(f"{name} codes", shape, torch_dtype(self.tensor.dtype))
        reader.read_into(self.tensor, (self.first + rows.start) * width, as_bytes(codes))
        out = buffer(name, shape, torch.float32).copy_(codes)
        first = self._block_rows(slice(0, self.count)).start
        blocks = self._block_rows(rows)
        factors = self.factors[blocks.start - first : blocks.stop - first]
        for part, factor in zip(self._strips(rows), factors, strict=True):
            self._multiply(out[part], factor)
        return out

    def _strips(self, rows: slice) -> Iterator[slice]:
        """The rows of each row of blocks, counted from the first of `rows`."""
        _, start, stop = self._inside(rows)
        high = self.scale.block[0]
        for block in range(start // high, -(-stop // high)):
            yield slice(max(start, block * high) - start, min(stop, (block + 1) * high) - start)

    def _multiply(self, strip: Tensor, factor: Tensor) -> None:
        """Multiply `strip` [t, in] by `factor`, one number for each block of columns."""
        wide = self.scale.block[1]
        full = strip.shape[1] // wide
        whole = strip[:, : full * wide]
        whole.view(strip.shape[0], full, wide).mul_(factor[:full, None])
        if full < factor.shape[0]:
            strip[:, full * wide :].mul_(factor[full])
