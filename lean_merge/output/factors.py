"""The factors of an analysis: blocks of the output, written as one safetensors file."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lean_merge.checkpoints.reader import as_bytes
from lean_merge.output.blocks import ITEM, Block
from lean_merge.output.folder import OutputFolder
from lean_merge.output.layout import OutputTensor, Shard, single_file

FACTORS = "analysis.safetensors"
_CHUNK = 1 << 20
"""Numbers that pass through memory at once."""


def write_factors(folder: OutputFolder, blocks: Mapping[str, Block]) -> Shard:
    """Writes analysis.safetensors into an open folder, which stays unsealed; returns its layout.

    Raises OutputError or BudgetError where the disk refuses.
    """
    tensors = [OutputTensor(n, "F32", block.shape, block.nbytes) for n, block in blocks.items()]
    shard = single_file(FACTORS, tensors)
    folder.add(shard)
    chunk = torch.empty(_CHUNK)
    for name, block in blocks.items():
        if folder.is_finished(name):
            continue
        count = block.nbytes // ITEM
        for first in range(0, count, _CHUNK):
            numbers = chunk[: min(_CHUNK, count - first)]
            folder.blocks.read(block, first, numbers)
            folder.write_at(shard, shard.offsets[name] + first * ITEM, as_bytes(numbers))
    return shard
