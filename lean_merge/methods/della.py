"""DELLA: drop entries by chance, small ones more likely, and elect signs (arXiv:2406.11617)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lean_merge.errors import RecipeError
from lean_merge.linalg.ranks import fill_row_ranks
from lean_merge.methods.base import per_expert
from lean_merge.methods.dropping import DroppingMethod, DroppingParameters
from lean_merge.methods.elementwise import Block
from lean_merge.methods.ranges import check_range
from lean_merge.methods.registry import register


@dataclass(frozen=True, slots=True)
class DellaParameters(DroppingParameters):
    """Parameters of DELLA.

    density : mean probability with which an entry of the task vector is kept, of each expert by
        itself.
    mllm_density : the same for the MLLM's task vector; at 0 it is the first expert's.
    epsilon : how much the probability of the largest entry of a row is above the mean, and that of
        the smallest below it, of each expert by itself. The MLLM's is the first expert's.
    weight : weight of the expert's task vector, of each expert by itself.
    mllm_weight : weight of the MLLM's task vector.
    normalize : divide by the sum of the weights.
    scale : factor of the merged task vector.
    rescale : divide the entries that are kept by their probabilities (`density`), or multiply them
        by what restores the sum of magnitudes (`l1`), or leave them (`none`).
    """

    epsilon: float = per_expert(0.15)

    def __post_init__(self) -> None:
        DroppingParameters.__post_init__(self)
        check_range("epsilon", self.epsilon, 0, 0.5)


@register
class Della(DroppingMethod[DellaParameters]):
    """W = W_0 + scale * the mean, over the task vectors that agree in sign, of random entries.

    An entry is kept with the probability density - epsilon + 2 epsilon r / (n - 1), where r is the
    rank of its magnitude among the n of its row, from 0 for the smallest, and divided by that. At a
    density of 1 all are kept. Signs are elected as in `ties`.
    """

    name: ClassVar[str] = "della"
    reference: ClassVar[str] = "arXiv:2406.11617"
    evidence: ClassVar[str] = "published and here"
    parameters_type: ClassVar[type[DellaParameters]] = DellaParameters
    elects: ClassVar[bool] = True
    keeping: ClassVar[int] = 6
    """The probabilities, the random numbers, and what sorting takes."""

    def check(self) -> None:
        """Raise RecipeError if a probability does not lie between 0 and 1."""
        super().check()
        for role, density in enumerate(self.densities):
            epsilon = self._epsilon(role)
            if density < 1 and not epsilon < min(density, 1 - density):
                raise RecipeError(
                    f"epsilon must be smaller than density and 1 - density, since probabilities "
                    f"reach from density - epsilon to density + epsilon; it is {epsilon} at a "
                    f"density of {density}."
                )

    def _epsilon(self, role: int) -> float:
        return self.parameters[max(0, role - 1)].epsilon

    def draw(self, block: Block, role: int, out: Tensor, work: Tensor, *, divide: bool) -> float:
        """Write the entries that stay to `out`, divided by their probabilities if wanted."""
        task_vector, density = block.task_vectors[role], self.densities[role]
        if density == 1:
            out.copy_(task_vector)
            return 1.0
        probabilities = fill_row_ranks(task_vector, work[0])
        steps = task_vector.shape[1] - 1
        epsilon = self._epsilon(role) if steps else 0.0
        probabilities.mul_(2 * epsilon / max(1, steps)).add_(density - epsilon)
        numbers = block.uniform(f"drop {role}", work[1])
        torch.lt(numbers, probabilities, out=out).mul_(task_vector)
        if divide:
            out.div_(probabilities)
        return 1.0
