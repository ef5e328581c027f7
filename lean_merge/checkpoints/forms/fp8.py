"""Find the scales of fp8 weights, and read their rows multiplied by these, tile by tile.

The layouts are those of transformers' FineGrainedFP8 (`weight_scale_inv`, a factor for each block)
and of compressed-tensors, FBGEMM and ModelOpt (`weight_scale`, one factor, or one for each row,
group or column).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lean_merge.checkpoints.dtypes import torch_dtype
from lean_merge.checkpoints.forms import Encoding, Form
from lean_merge.checkpoints.forms.unsupported import MEND, integer_format, weight_groups
from lean_merge.checkpoints.header import TensorSpec
from lean_merge.checkpoints.reader import TensorReader, as_bytes
from lean_merge.checkpoints.rows import Buffer, Place, StoredRows
from lean_merge.errors import CheckpointError, DataError, shown

_FP8 = frozenset({"F8_E4M3", "F8_E5M2"})
_METHODS = frozenset({"fp8", "fbgemm_fp8", "compressed-tensors", "modelopt", "quark"})
_SCALE_SUFFIXES = ("_scale_inv", "_scale")
_SCALE_DTYPES = frozenset({"F32", "F16", "BF16", "F8_E8M0"})
_DEFAULT_BLOCK = (128, 128)
# A model whose weights are no longer fp8 has no use for the scales of activations and caches.
_ACTIVATIONS = (
    *("input_scale", "input_scale_ub", "activation_scale", "output_scale"),
    *("q_scale", "k_scale", "v_scale", "prob_scale", "prob_output_scale"),
)


class Fp8(Form):
    """The form of tensors of dtype F8_E4M3 or F8_E5M2 with their scales beside them."""

    def understands(self, settings: Mapping[str, Any]) -> bool:
        method = str(settings.get("quant_method", ""))
        # ModelOpt and Quark have formats other than fp8, which they name here.
        algorithm = settings.get("quant_algo", "FP8")
        if isinstance(algorithm, str) and "FP8" not in algorithm.upper():
            return False
        if method == "compressed-tensors" and integer_format(settings):
            return False
        return method in _METHODS

    def decode(
        self, tensors: Mapping[str, TensorSpec], settings: Sequence[Mapping[str, Any]]
    ) -> tuple[Mapping[str, TensorSpec], Mapping[str, Encoding]]:
        """Return the tensors without scales of weights or activations, and the fp8 tensors' scales.

        Raises
        ------
        CheckpointError
            An fp8 tensor has no scales although the config announces them, or none that fit it.
        """
        blocks = [block for each in settings for block in _stated_blocks(each)]
        # FBGEMM gives Llama 4's stacked experts a factor for each column.
        by_column = any(each.get("quant_method") == "fbgemm_fp8" for each in settings)
        scales: dict[str, Scale] = {}
        for name, spec in tensors.items():
            if spec.dtype not in _FP8 or not spec.shape:
                continue
            found = [tensors[name + end] for end in _SCALE_SUFFIXES if name + end in tensors]
            if found:
                turned = by_column and len(spec.shape) == 3
                scales[name] = _scale(spec, found[0], blocks, in_columns=turned)
            elif settings and not name.endswith(_SCALE_SUFFIXES):
                raise CheckpointError(
                    f"{spec.file}: fp8 tensor {shown(name)} has no scales ({shown(name)} with "
                    f"{' or '.join(_SCALE_SUFFIXES)}), so its numbers are not known; download the "
                    "checkpoint again."
                )
        if not scales:
            return tensors, {}
        spent = {scale.tensor.name for scale in scales.values()}
        kept = {
            name: spec
            for name, spec in tensors.items()
            if name not in spent and not name.rsplit(".", 1)[-1].endswith(_ACTIVATIONS)
        }
        return kept, scales


FORM = Fp8()


@dataclass(frozen=True, slots=True)
class Scale(Encoding):
    """The factors by which the numbers of an fp8 tensor [..., out, in] are multiplied.

    Attributes
    ----------
    tensor
        The factors of all blocks: [..., ceil(out / rows), ceil(in / columns)] in row order.
    block
        The rows and columns of a block.
    """

    tensor: TensorSpec
    block: tuple[int, int]

    def rows(self, place: Place) -> ScaledRows:
        return ScaledRows(place, self)


def _stated_blocks(settings: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    stated = [settings.get("weight_block_size")]
    stated += [weights.get("block_structure") for weights in weight_groups(settings)]
    for block in stated:
        if isinstance(block, list) and len(block) == 2:
            if all(type(length) is int and length > 0 for length in block):
                yield block[0], block[1]


def _scale(
    spec: TensorSpec, scale: TensorSpec, stated: list[tuple[int, int]], *, in_columns: bool
) -> Scale:
    """Return `scale` with the block size that its shape implies.

    [..., 1, columns] has a factor for each column; with `in_columns`, so has [..., columns, 1].
    """
    if scale.dtype not in _SCALE_DTYPES:
        raise CheckpointError(
            f"{scale.file}: scales {shown(scale.name)} have the dtype {scale.dtype}, which is "
            f"not understood; {MEND}."
        )
    rows, columns = (1, 1, *spec.shape)[-2:]
    count, factors = math.prod(spec.shape[:-2]), math.prod(scale.shape)
    by_row = (rows, 1) if scale.shape[-1:] == (1,) else (rows,)
    if factors == count and 0 not in spec.shape:
        return Scale(scale, (rows, columns))
    by_column = [(1, columns), (columns, 1)][: 1 + in_columns]
    if 0 not in spec.shape and scale.shape in [(*spec.shape[:-2], *each) for each in by_column]:
        return Scale(scale, (rows, 1))
    if scale.shape == (*spec.shape[:-2], *by_row):
        return Scale(scale, (1, columns))
    grid = scale.shape[-2:]
    if len(scale.shape) == len(spec.shape) and scale.shape[:-2] == spec.shape[:-2]:
        for high, wide in (*stated, _DEFAULT_BLOCK):
            if grid == (-(-rows // high), -(-columns // wide)):
                return Scale(scale, (high, wide))
        if grid[0] == rows and grid[1] and columns % grid[1] == 0:
            return Scale(scale, (1, columns // grid[1]))
    raise CheckpointError(
        f"{scale.file}: scales {shown(scale.name)} of shape {list(scale.shape)} do not fit "
        f"{shown(spec.name)} of shape {list(spec.shape)}; download the checkpoint again."
    )


@dataclass(frozen=True, slots=True)
class ScaledRows(StoredRows):
    """Rows of one matrix of an fp8 tensor, wherever they lie in it, as float32 numbers."""

    scale: Scale
    factors: Tensor | None = field(default=None, compare=False, repr=False)
    """The factors of all blocks from the first stored row to the last, once they are loaded."""

    @property
    def dtype(self) -> str:
        """Return F32, in which a product of fp8 and a scale is rounded only once."""
        return "F32"

    @property
    def stored(self) -> tuple[TensorSpec, ...]:
        return self.place.tensor, self.scale.tensor

    @property
    def extents(self) -> tuple[TensorSpec, ...]:
        return *StoredRows(self.place).extents, self.scale.tensor

    @property
    def _origin(self) -> tuple[int, int, int]:
        """Return its first number's matrix in the stack, its stored row and its column."""
        height, width = (1, *self.place.tensor.shape)[-2:]
        row, column = divmod(self.place.first, width)
        return *divmod(row, height), column

    @property
    def _blocks(self) -> slice:
        """Return the rows of blocks that it touches, counted over the whole stack."""
        matrix, row, _ = self._origin
        height, width = (1, *self.place.tensor.shape)[-2:]
        first, count = self.place.extent
        stop = row + (first + count - 1) // width - first // width + 1
        high = self.scale.block[0]
        before = matrix * -(-height // high)
        return slice(before + row // high, before + -(-stop // high))

    @property
    def _shape_of_factors(self) -> tuple[int, int]:
        blocks = self._blocks
        wide = -(-self.place.tensor.shape[-1] // self.scale.block[1])
        return blocks.stop - blocks.start, wide

    @property
    def loaded(self) -> int:
        """Return the bytes of its factors."""
        item = torch_dtype(self.scale.tensor.dtype).itemsize
        return math.prod(self._shape_of_factors) * item

    @property
    def held(self) -> int:
        """Return the bytes of the factors as they are stored and in float32."""
        return self.loaded + 4 * math.prod(self._shape_of_factors)

    def load(self, reader: TensorReader) -> ScaledRows:
        """Return this source with its factors. Raises DataError for NaN, Inf, zero or negatives."""
        tensor = self.scale.tensor
        raw = torch.empty(self._shape_of_factors, dtype=torch_dtype(tensor.dtype))
        start = self._blocks.start * raw.shape[1] * raw.element_size()
        reader.read_into(tensor, start, as_bytes(raw))
        factors = raw.float()
        if not bool(((factors > 0) & torch.isfinite(factors)).all()):
            raise DataError(
                f"{tensor.file}: scales {tensor.name} of {self.name} hold a number that is zero, "
                "negative, NaN or Inf, so the weight is not known; restore the file from its "
                "source."
            )
        return replace(self, factors=factors)

    def scratch(self, count: int) -> int:
        """Return the bytes of the stored numbers."""
        return count * self.shape[1]

    def read(self, rows: slice, reader: TensorReader, buffer: Buffer, name: str) -> Tensor:
        """Return the rows times their scales, a transposed view of columns; `load` comes first."""
        assert self.factors is not None
        codes = self._fill(rows, reader, buffer, f"{name} codes")
        out = buffer(name, tuple(codes.shape), torch.float32).copy_(codes)
        if not self.in_columns:
            for part, block in self._strips(rows):
                _multiply(out[part], self.factors[block], self.scale.block[1])
            return out
        for part, block in self._column_strips(rows):
            _multiply(out[:, part].T, self.factors[:, block], self.scale.block[0])
        return out.T

    def _strips(self, rows: slice) -> Iterator[tuple[slice, int]]:
        """Cut `rows` at the ends of blocks: (rows counted from the first, row of factors)."""
        (_, first, _), (high, _) = self._origin, self.scale.block
        run, period = self.place.run, self.place.period
        at = rows.start
        while at < rows.stop:
            row = first + at // run * period + at % run
            stop = min(rows.stop, (at // run + 1) * run, at + high - row % high)
            yield slice(at - rows.start, stop - rows.start), row // high - first // high
            at = stop

    def _column_strips(self, rows: slice) -> Iterator[tuple[slice, int]]:
        """Cut columns at the ends of blocks: (columns counted from the first, factors' column)."""
        (_, _, first), (_, wide) = self._origin, self.scale.block
        at = rows.start
        while at < rows.stop:
            stop = min(rows.stop, at + wide - (first + at) % wide)
            yield slice(at - rows.start, stop - rows.start), (first + at) // wide
            at = stop


def _multiply(strip: Tensor, factor: Tensor, wide: int) -> None:
    """Multiply `strip` [t, n], in place, by `factor`: one number for each `wide` columns."""
    full = strip.shape[1] // wide
    strip[:, : full * wide].view(strip.shape[0], full, wide).mul_(factor[:full, None])
    if full < factor.shape[0]:
        strip[:, full * wide :].mul_(factor[full])
