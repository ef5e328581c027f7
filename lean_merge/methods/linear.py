"""Linear interpolation: weighted means of the models themselves (arXiv:2505.05464)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lean_merge.errors import RecipeError
from lean_merge.methods.base import Decision, ExpertRecord, Passes, WeightContext, per_expert
from lean_merge.methods.elementwise import Elementwise
from lean_merge.methods.interpolation import InterpolatingMethod
from lean_merge.methods.ranges import check_range
from lean_merge.methods.registry import register


@dataclass(frozen=True, slots=True)
class LinearParameters:
    """Parameters of linear interpolation.

    weight : share of the expert in the result, of each expert by itself.
    normalize : False, the MLLM has the share that the experts leave; True, all weights are divided
        by their sum, in which the MLLM's is mllm_weight.
    mllm_weight : weight of the MLLM, with normalize.
    """

    weight: float = per_expert(0.1)
    normalize: bool = False
    mllm_weight: float = 1.0

    def __post_init__(self) -> None:
        check_range("weight", self.weight, -100, 100)
        check_range("mllm_weight", self.mllm_weight, -100, 100)
        if self.mllm_weight != 1.0 and not self.normalize:
            raise RecipeError(
                "mllm_weight counts only with normalize: true; without it the MLLM has the share "
                "that the experts' weights leave."
            )


@register
class Linear(InterpolatingMethod[LinearParameters]):
    """W = (1 - sum_k w_k) W_mllm + sum_k w_k W_expert_k, on every in-scope weight.

    Where all w_k are 0, the MLLM's bytes are copied. So values that differ between layers make a
    layer swap.
    """

    name: ClassVar[str] = "linear"
    reference: ClassVar[str] = "arXiv:2505.05464"
    evidence: ClassVar[str] = "published and here"
    parameters_type = LinearParameters

    def check(self) -> None:
        """Raise RecipeError if the sum of weights that is divided by is zero."""
        if abs(self._divisor) < 1e-8:
            raise RecipeError(
                "weight, mllm_weight: with normalize, the weights may not sum to zero."
            )

    @property
    def _divisor(self) -> float:
        if not self.common.normalize:
            return 1.0
        return self.common.mllm_weight + sum(own.weight for own in self.parameters)

    @property
    def _shares(self) -> tuple[float, ...]:
        return tuple(own.weight / self._divisor for own in self.parameters)

    def analyze(self, weight: WeightContext) -> Passes:
        """Decide at once, without a pass."""
        records = tuple(
            ExpertRecord(
                selected=True,
                reason="every in-scope weight is merged",
                update_norm=None if share else 0.0,
            )
            for share in self._shares
        )
        if not any(self._shares):
            return Decision(records)
        update = Elementwise(self, (self._shares, 0.0), name=weight.name, seed=weight.seed)
        return Decision(records, update)
        yield  # makes this a generator, as the protocol wants

    def reads_task_vectors(self) -> tuple[bool, ...]:
        """Tell that the MLLM's weight is needed, and those of experts that have a share."""
        return any(self._shares), *(share != 0.0 for share in self._shares)
