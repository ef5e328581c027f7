"""Which methods help and which harm, at which scale, and what would have told the scale beforehand.

A method's best scale is the value of its grid with the most picture sums. A rule names a value of
the grid from numbers that are known without measuring a merge; what it costs is the difference to
the best value in picture sums, in points.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean

from reproduction.grids import GRIDS, Grid
from reproduction.results import Change, Results

TASK = "picture_sums"
KEPT = "read"
INSIDE = 8
"""Leading directions of the MLLM whose share of dM's energy counts as overlap."""


def names(results: Results, grid: Grid) -> list[str]:
    """Return the values of a grid that were measured, as they are named in the results."""
    return results.measured(grid.group, grid.values)


def measured_grids(results: Results) -> list[Grid]:
    """Return the grids of which anything was measured."""
    return [grid for grid in GRIDS if names(results, grid)]


def gain(results: Results, grid: Grid, name: str, index: int) -> float:
    """Return one seed's change in picture sums against the MLLM, in points."""
    return results.change(grid.group, name, TASK).of_seeds[index][0]


def best(results: Results, grid: Grid, among: Sequence[int]) -> str:
    """Return the value with the most picture sums, in the mean over some seeds (indices)."""
    return max(
        names(results, grid),
        key=lambda name: fmean(gain(results, grid, name, index) for index in among),
    )


def default(results: Results, grid: Grid) -> str | None:
    """Return the name of the method's own default, if it was measured."""
    name = f"{grid.default:g}"
    return name if name in names(results, grid) else None


def helps(results: Results, grid: Grid) -> list[str]:
    """Return the values at which picture sums rise in every seed, and reading falls in none."""
    return [
        name
        for name in names(results, grid)
        if results.change(grid.group, name, TASK).is_above()
        and not falls(results.change(grid.group, name, KEPT))
    ]


def harms(results: Results, grid: Grid) -> list[str]:
    """Return the values at which picture sums or reading fall in some seed."""
    return [
        name
        for name in names(results, grid)
        if any(falls(results.change(grid.group, name, task)) for task in (TASK, KEPT))
    ]


def falls(change: Change) -> bool:
    """Tell whether the whole interval of some seed lies below zero."""
    return any(high < 0 for _, (_, high) in change.of_seeds)


# --- what is known of a family without measuring a merge ----------------------------------


def norm_ratio(results: Results, index: int) -> float:
    """Return ||dV|| / ||dM||, Frobenius, over all weights in scope."""
    weights = results.data["facts"][index]["weights"]
    return math.hypot(*(w["mllm"] for w in weights)) / math.hypot(*(w["expert"] for w in weights))


def cosine(results: Results, index: int) -> float | None:
    """Return the cosine of dV and dM, over all weights in scope, or None if it is not known."""
    found: float | None = results.data["facts"][index].get("cosine")
    return found


def overlap(results: Results, index: int) -> float:
    """Return the share of dM's energy within the leading 8 input directions of dV, in 0..1."""
    shares: list[float] = results.data["facts"][index]["energy"]["the MLLM's"]
    return shares[INSIDE - 1]


# --- rules --------------------------------------------------------------------------------

Rule = Callable[[Results, Grid, int], "str | None"]


def _at(value: Callable[[Results, int], float | None]) -> Rule:
    """Return the rule that takes the grid's value nearest to a number of the family."""

    def rule(results: Results, grid: Grid, index: int) -> str | None:
        wanted = value(results, index)
        if wanted is None:
            return None
        return min(names(results, grid), key=lambda name: abs(float(name) - wanted))

    return rule


def _of_length(length: Callable[[Results, int], float]) -> Rule:
    """Return the rule that takes the value whose update is nearest to a length, dM's being 1."""

    def rule(results: Results, grid: Grid, index: int) -> str | None:
        wanted = length(results, index)

        def distance(name: str) -> float:
            norm: float = results.entry(grid.group, name)["norm"][index]
            return abs(math.log(max(norm, 1e-9) / wanted))

        return min(names(results, grid), key=distance)

    return rule


def _of_the_others(results: Results, grid: Grid, index: int) -> str | None:
    """Return the best value of the other families, by their mean."""
    others = [other for other in range(len(results.seeds)) if other != index]
    return best(results, grid, others) if others else None


def _away(value: Callable[[Results, int], float | None]) -> Callable[[Results, int], float | None]:
    def rest(results: Results, index: int) -> float | None:
        found = value(results, index)
        return None if found is None else 1 - found

    return rest


RULES: dict[str, Rule] = {
    "the method's default": lambda results, grid, _: default(results, grid),
    "norm ratio: \\|\\|dV\\|\\| / \\|\\|dM\\|\\|": _at(norm_ratio),
    "similarity: 1 - cosine of dV and dM": _at(_away(cosine)),
    "overlap: 1 - share of dM in the MLLM's leading 8": _at(_away(overlap)),
    "the update as long as dM": _of_length(lambda results, index: 1.0),
    "the update as long as dV": _of_length(norm_ratio),
}
"""Rules that look at the weights alone."""

MEASURED_RULES: dict[str, Rule] = {"measured: the best of the other two families": _of_the_others}
"""Beside them, one that needs measurements of other families."""


def cost(results: Results, rule: Rule, grid: Grid, index: int) -> float | None:
    """Return the points that a rule leaves on the table in one family, or None without a value."""
    name = rule(results, grid, index)
    if name is None:
        return None
    top = gain(results, grid, best(results, grid, [index]), index)
    return top - gain(results, grid, name, index)


def cost_of_chance(results: Results, grid: Grid, index: int) -> float:
    """Return what a value of the grid costs in the mean, drawn at random."""
    gains = [gain(results, grid, name, index) for name in names(results, grid)]
    return max(gains) - fmean(gains)
