"""The law of |cos| between unrelated directions, as counts over the bins of a histogram."""

from __future__ import annotations

import math
from collections.abc import Sequence

_STEPS = 64


def cumulative(edges: Sequence[float], width: int) -> list[float]:
    """P(|cos| <= s) at each of the ascending `edges`, for random unit vectors of R^width.

    With s = sin a the density is proportional to cos(a)^(width - 2), which Simpson's rule adds up
    from edge to edge. The square of s is Beta(1/2, (width - 1) / 2) distributed.
    """
    if width < 2:
        # Two unit vectors of R^1 are equal up to their sign.
        return [1.0 if edge >= 1 else 0.0 for edge in edges]
    scale = 2 / math.sqrt(math.pi)
    scale *= math.exp(math.lgamma(width / 2) - math.lgamma((width - 1) / 2))
    found, total, last = [], 0.0, 0.0
    for edge in edges:
        angle = math.asin(min(1.0, max(0.0, edge)))
        total += scale * _integral(last, angle, width - 2)
        found.append(min(1.0, total))
        last = angle
    return found


def _integral(low: float, high: float, power: int) -> float:
    """Of cos(a)^power from `low` to `high`."""
    step = (high - low) / _STEPS
    # At a right angle rounding may leave a cosine below zero.
    heights = [max(0.0, math.cos(low + step * n)) ** power for n in range(_STEPS + 1)]
    odd, even = sum(heights[1:-1:2]), sum(heights[2:-1:2])
    return step / 3 * (heights[0] + 4 * odd + 2 * even + heights[-1])


def expected(edges: Sequence[float], widths: Sequence[int]) -> list[float]:
    """How many of the weights of these `widths` lie between each two edges, by that law."""
    counts = [0.0] * (len(edges) - 1)
    for width in sorted(set(widths)):
        below = cumulative(edges, width)
        many = widths.count(width)
        for bin_ in range(len(counts)):
            counts[bin_] += many * (below[bin_ + 1] - below[bin_])
    return counts
