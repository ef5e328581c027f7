"""Find the places of a model's logical weights inside its stored tensors, and name them.

Stored tensors may be fused, stacked, interleaved or transposed, while the mathematics knows the
weights q, k, v, o, gate, up and down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lean_merge.checkpoints.header import TensorSpec
from lean_merge.checkpoints.rows import Place, row_block

QKV = "qkv_proj"
GATE_UP = "gate_up_proj"
INTERLEAVED_QKV = "wqkv"
FUSED = frozenset({QKV, GATE_UP, INTERLEAVED_QKV})
EXPERTS = "experts"
_LEAVES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj", "wo": "o_proj"}
_MODULES = {"attention": "self_attn", "feed_forward": "mlp", "block_sparse_moe": "mlp"}
LEAVES = FUSED | frozenset(
    {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", *_LEAVES}
)


@dataclass(frozen=True, slots=True)
class Heads:
    """The numbers of query heads and of key/value heads, and the rows that each head has."""

    queries: int
    pairs: int
    size: int

    @property
    def rows(self) -> int:
        """Return the number of rows of q, k and v together."""
        return (self.queries + 2 * self.pairs) * self.size


def canonical(rest: str) -> str:
    """Return a weight's name inside its layer as Llama has it, such as "mlp.gate_proj"."""
    *modules, leaf = rest.split(".")
    return ".".join([*(_MODULES.get(each, each) for each in modules), _LEAVES.get(leaf, leaf)])


def places(rest: str, tensor: TensorSpec, heads: Sequence[Heads]) -> dict[str, Place]:
    """Return the logical weights in a stored matrix [out, in], by canonical name in its layer.

    Parameters
    ----------
    rest
        The tensor's canonical name in its layer, without ".weight".
    tensor
        A matrix.
    heads
        The heads that configurations state. The first that fit decide how q, k and v are split; a
        matrix that cannot be split is one weight.
    """
    parent, _, leaf = rest.rpartition(".")
    stem = f"{parent}." if parent else ""
    rows = tensor.shape[0]
    parts = {leaf: rows}
    if leaf == GATE_UP and rows % 2 == 0:
        parts = {"gate_proj": rows // 2, "up_proj": rows // 2}
    if leaf in (QKV, INTERLEAVED_QKV):
        fitting = next((each for each in heads if each.rows == rows), None)
        if fitting is not None and leaf == INTERLEAVED_QKV:
            return _interleaved(parent, tensor, fitting)
        if fitting is not None:
            queries, pairs = fitting.queries * fitting.size, fitting.pairs * fitting.size
            parts = {"q_proj": queries, "k_proj": pairs, "v_proj": pairs}
    found, start = {}, 0
    for part, count in parts.items():
        found[f"{stem}{part}"] = row_block(tensor, start, count)
        start += count
    return found


def _interleaved(parent: str, tensor: TensorSpec, heads: Heads) -> dict[str, Place]:
    """Return q, k and v of InternLM2's wqkv: groups of query heads, each with its key and value."""
    group, width = heads.queries // heads.pairs, tensor.shape[1]
    found = {}
    for leaf, start, count in (("q", 0, group), ("k", group, 1), ("v", group + 1, 1)):
        found[f"{parent}.{leaf}_proj"] = Place(
            tensor,
            (heads.pairs * count * heads.size, width),
            start * heads.size * width,
            count * heads.size,
            (group + 2) * heads.size,
        )
    return found


def stack_places(
    stack: dict[str, TensorSpec], hidden: int | None
) -> dict[str, dict[str, Place]] | None:
    """Return the logical weights of experts that are stacked along a first dimension.

    Rows may be stored as rows or as columns; the shapes of the parts together tell which, since a
    gate has as many rows as down has columns.

    Parameters
    ----------
    stack
        gate_up_proj or gate_proj, up_proj, and down_proj [experts, *, *] by leaf.
    hidden
        Width of the layer's inputs, where known.

    Returns
    -------
    dict of dict of Place, or None
        For each leaf, its weights by "<expert>.<leaf>"; None if the shapes fit neither way or both.
    """
    if len({tensor.shape[0] for tensor in stack.values()}) != 1:
        return None
    ways = [turned for turned in (False, True) if _fits(stack, hidden, turned)]
    if len(ways) != 1:
        return None
    return {leaf: _experts(leaf, tensor, ways[0]) for leaf, tensor in stack.items()}


def _fits(stack: dict[str, TensorSpec], hidden: int | None, turned: bool) -> bool:
    inner = set()
    widths = set() if hidden is None else {hidden}
    for leaf, tensor in stack.items():
        out, into = tensor.shape[:0:-1] if turned else tensor.shape[1:]
        if leaf == "down_proj":
            out, into = into, out
        if leaf == GATE_UP and out % 2:
            return False
        inner.add(out // 2 if leaf == GATE_UP else out)
        widths.add(into)
    return len(inner) == 1 and len(widths) == 1


def _experts(leaf: str, tensor: TensorSpec, turned: bool) -> dict[str, Place]:
    count, rows, columns = tensor.shape
    out, into = (columns, rows) if turned else (rows, columns)
    names = ("gate_proj", "up_proj") if leaf == GATE_UP else (leaf,)
    out //= len(names)
    found = {}
    for expert in range(count):
        for part, name in enumerate(names):
            first = expert * rows * columns + part * out * (1 if turned else into)
            found[f"{expert}.{name}"] = Place(
                tensor, (out, into), first, out, out, columns if turned else 0
            )
    return found
