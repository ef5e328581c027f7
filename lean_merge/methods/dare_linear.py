"""DARE: drop entries of task vectors at random, enlarge the rest, and add (arXiv:2311.03099)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lean_merge.methods.dropping import DroppingMethod, DroppingParameters
from lean_merge.methods.elementwise import Block
from lean_merge.methods.registry import register


@dataclass(frozen=True, slots=True)
class DareParameters(DroppingParameters):
    """Parameters of DARE.

    density : probability with which an entry of the task vector is kept, of each expert by itself.
    mllm_density : the same for the MLLM's task vector; at 0 it is the first expert's.
    weight : weight of the expert's task vector, of each expert by itself.
    mllm_weight : weight of the MLLM's task vector.
    normalize : divide by the sum of the weights.
    scale : factor of the merged task vector.
    rescale : divide the entries that are kept by their `density`, or multiply them by what restores
        the sum of magnitudes (`l1`), or leave them (`none`).
    """


@dataclass(frozen=True, slots=True)
class DareLinearParameters(DareParameters):
    __doc__ = DareParameters.__doc__

    normalize: bool = False
    least_weight: ClassVar[float] = -100


@register
class DareLinear(DroppingMethod[DareParameters]):
    """W = W_0 + scale * the sum of the task vectors, of which random entries are dropped.

    Each entry is kept with the probability `density`, and then divided by it.
    """

    name: ClassVar[str] = "dare_linear"
    reference: ClassVar[str] = "arXiv:2311.03099"
    evidence: ClassVar[str] = "published and here"
    parameters_type: ClassVar[type[DareParameters]] = DareLinearParameters
    elects: ClassVar[bool] = False
    keeping: ClassVar[int] = 2
    """The random numbers, and the bits that they are made of."""

    def draw(self, block: Block, role: int, out: Tensor, work: Tensor, *, divide: bool) -> float:
        """Write the entries that stay to `out`."""
        density = self.densities[role]
        if density == 1:
            out.copy_(block.task_vectors[role])
            return 1.0
        numbers = block.uniform(f"drop {role}", work[0])
        torch.lt(numbers, density, out=out).mul_(block.task_vectors[role])
        return 1 / density if divide else 1.0
