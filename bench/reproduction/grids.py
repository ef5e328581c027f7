"""The methods that are measured, each over a grid of the parameter that says how much is merged.

Every merge is made by the program itself. A grid's results stand under its group.
"""

from __future__ import annotations

from dataclasses import dataclass

from reproduction.exam import Weights
from reproduction.family import TaskVectors

WHY_LIMIT = 500
"""Problems for all that decides no claim of the paper."""


@dataclass(frozen=True)
class Grid:
    """One method, and the values of one of its parameters at which it is measured.

    Attributes
    ----------
    group
        Where its figures stand in the results.
    title
        Its name on the page.
    kind : {"interpolation", "elementwise", "low rank", "spectral"}
        What it is shown beside.
    method
        Its name in a recipe.
    axis
        The parameter that varies.
    values
        Those of the parameter, in ascending order.
    default
        The parameter's default, in the method itself.
    fixed
        Other parameters, with their values; all others have their defaults.
    limit
        The number of problems that are asked, or None for all.
    """

    group: str
    title: str
    kind: str
    method: str
    axis: str
    values: tuple[float, ...]
    default: float
    fixed: tuple[tuple[str, object], ...] = ()
    limit: int | None = WHY_LIMIT

    def parameters(self, value: float) -> dict[str, object]:
        """Return the recipe's parameters at one value."""
        return {**dict(self.fixed), self.axis: value}

    def merged(self, value: float, family: TaskVectors) -> Weights:
        """Merge a family by lean-merge at one value."""
        return family.merged(self.method, **self.parameters(value))


_SCALES = (0.5, 0.7, 1.0, 1.5)


def _joint(
    method: str, title: str, kind: str, values: tuple[float, ...] = _SCALES, **fixed: object
) -> Grid:
    """Return the grid of a method that treats all models alike, over its `scale`."""
    group = " ".join([method, *(f"{name} {value}" for name, value in fixed.items())])
    return Grid(group, title, kind, method, "scale", values, 1.0, tuple(fixed.items()))


KINDS = {
    "interpolation": "On the line between models",
    "elementwise": "Entry by entry",
    "low rank": "Few directions of the expert",
    "spectral": "Directions of all task vectors",
}
"""The kinds of methods with their headings."""

GRIDS: tuple[Grid, ...] = (
    Grid(
        "task arithmetic",
        "Task Arithmetic",
        "interpolation",
        "task_arithmetic",
        "scale",
        (0.1, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0),
        1.0,
        limit=None,
    ),
    Grid(
        "linear",
        "MLLM toward expert",
        "interpolation",
        "linear",
        "weight",
        (0.1, 0.3, 0.5, 0.7, 0.9, 1.0),
        0.1,
        limit=None,
    ),
    Grid("slerp", "Slerp", "interpolation", "slerp", "t", (0.1, 0.5), 0.1),
    Grid(
        "ties",
        "TIES",
        "elementwise",
        "ties",
        "scale",
        (0.3, 0.5, 0.7, 1.0, 1.5),
        1.0,
        limit=None,
    ),
    _joint("dare_linear", "DARE", "elementwise", (0.3, 0.5, 1.0)),
    _joint("dare_linear", "DARE, density 0.5", "elementwise", (0.5, 1.0), density=0.5),
    _joint("dare_ties", "DARE, signs elected", "elementwise", (0.5, 1.0)),
    _joint("della_linear", "DELLA, summed", "elementwise", (0.5, 1.0)),
    _joint("della", "DELLA", "elementwise", (0.5, 1.0)),
    _joint("breadcrumbs", "Breadcrumbs", "elementwise", (0.5, 1.0, 1.5)),
    _joint("breadcrumbs_ties", "Breadcrumbs, signs elected", "elementwise", (0.5, 1.0, 1.5)),
    Grid("ip merging", "IP-Merging", "low rank", "ip_merging", "scale", (1.0, 4.0, 16.0), 1.0),
    Grid(
        "ip published",
        "IP-Merging, as published",
        "low rank",
        "ip_merging",
        "scale",
        (1.0, 4.0, 16.0),
        1.0,
        (("variant", "published"),),
    ),
    Grid("rank one", "Rank one", "low rank", "rank_one", "scale", (0.05, 0.3, 0.5, 1.0), 0.05),
    Grid("star", "STAR", "low rank", "star", "scale", (0.1, 0.3, 0.5, 1.0), 1.0),
    _joint("tsv_m", "TSV-M", "spectral", (0.3, *_SCALES)),
    _joint("iso_c", "Iso-C", "spectral"),
    _joint("wudi", "WUDI", "spectral", (0.3, *_SCALES)),
    _joint("optmerge", "OptMerge", "spectral"),
    _joint("svc", "SVC", "spectral"),
)

BY_GROUP = {grid.group: grid for grid in GRIDS}
