"""The tasks of a plan: one for each tensor of the output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lean_merge.checkpoints import TensorSpec, WeightSource
from lean_merge.mapping import LogicalWeight, MappedWeight
from lean_merge.methods import Method
from lean_merge.store import OutputTensor


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
    `halves` tells whether its analysis takes one half of the arena, beside another, or both.
    """

    shard: int
    tensor: OutputTensor
    weight: MappedWeight
    resident: tuple[int, ...]
    methods: tuple[Method[Any] | None, ...]
    filtered: tuple[str, ...]
    halves: tuple[int, ...]

    def read(self, *, rows: bool) -> tuple[TensorSpec, ...]:
        """The parts of stored tensors that are read; those of the MLLM anyway where `rows` are."""
        sources: list[WeightSource] = []
        for part, method in zip(self.weight.slices, self.methods, strict=True):
            if method is not None and looks(method, part):
                sources += part.roles
                continue
            added = method.reads_task_vectors() if method is not None and rows else ()
            sources += [part.mllm, *formed_from(part, added)] if rows else []
        return self.weight.extents_of(sources)


def formed_from(weight: LogicalWeight, wanted: Sequence[bool]) -> list[WeightSource]:
    """What is read to form these of its task vectors: the base too, where any is a difference."""
    sources = [source for source, one in zip(weight.others, wanted, strict=False) if one]
    if any(not source.is_difference for source in sources):
        sources.append(weight.base)
    return sources


def looks(method: Method[Any], weight: LogicalWeight) -> bool:
    """Whether the method makes any pass over the weight."""
    return method.cost(weight.shape, item=4).passes > 0 and needs_analysis(weight)


def needs_analysis(weight: LogicalWeight) -> bool:
    """Whether a method that analyses has anything to look at: some expert changes the weight."""
    return not all(expert.zero_because for expert in weight.experts)
