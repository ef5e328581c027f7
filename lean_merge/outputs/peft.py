"""Lay out and write the factors of a LoRA adapter in PEFT's format.

Their ranks are known only when all weights are analysed; until then, factors wait in blocks.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lean_merge.checkpoints.dtypes import safetensors_dtype
from lean_merge.checkpoints.reader import as_bytes
from lean_merge.checkpoints.weightfiles import ADAPTER_CONFIG
from lean_merge.errors import DataError, OutputError
from lean_merge.outputs.modules import RowRuns
from lean_merge.store.blocks import StoredBlock
from lean_merge.store.folder import OutputFolder
from lean_merge.store.layout import OutputTensor, Shard, single_file

ADAPTER = "adapter_model.safetensors"
_KEY = "base_model.model."
_CHUNK = 1 << 20
"""The count of numbers that pass through memory at once."""


@dataclass(frozen=True, slots=True)
class StoredFactors:
    """The update of some rows of a module, rows of b [rows, rank] @ a [rank, in].

    Attributes
    ----------
    runs
        The (row of b, row of the module, count) of the rows that lie in the module.
    rank
        The rank of the update; 0 if there is none.
    a, b
        Blocks of the output; None if there is no update, or while only sizes matter.
    """

    runs: RowRuns
    rank: int = 0
    a: StoredBlock | None = None
    b: StoredBlock | None = None


@dataclass(frozen=True, slots=True)
class AdapterModule:
    """One module of the adapter.

    A fused weight has a part for each projection. Their rows of A are stacked, and an entry of B is
    zero if its row and its column belong to different parts, so that the ranks add up. Rows without
    a part stay as they are. If the ranks add up to less than `least_rank`, zeros follow.
    """

    name: str
    out_features: int
    in_features: int
    parts: tuple[StoredFactors, ...] = ()
    least_rank: int = 0

    @property
    def rank(self) -> int:
        """Return the rank of A and B."""
        return max(self.least_rank, sum(part.rank for part in self.parts))

    @property
    def key_a(self) -> str:
        """Return the name of A [rank, in] as PEFT saves it."""
        return f"{_KEY}{self.name}.lora_A.weight"

    @property
    def key_b(self) -> str:
        """Return the name of B [out, rank]."""
        return f"{_KEY}{self.name}.lora_B.weight"


def gaps(runs: Iterable[tuple[int, int, int]], rows: int) -> Iterator[tuple[int, int]]:
    """Yield the (first, count) of those of the `rows` rows of a module that no run has."""
    done = 0
    for _, first, count in sorted(runs, key=lambda run: run[1]):
        if first > done:
            yield done, first - done
        done = first + count
    if rows > done:
        yield done, rows - done


def same_rank(modules: Sequence[AdapterModule]) -> list[AdapterModule]:
    """Return the modules, each with the largest of their ranks."""
    largest = max((module.rank for module in modules), default=0)
    return [replace(module, least_rank=largest) for module in modules]


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
    beside: Sequence[str] = (),
    task: str | None = "CAUSAL_LM",
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
    beside, task
        As `Modules` has them.

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
    config = adapter_config(modules, base_model=base_model, beside=beside, task=task)
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
    end = module.rank * module.in_features * dtype.itemsize
    while position < end:
        data = as_bytes(torch.zeros(min(_CHUNK, (end - position) // dtype.itemsize), dtype=dtype))
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
    stored = [part for part in module.parts if part.b is not None]
    for first, count in gaps((run for part in stored for run in part.runs), module.out_features):
        for start in range(first, first + count, height):
            rows = min(height, first + count - start)
            write(start * width, as_bytes(torch.zeros(rows, module.rank, dtype=dtype)))
    left = 0
    for part in stored:
        assert part.b is not None
        for source, first, count in part.runs:
            for start in range(0, count, height):
                rows = min(height, count - start)
                numbers = chunk[: rows * part.rank].view(rows, part.rank)
                folder.blocks.read(part.b, (source + start) * part.rank, numbers)
                block = torch.zeros(rows, module.rank, dtype=torch.float32)
                block[:, left : left + part.rank] = numbers
                write((first + start) * width, as_bytes(cast_factors(block, dtype, module.name)))
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


def adapter_config(
    modules: Sequence[AdapterModule],
    *,
    base_model: str,
    beside: Sequence[str] = (),
    task: str | None = "CAUSAL_LM",
) -> dict[str, Any]:
    """Return the content of adapter_config.json.

    Every alpha equals its rank, so PEFT's scaling alpha / rank is 1 everywhere. `r` is the largest
    rank, and patterns name the modules of lower rank. The revision after the @ of a hub id has a
    key of its own, because loaders take `base_model` for a repository's name. `beside` are modules
    whose names end as those of the adapter do, and `task` is PEFT's type of task.
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
        "task_type": task,
        "inference_mode": True,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": smaller,
        "alpha_pattern": smaller,
        "target_modules": [module.name for module in modules],
        **({"exclude_modules": list(beside)} if beside else {}),
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
    "gaps",
    "same_rank",
    "write_adapter",
]
