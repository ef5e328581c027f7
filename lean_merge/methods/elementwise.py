"""Methods that work out an entry of the update from the same entry of the task vectors.

They may also use the rest of its row, statistics of the weight or of all weights, and random
numbers.
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
    """A few rows of one weight, whose update a method works out.

    Attributes
    ----------
    task_vectors : sequence of Tensor [t, in], float32
        These rows of the task vectors, the MLLM's first. They are not to be changed.
    scratch : Tensor [k, t, in], float32
        Memory to work with, with anything in it; k is the method's `scratch`.
    statistics
        What the method's `statistics` returned.
    rows : slice
        Which rows of the weight these are.
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
        """Fill `out` [t, in] with random numbers from 0 up to, and without, 1.

        They are drawn for each row by a generator of its own, which is seeded by SHA-256 of the
        seed, the weight's name, the purpose and the row's index. So the same numbers come whichever
        rows make up the block, and other ones for another purpose.
        """
        generator = torch.Generator()
        for row, numbers in enumerate(out, self.rows.start):
            key = f"{self.seed}\0{self.name}\0{purpose}\0row {row}".encode()
            digest = hashlib.sha256(key).digest()
            generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            torch.rand(numbers.shape, generator=generator, out=numbers)
        return out


class ElementwiseMethod(Method[P], abc.ABC):
    """A method that gives the update of a few rows from the same rows of the task vectors."""

    exact_differences: ClassVar[bool] = True
    changes_by_itself: ClassVar[bool] = True
    multiplies: ClassVar[bool] = False

    @abc.abstractmethod
    def fill(self, block: Block, out: Tensor) -> None:
        """Write the update of a block's rows to `out` [t, in] float32.

        Several threads call this at a time. An entry's update may depend on its whole row, but on
        no other row but through `block.statistics`.
        """

    @property
    def scratch(self) -> int:
        """How many blocks [t, in] of float32 `fill` takes, in `block.scratch` or by itself."""
        return 4

    def statistics(
        self, weight: WeightContext
    ) -> Generator[Sequence[Pass | None], Sequence[Products | None], Any]:
        """Ask for the passes that `fill` needs, and return plain numbers in tuples.

        By default, what the survey of all weights returned.
        """
        return weight.surveyed
        yield  # makes this a generator, as the protocol wants

    def analyze(self, weight: WeightContext) -> Passes:
        """The passes of `statistics`; every in-scope weight is merged."""
        statistics = yield from self.statistics(weight)
        record = ExpertRecord(selected=True, reason="every in-scope weight is merged")
        update = Elementwise(self, statistics, name=weight.name, seed=weight.seed)
        return Decision((record,) * len(self.parameters), update)

    def cost(self, shape: tuple[int, int], *, item: int) -> AnalysisCost:
        """No pass, and what `fill` takes."""
        return AnalysisCost(scratch=self.scratch)

    def reads_task_vectors(self) -> tuple[bool, ...]:
        """All of them."""
        return (True,) * (len(self.parameters) + 1)


class Elementwise(Update):
    """The update that an `ElementwiseMethod` works out a few rows at a time.

    Parameters
    ----------
    method
        Whose `fill` works it out.
    statistics
        What it asked for, in numbers and tuples of them, whose `repr` tells them exactly.
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
        """All task vectors."""
        return self._method.reads_task_vectors()

    @property
    def scratch(self) -> int:
        """What the method's `fill` takes."""
        return self._method.scratch

    def rows(
        self, rows: slice, task_vectors: Sequence[Tensor | None], scratch: Tensor, out: Tensor
    ) -> None:
        """The method's `fill`."""
        given = [task_vector for task_vector in task_vectors if task_vector is not None]
        block = Block(given, scratch, self._statistics, rows, self._name, self._seed)
        self._method.fill(block, out)

    def digest(self) -> bytes:
        """The digest of the method, its parameters, the seed and the statistics."""
        method = self._method
        told = repr((method.name, method.parameters, self._seed, self._statistics))
        return hashlib.sha256(told.encode()).digest()


__all__ = ["Block", "Elementwise", "ElementwiseMethod"]
