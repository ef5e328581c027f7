"""Lay out and write the factors of a LoRA adapter in PEFT's format.

Their ranks are known only when all weights are analysed; until then, factors wait in blocks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lean_merge.checkpoints.dtypes import safetensors_dtype
from lean_merge.checkpoints.reader import as_bytes
from lean_merge.checkpoints.weightfiles import ADAPTER_CONFIG
from lean_merge.errors import DataError, OutputError
from lean_merge.store.blocks import StoredBlock
from lean_merge.store.folder import OutputFolder
from lean_merge.store.layout import OutputTensor, Shard, single_file

ADAPTER = "adapter_model.safetensors"
_KEY = "base_model.model."
_CHUNK = 1 << 20
"""The count of numbers that pass through memory at once."""


@dataclass(frozen=True, slots=True)
class StoredFactors:
    """The update of some rows of a module, b [rows, rank] @ a [rank, in].

    Attributes
    ----------
    runs
        The (first, count) of the module's rows, in the order of b's rows.
    rank
        The rank of the update; 0 if there is none.
    a, b
        Blocks of the output; None if there is no update, or while only sizes matter.
    """

    runs: tuple[tuple[int, int], ...]
    rank: int = 0
    a: StoredBlock | None = None
    b: StoredBlock | None = None

    @property
    def rows(self) -> int:
        """Return the number of rows that it updates."""
        return sum(count for _, count in self.runs)


@dataclass(frozen=True, slots=True)
class AdapterModule:
    """One module of the adapter; each of its rows is in one of its parts.

    A fused weight has a part for each projection. Their rows of A are stacked, and an entry of B is
    zero if its row and its column belong to different parts, so that the ranks add up.
    """

    name: str
    in_features: int
    parts: tuple[StoredFactors, ...]

    @property
    def out_features(self) -> int:
        """Return the number of rows of the module's weight."""
        return sum(part.rows for part in self.parts)

    @property
    def rank(self) -> int:
        """Return the rank of A and B."""
        return sum(part.rank for part in self.parts)

    @property
    def key_a(self) -> str:
        """Return the name of A [rank, in] as PEFT saves it."""
        return f"{_KEY}{self.name}.lora_A.weight"

    @property
    def key_b(self) -> str:
        """Return the name of B [out, rank]."""
        return f"{_KEY}{self.name}.lora_B.weight"


def adapter_layout(modules: Sequence[AdapterModule], dtype: torch.dtype) -> Shard:
    """Lay out the factors of `modules` in adapter_model.safetensors."""
    tensors = []
    for module in modules:
        shapes = {
            module.key_a: (module.rank, module.in_features),
            module.key_b: (module.out_features, module.rank),
        }
        for name, shape in shapes.items():
            size = shape[0] * shape[1] * dtype.itemsize
            tensors.append(OutputTensor(name, safetensors_dtype(dtype), shape, size))
    return single_file(ADAPTER, tensors)


def write_adapter(
    folder: OutputFolder,
    modules: Sequence[AdapterModule],
    *,
    dtype: torch.dtype,
    base_model: str,
) -> None:
    """Write weights and adapter_config.json into an open folder, which stays unsealed.

    Parameters
    ----------
    folder
        The output, whose blocks hold the factors.
    modules
        The modules that get an update; at least one.
    dtype
        The dtype of the factors in the file.
    base_model
        The model that the adapter belongs to: the MLLM, as the user named it.

    Raises
    ------
    OutputError
        There is no module, so that PEFT would refuse the adapter; or the disk refuses.
    BudgetError
        The disk is full.
    """
    if not modules:
        raise OutputError(
            f"{folder.final}: no weight was selected, so the adapter would be empty and PEFT would "
            "refuse it; lower --threshold."
        )
    shard = adapter_layout(modules, dtype)
    folder.add(shard)
    chunk = torch.empty(_CHUNK, dtype=torch.float32)
    for module in modules:
        _write_a(folder, shard, module, dtype, chunk)
        _write_b(folder, shard, module, dtype, chunk)
    config = adapter_config(modules, base_model=base_model)
    folder.write_file(ADAPTER_CONFIG, (json.dumps(config, indent=2) + "\n").encode())


def _write_a(
    folder: OutputFolder,
    shard: Shard,
    module: AdapterModule,
    dtype: torch.dtype,
    chunk: Tensor,
) -> None:
    write, position = folder.writer(shard, module.key_a), 0
    for part in module.parts:
        if part.a is None:
            continue
        count = part.rank * module.in_features
        for start in range(0, count, _CHUNK):
            numbers = chunk[: min(_CHUNK, count - start)]
            folder.blocks.read(part.a, start, numbers)
            data = as_bytes(cast_factors(numbers, dtype, module.name))
            write(position, data)
            position += data.nbytes


def _write_b(
    folder: OutputFolder,
    shard: Shard,
    module: AdapterModule,
    dtype: torch.dtype,
    chunk: Tensor,
) -> None:
    write, width = folder.writer(shard, module.key_b), module.rank * dtype.itemsize
    height = max(1, _CHUNK // module.rank)
    left = 0
    for part in module.parts:
        done = 0
        for first, count in part.runs:
            for start in range(0, count, height):
                rows = min(height, count - start)
                block = torch.zeros(rows, module.rank, dtype=torch.float32)
                if part.b is not None:
                    numbers = chunk[: rows * part.rank].view(rows, part.rank)
                    folder.blocks.read(part.b, done * part.rank, numbers)
                    block[:, left : left + part.rank] = numbers
                write((first + start) * width, as_bytes(cast_factors(block, dtype, module.name)))
                done += rows
        left += part.rank


def cast_factors(numbers: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Convert factors of module `name` to an adapter's dtype. Raises DataError on overflow."""
    cast = numbers.to(dtype)
    if not bool(torch.isfinite(cast).all()):
        raise DataError(
            f"The adapter's factors of {name} overflow {str(dtype).removeprefix('torch.')}; choose "
            "--out-dtype float32 or bfloat16."
        )
    return cast


def adapter_config(modules: Sequence[AdapterModule], *, base_model: str) -> dict[str, Any]:
    """Return the content of adapter_config.json.

    Every alpha equals its rank, so PEFT's scaling alpha / rank is 1 everywhere, even for loaders
    that know only one alpha. `r` is the largest rank, and patterns name the modules of lower rank.
    The revision after the @ of a hub id has a key of its own, because loaders take `base_model` for
    a repository's name.
    """
    name, revision = base_model, ""
    if not Path(base_model).expanduser().exists():
        name, _, revision = base_model.partition("@")
    largest = max(module.rank for module in modules)
    smaller = {module.name: module.rank for module in modules if module.rank < largest}
    return {
        "base_model_name_or_path": name,
        "revision": revision or None,
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": smaller,
        "alpha_pattern": smaller,
        "target_modules": [module.name for module in modules],
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


__all__ = [
    "ADAPTER",
    "AdapterModule",
    "StoredFactors",
    "adapter_config",
    "adapter_layout",
    "cast_factors",
    "write_adapter",
]
