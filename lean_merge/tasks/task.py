"""A plan has one task for each tensor of the output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lean_merge.checkpoints import TensorSpec, WeightSource, common_dtype
from lean_merge.mapping import LogicalWeight, MappedWeight
from lean_merge.methods import Method
from lean_merge.store import OutputTensor


@dataclass(frozen=True, slots=True)
class CopyTask:
    """A tensor out of scope, whose bytes are copied, or whose numbers are written in another dtype.

    In the second case, `decoded` holds the matrices from which its numbers are read.
    """

    shard: int
    tensor: OutputTensor
    source: TensorSpec
    decoded: tuple[WeightSource, ...] = ()

    def read(self, *, rows: bool) -> tuple[TensorSpec, ...]:
        """Return the stored tensors that are read; `rows` tells if rows are written."""
        if not rows:
            return ()
        parts = (spec for source in self.decoded for spec in source.stored)
        return tuple(dict.fromkeys((self.source, *parts)))


@dataclass(frozen=True, slots=True)
class WeightTask:
    """A tensor in scope, which is one logical weight or several.

    For each logical weight, `resident` is the number of tiles that are kept, and `methods` holds
    the method. A part of a fused tensor that a filter leaves out has no method, and `filtered`
    gives the reason. `halves` is the number of halves of the arena that the analysis takes.
    """

    shard: int
    tensor: OutputTensor
    weight: MappedWeight
    resident: tuple[int, ...]
    methods: tuple[Method[Any] | None, ...]
    filtered: tuple[str, ...]
    halves: tuple[int, ...]

    def read(self, *, rows: bool) -> tuple[TensorSpec, ...]:
        """Return the parts of stored tensors that are read; `rows` tells if rows are written."""
        sources: list[WeightSource] = []
        for part, method in zip(self.weight.slices, self.methods, strict=True):
            if method is not None and looks(method, part):
                sources += formed_from(part, [True] * len(part.others), method)
                continue
            added = method.reads_task_vectors() if method is not None and rows else ()
            sources += [part.mllm, *formed_from(part, added, method)] if rows else []
        return self.weight.extents_of(sources)


def formed_from(
    weight: LogicalWeight, wanted: Sequence[bool], method: Method[Any] | None
) -> list[WeightSource]:
    """Return the sources that are read to form the wanted task vectors of a weight.

    The base is among them if it is subtracted from any or, for a method that takes no differences,
    added to any.
    """
    differences = method is None or method.differences
    sources = [source for source, one in zip(weight.others, wanted, strict=False) if one]
    if any(source.is_difference != differences for source in sources):
        sources.append(weight.base)
    return sources


def looks(method: Method[Any], weight: LogicalWeight) -> bool:
    """Return whether the method makes any pass over the weight."""
    return method.cost(weight.shape, item=4).passes > 0 and needs_analysis(method, weight)


def needs_analysis(method: Method[Any], weight: LogicalWeight) -> bool:
    """Return whether a method has to look at the weight.

    It has to if an expert changes the weight, or if the method may change a weight that none does.
    """
    return method.changes_by_itself or not all(expert.zero_because for expert in weight.experts)


def task_dtype(method: Method[Any] | None, weight: LogicalWeight) -> torch.dtype:
    """Return the dtype in which the task vectors of a weight are formed."""
    if method is not None and method.forms_exactly(weight.shape):
        return torch.float32
    return common_dtype(source.dtype for source in weight.roles)
