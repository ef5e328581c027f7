"""The settings of a prior: which difference it holds, of which rank, and in which dtype."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lean_merge.drift.prior import DIFFERENCES, PRIOR_DTYPES
from lean_merge.errors import RecipeError, shown
from lean_merge.outputs.approximating import WHOLE_UP_TO

AUTO_SHARE = 0.9
"""The share of D's squared norm that `--rank auto` keeps of a weight, as far as its limits let."""
LARGEST_AUTO = 256
"""The largest rank of `--rank auto` for a weight that is too large to be decomposed whole."""
_ROUNDING = 1e-12
"""Directions with less than this share of the largest one's squared norm are rounding."""


@dataclass(frozen=True, slots=True)
class PriorSettings:
    """The settings of a prior beside its recipe.

    Attributes
    ----------
    difference
        Whether D is "expert-mllm", W_expert - W_mllm, or "expert-base", W_expert - W_0.
    rank
        The rank of every weight: a number; "auto" for the smallest that keeps `AUTO_SHARE` of its
        squared norm; or "full" for D as it is.
    dtype
        The dtype in which it is stored: a key of `PRIOR_DTYPES`.
    """

    difference: str = DIFFERENCES[0]
    rank: int | str = "auto"
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.difference not in DIFFERENCES:
            raise RecipeError(
                f"difference must be one of {', '.join(DIFFERENCES)}, not {shown(self.difference)}."
            )
        if self.rank not in ("auto", "full") and not (type(self.rank) is int and self.rank >= 1):
            raise RecipeError(
                f"rank must be auto, full or a whole number from 1, not {shown(self.rank)}."
            )
        if self.dtype not in PRIOR_DTYPES:
            raise RecipeError(
                f"dtype must be one of {', '.join(PRIOR_DTYPES)}, not {shown(self.dtype)}."
            )

    @property
    def is_whole(self) -> bool:
        """Return whether D is kept as it is."""
        return self.rank == "full"

    def largest_rank(self, shape: tuple[int, int]) -> int:
        """Return the most directions that are computed for a weight [out, in]."""
        if isinstance(self.rank, int):
            return min(self.rank, *shape)
        # More directions than these would take more room than D itself.
        most = max(1, shape[0] * shape[1] // (shape[0] + shape[1]))
        return most if min(shape) <= WHOLE_UP_TO else min(most, LARGEST_AUTO)

    def chosen(self, energies: Sequence[float], total: float) -> int:
        """Return how many directions of these descending squared singular values are kept."""
        found = sum(energy > _ROUNDING * energies[0] for energy in energies)
        if self.rank != "auto":
            return found
        kept = 0.0
        for count, energy in enumerate(energies[:found], 1):
            kept += energy
            if kept >= AUTO_SHARE * total:
                return count
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {"difference": self.difference, "rank": self.rank, "dtype": self.dtype}
