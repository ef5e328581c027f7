"""Task Arithmetic: add the experts' task vectors, scaled (arXiv:2212.04089)."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from lean_merge.errors import RecipeError
from lean_merge.linalg import Pass, Products
from lean_merge.methods.base import (
    AnalysisCost,
    Decision,
    ExpertRecord,
    Method,
    WeightContext,
    per_expert,
)
from lean_merge.methods.registry import register
from lean_merge.methods.updates import Combined


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
class TaskArithmetic(Method[TaskArithmeticParameters]):
    """W = W_mllm + sum_k scale_k (W_expert_k - W_0), on every in-scope weight."""

    name: ClassVar[str] = "task_arithmetic"
    reference: ClassVar[str] = "arXiv:2212.04089"
    parameters_type = TaskArithmeticParameters

    def __init__(self, parameters: Sequence[TaskArithmeticParameters]) -> None:
        super().__init__(parameters)
        if self.common.symmetric and len({p.scale for p in self.parameters}) > 1:
            raise RecipeError("symmetric task arithmetic has one scale; give it once, for all.")

    def cost(self, shape: tuple[int, int], *, item: int) -> AnalysisCost:
        """Nothing: no pass is made."""
        return AnalysisCost()

    def reads_task_vectors(self) -> tuple[bool, ...]:
        """Every expert's, and the MLLM's where the merge is symmetric."""
        return self._of_mllm() != 0.0, *(p.scale != 0.0 for p in self.parameters)

    def _of_mllm(self) -> float:
        return self.common.scale - 1.0 if self.common.symmetric else 0.0

    def analyze(
        self, weight: WeightContext
    ) -> Generator[Sequence[Pass | None], Sequence[Products | None], Decision]:
        """No passes: the coefficients are given."""
        scales = tuple(p.scale for p in self.parameters)
        coefficients = self._of_mllm(), *scales
        records = tuple(
            ExpertRecord(
                selected=True,
                reason="every in-scope weight is merged",
                update_norm=None if scale else 0.0,
            )
            for scale in scales
        )
        return Decision(records, Combined(coefficients) if any(coefficients) else None)
        yield  # makes this a generator, as the protocol wants
