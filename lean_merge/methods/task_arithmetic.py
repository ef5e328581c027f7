"""Task Arithmetic: add the experts' task vectors, scaled (arXiv:2212.04089)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from lean_merge.errors import RecipeError
from lean_merge.methods.base import per_expert
from lean_merge.methods.combination import LinearMethod
from lean_merge.methods.registry import register


@dataclass(frozen=True, slots=True)
class TaskArithmeticParameters:
    """Parameters of Task Arithmetic.

    scale : weight of the expert's task vector, of each expert by itself.
    symmetric : False, W = W_mllm + sum_k scale_k dM_k; True, W = W_0 + scale (dV + sum_k dM_k) with
        one scale for all.
    """

    scale: float = per_expert(1.0)
    symmetric: bool = False

    def __post_init__(self) -> None:
        if not -100 <= self.scale <= 100:
            raise RecipeError(f"scale must lie in -100 .. 100, not {self.scale}.")


@register
class TaskArithmetic(LinearMethod[TaskArithmeticParameters]):
    """W = W_mllm + sum_k scale_k (W_expert_k - W_0), on every in-scope weight."""

    name: ClassVar[str] = "task_arithmetic"
    reference: ClassVar[str] = "arXiv:2212.04089"
    parameters_type = TaskArithmeticParameters
    evidence: ClassVar[str] = "published and here"

    def __init__(self, parameters: Sequence[TaskArithmeticParameters]) -> None:
        super().__init__(parameters)
        if self.common.symmetric and len({p.scale for p in self.parameters}) > 1:
            raise RecipeError("symmetric task arithmetic has one scale; give it once, for all.")

    def coefficients(self) -> tuple[float, ...]:
        """Return the coefficient of the MLLM's task vector, then the experts' scales.

        The MLLM's is scale - 1 if the merge is symmetric, because W_mllm already holds it once.
        """
        of_mllm = self.common.scale - 1.0 if self.common.symmetric else 0.0
        return of_mllm, *(own.scale for own in self.parameters)
