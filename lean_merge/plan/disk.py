"""The most that an output takes of the disk where headers alone do not tell how large it becomes.

An adapter or an analysis takes its space twice: float32 blocks first, then the file made of them.
Its ranks depend on the numbers, but how many directions are computed at most does not. Journal and
report are not counted: they take a few KiB for each weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lean_merge.mapping import LogicalWeight
from lean_merge.methods import EvidenceMethod, Watching
from lean_merge.outputs.factors import factor_shapes, factors_layout
from lean_merge.outputs.peft import AdapterModule, adapter_layout
from lean_merge.tasks import WeightTask, needs_analysis


def adapter_disk(modules: Sequence[AdapterModule], dtype: torch.dtype) -> tuple[int, int]:
    """Most bytes of adapter_model.safetensors, and with the blocks that it is made of.

    `modules` have the largest ranks that there can be.
    """
    size = adapter_layout(modules, dtype).size
    numbers = sum(module.rank * module.in_features for module in modules)
    numbers += sum(part.rows * part.rank for module in modules for part in module.parts)
    return size, size + 4 * numbers


def evidence_disk(tasks: Sequence[WeightTask]) -> tuple[int, int]:
    """Most bytes of analysis.safetensors, and with the blocks that it is made of."""
    shapes: dict[str, tuple[int, int]] = {}
    for weight, method in _watched(tasks):
        count = method.most_stored(weight.shape)
        shapes |= factor_shapes(weight.canonical, weight.shape, len(weight.experts), count)
    shard = factors_layout(shapes)
    return shard.size, 2 * shard.size - len(shard.header)


def _watched(
    tasks: Sequence[WeightTask],
) -> list[tuple[LogicalWeight, EvidenceMethod[object]]]:
    """The weights that are looked at, and the methods that gather their evidence."""
    found = []
    for task in tasks:
        for part, each in zip(task.weight.slices, task.methods, strict=True):
            method = each.method if isinstance(each, Watching) else each
            if isinstance(method, EvidenceMethod) and needs_analysis(part):
                found.append((part, method))
    return found
