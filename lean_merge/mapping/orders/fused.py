"""Orders in which q, k and v, or gate and up, are fused into one tensor."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping

from lean_merge.mapping.orders.finding import RowsElsewhere, known_order
from lean_merge.mapping.placement import Heads

_QKV = ("q_proj", "k_proj", "v_proj")
_GATE_UP = ("gate_proj", "up_proj")
PlaceOfRow = Callable[[str, int], int]
"""Gives the row of the fused tensor that holds a row of a projection."""


@known_order
def fused_order(rows: RowsElsewhere) -> str | None:
    """Find the order in which the stored rows are those that were found, or an exchange."""
    found = rows.stored()
    for names in (_QKV, _GATE_UP):
        if found and all(leaf in names for _, leaf, _ in found) and rows.sizes.keys() >= set(names):
            for words, place in _orders(names, rows.sizes, rows.heads):
                if all(place(leaf, index) == stored for stored, leaf, index in found):
                    return words
    others = {leaf for leaf, _ in rows.matches.values()}
    if len(others) == 1 and all(row == index for row, (_, index) in rows.matches.items()):
        return f"{rows.own} and {others.pop()} are exchanged"
    return None


def _orders(
    names: tuple[str, ...], sizes: Mapping[str, int], heads: Heads | None
) -> Iterator[tuple[str, PlaceOfRow]]:
    """Yield the orders that some family uses, in words and as a function."""
    if names == _GATE_UP:
        yield "rows of gate and up alternate", lambda leaf, row: 2 * row + names.index(leaf)
    elif heads is not None:
        words = "q, k and v stand together for each key/value head, as in a tensor named wqkv"
        yield words, _by_heads(heads)
    for order in itertools.permutations(names):
        ends = itertools.accumulate(sizes[leaf] for leaf in order)
        starts = {leaf: end - sizes[leaf] for leaf, end in zip(order, ends, strict=True)}
        words = ", then ".join(name.removesuffix("_proj") for name in order)
        name = {_QKV: "qkv_proj", _GATE_UP: "gate_up_proj"}.get(order)
        name = "up_gate_proj" if order == _GATE_UP[::-1] else name
        named = f", as in a tensor named {name}" if name else ""
        yield f"it holds {words}{named}", _after_another(starts)


def _after_another(starts: Mapping[str, int]) -> PlaceOfRow:
    return lambda leaf, row: starts[leaf] + row


def _by_heads(heads: Heads) -> PlaceOfRow:
    """Return the order in which each key/value head has its queries, its key and its value."""
    group, size = heads.queries // heads.pairs, heads.size
    parts = {"q_proj": (0, group), "k_proj": (group, 1), "v_proj": (group + 1, 1)}

    def place(leaf: str, row: int) -> int:
        start, count = parts[leaf]
        head, within = divmod(row, count * size)
        return (head * (group + 2) + start) * size + within

    return place
