"""Few combinations of parameters in which every two values meet, where all would be many times."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any


def all_pairs(*parameters: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Combinations of one value of each parameter, such that any two values meet in one of them.

    The next one is that with most pairs that have not met, the first of them if there are several.
    """
    every = list(itertools.product(*(range(len(values)) for values in parameters)))
    waiting = {pair for each in every for pair in _pairs(each)}
    chosen = []
    while waiting:
        best = max(every, key=lambda each: len(waiting.intersection(_pairs(each))))
        waiting.difference_update(_pairs(best))
        chosen.append(tuple(values[n] for values, n in zip(parameters, best, strict=True)))
    return chosen


def _pairs(combination: tuple[int, ...]) -> list[tuple[tuple[int, int], ...]]:
    return list(itertools.combinations(enumerate(combination), 2))
