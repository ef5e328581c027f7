"""The null law: how alike corresponding directions of unrelated matrices are by chance.

The cosine of two independent directions that are uniform on the sphere in R^n has
s^2 ~ Beta(1/2, (n - 1) / 2); its mean is about sqrt(2 / (pi n)).

scipy is imported where it is used: a merge at a given threshold needs none of this, and
`scipy.special` takes 10 MiB and a fifth of a second, `scipy.stats` another 30 MiB and half of one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_EQUAL = 1e-9
"""Distance of values that are not told apart."""


def null_quantile(probability: float, in_features: int, *, directions: int = 1) -> float:
    """The cosine that the largest of so many chance `directions` exceeds with 1 - `probability`."""
    if in_features < 2:
        return 1.0
    from scipy.special import betaincinv

    each = probability ** (1 / max(1, directions))
    square = float(betaincinv(0.5, (in_features - 1) / 2, each))
    return math.sqrt(square)


def null_cdf(cosine: float, in_features: int, *, directions: int = 1) -> float:
    """The probability that the largest of so many chance `directions` is at most `cosine`."""
    if in_features < 2:
        return float(cosine >= 1.0)
    from scipy.special import betainc

    below = float(betainc(0.5, (in_features - 1) / 2, min(cosine**2, 1.0)))
    return below ** max(1, directions)


def uniform_distance(probabilities: Sequence[float]) -> tuple[float, float]:
    """Kolmogorov and Smirnov's one-sided test: distance, and p-value, of being above uniform.

    Small probabilities are no evidence against the law here, for nothing is less than unrelated.
    """
    from scipy.special import smirnov

    ordered = np.sort(np.asarray(probabilities, dtype=np.float64))
    distance = float(np.max(ordered - np.arange(ordered.size) / ordered.size))
    return distance, float(smirnov(ordered.size, distance))


@dataclass(frozen=True, slots=True)
class Split:
    """Otsu's split of values into a lower and an upper class.

    Attributes
    ----------
    below, above : float
        The largest of the lower and the smallest of the upper class.
    separability : float
        Share of the variance that lies between the classes; 3/4 for evenly spread values.
    """

    below: float
    above: float
    separability: float


def otsu_split(values: Sequence[float]) -> Split | None:
    """The split with the most variance between the classes (Otsu 1979); None if all are equal."""
    ordered: NDArray[np.float64] = np.sort(np.asarray(values, dtype=np.float64))
    count = ordered.size
    if count < 2 or ordered[-1] - ordered[0] <= _EQUAL:
        return None
    lower = np.arange(1, count)
    sums = np.cumsum(ordered)[:-1]
    means = sums / lower, (ordered.sum() - sums) / (count - lower)
    between = lower * (count - lower) / count**2 * (means[1] - means[0]) ** 2
    # Equal values are never told apart.
    between[ordered[1:] == ordered[:-1]] = -1.0
    best = int(np.argmax(between))
    return Split(
        below=float(ordered[best]),
        above=float(ordered[best + 1]),
        separability=float(between[best] / ordered.var()),
    )
