"""The parameters of IP-Merging."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from lean_merge.errors import RecipeError, shown
from lean_merge.methods.base import per_expert
from lean_merge.methods.ranges import check_range, check_rank, check_word

AUTO = "auto"
PAPER, PUBLISHED = "paper", "published"
_OF_PUBLISHED = {"select_by": "max", "nuclear": "top_q", "rank": 1024}
"""What the code that the authors published does, in place of the paper's words."""
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
    "variant": (PAPER, PUBLISHED),
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
    variant : `paper`, or `published`, the rule of the code that the authors published; it sets
        select_by to max, nuclear to top_q and rank to 1024, and cuts the expert to that rank.
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
    variant: str = PAPER

    def __post_init__(self) -> None:
        if self.threshold != AUTO and (
            isinstance(self.threshold, str) or not 0 <= self.threshold <= 1
        ):
            raise RecipeError(f"threshold must lie in 0 .. 1, or be auto, not {self.threshold}.")
        check_range("scale", self.scale, -100, 100)
        check_range("temperature", self.temperature, 0, 10_000)
        for name, choices in _CHOICES.items():
            check_word(name, getattr(self, name), choices)
        if self.variant == PUBLISHED:
            self._follow_published()
        if frozenset(self.stages) not in _STAGE_SETS or len(set(self.stages)) != len(self.stages):
            raise RecipeError(
                f"stages {shown(','.join(map(str, self.stages)))} is not defined; choose select; "
                "select,rescale; select,project; or select,rescale,project."
            )
        check_rank(self.rank)

    def _follow_published(self) -> None:
        """Set what the published code fixes; raise RecipeError for another wish."""
        defaults = {each.name: each.default for each in fields(self)}
        for name, value in _OF_PUBLISHED.items():
            if getattr(self, name) not in (value, defaults[name]):
                raise RecipeError(
                    f"variant: published has {name}: {value}, not {shown(getattr(self, name))}; "
                    "leave it out, or choose variant: paper."
                )
            object.__setattr__(self, name, value)

    @property
    def bound(self) -> float:
        """Return the threshold; it is infinite while it is `auto` and not yet found."""
        return math.inf if self.threshold == AUTO else float(self.threshold)
