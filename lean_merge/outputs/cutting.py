"""Cut the update of a weight to the rank that an adapter keeps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lean_merge.linalg.truncation import Truncation, truncate
from lean_merge.methods import Decision
from lean_merge.outputs.base import Output
from lean_merge.tasks import Truncated
from lean_merge.tasks.tiles import STRIP_ELEMENTS

ADAPTER_ERROR = 2e-4
"""The largest relative Frobenius error that `--lora-rank auto` allows for an update."""


@dataclass(frozen=True, slots=True)
class CutUpdate:
    """An update cut to rank k: b [out, k] @ a [k, in], which are formed a few rows at a time.

    Attributes
    ----------
    left, right : Tensor [out, r], [r, in]
        The factors of the whole update.
    cut
        The truncation that is applied to them.
    omitted
        The relative error that they have already.
    """

    left: Tensor
    right: Tensor
    cut: Truncation
    omitted: float

    @property
    def rank(self) -> int:
        """Return the rank k that is kept."""
        return self.cut.rank

    @property
    def truncated(self) -> Truncated:
        """Return the record of the cut for the report."""
        rest = self.omitted**2
        error = math.sqrt(rest + (1 - rest) * self.cut.error**2) if rest else self.cut.error
        return Truncated(self.rank, error)

    def b(self) -> Iterator[Tensor]:
        """Yield the rows of b in order, a few at a time."""
        return _strips(self.left, self.cut.of_left)

    def a(self) -> Iterator[Tensor]:
        """Yield the rows of a in order, a few at a time."""
        return _strips(self.cut.of_right, self.right)


def cut_update(decision: Decision, rank: int | str) -> CutUpdate | None:
    """Cut a decision's update to a rank; return None if it has no update.

    Parameters
    ----------
    decision
        The decision, whose update must have factors.
    rank
        The rank to cut it to, or "auto" for the smallest rank whose relative Frobenius error is at
        most `ADAPTER_ERROR`.
    """
    update = decision.update
    factors = None if update is None else update.factors()
    if update is None or factors is None:
        return None
    cut = truncate(*factors, error=ADAPTER_ERROR, rank=None if isinstance(rank, str) else rank)
    return CutUpdate(*factors, cut, update.omitted)


def cutting_bytes(rank: int) -> int:
    """Return the bytes that it takes to cut factors of `rank`.

    They are a dozen matrices [rank, rank] in float64: Gram matrices, eigenvectors, their products
    and LAPACK's workspace. Strips of the factors in float64, and of the cut ones, are added.
    """
    return 12 * rank**2 * 8 + 4 * STRIP_ELEMENTS * 8


def _strips(left: Tensor, right: Tensor) -> Iterator[Tensor]:
    """Yield the product's rows, a few at a time."""
    height = max(1, STRIP_ELEMENTS // max(1, *right.shape))
    for first in range(0, left.shape[0], height):
        yield torch.mm(left[first : first + height], right)


class CuttingOutput(Output):
    """A kind of output that keeps the factors of updates, and so cuts each to its rank."""

    most_waiting: ClassVar[int] = 1

    @staticmethod
    def storing_bytes(rank: int) -> int:
        """Return how many bytes it takes to cut an update of at most `rank`."""
        return cutting_bytes(rank)

    @staticmethod
    def waiting_bytes(update: int, rank: int, kept: int) -> int:
        """Return the bytes of one update, and of cutting it."""
        return update + cutting_bytes(rank)
