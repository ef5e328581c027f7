"""Cut the rows of a weight into tiles and strips, always the same for any memory and threads."""

from __future__ import annotations

from collections.abc import Iterator

TILE_ELEMENTS = 1 << 21
"""Elements of a canonical row tile: the unit of products and of summation order."""
TILE_ROWS = 96
"""Rows of a tile at least: with fewer, a pass spends its time on adding up partial sums [in, b]."""
LANES = 4
"""Partial sums of a pass. Tile t is added to lane t mod LANES, whichever thread computes it."""
READ_ELEMENTS = 1 << 18
"""Elements of the row strips in which tiles are read and task vectors formed, inside a cache."""
STRIP_ELEMENTS = 1 << 17
"""Elements of the row strips in which an update is added and rounded; float32 ones fit a cache."""
SAMPLED_ELEMENTS = 1 << 16
"""Elements of the base's first rows that tell its norm well enough to compare magnitudes."""


def tile_rows(in_features: int) -> int:
    """Count the rows of a canonical tile of a weight with `in_features` columns."""
    return max(TILE_ROWS, TILE_ELEMENTS // in_features // 16 * 16)


def row_tiles(shape: tuple[int, int]) -> Iterator[slice]:
    """Yield the canonical row tiles of a weight [out, in], in order."""
    rows = tile_rows(shape[1])
    for start in range(0, shape[0], rows):
        yield slice(start, min(start + rows, shape[0]))


def strips(rows: slice, in_features: int, elements: int) -> Iterator[slice]:
    """Cut `rows` from their start into strips of at most so many elements, or 4 rows."""
    height = strip_rows(in_features, elements)
    for start in range(rows.start, rows.stop, height):
        yield slice(start, min(start + height, rows.stop))


def strip_rows(in_features: int, elements: int) -> int:
    """Count the rows of a strip of at most so many elements; there are at least 4."""
    return max(4, elements // in_features // 4 * 4)


def sampled_rows(shape: tuple[int, int]) -> int:
    """Count the first rows of a weight that tell its norm well enough to compare magnitudes."""
    return min(shape[0], strip_rows(shape[1], SAMPLED_ELEMENTS))
