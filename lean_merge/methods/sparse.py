"""Methods that thin out every task vector, and then add them up or elect a sign for each entry.

The task vectors t_i are the MLLM's and the experts', with weights w_i, and the result is
W_0 + scale * merged. Sparse t_i, in which many entries are 0, are merged in one of two ways. They
are summed: sum w_i t_i. Or the sign of that sum is elected for each entry, where 0 counts as
positive, and only the entries of that sign are summed. With `normalize`, a sum is divided by that
of its weights.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from lean_merge.errors import RecipeError
from lean_merge.methods.base import per_expert
from lean_merge.methods.elementwise import Block, ElementwiseMethod
from lean_merge.methods.ranges import check_range, check_share
from lean_merge.methods.weighed import WeighedMethod


@dataclass(frozen=True, slots=True)
class SparseParameters:
    """Parameters of methods that merge sparse task vectors.

    density : share of a task vector's entries that is kept.
    mllm_density : the same for the MLLM's task vector; at 0 it is the first expert's.
    weight : weight of the expert's task vector, of each expert by itself.
    mllm_weight : weight of the MLLM's task vector.
    normalize : divide by the sum of the weights.
    scale : factor of the merged task vector.
    """

    density: float = per_expert(0.2)
    mllm_density: float = 0.0
    weight: float = per_expert(1.0)
    mllm_weight: float = 1.0
    normalize: bool = True
    scale: float = 1.0
    least_weight: ClassVar[float] = 0

    def __post_init__(self) -> None:
        check_share("density", self.density)
        if self.mllm_density:
            check_share("mllm_density", self.mllm_density)
        for name in ("weight", "mllm_weight"):
            check_range(name, getattr(self, name), self.least_weight, 100)
        check_range("scale", self.scale, -100, 100)


_MINUS_ONE = torch.tensor(-1.0)
S = TypeVar("S", bound=SparseParameters)


class SparseMethod(WeighedMethod[S], ElementwiseMethod[S], abc.ABC):
    """A method that merges sparse task vectors; a subclass says which entries stay."""

    elects: ClassVar[bool]
    """Whether a sign is elected for each entry."""
    keeping: ClassVar[int]
    """How many blocks `keep` works with."""

    def check(self) -> None:
        """Raise RecipeError if a sum of weights that is divided by is zero."""
        if self.common.normalize and abs(sum(self.weights)) < 1e-8:
            raise RecipeError(
                "weight, mllm_weight: with normalize, the weights may not sum to zero."
            )

    @property
    def densities(self) -> tuple[float, ...]:
        """Return the share of entries that is kept of each task vector, the MLLM's first."""
        of_mllm = self.common.mllm_density or self.common.density
        return of_mllm, *(own.density for own in self.parameters)

    def reads_task_vectors(self) -> tuple[bool, ...]:
        """Tell which task vectors `fill` needs: all that have a weight, and the MLLM's."""
        return self.has_mllm, *(weight != 0.0 for weight in self.weights[1:])

    @property
    def scratch(self) -> int:
        """Return how many blocks `fill` needs, those of `keep` included.

        An election keeps all sparse task vectors, and needs three blocks more, for the signs, the
        entries that agree with them and the sums of their weights. A sum needs one.
        """
        return self.keeping + (self.roles + 3 if self.elects else 1)

    @abc.abstractmethod
    def keep(self, block: Block, role: int, out: Tensor, work: Tensor) -> float:
        """Write a task vector's entries that stay to `out` [t, in], and 0 elsewhere.

        Parameters
        ----------
        role
            The number of the task vector: 0 is the MLLM's, and k the k-th expert's.
        work : Tensor [keeping, t, in]
            Memory to work with; its contents are arbitrary.

        Returns
        -------
        float
            The factor by which all that is in `out` is still to be multiplied.
        """

    def fill(self, block: Block, out: Tensor) -> None:
        """Write the scaled merged task vector minus the MLLM's own task vector to `out`."""
        if self.elects:
            self._elect(block, out)
        else:
            self._add(block, out)
        if self.has_mllm:
            out.sub_(block.task_vectors[0])

    def _add(self, block: Block, out: Tensor) -> None:
        """Write the scaled sum of the sparse task vectors to `out`."""
        work, sparse = block.scratch[: self.keeping], block.scratch[self.keeping]
        divisor = sum(self.weights) if self.common.normalize else 1.0
        out.zero_()
        for role, weight in enumerate(self.weights):
            if weight:
                factor = self.keep(block, role, sparse, work)
                out.add_(sparse, alpha=factor * weight * self.common.scale / divisor)

    def _elect(self, block: Block, out: Tensor) -> None:
        """Write the scaled sum of the entries that agree with the elected signs to `out`."""
        work = block.scratch[: self.keeping]
        *blocks, signs, agrees, divisor = block.scratch[self.keeping :]
        weighed = [(blocks[role], own) for role, own in enumerate(self.weights) if own]
        signs.zero_()
        for role, weight in enumerate(self.weights):
            if weight:
                factor = self.keep(block, role, blocks[role], work) * weight
                signs.add_(blocks[role] if factor == 1.0 else blocks[role].mul_(factor))
        # The sign is +1 where the sum is not negative, and -1 elsewhere: twice 1 or 0, minus 1.
        torch.add(_MINUS_ONE, torch.ge(signs, 0.0, out=signs), alpha=2.0, out=signs)
        out.zero_()
        divisor.zero_()
        for sparse, weight in weighed:
            torch.mul(sparse, signs, out=agrees)
            torch.gt(agrees, 0.0, out=agrees)
            out.addcmul_(sparse, agrees)
            if self.common.normalize:
                divisor.add_(agrees, alpha=weight)
        if self.common.normalize:
            # Where no task vector agrees, the sum is 0, and is divided by something.
            out.div_(divisor.clamp_min_(min(weight for _, weight in weighed)))
        if self.common.scale != 1.0:
            out.mul_(self.common.scale)


__all__ = ["SparseMethod", "SparseParameters"]
