"""The tasks of a plan: one for each tensor of the output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lean_merge.checkpoints import LogicalWeight, MappedWeight, TensorSpec, WeightSource
from lean_merge.methods import Method
from lean_merge.output import OutputTensor


@dataclass(frozen=True, slots=True)
class CopyTask:
    """A tensor out of scope: its bytes go over as they are, or its numbers in another dtype.

    `decoded` has the matrices that its numbers are then read from, and is empty otherwise.
    """

    shard: int
    tensor: OutputTensor
    source: TensorSpec
    decoded: tuple[WeightSource, ...] = ()

    @property
    def stored(self) -> tuple[TensorSpec, ...]:
        """Every tensor that is read."""
        parts = (spec for source in self.decoded for spec in source.stored)
        return tuple(dict.fromkeys((self.source, *parts)))


@dataclass(frozen=True, slots=True)
class WeightTask:
    """An in-scope tensor.

    For each of its logical weights, `resident` tells how many tiles are kept, `methods` how it is
    merged, and `filtered` why not: a part of a fused tensor that a filter takes has no method.
    `beside` tells whether it may be analysed beside another such.
    """

    shard: int
    tensor: OutputTensor
    weight: MappedWeight
    resident: tuple[int, ...]
    methods: tuple[Method[Any] | None, ...]
    filtered: tuple[str, ...]
    beside: tuple[bool, ...]


def needs_analysis(weight: LogicalWeight) -> bool:
    """Whether a method that analyses has anything to look at: some expert changes the weight."""
    return not all(expert.zero_because for expert in weight.experts)
