"""Write the factors of an analysis, which wait in blocks, as one safetensors file."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from lean_merge.checkpoints.reader import as_bytes
from lean_merge.store.blocks import ITEM, StoredBlock
from lean_merge.store.folder import OutputFolder
from lean_merge.store.layout import OutputTensor, Shard, single_file

FACTORS = "analysis.safetensors"
_CHUNK = 1 << 20
"""The count of numbers that pass through memory at once."""


def factor_shapes(
    canonical: str, shape: tuple[int, int], experts: int, count: int
) -> dict[str, tuple[int, int]]:
    """Return the shapes, by name, of the tensors that hold `count` directions of a weight."""
    images = {f"{canonical}.expert{k + 1}.images": (count, shape[0]) for k in range(experts)}
    return {f"{canonical}.mllm.vectors": (count, shape[1]), **images}


def factors_layout(shapes: Mapping[str, tuple[int, ...]]) -> Shard:
    """Lay out tensors of these shapes in analysis.safetensors."""
    sizes = {name: math.prod(shape) * ITEM for name, shape in shapes.items()}
    tensors = [OutputTensor(name, "F32", shapes[name], size) for name, size in sizes.items()]
    return single_file(FACTORS, tensors)


def write_factors(folder: OutputFolder, blocks: Mapping[str, StoredBlock]) -> Shard:
    """Write analysis.safetensors into an open folder, which stays unsealed; return its layout.

    Raises OutputError or BudgetError where the disk refuses.
    """
    shard = factors_layout({name: block.shape for name, block in blocks.items()})
    folder.add(shard)
    chunk = torch.empty(_CHUNK, dtype=torch.float32)
    for name, block in blocks.items():
        write, count = folder.writer(shard, name), block.nbytes // ITEM
        for first in range(0, count, _CHUNK):
            numbers = chunk[: min(_CHUNK, count - first)]
            folder.blocks.read(block, first, numbers)
            write(first * ITEM, as_bytes(numbers))
    return shard
