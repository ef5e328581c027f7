"""95 % intervals, for one family over its problems and for all over problems or seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

CONFIDENCE = 0.95
_REACH = float(stats.norm.ppf((1 + CONFIDENCE) / 2))
Interval = tuple[float, float]


def paired(gained: int, lost: int, asked: int) -> Interval:
    """Of the difference of two shares on the same problems (Agresti and Min 2005).

    Half a problem is added to each cell of the 2 x 2 table before Wald's interval is taken, so that
    it keeps a width where the two models differ on few problems or on none.

    Parameters
    ----------
    gained, lost : int
        Problems that only the second, or only the first, answers rightly.
    asked : int
        All problems.
    """
    if not 0 <= gained + lost <= asked or asked == 0:
        raise ValueError(f"{gained} gained and {lost} lost of {asked} problems make no sense")
    up, down, total = gained + 0.5, lost + 0.5, asked + 2.0
    centre = (up - down) / total
    reach = _REACH * math.sqrt((up + down) - (up - down) ** 2 / total) / total
    return centre - reach, centre + reach


def over_problems(differences: NDArray[np.float64]) -> Interval:
    """Of the mean over seeds, for these seeds: t over the problems, each averaged over the seeds.

    Parameters
    ----------
    differences : ndarray, shape (seeds, problems)
        1 where a problem was gained, -1 where it was lost, else 0.
    """
    return _t(differences.mean(0))


def over_seeds(means: Sequence[float]) -> Interval:
    """Of the mean over seeds, for families trained like these: t over the seeds' own means.

    With three seeds it has two degrees of freedom, and is wide.
    """
    return _t(np.asarray(means, dtype=np.float64))


def _t(values: NDArray[np.float64]) -> Interval:
    if len(values) < 2:
        return -math.inf, math.inf
    centre, error = float(values.mean()), float(stats.sem(values))
    if error == 0:
        return centre, centre
    low, high = stats.t.interval(CONFIDENCE, len(values) - 1, loc=centre, scale=error)
    return float(low), float(high)
