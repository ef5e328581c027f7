"""Measure how far apart weights of equal shape are, by reading strips of rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from lean_merge.checkpoints import TensorReader, WeightSource, torch_dtype
from lean_merge.engine import Workers
from lean_merge.tasks import tiles

UNRELATED_QUANTILE = 2.5758
"""99 % of a normal law lie within this many standard deviations."""


@dataclass(frozen=True, slots=True)
class InnerProducts:
    """The inner products of one weight between pairs of roles, as vectors in float64.

    `squares` holds the product of each role's weight with itself.
    """

    squares: Mapping[str, float]
    inner: Mapping[tuple[str, str], float]

    def distance(self, one: str, other: str) -> float | None:
        """Return ||one - other|| / ||other||; None if `other` is zero or a product is not finite.

        It is computed from the products, so values below about 1e-7 are mere rounding.
        """
        square = self.squares[one] + self.squares[other] - 2 * self._inner(one, other)
        # Rounding may leave it below zero; NaN stays what it is.
        return _ratio(math.sqrt(0.0 if square < 0 else square), math.sqrt(self.squares[other]))

    def cosine(self, one: str, other: str) -> float | None:
        """Return the cosine of the angle between the two weights as vectors."""
        norms = math.sqrt(self.squares[one]) * math.sqrt(self.squares[other])
        return _ratio(self._inner(one, other), norms)

    def unrelated(self, one: str, other: str) -> float | None:
        """Return the distance that two weights of these norms would have at a right angle."""
        both = math.sqrt(self.squares[one] + self.squares[other])
        return _ratio(both, math.sqrt(self.squares[other]))

    def _inner(self, one: str, other: str) -> float:
        return self.inner[one, other] if (one, other) in self.inner else self.inner[other, one]


def _ratio(above: float, below: float) -> float | None:
    finite = math.isfinite(above) and math.isfinite(below)
    return above / below if finite and below > 0 else None


def unrelated_cosine(shape: tuple[int, int]) -> float:
    """Return the bound below which |cos| stays for 99 % of pairs of unrelated weights [out, in].

    Where entries are independent and around zero, the cosine is normal with variance 1/(out * in).
    """
    return UNRELATED_QUANTILE / math.sqrt(math.prod(shape))


def strip_bytes(source: WeightSource) -> int:
    """Return how many bytes one thread holds for a role.

    They are a strip as it is read and in float64, and the bytes for loading and for reading.
    """
    shape = source.shape
    rows = min(shape[0], tiles.strip_rows(shape[1], tiles.READ_ELEMENTS))
    item = torch_dtype(source.dtype).itemsize
    return rows * shape[1] * (item + 8) + source.scratch(rows) + source.held


def products(
    sources: Mapping[str, WeightSource], reader: TensorReader, workers: Workers
) -> InnerProducts:
    """Read all roles' rows once and add up their products, strip by strip in order.

    Raises
    ------
    CheckpointError, DataError
        A row cannot be read.
    """
    loaded = {role: source.load(reader) for role, source in sources.items()}
    shape = next(iter(loaded.values())).shape
    squares = dict.fromkeys(loaded, 0.0)
    inner = dict.fromkeys(combinations(loaded, 2), 0.0)
    for rows in tiles.strips(slice(0, shape[0]), shape[1], tiles.READ_ELEMENTS):
        strips = {
            role: _numbers(source, rows, reader, workers.buffer, role)
            for role, source in loaded.items()
        }
        for role, strip in strips.items():
            squares[role] += float(torch.dot(strip, strip))
        for one, other in inner:
            inner[one, other] += float(torch.dot(strips[one], strips[other]))
    return InnerProducts(squares, inner)


def _numbers(
    source: WeightSource,
    rows: slice,
    reader: TensorReader,
    buffer: Callable[[str, tuple[int, ...], torch.dtype], Tensor],
    role: str,
) -> Tensor:
    """Read rows of a weight in float64, as one vector in this thread's buffer for the role."""
    stored = source.read(rows, reader, buffer, f"{role} stored")
    numbers = buffer(f"{role} numbers", tuple(stored.shape), torch.float64)
    return numbers.copy_(stored).view(-1)
