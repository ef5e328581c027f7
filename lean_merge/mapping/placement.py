"""Find the places of a model's logical weights inside its stored tensors, and name them.

Stored tensors may be fused, stacked, interleaved or transposed, while the mathematics knows the
weights q, k, v, o, gate, up and down.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lean_merge.checkpoints.header import TensorSpec
from lean_merge.checkpoints.rows import Place, row_block

QKV = "qkv_proj"
GATE_UP = "gate_up_proj"
UP_GATE = "up_gate_proj"
INTERLEAVED_QKV = "wqkv"
_ALWAYS_WHOLE = frozenset({"c_attn", "query_key_value", "Wqkv", "qkv", "att_proj"})
FUSED = frozenset({QKV, GATE_UP, UP_GATE, INTERLEAVED_QKV}) | _ALWAYS_WHOLE
EXPERTS = "experts"
_LINEAR = {"input_linear": GATE_UP, "output_linear": "down_proj"}
"""Granite's names, whose tensors hold all experts if they have three dimensions."""
_LEAVES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj", "wo": "o_proj"} | _LINEAR
_MODULES = {"attention": "self_attn", "feed_forward": "mlp", "block_sparse_moe": "mlp"}
_STACKED = frozenset({GATE_UP, "gate_proj", "up_proj", "down_proj"})
_LEAF = frozenset({QKV, INTERLEAVED_QKV, "q_proj", "k_proj", "v_proj", "o_proj"}) | _STACKED
NO_MATRICES = re.compile(
    r"norm|^ln(_|\d|$)|conv|bias|embed|rotary|sinks?$|scale|^wg$|^A_log$|^D$|^dt$|^weight$"
)
"""Names of what holds no matrix of a method, though it may have two dimensions: norms,
convolutions, biases, embeddings, attention sinks, scales, and decays of state-space models."""
NO_MODULES = re.compile(r"(^|\.)(router\w*|(shared_expert_)?gate|lora_\w+)(\.|$)")
"""Modules that are left out too: routers and gates of experts, and adapters of the model's own."""
_COUNTS = frozenset({"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"})


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
    """Return a weight's name inside its layer as Llama has it, such as "mlp.gate_proj".

    Only names that mean the same in every model become Llama's. A wq is not a q_proj, because its
    rows stand in another order, and the meaning of out_proj or fc1 depends on the family.
    """
    *modules, leaf = rest.removesuffix(".base_layer").split(".")
    return ".".join([*(_MODULES.get(each, each) for each in modules), _LEAVES.get(leaf, leaf)])


def is_stack(rest: str, tensor: TensorSpec) -> bool:
    """Return whether a tensor holds the matrices of all experts in a layout that is known."""
    parent, _, leaf = canonical(rest).rpartition(".")
    known = parent.rpartition(".")[2] == EXPERTS or rest.rpartition(".")[2] in _LINEAR
    return len(tensor.shape) == 3 and leaf in _STACKED and known


def is_matrix(rest: str, tensor: TensorSpec) -> bool:
    """Return whether a tensor of a layer holds what methods merge: a matrix, or a stack of them.

    Parameters
    ----------
    rest
        The canonical name in the layer, without ".weight".
    tensor
        Every tensor of two dimensions counts unless `NO_MATRICES` or `NO_MODULES` names it.
    """
    leaf, shape = rest.rpartition(".")[2], tensor.shape
    if len(shape) < 2 or NO_MODULES.search(rest):
        return False
    known = leaf in _LEAF
    return known or not (NO_MATRICES.search(leaf) or 1 in shape or tensor.dtype in _COUNTS)


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
    if leaf in (GATE_UP, UP_GATE) and rows % 2 == 0:
        parts = dict.fromkeys(("gate_proj", "up_proj")[:: 1 if leaf == GATE_UP else -1], rows // 2)
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
