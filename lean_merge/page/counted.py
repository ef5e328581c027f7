"""Read counts among measured numbers: with `.correct` and `.total` they are a share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt

_RIGHT, _ALL = ".correct", ".total"
_QUANTILE = 1.959963984540054
"""The normal distribution's quantile of 97.5 %."""


@dataclass(frozen=True, slots=True)
class Score:
    """A measured number.

    Attributes
    ----------
    value
        The number, or the share of right answers.
    low, high
        The Wilson 95 % interval of a share that was counted, else None.
    """

    value: float
    low: float | None = None
    high: float | None = None

    def may_equal(self, other: Score) -> bool:
        """Return whether both were counted, and their intervals overlap."""
        if self.low is None or self.high is None or other.low is None or other.high is None:
            return False
        return self.low <= other.high and other.low <= self.high


def measured_numbers(numbers: Mapping[str, float]) -> dict[str, Score]:
    """Return measured numbers by name, in which `NAME.correct` and `NAME.total` become NAME."""
    found = {}
    for name, value in numbers.items():
        stem = name.removesuffix(_RIGHT) if name.endswith(_RIGHT) else name.removesuffix(_ALL)
        right, total = numbers.get(stem + _RIGHT), numbers.get(stem + _ALL)
        if stem == name or right is None or total is None or not 0 <= right <= total or total == 0:
            found[name] = Score(value)
        else:
            found[stem] = _counted(right, total)
    return found


def _counted(right: float, total: float) -> Score:
    """Return a share with Wilson's interval (Wilson 1927)."""
    share, spread = right / total, _QUANTILE**2 / total
    centre = (share + spread / 2) / (1 + spread)
    reach = sqrt(share * (1 - share) * spread + spread**2 / 4) / (1 + spread)
    return Score(share, max(0.0, centre - reach), min(1.0, centre + reach))
