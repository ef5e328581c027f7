"""Where the logical weights of a model lie inside its stored tensors, and what they are called.

Storage fuses, stacks, interleaves and transposes; mathematics knows q, k, v, o, gate, up and down.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lean_merge.checkpoints.header import TensorSpec

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
    """Numbers of query heads and of key/value heads, and the rows of one."""

    queries: int
    pairs: int
    size: int

    @property
    def rows(self) -> int:
        """Rows of q, k and v together."""
        return (self.queries + 2 * self.pairs) * self.size


@dataclass(frozen=True, slots=True)
class Place:
    """Where one logical weight [out, in] lies in a stored tensor.

    Attributes
    ----------
    tensor
        That holds it.
    shape
        out, in.
    first
        Which of the tensor's numbers is the weight's first.
    run, period
        Row i of the weight begins `i // run * period + i % run` rows after its first. All rows lie
        together where `run` is out.
    width
        0 where its rows are stored as rows. Else they are stored as columns, and this many numbers
        lie from one to the next number of such a column.
    """

    tensor: TensorSpec
    shape: tuple[int, int]
    first: int
    run: int
    period: int
    width: int = 0

    @property
    def is_block(self) -> bool:
        """Whether it is one block of rows."""
        return not self.width and self.run == self.shape[0]

    @property
    def extent(self) -> tuple[int, int]:
        """(first, count) of the stored numbers from its first to its last."""
        out, into = self.shape
        if self.width:
            return self.first, (into - 1) * self.width + out
        last = (out - 1) // self.run * self.period + (out - 1) % self.run
        return self.first, (last + 1) * into

    def spans(self, rows: slice) -> Iterator[tuple[int, int]]:
        """(first, count) of the stored numbers of `rows`.

        In order they fill [t, in], or [in, t] where the rows are stored as columns.
        """
        if self.width:
            for column in range(self.shape[1]):
                yield self.first + column * self.width + rows.start, rows.stop - rows.start
            return
        at = rows.start
        while at < rows.stop:
            stop = min(rows.stop, (at // self.run + 1) * self.run)
            row = at // self.run * self.period + at % self.run
            yield self.first + row * self.shape[1], (stop - at) * self.shape[1]
            at = stop


def canonical(rest: str) -> str:
    """A weight's name inside its layer in the words of Llama: "mlp.gate_proj"."""
    *modules, leaf = rest.split(".")
    return ".".join([*(_MODULES.get(each, each) for each in modules), _LEAVES.get(leaf, leaf)])


def places(rest: str, tensor: TensorSpec, heads: Sequence[Heads]) -> dict[str, Place]:
    """The logical weights in a stored matrix [out, in], by canonical name in its layer.

    Parameters
    ----------
    rest
        The tensor's canonical name in its layer, without ".weight".
    tensor
        Of two dimensions.
    heads
        What configurations say of the heads; the first that fits splits q, k and v. What cannot be
        split is one weight.
    """
    parent, _, leaf = rest.rpartition(".")
    rows, width = tensor.shape

    def block(name: str, start: int, count: int) -> tuple[str, Place]:
        at = f"{parent}.{name}" if parent else name
        return at, Place(tensor, (count, width), start * width, count, count)

    if leaf == GATE_UP and rows % 2 == 0:
        half = rows // 2
        return dict([block("gate_proj", 0, half), block("up_proj", half, half)])
    if leaf in (QKV, INTERLEAVED_QKV):
        fitting = next((each for each in heads if each.rows == rows), None)
        if fitting is not None and leaf == INTERLEAVED_QKV:
            return _interleaved(parent, tensor, fitting)
        if fitting is not None:
            queries, pairs = fitting.queries * fitting.size, fitting.pairs * fitting.size
            return dict(
                [
                    block("q_proj", 0, queries),
                    block("k_proj", queries, pairs),
                    block("v_proj", queries + pairs, pairs),
                ]
            )
    return dict([block(leaf, 0, rows)])


def _interleaved(parent: str, tensor: TensorSpec, heads: Heads) -> dict[str, Place]:
    """q, k and v of InternLM2's wqkv: of each key/value head, its query heads, key and value."""
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
    """The logical weights of experts that are stacked along a first dimension.

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
