"""Methods that drop entries of every task vector by chance, and enlarge those that stay."""

from __future__ import annotations

import abc
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from lean_merge.linalg import Pass, Products
from lean_merge.methods.base import AnalysisCost, WeightContext
from lean_merge.methods.elementwise import Block
from lean_merge.methods.ranges import check_word
from lean_merge.methods.sparse import SparseMethod, SparseParameters

RESCALE = ("density", "l1", "none")


@dataclass(frozen=True, slots=True)
class DroppingParameters(SparseParameters):
    """Parameters of methods that drop entries by chance.

    rescale : divide an entry that is kept by the probability of that (`density`), or multiply all
        by what restores the sum of magnitudes (`l1`), or leave them (`none`).
    """

    rescale: str = "density"

    def __post_init__(self) -> None:
        SparseParameters.__post_init__(self)
        check_word("rescale", self.rescale, RESCALE)


D = TypeVar("D", bound=DroppingParameters)


class DroppingMethod(SparseMethod[D], abc.ABC):
    """A method that keeps each entry by chance.

    Whether an entry stays depends on the recipe's seed, the weight's canonical name, the task
    vector's number and the entry's indices.
    """

    @abc.abstractmethod
    def draw(self, block: Block, role: int, out: Tensor, work: Tensor, *, divide: bool) -> float:
        """Write the entries that stay as `keep` does; `divide` them by their probabilities."""

    def keep(self, block: Block, role: int, out: Tensor, work: Tensor) -> float:
        """Write the entries that stay to `out`, and return the factor that rescales them."""
        rescale = self.common.rescale
        factor = self.draw(block, role, out, work, divide=rescale == "density")
        if rescale == "l1":
            before, after = block.statistics[role]
            return float(before / after) if after else 1.0
        return factor

    def statistics(
        self, weight: WeightContext
    ) -> Generator[Sequence[Pass | None], Sequence[Products | None], Any]:
        """Return each task vector's sum of magnitudes before and after dropping, for `l1`."""
        if self.common.rescale != "l1":
            return None
        found = yield [
            Pass(reduce=partial(self._sums, weight, role)) if own else None
            for role, own in enumerate(self.weights)
        ]
        return tuple(
            () if each is None or each.reduced is None else tuple(each.reduced.tolist())
            for each in found
        )

    def _sums(self, weight: WeightContext, role: int, rows: slice, values: Tensor) -> Tensor:
        """Return the sums of magnitudes of some rows before and after dropping: [2] float64."""
        work = torch.empty(self.keeping + 1, *values.shape, dtype=torch.float32)
        task_vectors = [values] * self.roles
        block = Block(task_vectors, work, None, rows, weight.name, weight.seed)
        self.draw(block, role, work[0], work[1:], divide=False)
        sums = [each.abs().sum(dtype=torch.float64) for each in (values, work[0])]
        return torch.stack(sums)

    def cost(self, shape: tuple[int, int], *, item: int) -> AnalysisCost:
        """Return the cost; `l1` takes a pass over the rows."""
        if self.common.rescale != "l1":
            return super().cost(shape, item=item)
        # The blocks of `_sums` in at most four threads, which get 2^18 numbers at once, or 4 rows.
        workspace = 4 * (self.keeping + 3) * 4 * max(1 << 18, 4 * shape[1])
        return AnalysisCost(workspace, passes=1, usual_passes=1, scratch=self.scratch)


__all__ = ["DroppingMethod", "DroppingParameters"]
