"""The factors of an analysis: collected, then laid out and written as one safetensors file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lean_merge.checkpoints.reader import as_bytes
from lean_merge.output.adapter import FactorStore
from lean_merge.output.folder import OutputFolder
from lean_merge.output.layout import OutputTensor, Shard, single_file

FACTORS = "analysis.safetensors"
_CHUNK = 1 << 20
"""Numbers that pass through memory at once."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A float32 tensor that waits in a `FactorStore`, from `start` on."""

    name: str
    shape: tuple[int, int]
    start: int


def write_factors(
    folder: OutputFolder, store: FactorStore, tensors: Sequence[StoredTensor]
) -> Shard:
    """Writes analysis.safetensors into an open folder, which stays unsealed; returns its layout.

    Raises OutputError or BudgetError where the disk refuses.
    """
    shard = single_file(
        FACTORS,
        [OutputTensor(t.name, "F32", t.shape, 4 * t.shape[0] * t.shape[1]) for t in tensors],
    )
    folder.add(shard)
    chunk = torch.empty(_CHUNK)
    for tensor in tensors:
        count = tensor.shape[0] * tensor.shape[1]
        for first in range(0, count, _CHUNK):
            numbers = chunk[: min(_CHUNK, count - first)]
            store.read(tensor.start + 4 * first, numbers)
            folder.write_at(shard, shard.offsets[tensor.name] + 4 * first, as_bytes(numbers))
    return shard
