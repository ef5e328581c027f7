"""A plan tells all that a merge will do. It is made from a recipe and headers alone."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lean_merge import memory
from lean_merge.checkpoints import (
    FLOATING,
    Checkpoint,
    open_checkpoint,
    open_expert,
)
from lean_merge.errors import CoverageError
from lean_merge.mapping import (
    Coverage,
    MappedWeight,
    map_roles,
)
from lean_merge.methods import Method
from lean_merge.outputs import Output, Request, output_of
from lean_merge.outputs.analysis import factors_on_disk
from lean_merge.outputs.gathered import FoundThreshold, Gathered
from lean_merge.outputs.recorded import Analysis
from lean_merge.plan import budget
from lean_merge.plan.footprint import Layout, Room, check_budget, share_room
from lean_merge.plan.gathering import EvidencePlan, decided, described
from lean_merge.plan.parameters import MethodTable, build_method
from lean_merge.plan.resources import Resources, limits_of, processors, resolve_device
from lean_merge.plan.scope import Scope, filter_weights, positions_of
from lean_merge.recipe import MergeRecipe
from lean_merge.sizes import format_size
from lean_merge.store import Shard, side_files
from lean_merge.tasks import CopyTask, WeightTask, tiles


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
    """All that `merge` will do. It is made from headers, and nothing is written yet."""

    recipe: MergeRecipe
    method: Method[Any]
    base: Checkpoint
    mllm: Checkpoint
    experts: tuple[Checkpoint, ...]
    coverage: Coverage
    scope: Scope
    output: Output
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
    prediction: Prediction
    notes: tuple[str, ...]
    evidence: EvidencePlan | None = None

    @property
    def inputs(self) -> tuple[Path, ...]:
        """The folders that are read, and the targets of links in them; none is ever written to."""
        checkpoints = (self.base, self.mllm, *self.experts)
        files = [file for checkpoint in checkpoints for file in checkpoint.files]
        return (
            *(checkpoint.path for checkpoint in checkpoints),
            *(file.resolve() for file in files if file.is_symlink()),
        )

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The output's weight files, as far as their layout is known before the run."""
        return self.output.shards

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

    @property
    def copies(self) -> tuple[CopyTask, ...]:
        """The tasks out of scope."""
        return tuple(task for task in self.tasks if isinstance(task, CopyTask))


def plan(
    recipe: MergeRecipe,
    resources: Resources | None = None,
    *,
    analysis: Analysis | None = None,
    output: type[Output] | None = None,
) -> Plan:
    """Read the headers of all checkpoints and lay out the whole merge.

    Parameters
    ----------
    recipe
        What is wanted.
    resources
        Device, memory and threads.
    analysis
        An analysis of the same inputs, from which weights are decided.
    output
        The kind of output; by default the one that the recipe names.

    Raises
    ------
    RecipeError
        A parameter, or the device, makes no sense, or the output cannot hold what is asked for.
    CheckpointError, CoverageError
        A checkpoint is damaged, or the roles do not share one foundation.
    BudgetError
        The memory given is too small; the message names the smallest that works.
    """
    evidence = None if analysis is None else EvidencePlan(analysis.gathered, analysis)
    return _plan(recipe, resources or Resources(), output or output_of(recipe.output), evidence)


def plan_again(
    recipe: MergeRecipe,
    gathered: Gathered,
    resources: Resources | None = None,
    *,
    choices: tuple[FoundThreshold, ...] = (),
) -> Plan:
    """Plan a merge from an analysis again, so that evidence is gathered anew in the same way.

    Parameters
    ----------
    recipe, resources
        As `plan` has them.
    gathered
        What the evidence depended on.
    choices
        The thresholds that were found, if there were any to find.
    """
    evidence = EvidencePlan(gathered, choices=choices)
    return _plan(recipe, resources or Resources(), output_of(recipe.output), evidence)


def _plan(
    recipe: MergeRecipe, resources: Resources, kind: type[Output], evidence: EvidencePlan | None
) -> Plan:
    kind.check(recipe)
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
    if evidence is not None:
        if evidence.source is not None:
            evidence.source.check_inputs(base, mllm, experts)
        by_weight, evidence = decided(by_weight, places, recipe, evidence)
    merged = tuple(_merged(coverage, scope))
    output = kind(Request(recipe, mllm, coverage.prefixes["mllm"], merged, by_weight))
    notes = [*output.notes]
    device, choice = resolve_device(resources.device)
    notes += choice
    threads = processors(resources.threads)
    device, limits, busy = limits_of(resources, device)
    notes += busy
    notes += described(evidence.anew) if evidence is not None else []
    layout = Layout(
        output=output,
        device=device,
        workers=min(threads, budget.LANES),
        memory=limits[0],
        vram=limits[1],
        held=memory.usage().anonymous
        + output.held_bytes
        + _decoding_bytes(mllm, min(threads, budget.LANES)),
        rounding=recipe.rounding,
    )
    parts = [part for weight in merged for part in weight.slices]
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
    tasks = _tasks(output, scope, layout, room)
    check_budget([task for task in tasks if isinstance(task, WeightTask)], layout)
    unpredicted = Plan(
        recipe=recipe,
        method=method,
        base=base,
        mllm=mllm,
        experts=experts,
        coverage=coverage,
        scope=scope,
        output=output,
        tasks=tasks,
        device=layout.device,
        memory=layout.memory,
        vram=layout.vram,
        threads=threads,
        workers=layout.workers,
        arena=room.arena,
        waiting=room.waiting,
        prediction=Prediction(layout.held + room.peak),
        notes=tuple(notes),
        evidence=evidence,
    )
    return dataclasses.replace(unpredicted, prediction=_predict(unpredicted, layout))


def _decoding_bytes(mllm: Checkpoint, workers: int) -> int:
    """Count the most bytes that it takes to write tensors out of scope that have scales.

    Each worker has a strip as it is stored, in float32 and rounded; at most eight's scales wait.
    """
    strip = kept = 0
    for name in mllm.encodings:
        matrices = mllm.decoded(mllm.tensors[name])
        kept = max(kept, sum(source.held for source in matrices))
        for source in matrices[:1]:
            out_features, in_features = source.shape
            rows = min(out_features, tiles.strip_rows(in_features, tiles.READ_ELEMENTS))
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


def _tasks(
    output: Output, scope: Scope, layout: Layout, room: Room
) -> tuple[CopyTask | WeightTask, ...]:
    """Give a task for each tensor, in the order of the bytes that are written, else of those read.

    A tensor of which no part is merged is copied, or left alone where nothing is copied.
    """
    merged = {weight.mllm.name: weight for weight in output.weights}
    ordered = [(0, name) for name in output.tensors]
    if output.shards:
        ordered = [
            (index, name)
            for index, shard in enumerate(output.shards)
            for name in sorted(shard.offsets, key=lambda n: shard.offsets[n])
        ]
    tasks: list[CopyTask | WeightTask] = []
    for index, name in ordered:
        weight = merged.get(name)
        if weight is not None:
            tasks.append(
                WeightTask(
                    index,
                    output.tensors[name],
                    weight,
                    resident=tuple(layout.resident(part) for part in weight.slices),
                    methods=tuple(output.methods.get(part.canonical) for part in weight.slices),
                    filtered=tuple(scope.reason(part) for part in weight.slices),
                    halves=tuple(
                        1 if part.canonical in room.beside else 2 for part in weight.slices
                    ),
                )
            )
        elif output.writes_rows:
            spec = output.mllm.tensors[name]
            decoded = output.mllm.decoded(spec)
            tasks.append(CopyTask(index, output.tensors[name], spec, decoded))
    return tuple(tasks)


def _merged(coverage: Coverage, scope: Scope) -> list[MappedWeight]:
    """List the tensors of which at least one part is not filtered out."""
    return [
        weight
        for weight in coverage.weights
        if any(not scope.reason(part) for part in weight.slices)
    ]


def _predict(plan: Plan, layout: Layout) -> Prediction:
    vram = 0
    usual = most = sum(layout.bytes_copied(task) for task in plan.copies)
    for task in plan.weights:
        for part, resident in zip(task.weight.slices, task.resident, strict=True):
            if not layout.on_cpu:
                kept = resident * layout.shape(part).resident_tile
                vram = max(vram, layout.fixed(part)[1] + kept)
        read = layout.bytes_read(task)
        usual, most = usual + read[0], most + read[1]
    disk = plan.output.bytes_on_disk
    if not plan.is_settled:
        disk += factors_on_disk(plan.output.weights, plan.output.methods)
    return Prediction(
        peak_memory=plan.prediction.peak_memory,
        peak_vram=vram,
        bytes_read=usual,
        most_read=most,
        bytes_written=plan.output.bytes_written,
        disk=disk,
        exact_writes=plan.output.exact,
    )
