"""The null law says how alike directions of unrelated matrices are by chance.

If two independent directions are uniform on the sphere in R^n, the square of their cosine s is
distributed as s^2 ~ Beta(1/2, (n - 1) / 2); the mean of |s| is about sqrt(2 / (pi n)).

Functions import scipy where they use it, because a merge at a given threshold does not need it:
`scipy.special` takes 10 MiB and 0.2 seconds, and `scipy.stats` another 30 MiB and 0.5 seconds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_EQUAL = 1e-9
"""Values that differ by at most this count as equal."""


def null_quantile(probability: float, in_features: int, *, directions: int = 1) -> float:
    """Return the quantile of the largest cosine among `directions` pairs aligned by chance.

    With the given `probability`, that largest cosine is at most the result.
    """
    if in_features < 2:
        return 1.0
    from scipy.special import betaincinv

    each = probability ** (1 / max(1, directions))
    square = float(betaincinv(0.5, (in_features - 1) / 2, each))
    return math.sqrt(square)


def null_cdf(cosine: float, in_features: int, *, directions: int = 1) -> float:
    """Return the probability that `directions` chance cosines are all at most `cosine`."""
    if in_features < 2:
        return float(cosine >= 1.0)
    from scipy.special import betainc

    below = float(betainc(0.5, (in_features - 1) / 2, min(cosine**2, 1.0)))
    return below ** max(1, directions)


def uniform_distance(probabilities: Sequence[float]) -> tuple[float, float]:
    """Test whether `probabilities` lie above the uniform law (Kolmogorov and Smirnov, one-sided).

    Return the distance and the p-value. Only large probabilities are evidence against the null law,
    because matrices cannot be less than unrelated.
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
        The largest value of the lower class, and the smallest of the upper class.
    separability : float
        Share of the variance that lies between the classes; 3/4 for evenly spread values.
    """

    below: float
    above: float
    separability: float


def otsu_split(values: Sequence[float]) -> Split | None:
    """Split where the variance between classes is largest (Otsu 1979); None if all are equal."""
    ordered: NDArray[np.float64] = np.sort(np.asarray(values, dtype=np.float64))
    count = ordered.size
    if count < 2 or ordered[-1] - ordered[0] <= _EQUAL:
        return None
    lower = np.arange(1, count)
    sums = np.cumsum(ordered)[:-1]
    means = sums / lower, (ordered.sum() - sums) / (count - lower)
    between = lower * (count - lower) / count**2 * (means[1] - means[0]) ** 2
    # Equal values must fall into the same class.
    between[ordered[1:] == ordered[:-1]] = -1.0
    best = int(np.argmax(between))
    return Split(
        below=float(ordered[best]),
        above=float(ordered[best + 1]),
        separability=float(between[best] / ordered.var()),
    )
