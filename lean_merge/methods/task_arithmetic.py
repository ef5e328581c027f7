"""Task Arithmetic: add the experts' task vectors, scaled (arXiv:2212.04089)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from lean_merge.errors import RecipeError
from lean_merge.methods.base import per_expert
from lean_merge.methods.combination import LinearMethod
from lean_merge.methods.ranges import check_range
from lean_merge.methods.registry import register


@dataclass(frozen=True, slots=True)
class TaskArithmeticParameters:
    """Parameters of Task Arithmetic.

    scale : factor of the expert's task vector, of each expert by itself.
    weight : another such factor.
    normalize : divide by the sum of the weights.
    exact : form task vectors in float32, even if the checkpoints have 16 bits; that is slower.
    symmetric : False, W = W_mllm + sum_k scale_k dM_k; True, W = W_0 + scale (dV + sum_k dM_k) with
        one scale for all.
    """

    scale: float = per_expert(1.0)
    symmetric: bool = False
    weight: float = per_expert(1.0)
    normalize: bool = False
    exact: bool = False

    def __post_init__(self) -> None:
        check_range("scale", self.scale, -100, 100)
        check_range("weight", self.weight, -100, 100)


@register
class TaskArithmetic(LinearMethod[TaskArithmeticParameters]):
    """W = W_mllm + sum_k scale_k weight_k (W_expert_k - W_0), on every in-scope weight."""

    name: ClassVar[str] = "task_arithmetic"
    reference: ClassVar[str] = "arXiv:2212.04089"
    parameters_type = TaskArithmeticParameters
    evidence: ClassVar[str] = "published and here"

    def __init__(self, parameters: Sequence[TaskArithmeticParameters]) -> None:
        super().__init__(parameters)
        if self.common.symmetric and len({p.scale for p in self.parameters}) > 1:
            raise RecipeError("symmetric task arithmetic has one scale; give it once, for all.")
        if self.common.symmetric and any(p.weight != 1.0 for p in self.parameters):
            raise RecipeError("weight: symmetric task arithmetic has one scale, and no weights.")
        if self.common.normalize and abs(sum(p.weight for p in self.parameters)) < 1e-8:
            raise RecipeError("weight: with normalize, the weights may not sum to zero.")

    def forms_exactly(self, shape: tuple[int, int]) -> bool:
        """Return whether the parameter `exact` asks for task vectors in float32."""
        return self.common.exact

    def coefficients(self) -> tuple[float, ...]:
        """Return the coefficient of the MLLM's task vector, then the experts' scales.

        The MLLM's is scale - 1 if the merge is symmetric, because W_mllm already holds it once.
        """
        of_mllm = self.common.scale - 1.0 if self.common.symmetric else 0.0
        total = sum(own.weight for own in self.parameters) if self.common.normalize else 1.0
        return of_mllm, *(own.scale * own.weight / total for own in self.parameters)
