"""Finds language models inside checkpoints by the structure of their tensors' names.

A decoder stores `<prefix>layers.<N>.<rest>`, and a vision tower often does too, with some of the
same leaves. What tells them apart is not the prefix, which changes between families and between
versions of one library, but which names a whole layer is made of.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from lean_merge.checkpoints.checkpoint import Checkpoint
from lean_merge.checkpoints.header import TensorSpec
from lean_merge.errors import CoverageError

QKV = "qkv_proj"
GATE_UP = "gate_up_proj"
INTERLEAVED_QKV = "wqkv"
LEAVES = frozenset(
    {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    | {QKV, GATE_UP, INTERLEAVED_QKV, "wo", "w1", "w2", "w3"}
)
_ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})
_WEIGHT = ".weight"
# Finding the language model compares every part with every other, kind of layer by kind of layer:
# a checkpoint made of thousands would keep it busy for hours. Real ones have tens.
_MAX_PARTS = 100
_MAX_KINDS = 300

Key = tuple[int, str]
"""(layer, rest): a weight's place in a language model, whatever its prefix."""


@dataclass(frozen=True)
class Decoder:
    """The tensors under one prefix of a checkpoint, if they look like layers.

    Attributes
    ----------
    prefix
        Up to and with "layers.".
    weights
        In-scope 2-D weights by (layer, rest), rest without ".weight", in the file's order.
    stacked
        Names of experts' weights stored as one tensor of 3 or more dimensions.
    unknown
        2-D weights by (layer, rest) that are neither in scope nor known to stay out of it.
    others
        Every other tensor that ends in ".weight", by (layer, rest).
    """

    prefix: str
    weights: dict[Key, TensorSpec] = field(default_factory=dict)
    stacked: list[str] = field(default_factory=list)
    unknown: dict[Key, TensorSpec] = field(default_factory=dict)
    others: dict[Key, TensorSpec] = field(default_factory=dict)

    @property
    def depth(self) -> int:
        """Number of layers."""
        return 1 + max((layer for layer, _ in self.weights), default=-1)

    def find(self, key: Key) -> TensorSpec | None:
        """The tensor at (layer, rest), of whatever shape."""
        return self.weights.get(key) or self.others.get(key)

    @cached_property
    def layers(self) -> list[frozenset[str]]:
        """The distinct sets of rests that its layers are made of."""
        rests: dict[int, set[str]] = {}
        for layer, rest in self.weights:
            rests.setdefault(layer, set()).add(rest)
        return sorted(
            set(map(frozenset, rests.values())), key=lambda each: (-len(each), sorted(each))
        )

    def one_layer(self) -> frozenset[str]:
        """The rests of its fullest layer."""
        return self.layers[0]

    def has_whole_layer_of(self, other: Decoder) -> bool:
        """Whether one layer here has every in-scope name of some layer of `other`."""
        mine = self.layers
        return any(theirs <= each for theirs in other.layers for each in mine)

    def rank(self) -> tuple[int, int]:
        """How much it looks like the language model: fullness of its layers, then its bytes."""
        return len(self.one_layer()), sum(spec.nbytes for spec in self.weights.values())


def split_name(name: str) -> tuple[str, int, str] | None:
    """(prefix, layer, rest) of "<prefix>layers.<layer>.<rest>", None for any other name."""
    parts = name.split(".")
    for at in range(len(parts) - 2):
        # The bound on digits keeps hostile names from becoming huge integers.
        number = parts[at + 1]
        if parts[at] == "layers" and number.isascii() and number.isdigit() and len(number) <= 6:
            prefix = "".join(f"{part}." for part in parts[: at + 1])
            return prefix, int(number), ".".join(parts[at + 2 :])
    return None


def decoders(checkpoint: Checkpoint) -> dict[str, Decoder]:
    """What could be a language model's layers, by prefix."""
    found: dict[str, Decoder] = {}
    for spec in checkpoint.tensors.values():
        split = split_name(spec.name)
        if split is None:
            continue
        prefix, layer, rest = split
        decoder = found.setdefault(prefix, Decoder(prefix))
        stem = rest.removesuffix(_WEIGHT)
        segments = stem.split(".")
        if len(spec.shape) >= 3 and ("experts" in segments or segments[-1] in LEAVES):
            decoder.stacked.append(spec.name)
        if stem == rest:
            continue
        key = (layer, stem)
        if len(spec.shape) == 2 and segments[-1] in LEAVES:
            decoder.weights[key] = spec
            continue
        decoder.others[key] = spec
        if len(spec.shape) == 2 and segments[-1] not in _ROUTERS:
            decoder.unknown[key] = spec
    parts = {prefix: decoder for prefix, decoder in found.items() if decoder.weights}
    if len(parts) > _MAX_PARTS or sum(len(part.layers) for part in parts.values()) > _MAX_KINDS:
        raise CoverageError(
            f"{checkpoint.source}: has layers under {len(parts)} prefixes, or of more than "
            f"{_MAX_KINDS} kinds, which no model has; pass another checkpoint."
        )
    return parts


def language_layout(checkpoint: Checkpoint) -> Mapping[str, int]:
    """Prefixes under which a language model's layers may lie, and the number of layers of each.

    The likeliest comes first; towers that share leaf names follow.
    """
    found = sorted(decoders(checkpoint).values(), key=Decoder.rank, reverse=True)
    return {decoder.prefix: decoder.depth for decoder in found}
