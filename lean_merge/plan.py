"""From a recipe and headers alone to everything that will happen: tasks, layout, bytes, memory."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lean_merge import budget, memory
from lean_merge.checkpoints import (
    FLOATING,
    Checkpoint,
    Coverage,
    MappedWeight,
    TensorSpec,
    common_dtype,
    map_roles,
    open_checkpoint,
    safetensors_dtype,
    torch_dtype,
)
from lean_merge.errors import BudgetError, CoverageError, RecipeError, shown
from lean_merge.methods import AnalysisCost, Method, all_methods, canonical_name
from lean_merge.output import OutputTensor, Shard, plan_shards, side_files
from lean_merge.recipe import MergeRecipe, reject_unknown


@dataclass(frozen=True, slots=True)
class Resources:
    """What the merge may use; decides speed, never the numbers.

    Parameters
    ----------
    device : str
        `auto`, `cpu`, `cuda`, `cuda:N`, or another torch device.
    memory, vram : int, optional
        Ceilings in bytes; by default half of what is available.
    threads : int, optional
        By default the processors this process may use.
    """

    device: str = "auto"
    memory: int | None = None
    vram: int | None = None
    threads: int | None = None


@dataclass(frozen=True, slots=True)
class CopyTask:
    """A tensor out of scope: its bytes go over as they are."""

    shard: int
    tensor: OutputTensor
    source: TensorSpec


@dataclass(frozen=True, slots=True)
class WeightTask:
    """An in-scope tensor; `resident` tells for each logical weight how many tiles are kept."""

    shard: int
    tensor: OutputTensor
    weight: MappedWeight
    resident: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Prediction:
    """Bytes that the run will read, write, and hold at most.

    `exact_reads` is False where weights are read again for every pass of an analysis whose number
    of passes depends on the data; `bytes_read` is then the most that can be.
    """

    peak_memory: int
    peak_vram: int
    bytes_read: int
    bytes_written: int
    disk: int
    exact_reads: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that `merge` will do; made from headers, so nothing is written yet."""

    recipe: MergeRecipe
    method: Method[Any]
    base: Checkpoint
    mllm: Checkpoint
    experts: tuple[Checkpoint, ...]
    coverage: Coverage
    shards: tuple[Shard, ...]
    tasks: tuple[CopyTask | WeightTask, ...]
    device: str
    memory: int
    vram: int
    threads: int
    workers: int
    prediction: Prediction
    notes: tuple[str, ...]

    @property
    def inputs(self) -> tuple[Path, ...]:
        """Folders or files that are read, and never written to."""
        return tuple(checkpoint.path for checkpoint in (self.base, self.mllm, *self.experts))

    @property
    def weights(self) -> tuple[WeightTask, ...]:
        """The tasks in scope."""
        return tuple(task for task in self.tasks if isinstance(task, WeightTask))

    @property
    def copies(self) -> tuple[CopyTask, ...]:
        """The tasks out of scope."""
        return tuple(task for task in self.tasks if isinstance(task, CopyTask))


def build_method(recipe: MergeRecipe) -> Method[Any]:
    """The recipe's method with its parameters, checked. Raises RecipeError."""
    methods = all_methods()
    name = canonical_name(recipe.merge_method)
    reject_unknown([name], methods, "merge_method")
    fields = {f.name: f for f in methods[name].parameter_fields()}
    own = [n for n, f in fields.items() if f.metadata.get("per_expert")]
    reject_unknown(dict(recipe.parameters), fields, f"parameters of {name}")
    for expert in recipe.experts:
        reject_unknown(dict(expert.parameters), own, f"parameters of an expert of {name}")
    try:
        return methods[name](
            [
                methods[name].parameters_type(
                    **_typed({**dict(recipe.parameters), **dict(expert.parameters)}, fields)
                )
                for expert in recipe.experts
            ]
        )
    except TypeError as error:
        raise RecipeError(f"The parameters of {name} make no sense: {error}.") from error


def _typed(
    values: Mapping[str, Any], fields: Mapping[str, dataclasses.Field[Any]]
) -> dict[str, Any]:
    """YAML's and the command line's looser types made those of the parameters' defaults."""
    typed = {}
    for name, value in values.items():
        default = fields[name].default
        if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value) if abs(value) < 2**64 else math.inf
        elif isinstance(default, tuple) and isinstance(value, str):
            value = tuple(part.strip() for part in value.split(",") if part.strip())
        elif isinstance(default, tuple) and isinstance(value, list):
            value = tuple(value)
        if type(value) is not type(default) and name != "rank":
            raise RecipeError(f"{name} must be a {type(default).__name__}, not {shown(value)}.")
        typed[name] = value
    return typed


def plan(recipe: MergeRecipe, resources: Resources | None = None) -> Plan:
    """Read the headers of all checkpoints and lay out the whole merge.

    Raises
    ------
    RecipeError
        A parameter, or the device, makes no sense.
    CheckpointError, CoverageError
        A checkpoint is damaged, or the roles do not share one foundation.
    BudgetError
        The memory given is too small; the message names the smallest that works.
    """
    resources = resources or Resources()
    method = build_method(recipe)
    base = open_checkpoint(recipe.base_model)
    mllm = open_checkpoint(recipe.mllm_model)
    experts = tuple(open_checkpoint(expert.model) for expert in recipe.experts)
    # Refused now rather than when they are copied, after the work is done.
    side_files(mllm.path)
    coverage = map_roles(base, mllm, experts, allow_partial=recipe.allow_partial)
    for weight in coverage.weights:
        _check_arithmetic(weight)
    outputs = _outputs(recipe, mllm, coverage)
    shards = plan_shards(list(outputs.values()), shard_size=recipe.shard_size)
    device, notes = resolve_device(resources.device)
    threads = _threads(resources.threads)
    limits = _limits(resources, device)
    held = memory.usage().anonymous
    layout = _Layout(method, device, min(threads, budget.LANES), *limits, held)
    _check_budget(coverage, layout)
    tasks = _tasks(mllm, coverage, outputs, shards, layout)
    return Plan(
        recipe=recipe,
        method=method,
        base=base,
        mllm=mllm,
        experts=experts,
        coverage=coverage,
        shards=shards,
        tasks=tasks,
        device=device,
        memory=limits[0],
        vram=limits[1],
        threads=threads,
        workers=layout.workers,
        prediction=_predict(tasks, shards, layout),
        notes=tuple(notes),
    )


def _check_arithmetic(weight: MappedWeight) -> None:
    for spec in (weight.mllm, weight.base, *weight.experts):
        if 0 in spec.shape:
            raise CoverageError(
                f"{spec.file}: in-scope tensor {spec.name} has shape {list(spec.shape)}, no "
                "numbers at all; restore the file from its source."
            )
        if spec.dtype not in FLOATING:
            raise CoverageError(
                f"{spec.file}: in-scope tensor {spec.name} is stored as {spec.dtype}, which cannot "
                "be merged; convert the checkpoint to bfloat16, float16 or float32 first."
            )


def _outputs(recipe: MergeRecipe, mllm: Checkpoint, coverage: Coverage) -> dict[str, OutputTensor]:
    """The MLLM's tensors, in its order, with the dtypes that are written."""
    in_scope = {weight.mllm.name for weight in coverage.weights}
    outputs = {}
    for name, spec in mllm.tensors.items():
        dtype, size = spec.dtype, spec.nbytes
        if name in in_scope and recipe.out_dtype != "auto":
            chosen = getattr(torch, recipe.out_dtype)
            dtype = safetensors_dtype(chosen)
            size = spec.nbytes // torch_dtype(spec.dtype).itemsize * chosen.itemsize
        outputs[name] = OutputTensor(name, dtype, spec.shape, size)
    return outputs


def resolve_device(wanted: str) -> tuple[str, list[str]]:
    """The torch device to compute on, and a note if it is not tested. Raises RecipeError."""
    if wanted == "auto":
        return ("cuda" if torch.cuda.is_available() else "cpu"), []
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise RecipeError(f"{wanted!r} is not a torch device; use auto, cpu or cuda:N.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RecipeError("No CUDA device is available; use --device cpu.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RecipeError(
            f"{wanted} does not exist; there are {torch.cuda.device_count()} devices."
        )
    notes = []
    if device.type not in ("cpu", "cuda"):
        notes.append(f"device {wanted} is untested; compare a few weights with --device cpu")
    return wanted, notes


def _threads(wanted: int | None) -> int:
    if wanted is not None:
        if wanted < 1:
            raise RecipeError(f"threads must be 1 or more, not {wanted}.")
        return wanted
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _limits(resources: Resources, device: str) -> tuple[int, int]:
    held = memory.usage().anonymous
    ceiling = resources.memory or held + memory.available() // 2
    if torch.device(device).type == "cuda":
        free = torch.cuda.mem_get_info(torch.device(device))[0]
        return ceiling, resources.vram or free // 2
    return ceiling, resources.vram or 0


def arithmetic_dtype(task: torch.dtype, device: str) -> torch.dtype:
    """Dtype of products: bfloat16 where the task vectors are and the machine is fast at it."""
    if task is not torch.bfloat16:
        return torch.float32
    if torch.device(device).type == "cuda":
        modern = torch.cuda.get_device_capability(torch.device(device)) >= (8, 0)
        return task if modern else torch.float32
    if torch.device(device).type == "cpu":
        native = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
        return task if native is not None and native() else torch.float32
    return torch.float32


@dataclass(frozen=True, slots=True)
class _Layout:
    """How a weight's memory is laid out, and with that what it costs."""

    method: Method[Any]
    device: str
    workers: int
    memory: int
    vram: int
    held: int
    """Anonymous bytes of the process before the merge."""

    def shape(self, weight: MappedWeight, rows: int) -> budget.WeightShape:
        specs = (weight.base, weight.mllm, *weight.experts)
        stored = [torch_dtype(spec.dtype) for spec in specs]
        task = common_dtype(spec.dtype for spec in specs)
        return budget.WeightShape(
            out_features=rows,
            in_features=weight.base.shape[1],
            roles=1 + len(weight.experts),
            stored_item=max(dtype.itemsize for dtype in stored),
            task_item=task.itemsize,
            arithmetic_item=arithmetic_dtype(task, self.device).itemsize,
        )

    @property
    def on_cpu(self) -> bool:
        return torch.device(self.device).type == "cpu"

    def cost(self, shape: budget.WeightShape) -> AnalysisCost:
        """What the method's analysis of such a weight costs at most."""
        return self.method.cost((shape.out_features, shape.in_features), item=shape.arithmetic_item)

    def fixed(self, shape: budget.WeightShape) -> tuple[int, int]:
        """Bytes on the host and on the device with no tile resident."""
        cost = self.cost(shape)
        if self.on_cpu:
            host = budget.host_bytes(
                shape, widest=cost.widest, workspace=cost.workspace, workers=self.workers
            )
            return host, 0
        # The small problems, and copies of vectors for them, are the CPU's on any device.
        host = budget.host_bytes(shape, widest=0, workspace=cost.workspace, workers=self.workers)
        device = budget.device_bytes(
            shape, widest=cost.widest, workspace=cost.workspace, workers=self.workers
        )
        return host, device

    def needs(self, weight: MappedWeight, rows: int) -> tuple[int, int]:
        """Bytes on host and device without which the weight cannot be merged."""
        host, device = self.fixed(self.shape(weight, rows))
        return self.held + host, device

    def resident(self, weight: MappedWeight, rows: int) -> int:
        """Tiles to keep in what the weight's needs leave free."""
        shape = self.shape(weight, rows)
        cost = self.cost(shape)
        host, device = self.needs(weight, rows)
        if cost.passes == 0:
            return 0
        if self.on_cpu:
            return budget.resident_tiles(shape, self.memory - host)
        return budget.resident_tiles(shape, self.vram - device) if self.vram else shape.tiles

    def bytes_read(self, task: WeightTask) -> tuple[int, bool]:
        """Most bytes that the task reads, and whether it is exactly that many."""
        weight, total, exact = task.weight, 0, True
        others = (weight.mllm, *weight.experts)
        item = {spec: spec.nbytes // spec.shape[0] for spec in (weight.base, *others)}
        whole = self.method.reads_task_vectors()
        for rows, resident in zip(task.weight.slices, task.resident, strict=True):
            shape = self.shape(weight, rows.stop - rows.start)
            cost = self.cost(shape)
            kept = min(shape.out_features, resident * budget.tile_rows(shape.in_features))
            again = shape.out_features - kept
            all_rows = item[weight.base] + sum(item[spec] for spec in others)
            if cost.passes:
                total += all_rows * (kept + again * cost.passes)
                exact = exact and again == 0
            total += item[weight.mllm] * shape.out_features
            if any(whole):
                wanted = sum(item[spec] for spec, add in zip(others, whole, strict=True) if add)
                total += (item[weight.base] + wanted) * again
                exact = exact and (cost.passes == 0 or again == 0)
        return total, exact


def _check_budget(coverage: Coverage, layout: _Layout) -> None:
    """Raise BudgetError, with the smallest that works for all weights, if one does not fit."""
    needs = [
        (*layout.needs(weight, rows.stop - rows.start), weight.mllm)
        for weight in coverage.weights
        for rows in weight.slices
    ]
    host, _, largest = max(needs, key=lambda need: need[0])
    name = f"{largest.name} {list(largest.shape)}"
    budget.check_fits(host, layout.memory, what="Memory", flag="--memory", name=name)
    if not layout.on_cpu and layout.vram:
        _, device, largest = max(needs, key=lambda need: need[1])
        name = f"{largest.name} {list(largest.shape)}"
        budget.check_fits(device, layout.vram, what="Device memory", flag="--vram", name=name)


def _tasks(
    mllm: Checkpoint,
    coverage: Coverage,
    outputs: Mapping[str, OutputTensor],
    shards: tuple[Shard, ...],
    layout: _Layout,
) -> tuple[CopyTask | WeightTask, ...]:
    """One task an output tensor, in the order of the bytes that are written."""
    in_scope = {weight.mllm.name: weight for weight in coverage.weights}
    tasks: list[CopyTask | WeightTask] = []
    for index, shard in enumerate(shards):
        for name in sorted(shard.offsets, key=lambda n: shard.offsets[n]):
            weight = in_scope.get(name)
            if weight is None:
                tasks.append(CopyTask(index, outputs[name], mllm.tensors[name]))
                continue
            resident = tuple(layout.resident(weight, s.stop - s.start) for s in weight.slices)
            tasks.append(WeightTask(index, outputs[name], weight, resident))
    return tuple(tasks)


def _predict(
    tasks: tuple[CopyTask | WeightTask, ...], shards: tuple[Shard, ...], layout: _Layout
) -> Prediction:
    host = vram = read = 0
    exact = True
    for task in tasks:
        if isinstance(task, CopyTask):
            read += task.source.nbytes
            continue
        for rows, resident in zip(task.weight.slices, task.resident, strict=True):
            shape = layout.shape(task.weight, rows.stop - rows.start)
            on_host, on_device = layout.fixed(shape)
            kept = resident * shape.resident_tile
            host = max(host, on_host + (kept if layout.on_cpu else 0))
            vram = max(vram, on_device + (0 if layout.on_cpu else kept))
        most, known = layout.bytes_read(task)
        read, exact = read + most, exact and known
    written = sum(shard.size for shard in shards)
    return Prediction(
        peak_memory=layout.held + host,
        peak_vram=vram,
        bytes_read=read,
        bytes_written=written,
        disk=written,
        exact_reads=exact,
    )


__all__ = [
    "BudgetError",
    "CopyTask",
    "Plan",
    "Prediction",
    "Resources",
    "WeightTask",
    "arithmetic_dtype",
    "build_method",
    "plan",
    "resolve_device",
]
