"""Methods that keep, of every task vector, the entries whose magnitude lies in a band."""

from __future__ import annotations

import abc
import math
from collections.abc import Generator, Sequence
from functools import partial
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from lean_merge.linalg import Pass, Products
from lean_merge.linalg.magnitudes import counting_bytes, largest_magnitudes
from lean_merge.methods.base import AnalysisCost, WeightContext
from lean_merge.methods.elementwise import Block
from lean_merge.methods.sparse import SparseMethod, SparseParameters

S = TypeVar("S", bound=SparseParameters)

Bands = tuple[tuple[float, ...], ...]
"""For each task vector the number just below the smallest magnitude that is kept and, if there is
one, the largest magnitude that is kept."""


class BandMethod(SparseMethod[S], abc.ABC):
    """A method that keeps entries by the rank of their magnitude in the weight.

    Entries whose magnitude equals that of the last one kept are kept too.
    """

    keeping: ClassVar[int] = 1

    @abc.abstractmethod
    def ranks(self, role: int, count: int) -> tuple[int, ...]:
        """Return the ranks, among `count` entries, of the smallest magnitude kept and the largest.

        The largest entry has rank 1. Rank 0 means that none is kept, or for the largest that none
        is too large; it may be left out then.
        """

    def bands(self) -> Generator[Sequence[Pass | None], Sequence[Products | None], Bands]:
        """Ask for the two passes that tell the magnitudes of these ranks."""
        weights = enumerate(self.weights)
        ranks = [partial(self.ranks, role) if weight else None for role, weight in weights]
        found = yield from largest_magnitudes(ranks, torch.float32)
        return tuple((_below(each[0]), *each[1:]) if each else () for each in found)

    def statistics(
        self, weight: WeightContext
    ) -> Generator[Sequence[Pass | None], Sequence[Products | None], Bands]:
        """Return the bands of this weight."""
        return (yield from self.bands())

    def cost(self, shape: tuple[int, int], *, item: int) -> AnalysisCost:
        """Return the cost of counting magnitudes, which takes two passes over the rows."""
        workspace = counting_bytes(self.roles, len(self.ranks(0, 1)))
        return AnalysisCost(workspace, passes=2, usual_passes=2, scratch=self.scratch)

    def keep(self, block: Block, role: int, out: Tensor, work: Tensor) -> float:
        """Write the entries whose magnitudes lie in the role's band, edges included."""
        task_vector = block.task_vectors[role]
        below, *most = block.statistics[role]
        _larger(task_vector, below, out)
        for edge in most:
            out.sub_(_larger(task_vector, edge, work[0]))
        return 1.0


def _larger(values: Tensor, than: float, out: Tensor) -> Tensor:
    """Write the values of larger magnitude than a float32 number to `out`, and 0 for the others."""
    larger: Tensor = torch.ops.aten.hardshrink.out(values, than, out=out)
    return larger


def _below(magnitude: float) -> float:
    """Return the next smaller number in float32; a number below 0 for 0."""
    return float(torch.nextafter(torch.tensor(magnitude), torch.tensor(-math.inf)))


__all__ = ["BandMethod", "Bands"]
