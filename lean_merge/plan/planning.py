"""From a recipe and headers alone to everything that will happen: tasks, layout, bytes, memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lean_merge import memory
from lean_merge.checkpoints import (
    FLOATING,
    Checkpoint,
    open_checkpoint,
    open_expert,
    safetensors_dtype,
    torch_dtype,
)
from lean_merge.errors import CoverageError, RecipeError
from lean_merge.mapping import (
    Coverage,
    MappedWeight,
    decoded_matrices,
    map_roles,
    module_name,
)
from lean_merge.methods import Method
from lean_merge.outputs.gathered import FoundThreshold, Gathered
from lean_merge.outputs.peft import AdapterModule, StoredFactors
from lean_merge.plan import budget
from lean_merge.plan.disk import adapter_disk, evidence_disk
from lean_merge.plan.footprint import Layout, Room, check_budget, share_room
from lean_merge.plan.gathering import (
    EvidencePlan,
    Recorded,
    decided,
    described,
    watching,
)
from lean_merge.plan.parameters import MethodTable, build_method
from lean_merge.plan.resources import Resources, limits_of, processors, resolve_device
from lean_merge.plan.scope import Scope, filter_weights, positions_of
from lean_merge.recipe import MergeRecipe
from lean_merge.sizes import format_size
from lean_merge.store import (
    OutputTensor,
    Shard,
    missing_from_cache,
    plan_shards,
    side_files,
)
from lean_merge.tasks import CopyTask, WeightTask
from lean_merge.tasks.tiles import READ_ELEMENTS, strip_rows

ANALYSIS = "analysis"
"""The output of a plan that only gathers evidence."""
DECODED_DTYPE = torch.bfloat16
"""What weights that are stored with scales are written in unless the recipe says otherwise."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """Bytes that the run will read, write, and hold at most.

    `bytes_read` is an estimate, and `most_read` the most that can be. They differ where rows do not
    stay in memory, because they are then read again in every pass of an analysis, and how many
    passes it takes depends on the data. `exact_writes` is False for an adapter, whose ranks depend
    on the data. `disk` is the most that the output takes while it is made, together with an
    analysis that it makes for itself.
    """

    peak_memory: int
    peak_vram: int = 0
    bytes_read: int = 0
    most_read: int = 0
    bytes_written: int = 0
    disk: int = 0
    exact_writes: bool = True


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that `merge` will do; made from headers, so nothing is written yet."""

    recipe: MergeRecipe
    method: Method[Any]
    base: Checkpoint
    mllm: Checkpoint
    experts: tuple[Checkpoint, ...]
    coverage: Coverage
    scope: Scope
    shards: tuple[Shard, ...]
    tasks: tuple[CopyTask | WeightTask, ...]
    device: str
    memory: int
    vram: int
    threads: int
    workers: int
    arena: int
    """Bytes on the host for tiles that stay, of all weights that are analysed at a time."""
    waiting: int
    """How many updates may wait to be stored while another weight is analysed."""
    writes_rows: bool
    """Whether the MLLM's rows are read once more, to be written, and other tensors copied."""
    prediction: Prediction
    notes: tuple[str, ...]
    evidence: EvidencePlan | None = None

    @property
    def inputs(self) -> tuple[Path, ...]:
        """Folders that are read, and where links in them lead to, which are never written to."""
        checkpoints = (self.base, self.mllm, *self.experts)
        files = [file for checkpoint in checkpoints for file in checkpoint.files]
        return (
            *(checkpoint.path for checkpoint in checkpoints),
            *(file.resolve() for file in files if file.is_symlink()),
        )

    @property
    def is_settled(self) -> bool:
        """Whether no threshold is to be found before anything is merged."""
        return self.evidence is not None or all(
            method is None or method.is_settled for task in self.weights for method in task.methods
        )

    @property
    def weights(self) -> tuple[WeightTask, ...]:
        """The tasks in scope."""
        return tuple(task for task in self.tasks if isinstance(task, WeightTask))

    def adapter_module(self, task: WeightTask, parts: tuple[StoredFactors, ...]) -> AdapterModule:
        """The module of an in-scope tensor, named as transformers loads it."""
        prefix = self.coverage.prefixes["mllm"]
        name = module_name(task.tensor.name, prefix=prefix, config=self.mllm.config)
        return AdapterModule(name, task.weight.mllm.shape[1], parts)

    @property
    def adapter_dtype(self) -> torch.dtype:
        """Of an adapter's factors."""
        wanted = self.recipe.out_dtype
        return torch.float32 if wanted == "auto" else _dtype_named(wanted)

    @property
    def copies(self) -> tuple[CopyTask, ...]:
        """The tasks out of scope."""
        return tuple(task for task in self.tasks if isinstance(task, CopyTask))


def plan(
    recipe: MergeRecipe,
    resources: Resources | None = None,
    *,
    analysis: Recorded | None = None,
) -> Plan:
    """Read the headers of all checkpoints and lay out the whole merge.

    An adapter's files are laid out once its ranks are known, so `Plan.shards` is empty; so it is
    where nothing is written. With an `analysis` of the same inputs, weights are decided from it.

    Raises
    ------
    RecipeError
        A parameter, or the device, makes no sense.
    CheckpointError, CoverageError
        A checkpoint is damaged, or the roles do not share one foundation.
    BudgetError
        The memory given is too small; the message names the smallest that works.
    """
    evidence = None if analysis is None else EvidencePlan(analysis.gathered, analysis)
    return _plan(recipe, resources or Resources(), recipe.output, evidence)


def plan_again(
    recipe: MergeRecipe,
    gathered: Gathered,
    resources: Resources | None = None,
    *,
    choices: tuple[FoundThreshold, ...] = (),
) -> Plan:
    """The plan of a merge from an analysis, which gathers its evidence anew in the same way.

    `choices` are the thresholds that it found, if there were any to find.
    """
    evidence = EvidencePlan(gathered, choices=choices)
    return _plan(recipe, resources or Resources(), recipe.output, evidence)


def plan_analysis(recipe: MergeRecipe, resources: Resources | None = None) -> Plan:
    """The plan of an analysis, which writes no weights.

    Raises as `plan`; RecipeError too for a method that has nothing to analyse.
    """
    evidence = EvidencePlan(Gathered.by(recipe))
    return _plan(recipe, resources or Resources(), ANALYSIS, evidence)


def plan_stream(recipe: MergeRecipe, resources: Resources | None = None) -> Plan:
    """The same for whole tensors in memory, one after the other in the order of the MLLM's files.

    Raises as `plan`; RecipeError too for a recipe of another output.
    """
    if recipe.output != "checkpoint":
        raise RecipeError(
            f"A stream gives whole tensors, and the recipe asks for output {recipe.output}; leave "
            "output out."
        )
    return _plan(recipe, resources or Resources(), "stream")


def _plan(
    recipe: MergeRecipe, resources: Resources, output: str, evidence: EvidencePlan | None = None
) -> Plan:
    method = build_method(recipe)
    base = open_checkpoint(recipe.base_model)
    mllm = open_checkpoint(recipe.mllm_model)
    experts = tuple(open_expert(expert.model) for expert in recipe.experts)
    # Refused now rather than when they are copied, after the work is done.
    side_files(mllm.path)
    coverage = map_roles(
        base, mllm, experts, allow_partial=recipe.allow_partial, names=recipe.name_rules()
    )
    for weight in coverage.weights:
        _check_arithmetic(weight)
    places = positions_of(coverage)
    scope = filter_weights(list(places.values()), include=recipe.include, exclude=recipe.exclude)
    methods = MethodTable(recipe)
    methods.check_filters(list(places.values()))
    by_weight = {
        name: methods.at(place) for name, place in places.items() if name not in scope.filtered
    }
    if output == ANALYSIS:
        by_weight = watching(by_weight)
    elif evidence is not None:
        if evidence.source is not None:
            evidence.source.check_inputs(base, mllm, experts)
        by_weight, evidence = decided(by_weight, places, recipe, evidence)
    elif output == "stream" and not all(each.is_settled for each in by_weight.values()):
        raise RecipeError("A stream finds no threshold of its own; give one instead of auto.")
    outputs = _outputs(recipe, mllm, _merged(coverage, scope))
    shards: tuple[Shard, ...] = ()
    notes: list[str] = []
    if output == "checkpoint":
        shards = plan_shards(list(outputs.values()), shard_size=recipe.shard_size)
        notes += missing_from_cache(mllm)
    if output == "lora":
        _check_low_rank(_merged(coverage, scope), by_weight)
    device, choice = resolve_device(resources.device)
    notes += choice
    threads = processors(resources.threads)
    device, limits, busy = limits_of(resources, device)
    notes += busy
    notes += described(evidence.anew) if evidence is not None else []
    largest = max((tensor.nbytes for tensor in outputs.values()), default=0)
    layout = Layout(
        methods=by_weight,
        output=output,
        device=device,
        workers=min(threads, budget.LANES),
        memory=limits[0],
        vram=limits[1],
        held=memory.usage().anonymous
        + (largest if output == "stream" else 0)
        + _decoding_bytes(mllm, min(threads, budget.LANES)),
        rounding=recipe.rounding,
    )
    parts = [part for weight in _merged(coverage, scope) for part in weight.slices]
    needed = max((layout.needs(part)[1] for part in parts), default=0)
    if resources.device == "auto" and resources.vram is None and 0 < layout.vram < needed:
        notes.append(
            f"{device} has {format_size(layout.vram)} to spare and {format_size(needed)} are "
            "needed, so the CPU is used; --device and --vram ask for it all the same"
        )
        layout = dataclasses.replace(layout, device="cpu", vram=0)
    layout = dataclasses.replace(
        layout,
        held=layout.held + layout.feeding(parts),
        most=max((layout.fixed(part)[0] for part in parts), default=0),
    )
    room = share_room(parts, layout)
    tasks = _tasks(mllm, coverage, scope, outputs, shards, layout, room)
    check_budget([task for task in tasks if isinstance(task, WeightTask)], layout)
    unpredicted = Plan(
        recipe=recipe,
        method=method,
        base=base,
        mllm=mllm,
        experts=experts,
        coverage=coverage,
        scope=scope,
        shards=shards,
        tasks=tasks,
        device=layout.device,
        memory=layout.memory,
        vram=layout.vram,
        threads=threads,
        workers=layout.workers,
        arena=room.arena,
        waiting=room.waiting,
        writes_rows=layout.writes_rows,
        prediction=Prediction(layout.held + room.peak),
        notes=tuple(notes),
        evidence=evidence,
    )
    written, disk = _written(unpredicted, output)
    return dataclasses.replace(unpredicted, prediction=_predict(unpredicted, layout, written, disk))


def _decoding_bytes(mllm: Checkpoint, workers: int) -> int:
    """Most bytes that it takes to write tensors out of scope that are stored with scales.

    Each worker has a strip as it is stored, in float32 and rounded; at most eight's scales wait.
    """
    strip = kept = 0
    for name in mllm.scales:
        matrices = decoded_matrices(mllm, mllm.tensors[name])
        kept = max(kept, sum(source.held for source in matrices))
        for source in matrices[:1]:
            out_features, in_features = source.shape
            rows = min(out_features, strip_rows(in_features, READ_ELEMENTS))
            strip = max(strip, source.scratch(rows) + 8 * rows * in_features)
    return workers * strip + 8 * kept


def _check_arithmetic(weight: MappedWeight) -> None:
    for source in (source for rows in weight.slices for source in rows.roles):
        if 0 in source.shape:
            raise CoverageError(
                f"{source.file}: in-scope tensor {source.name} has shape {list(source.shape)}, no "
                "numbers at all; restore the file from its source."
            )
        if source.dtype not in FLOATING:
            raise CoverageError(
                f"{source.file}: in-scope tensor {source.name} is stored as {source.dtype}, which "
                "cannot be merged; convert the checkpoint to bfloat16, float16 or float32 first."
            )


def _outputs(
    recipe: MergeRecipe, mllm: Checkpoint, merged: Sequence[MappedWeight]
) -> dict[str, OutputTensor]:
    """The MLLM's tensors, in its order, with the dtypes that are written."""
    in_scope = {weight.mllm.name for weight in merged}
    outputs = {}
    for name, spec in mllm.tensors.items():
        dtype, size = spec.dtype, spec.nbytes
        chosen: torch.dtype | None = None
        if recipe.out_dtype != "auto" and (name in in_scope or name in mllm.scales):
            chosen = _dtype_named(recipe.out_dtype)
        elif name in mllm.scales:
            chosen = DECODED_DTYPE
        if chosen is not None:
            dtype = safetensors_dtype(chosen)
            size = spec.nbytes // torch_dtype(spec.dtype).itemsize * chosen.itemsize
        outputs[name] = OutputTensor(name, dtype, spec.shape, size)
    return outputs


def _dtype_named(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _tasks(
    mllm: Checkpoint,
    coverage: Coverage,
    scope: Scope,
    outputs: Mapping[str, OutputTensor],
    shards: tuple[Shard, ...],
    layout: Layout,
    room: Room,
) -> tuple[CopyTask | WeightTask, ...]:
    """One task a tensor, in the order of the bytes that are written, else of those read.

    A tensor of which no part is merged is copied, or left alone where nothing is copied.
    """
    merged = {weight.mllm.name: weight for weight in _merged(coverage, scope)}
    ordered = [(0, name) for name in outputs]
    if shards:
        ordered = [
            (index, name)
            for index, shard in enumerate(shards)
            for name in sorted(shard.offsets, key=lambda n: shard.offsets[n])
        ]
    tasks: list[CopyTask | WeightTask] = []
    for index, name in ordered:
        weight = merged.get(name)
        if weight is not None:
            tasks.append(
                WeightTask(
                    index,
                    outputs[name],
                    weight,
                    resident=tuple(layout.resident(part) for part in weight.slices),
                    methods=tuple(layout.methods.get(part.canonical) for part in weight.slices),
                    filtered=tuple(scope.reason(part) for part in weight.slices),
                    halves=tuple(
                        1 if part.canonical in room.beside else 2 for part in weight.slices
                    ),
                )
            )
        elif layout.writes_rows:
            spec = mllm.tensors[name]
            tasks.append(CopyTask(index, outputs[name], spec, decoded_matrices(mllm, spec)))
    return tuple(tasks)


def _merged(coverage: Coverage, scope: Scope) -> list[MappedWeight]:
    """The tensors of which at least one part is not filtered out."""
    return [
        weight
        for weight in coverage.weights
        if any(not scope.reason(part) for part in weight.slices)
    ]


def _check_low_rank(weights: Sequence[MappedWeight], methods: Mapping[str, Method[Any]]) -> None:
    """Raise RecipeError for an update that no adapter holds."""
    for weight in weights:
        if ".experts." in weight.mllm.name or len(weight.mllm.shape) != 2:
            raise RecipeError(
                f"An adapter cannot hold {weight.mllm.name}: transformers stacks the experts of a "
                "mixture when it loads them, each with a rank of its own. Leave them out with "
                "--exclude experts, or write a checkpoint."
            )
        for part in weight.slices:
            method = methods.get(part.canonical)
            if method is not None and any(method.reads_task_vectors()):
                raise RecipeError(
                    f"The update of {part.canonical} has full rank, which no adapter holds: "
                    f"{method.name} adds whole task vectors. Use ip_merging with project among its "
                    "stages, or --output checkpoint."
                )


def _predict(plan: Plan, layout: Layout, written: int, disk: int) -> Prediction:
    vram = 0
    usual = most = sum(layout.bytes_copied(task) for task in plan.copies)
    for task in plan.weights:
        for part, resident in zip(task.weight.slices, task.resident, strict=True):
            if not layout.on_cpu:
                kept = resident * layout.shape(part).resident_tile
                vram = max(vram, layout.fixed(part)[1] + kept)
        read = layout.bytes_read(task)
        usual, most = usual + read[0], most + read[1]
    return Prediction(
        peak_memory=plan.prediction.peak_memory,
        peak_vram=vram,
        bytes_read=usual,
        most_read=most,
        bytes_written=written,
        disk=disk,
        exact_writes=layout.output not in ("lora", ANALYSIS),
    )


def _written(plan: Plan, output: str) -> tuple[int, int]:
    """Most bytes of the weight files, and most bytes that all takes of the disk meanwhile."""
    if output == ANALYSIS:
        return evidence_disk(plan.weights)
    written = disk = sum(shard.size for shard in plan.shards)
    if output == "lora":
        written, disk = _adapter_disk(plan)
    if not plan.is_settled:
        disk += evidence_disk(plan.weights)[1]
    return written, disk


def _adapter_disk(plan: Plan) -> tuple[int, int]:
    """The same for an adapter, whose ranks are the recipe's at most, if that is a number."""
    rank, modules = plan.recipe.lora_rank, []
    for task in plan.weights:
        parts = []
        for part, method in zip(task.weight.slices, task.methods, strict=True):
            largest = method.largest_rank(part.shape) if method else 0
            if isinstance(rank, int):
                largest = min(largest, rank)
            parts.append(StoredFactors(part.row_runs, largest))
        modules.append(plan.adapter_module(task, tuple(parts)))
    return adapter_disk(modules, plan.adapter_dtype)
