"""The most that an output takes of the disk where headers alone do not tell how large it becomes.

An adapter or an analysis takes its space twice: float32 blocks first, then the file made of them.
Its ranks depend on the numbers, but how many directions are computed at most does not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lean_merge.mapping import LogicalWeight
from lean_merge.methods import EvidenceMethod, Watching
from lean_merge.outputs.factors import factor_shapes, factors_layout
from lean_merge.outputs.peft import AdapterModule, adapter_layout
from lean_merge.store import Reserve
from lean_merge.tasks import WeightTask, needs_analysis

FIXED = 64 << 10
"""Bytes of a journal or report that grow with nothing: versions, paths, counts, words."""
FILE = 1 << 10
"""Bytes that one of them says of a file of an input at most."""
ENTRY = 2 << 10
"""Bytes that one of them says of a role of a weight at most, names apart: a score of numbers."""
NAMED = 16
"""How often one of them names a weight at most."""
NUMBER = 40
"""Bytes of a number in a list, with what is around it."""
LISTS = 4
"""Lists that an analysis keeps of a role: sigma, angles, similarity, gamma."""


def adapter_reserve(
    modules: Sequence[AdapterModule], dtype: torch.dtype, *, told: int
) -> tuple[int, Reserve]:
    """Most bytes of adapter_model.safetensors, and all that an adapter takes.

    `modules` have the largest ranks that there can be, and `told` is what `told_bytes` says.
    """
    size = adapter_layout(modules, dtype).size
    numbers = sum(module.rank * module.in_features for module in modules)
    numbers += sum(part.rows * part.rank for module in modules for part in module.parts)
    return size, Reserve(4 * numbers, size + 2 * told, told)


def evidence_reserve(
    tasks: Sequence[WeightTask], *, told: int, smaller: str = ""
) -> tuple[int, Reserve]:
    """Most bytes of analysis.safetensors, and all that an analysis takes."""
    shapes: dict[str, tuple[int, int]] = {}
    numbers = 0
    for weight, method in _watched(tasks):
        count = method.most_stored(weight.shape)
        shapes |= factor_shapes(weight.canonical, weight.shape, len(weight.experts), count)
        numbers += LISTS * (1 + len(weight.experts)) * method.most_computed(weight.shape)
    shard = factors_layout(shapes)
    told += NUMBER * numbers
    blocks = shard.size - len(shard.header)
    return shard.size, Reserve(blocks, shard.size + 2 * told, told, smaller=smaller)


def report_reserve(told: int) -> Reserve:
    """All that a report takes, without weights."""
    return Reserve(made=2 * told, journal=told)


def told_bytes(tasks: Sequence[WeightTask], *, recipe: int, files: int) -> int:
    """Most bytes of a journal, or of a report with its card, but for the lists of an analysis.

    `recipe` is the length of the recipe, and `files` how many files the inputs have.
    """
    most = FIXED + FILE * files + 4 * recipe
    for task in tasks:
        for part in task.weight.slices:
            most += ENTRY * (2 + len(part.experts))
            most += NAMED * (len(part.canonical) + len(task.tensor.name))
    return most


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
