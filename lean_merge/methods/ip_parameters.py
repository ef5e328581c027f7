"""The parameters of IP-Merging."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lean_merge.errors import RecipeError, shown
from lean_merge.methods.base import per_expert

AUTO = "auto"
STAGES = ("select", "rescale", "project")
_STAGE_SETS = (
    frozenset({"select"}),
    frozenset({"select", "rescale"}),
    frozenset({"select", "project"}),
    frozenset(STAGES),
)
_CHOICES = {
    "select_by": ("first", "max"),
    "nuclear": ("full", "top_q"),
    "importance": ("softmax", "relative"),
    "similarity_weight": ("none", "sigma"),
    "svd": ("randomized", "exact"),
}


@dataclass(frozen=True, slots=True)
class IPMergingParameters:
    """The parameters of IP-Merging; docs/method.md explains the steps.

    threshold : S_alpha of step 4, in 0 .. 1, of each expert by itself; or `auto`, from an analysis.
    scale : factor of the update in step 8, of each expert by itself.
    select_by : compare `first`, s_1, or `max`, the largest computed s_i, with the threshold.
    temperature : tau of step 6.
    importance : `softmax`, or `relative`, gamma_i = exp(tau (s_i - max s)).
    nuclear : sum `full` spectra in step 5, or `top_q` leading singular values.
    similarity_weight : `none`, or `sigma`, weigh s_i by the geometric mean of relative sigmas.
    stages : select; select,rescale; select,project; or all three (the paper's Table 5).
    rank : `auto`, or the number of directions to compute.
    svd : `randomized`, or `exact` for small models and as a reference.
    """

    threshold: float | str = per_expert(0.4, words=(AUTO,))
    scale: float = per_expert(1.0)
    select_by: str = "first"
    temperature: float = 32.0
    importance: str = "softmax"
    nuclear: str = "full"
    similarity_weight: str = "none"
    stages: tuple[str, ...] = STAGES
    rank: int | str = "auto"
    svd: str = "randomized"

    def __post_init__(self) -> None:
        if self.threshold != AUTO and (
            isinstance(self.threshold, str) or not 0 <= self.threshold <= 1
        ):
            raise RecipeError(f"threshold must lie in 0 .. 1, or be auto, not {self.threshold}.")
        if not -100 <= self.scale <= 100:
            raise RecipeError(f"scale must lie in -100 .. 100, not {self.scale}.")
        if not 0 <= self.temperature <= 10_000:
            raise RecipeError(f"temperature must lie in 0 .. 10000, not {self.temperature}.")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise RecipeError(
                    f"{name} must be one of {', '.join(choices)}, not {shown(getattr(self, name))}."
                )
        if frozenset(self.stages) not in _STAGE_SETS or len(set(self.stages)) != len(self.stages):
            raise RecipeError(
                f"stages {shown(','.join(map(str, self.stages)))} is not defined; choose select; "
                "select,rescale; select,project; or select,rescale,project."
            )
        if self.rank != "auto" and not (type(self.rank) is int and self.rank >= 1):
            raise RecipeError(
                f"rank must be 'auto' or a whole number from 1, not {shown(self.rank)}."
            )

    @property
    def bound(self) -> float:
        """Return the threshold; it is infinite while it is `auto` and not yet found."""
        return math.inf if self.threshold == AUTO else float(self.threshold)
