"""Cut the rows of a weight into tiles and strips, always the same for any memory and threads."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence

TILE_ELEMENTS = 1 << 21
"""Elements of a canonical row tile: the unit of products and of summation order."""
TILE_ROWS = 96
"""Rows of a tile at least: with fewer, a pass spends its time on adding up partial sums [in, b]."""
LANES = 4
"""Partial sums of a pass. Tile t is added to lane t mod LANES, whichever thread computes it."""
READ_ELEMENTS = 1 << 18
"""Elements of the row strips in which tiles are read and task vectors formed, inside a cache."""
STRIP_ELEMENTS = 1 << 18
"""Elements of the row strips in which an update is added and rounded; float32 ones fit a cache."""
LOOK_ELEMENTS = 1 << 18
"""Numbers of a weight at most that the early look reads of each role."""
LOOK_ROWS, LOOK_HEIGHT, LOOK_WEIGHTS, LOOK_KINDS = 16, 2, 3, 64
"""The early look reads this many rows in blocks of this height, of so many weights of a kind."""
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


def kind_of(canonical: str) -> str:
    """Return a weight's canonical name without the numbers of its layer and expert."""
    return re.sub(r"(?<=\.)\d+\.", "", canonical)


def looked_at(canonicals: Sequence[str]) -> list[str]:
    """Choose the weights of which the early look reads rows: a few of every kind.

    The choice depends on the canonical names alone.
    """
    kinds: dict[str, list[str]] = {}
    for name in sorted(canonicals, key=_drawn):
        kinds.setdefault(kind_of(name), []).append(name)
    return [name for group in [*kinds.values()][:LOOK_KINDS] for name in group[:LOOK_WEIGHTS]]


def look_blocks(canonical: str, shape: tuple[int, int], *, together: bool) -> tuple[slice, ...]:
    """Choose the rows of a weight that the early look reads.

    They are blocks that are spread over the weight, or one block if few rows cost as much as many.
    """
    out_features, in_features = shape
    rows = max(1, min(LOOK_ROWS, LOOK_ELEMENTS // in_features))
    height = rows if together else min(LOOK_HEIGHT, rows)
    count = min(rows // height, out_features // height)
    if count <= 1 and out_features <= rows:
        return (slice(0, out_features),)
    room, drawn = out_features // count - height, _drawn(canonical)
    firsts = (
        number * (room + height) + (drawn >> number * 8) % (room + 1) for number in range(count)
    )
    return tuple(slice(first, first + height) for first in firsts)


def _drawn(name: str) -> int:
    """Return a large number that the name alone decides."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest(), "little")
