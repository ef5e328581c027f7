"""Base class of methods that compute each entry of the update from the task vectors' same entry.

Such a method may also use the rest of the entry's row, statistics of the weight or of all weights,
and random numbers.
"""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from lean_merge.linalg import Pass, Products
from lean_merge.linalg.chance import fill_uniform
from lean_merge.methods.base import (
    AnalysisCost,
    Decision,
    ExpertRecord,
    Method,
    Passes,
    WeightContext,
)
from lean_merge.methods.updates import Update

P = TypeVar("P")


@dataclass(frozen=True, slots=True)
class Block:
    """A few rows of one weight for which a method computes the update.

    Attributes
    ----------
    task_vectors : sequence of Tensor [t, in], float32
        These rows of the task vectors, the MLLM's first. They are not to be changed. Where
        `reads_task_vectors` is False there are no rows.
    scratch : Tensor [k, t, in], float32
        Memory to work with; its contents are arbitrary. k is the method's `scratch`.
    statistics
        The result of the method's `statistics`.
    rows : slice
        The indices of these rows in the weight.
    name : str
        The canonical name of the weight.
    seed : int
        The recipe's seed.
    """

    task_vectors: Sequence[Tensor]
    scratch: Tensor
    statistics: Any
    rows: slice
    name: str
    seed: int

    def uniform(self, purpose: str, out: Tensor) -> Tensor:
        """Fill `out` [t, in] with random numbers from 0 to 1, and return it.

        They depend on the seed, the weight's name, the purpose and the rows' indices alone, so that
        a row's numbers are the same whatever rows make up the block.
        """
        return fill_uniform(out, self.rows.start, seed=self.seed, name=self.name, purpose=purpose)


class ElementwiseMethod(Method[P], abc.ABC):
    """A method that computes rows of the update from the same rows of the task vectors."""

    exact_differences: ClassVar[bool] = True
    changes_by_itself: ClassVar[bool] = True
    multiplies: ClassVar[bool] = False

    @abc.abstractmethod
    def fill(self, block: Block, out: Tensor) -> None:
        """Write the update of a block's rows to `out` [t, in] float32.

        Several threads call this at the same time. An entry's update may depend on its whole row,
        but on other rows only through `block.statistics`.
        """

    @property
    def scratch(self) -> int:
        """Return how many float32 blocks [t, in] `fill` needs, including any that it allocates."""
        return 4

    def statistics(
        self, weight: WeightContext
    ) -> Generator[Sequence[Pass | None], Sequence[Products | None], Any]:
        """Ask for the passes that `fill` needs, and return plain numbers in tuples.

        By default this returns the result of the survey of all weights.
        """
        return weight.surveyed
        yield  # makes this a generator, as the protocol wants

    def analyze(self, weight: WeightContext) -> Passes:
        """Ask for the passes of `statistics`, and merge every in-scope weight."""
        statistics = yield from self.statistics(weight)
        record = ExpertRecord(selected=True, reason="every in-scope weight is merged")
        update = Elementwise(self, statistics, name=weight.name, seed=weight.seed)
        return Decision((record,) * len(self.parameters), update)

    def cost(self, shape: tuple[int, int], *, item: int) -> AnalysisCost:
        """Return the cost without any pass; it counts only the memory that `fill` needs."""
        return AnalysisCost(scratch=self.scratch)

    def reads_task_vectors(self) -> tuple[bool, ...]:
        """Tell that an update may need the rows of every task vector."""
        return (True,) * (len(self.parameters) + 1)


class Elementwise(Update):
    """The update that an `ElementwiseMethod` computes a few rows at a time.

    Parameters
    ----------
    method
        The method whose `fill` computes the rows.
    statistics
        The method's statistics: numbers and tuples of them, whose `repr` is exact.
    name, seed
        The weight's canonical name, and the recipe's seed.
    """

    def __init__(
        self, method: ElementwiseMethod[Any], statistics: Any, *, name: str, seed: int
    ) -> None:
        self._method = method
        self._statistics = statistics
        self._name = name
        self._seed = seed

    @property
    def reads(self) -> tuple[bool, ...]:
        """Tell that the rows of every task vector are needed."""
        return self._method.reads_task_vectors()

    @property
    def scratch(self) -> int:
        """Return how many float32 blocks [t, in] the method's `fill` needs."""
        return self._method.scratch

    def rows(
        self, rows: slice, task_vectors: Sequence[Tensor | None], scratch: Tensor, out: Tensor
    ) -> None:
        """Call the method's `fill` to write these rows of the update to `out`."""
        none = torch.empty(0, dtype=torch.float32)
        given = [none if each is None else each for each in task_vectors]
        block = Block(given, scratch, self._statistics, rows, self._name, self._seed)
        self._method.fill(block, out)

    def digest(self) -> bytes:
        """Return SHA-256 of the method's name and parameters, the seed and the statistics."""
        method = self._method
        told = repr((method.name, method.parameters, self._seed, self._statistics))
        return hashlib.sha256(told.encode()).digest()


__all__ = ["Block", "Elementwise", "ElementwiseMethod"]
