"""The two orders of a head's rows: halves that rotate together, or neighbours that do."""

from __future__ import annotations

from lean_merge.mapping.orders.finding import RowsElsewhere, known_order


@known_order
def rope_order(rows: RowsElsewhere) -> str | None:
    """Tell Meta's order from that of Hugging Face, whose conversion exchanges them."""
    if rows.heads is None or any(leaf != rows.own for leaf, _ in rows.matches.values()):
        return None
    pairs = [(row, index) for row, (_, index) in rows.matches.items()]
    if all(row == _meta(index, rows.heads.size) for row, index in pairs):
        return "its heads are in Meta's order for rope and the base's in that of Hugging Face"
    if all(_meta(row, rows.heads.size) == index for row, index in pairs):
        return "the base's heads are in Meta's order for rope and its own in that of Hugging Face"
    return None


def _meta(row: int, size: int) -> int:
    """Return the place in Meta's order of a row that is at `row` in Hugging Face's."""
    half = max(1, size // 2)
    head, within = divmod(row, size)
    part, pair = divmod(within, half)
    return head * size + 2 * pair + part
