"""Where tiny models keep each logical weight, spelt out by hand and not taken from the package."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

INNER, HEADS, PAIRS, SIZE = 96, 4, 2, 16
LAYERS, EXPERTS, EXPERT_INNER = 2, 3, 48
Tensors = dict[str, Tensor]
Rows = slice | tuple[int, ...]
WHOLE = slice(None)


@dataclass(frozen=True)
class Where:
    """One logical weight [out, in] inside a stored tensor.

    Rows `rows` of the matrix, of member `expert` of a stack, that is transposed if `turned`.
    """

    name: str
    rows: Rows = field(default_factory=lambda: WHOLE)
    expert: int | None = None
    turned: bool = False

    def get(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The weight."""
        return self._matrix(tensors)[self._index]

    def put(self, tensors: Mapping[str, Tensor], weight: Tensor) -> None:
        """Write the weight into the tensor, in place."""
        self._matrix(tensors)[self._index] = weight.to(tensors[self.name].dtype)

    @property
    def _index(self) -> slice | Tensor:
        return torch.tensor(self.rows) if isinstance(self.rows, tuple) else self.rows

    def _matrix(self, tensors: Mapping[str, Tensor]) -> Tensor:
        tensor = tensors[self.name]
        matrix = tensor if self.expert is None else tensor[self.expert]
        return matrix.T if self.turned else matrix


@dataclass(frozen=True)
class Layout:
    """How a checkpoint names and stores its language model's weights.

    `qkv` is split, fused or interleaved; `mlp` is split, fused, or the experts': each, rows,
    columns; `numbers` are the numbers on the disk of the layers that came from the base.
    """

    prefix: str = "model.layers."
    qkv: str = "split"
    mlp: str = "split"
    shared: str = ""
    experts: int = EXPERTS
    inner: int = EXPERT_INNER
    attention: str = "self_attn"
    feed_forward: str = "mlp"
    leaves: tuple[tuple[str, str], ...] = ()
    numbers: tuple[int, ...] = tuple(range(LAYERS))

    def weights(self) -> dict[str, Where]:
        """Every logical weight in scope by canonical name."""
        found: dict[str, Where] = {}
        for layer, number in enumerate(self.numbers):
            at = f"{self.prefix}{number}."
            for rest, where in self._attention(f"{at}{self.attention}.").items():
                found[f"layers.{layer}.self_attn.{rest}"] = where
            for rest, where in self._feed_forward(f"{at}{self.feed_forward}.").items():
                found[f"layers.{layer}.mlp.{rest}"] = where
        return found

    def _leaf(self, name: str) -> str:
        return dict(self.leaves).get(name, name)

    def _attention(self, at: str) -> dict[str, Where]:
        found = {"o_proj": Where(f"{at}{self._leaf('o_proj')}.weight")}
        queries, pairs = HEADS * SIZE, PAIRS * SIZE
        if self.qkv == "split":
            return found | {f"{x}_proj": Where(f"{at}{x}_proj.weight") for x in "qkv"}
        if self.qkv == "fused":
            name = f"{at}qkv_proj.weight"
            return found | {
                "q_proj": Where(name, slice(0, queries)),
                "k_proj": Where(name, slice(queries, queries + pairs)),
                "v_proj": Where(name, slice(queries + pairs, queries + 2 * pairs)),
            }
        assert self.qkv == "interleaved"
        group = HEADS // PAIRS
        rows = torch.arange(queries + 2 * pairs).view(PAIRS, group + 2, SIZE)
        parts = {"q_proj": rows[:, :group], "k_proj": rows[:, group], "v_proj": rows[:, group + 1]}
        return found | {
            leaf: Where(f"{at}wqkv.weight", tuple(part.reshape(-1).tolist()))
            for leaf, part in parts.items()
        }

    def _feed_forward(self, at: str) -> dict[str, Where]:
        if self.mlp in ("split", "fused"):
            return self._dense(at, INNER, fused=self.mlp == "fused")
        found: dict[str, Where] = {}
        for expert in range(self.experts):
            if self.mlp == "each":
                inner = self._dense(f"{at}experts.{expert}.", 0, fused=False)
            else:
                inner = self._stacked(f"{at}experts.", expert, turned=self.mlp == "columns")
            found |= {f"experts.{expert}.{leaf}": where for leaf, where in inner.items()}
        if self.shared:
            inner = self._dense(f"{at}{self.shared}.", 0, fused=False)
            found |= {f"{self.shared}.{leaf}": where for leaf, where in inner.items()}
        return found

    def _dense(self, at: str, inner: int, *, fused: bool) -> dict[str, Where]:
        down = {"down_proj": Where(f"{at}{self._leaf('down_proj')}.weight")}
        if fused:
            name = f"{at}gate_up_proj.weight"
            gate, up = Where(name, slice(0, inner)), Where(name, slice(inner, 2 * inner))
            return {"gate_proj": gate, "up_proj": up} | down
        leaves = ("gate_proj", "up_proj")
        return {leaf: Where(f"{at}{self._leaf(leaf)}.weight") for leaf in leaves} | down

    def _stacked(self, at: str, expert: int, *, turned: bool) -> dict[str, Where]:
        gate_up, half = f"{at}gate_up_proj", self.inner
        return {
            "gate_proj": Where(gate_up, slice(0, half), expert, turned),
            "up_proj": Where(gate_up, slice(half, 2 * half), expert, turned),
            "down_proj": Where(f"{at}down_proj", WHOLE, expert, turned),
        }


def moved(*rules: tuple[str, str]) -> Callable[[Tensors], Tensors]:
    """Renames every tensor by the first rule whose pattern begins its name."""

    def convert(tensors: Tensors) -> Tensors:
        found = {}
        for name, tensor in tensors.items():
            matching = (rule for rule in rules if re.match(rule[0], name))
            pattern, template = next(matching, ("^", ""))
            found[re.sub(pattern, template, name, count=1)] = tensor
        return found

    return convert


def stored_as(
    source: Layout, target: Layout, then: Callable[[Tensors], Tensors] = dict
) -> Callable[[Tensors], Tensors]:
    """Stores the weights in scope in another layout; then the rest is renamed by `then`."""

    def convert(tensors: Tensors) -> Tensors:
        own, other = source.weights(), target.weights()
        values = {canonical: where.get(tensors).clone() for canonical, where in own.items()}
        taken = {where.name for where in own.values()}
        made = then({name: tensor for name, tensor in tensors.items() if name not in taken})
        names = {where.name for where in other.values()}
        for name in sorted(names):
            parts = [(c, where) for c, where in other.items() if where.name == name]
            made[name] = _empty([(values[c], where) for c, where in parts])
            for canonical, where in parts:
                where.put(made, values[canonical])
        return made

    return convert


def _empty(parts: list[tuple[Tensor, Where]]) -> Tensor:
    """A tensor with room for the parts."""
    experts = {where.expert for _, where in parts}
    rows = sum(weight.shape[0] for weight, _ in parts) // len(experts)
    weight, where = parts[0]
    shape = (weight.shape[1], rows) if where.turned else (rows, weight.shape[1])
    return weight.new_zeros(shape if where.expert is None else (len(experts), *shape))
