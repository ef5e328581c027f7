"""Find rows of a model among the rows of the base's layer, and put the order into words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lean_merge.checkpoints.reader import TensorReader
from lean_merge.checkpoints.rows import WeightSource, fresh_buffer
from lean_merge.mapping.placement import Heads

SAME_ROW = 0.7
"""From this cosine on, two rows are taken for the same row before and after tuning."""
MOST_SEARCHED = 1 << 31
"""Bytes of the base's weights in one layer beyond which no row is looked for in them."""
_STRIP = 1 << 18  # numbers that are read at once


@dataclass(frozen=True, slots=True)
class RowsElsewhere:
    """Rows of one weight of a model that are other rows of the base's layer.

    Attributes
    ----------
    own, source
        The last word of the weight's canonical name, and its rows.
    matches
        For each row, the last word of the weight of the base that holds it, and its index there.
    sizes
        The number of rows of the base's weights, by the last words of their names.
    heads
        The attention heads, if the configs tell them.
    """

    own: str
    source: WeightSource
    matches: Mapping[int, tuple[str, int]]
    sizes: Mapping[str, int]
    heads: Heads | None

    def stored(self) -> Sequence[tuple[int, str, int]]:
        """Return (row of the stored tensor, weight of the base, index there) of every match.

        It is empty if nothing else is fused into the tensor.
        """
        place = getattr(self.source, "place", None)
        if place is None or place.width or place.shape[0] == place.tensor.shape[-2]:
            return ()
        first = place.first // place.shape[1]
        return [
            (first + row // place.run * place.period + row % place.run, *match)
            for row, match in self.matches.items()
        ]


NamesOrder = Callable[[RowsElsewhere], str | None]
"""Says in words which order explains all matches; None if none that it knows does."""
_KNOWN: list[NamesOrder] = []


def known_order(function: NamesOrder) -> NamesOrder:
    """Make a function that names orders known; used as its decorator."""
    _KNOWN.append(function)
    return function


def order_in_words(
    own: str,
    source: WeightSource,
    rows: Mapping[int, Tensor],
    near: Mapping[str, WeightSource],
    heads: Heads | None,
    reader: TensorReader,
) -> str | None:
    """Say in which order a model's rows are; None if they are not rows of the base's layer.

    Parameters
    ----------
    own, source
        The last word of a weight's canonical name, and the model's rows of it.
    rows
        Some of these rows [in] by their numbers, which differ from the base's rows.
    near
        The base's weights in the same part of the same layer, by the last words of their names.
    heads
        The attention heads, if the configs tell them.
    reader
        What reads the base's rows.
    """
    if sum(base.nbytes(slice(0, base.shape[0])) for base in near.values()) > MOST_SEARCHED:
        return None
    numbers = [*rows]
    found = _search(torch.stack([*rows.values()]), near, reader) if rows else {}
    matches = {number: found[at] for at, number in enumerate(numbers) if at in found}
    if not matches or 2 * len(matches) < len(numbers):
        return None
    sizes = {leaf: base.shape[0] for leaf, base in near.items()}
    elsewhere = RowsElsewhere(own, source, matches, sizes, heads)
    words = next((text for each in _KNOWN if (text := each(elsewhere)) is not None), None)
    row, (leaf, index) = next(iter(matches.items()))
    return (
        f"row {row} of {source.name} as {own} is row {index} of the base's {leaf}"
        f"{f', as where {words}' if words else ''}; convert it to the base's order, or rename its "
        "tensors with names: in the recipe"
    )


def _search(
    rows: Tensor, near: Mapping[str, WeightSource], reader: TensorReader
) -> dict[int, tuple[str, int]]:
    """Find the rows of the base's weights to which rows of a role have a large cosine."""
    wanted = torch.nn.functional.normalize(rows.float(), dim=1)
    best = [SAME_ROW] * len(rows)
    found: dict[int, tuple[str, int]] = {}
    for leaf, source in near.items():
        base = source.load(reader)
        height = max(1, _STRIP // base.shape[1])
        for start in range(0, base.shape[0], height):
            strip = slice(start, min(start + height, base.shape[0]))
            own = base.read(strip, reader, fresh_buffer, "rows").float()
            values, places = (wanted @ torch.nn.functional.normalize(own, dim=1).T).max(dim=1)
            for n, (value, place) in enumerate(zip(values.tolist(), places.tolist(), strict=True)):
                if value > best[n]:
                    best[n], found[n] = value, (leaf, strip.start + place)
    return found
