"""Make a plan of everything that a merge will do from a recipe and its checkpoints' headers.

`_plan` has the steps in their order.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lean_merge.checkpoints import FLOATING, Checkpoint, by_role, open_checkpoint, open_expert
from lean_merge.checkpoints.elsewhere import FAR_FILES, Room, far_bytes
from lean_merge.checkpoints.identity import Opened
from lean_merge.checkpoints.sidefiles import with_side_files
from lean_merge.errors import CoverageError
from lean_merge.mapping import Coverage, LogicalWeight, map_roles
from lean_merge.methods import Method
from lean_merge.outputs import Output, RecordedEvidence, Request, evidence_kind, output_of
from lean_merge.outputs.gathered import FoundThreshold, Gathered
from lean_merge.plan.evidence import EvidencePlan, Methods, decide_from_evidence
from lean_merge.plan.fitting import Concurrency, Footprint, check_fits, concurrency, fit, long_work
from lean_merge.plan.parameters import build_method, methods_of
from lean_merge.plan.resources import Resources, resolve_resources
from lean_merge.plan.scope import Scope, filter_weights, positions_of
from lean_merge.recipe import MergeRecipe
from lean_merge.store import Shard
from lean_merge.tasks import CopyTask, WeightTask, tiles


@dataclass(frozen=True, slots=True)
class Prediction:
    """The bytes that a run will read, write, and hold at most.

    `bytes_read` is an estimate, and `most_read` the most that can be. They differ where rows do not
    stay in memory, because they are then read again in every pass of an analysis, and how many
    passes it takes depends on the data. `exact_writes` is False if `bytes_written` is an
    estimate, as for an adapter, whose ranks depend on the data.
    `looked` is what the early look at a sample reads before all that. `travels` is what comes from
    other machines, headers and the look included. `disk` is the most that the
    output takes while it is made, together with an analysis that it makes for itself.
    """

    peak_memory: int
    peak_vram: int = 0
    bytes_read: int = 0
    most_read: int = 0
    bytes_written: int = 0
    disk: int = 0
    exact_writes: bool = True
    looked: int = 0
    travels: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that `merge` will do. It is made from headers, and nothing is written yet."""

    recipe: MergeRecipe
    method: Method[Any]
    base: Checkpoint
    mllm: Checkpoint
    experts: tuple[Checkpoint, ...]
    parents: Mapping[int, Checkpoint]
    """The models that experts were tuned from, where it is not the base, by numbers from 1."""
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
    """Bytes of host memory for the tiles that stay in memory while their weights are analysed."""
    waiting: int
    """The number of updates that may wait to be stored while another weight is analysed."""
    arrivals: Room
    """The most bytes from other machines to hold at a time; none if all inputs are local."""
    prediction: Prediction
    notes: tuple[str, ...]
    sample: tuple[tuple[LogicalWeight, tuple[slice, ...]], ...] = ()
    """The weights, and their rows, of which the early look reads every role."""
    evidence: EvidencePlan | None = None

    @property
    def roles(self) -> dict[str, Checkpoint]:
        """Return all checkpoints by their roles."""
        return by_role(self.base, self.mllm, self.experts, self.parents)

    @property
    def inputs(self) -> tuple[Path, ...]:
        """Return the folders that are read, and the files that links in them lead to.

        Nothing is ever written there.
        """
        checkpoints = self.roles.values()
        files = [file for checkpoint in checkpoints for file in checkpoint.files]
        return (
            *(checkpoint.path for checkpoint in checkpoints),
            *(file.resolve() for file in files if file.is_symlink()),
        )

    @property
    def opened(self) -> dict[str, Opened]:
        """Return all that is read, by its role, with what was seen of its files."""
        source = None if self.evidence is None else self.evidence.source
        roles: dict[str, Opened] = {**self.roles}
        return roles if source is None else {**roles, "analysis": source}

    @property
    def seen(self) -> dict[Path, Mapping[str, Any]]:
        """Return what was seen of all files that are read."""
        return {file: entry for each in self.opened.values() for file, entry in each.seen.items()}

    @property
    def shards(self) -> tuple[Shard, ...]:
        """Return the output's weight files, as far as their layout is known before the run."""
        return self.output.shards

    @property
    def is_settled(self) -> bool:
        """Return whether every threshold is known before anything is merged."""
        return self.evidence is not None or all(
            method is None or method.is_settled for task in self.weights for method in task.methods
        )

    @property
    def weights(self) -> tuple[WeightTask, ...]:
        """Return the tasks in scope."""
        return tuple(task for task in self.tasks if isinstance(task, WeightTask))

    @property
    def copies(self) -> tuple[CopyTask, ...]:
        """Return the tasks out of scope."""
        return tuple(task for task in self.tasks if isinstance(task, CopyTask))


def plan(
    recipe: MergeRecipe,
    resources: Resources | None = None,
    *,
    analysis: RecordedEvidence | None = None,
    output: type[Output] | None = None,
    like: Plan | None = None,
) -> Plan:
    """Read the headers of all checkpoints and lay out the whole merge.

    Parameters
    ----------
    recipe
        What is to be merged, and how.
    resources
        The device, memory and threads that may be used.
    analysis
        An analysis of the same inputs, from whose evidence each weight is decided.
    output
        The kind of output; by default the one that the recipe names.
    like
        A plan of the same models. What it opened and mapped is not opened and mapped again.

    Raises
    ------
    RecipeError
        A parameter or the device makes no sense, or the output cannot hold what is asked for.
    CheckpointError, CoverageError
        A checkpoint is damaged, or the roles do not share one foundation.
    BudgetError
        The memory given is too small; the message names the smallest that works.
    """
    evidence = None if analysis is None else EvidencePlan(analysis.gathered, analysis)
    kind = output or output_of(recipe.output)
    return _plan(recipe, resources or Resources(), kind, evidence, like)


def plan_again(
    recipe: MergeRecipe,
    gathered: Gathered,
    resources: Resources | None = None,
    *,
    thresholds: tuple[FoundThreshold, ...] = (),
) -> Plan:
    """Plan a merge from an analysis again, without the analysis.

    Its evidence is gathered anew, in the way that `gathered` tells. `thresholds` are those
    that the analysis found, if there were any to find. Raises as `plan` does.
    """
    evidence = EvidencePlan(gathered, thresholds=thresholds)
    return _plan(recipe, resources or Resources(), output_of(recipe.output), evidence)


def _plan(
    recipe: MergeRecipe,
    resources: Resources,
    kind: type[Output],
    evidence: EvidencePlan | None,
    like: Plan | None = None,
) -> Plan:
    kind.check(recipe)
    method = build_method(recipe)

    # Open the checkpoints, and find the weights that correspond.
    if like is not None and _models(like.recipe) == _models(recipe):
        base, mllm, experts = like.base, like.mllm, like.experts
        parents, coverage = like.parents, like.coverage
    else:
        base, mllm, experts, parents, coverage = _mapped(recipe)

    # Choose what is merged, and how each weight is decided.
    positions = positions_of(coverage)
    scope = filter_weights(list(positions.values()), include=recipe.include, exclude=recipe.exclude)
    methods: Methods = methods_of(recipe, positions, scope)
    if evidence is not None:
        if evidence.source is not None:
            evidence.source.check_inputs(by_role(base, mllm, experts, parents))
        methods, evidence = decide_from_evidence(methods, positions, recipe, evidence)
    settled = evidence is not None or all(each.is_settled for each in methods.values())

    # Lay out what is written, and fit its weights into memory.
    prefix = coverage.prefixes.get("mllm", coverage.prefixes["base"])
    output = kind(Request(recipe, mllm, prefix, scope.merged(coverage), methods))
    # A GPU is worth its transfers only where matrices are multiplied.
    wanted = resources if method.multiplies else dataclasses.replace(resources, device="cpu")
    machine = resolve_resources(wanted)
    footprint, fallback = fit(output, machine)
    shared = concurrency(footprint)

    # List what is done for each tensor.
    tasks = _tasks(output, scope, footprint, shared)
    sample = _sample(output)
    check_fits(tasks, footprint)
    files = (file for each in by_role(base, mllm, experts, parents).values() for file in each.files)
    opened = sum(FAR_FILES[file].opened for file in files if file in FAR_FILES)
    return Plan(
        recipe=recipe,
        method=method,
        base=base,
        mllm=mllm,
        experts=experts,
        parents=parents,
        coverage=coverage,
        scope=scope,
        output=output,
        tasks=tasks,
        device=footprint.device,
        memory=footprint.memory,
        vram=footprint.vram,
        threads=machine.threads,
        workers=footprint.workers,
        arena=shared.arena,
        waiting=shared.waiting,
        arrivals=footprint.arrivals,
        prediction=_predict(
            tasks,
            footprint,
            shared,
            settled=settled,
            looked=_bytes_of(sample),
            travels=opened
            + (1 if settled else 2) * _bytes_of(sample, far=True)
            + _travels(output, tasks, settled=settled, disk=footprint.arrivals.disk),
        ),
        notes=(
            *output.notes,
            *_rules(methods),
            *machine.notes,
            *(evidence.notes if evidence is not None else ()),
            *fallback,
            *long_work(footprint),
        ),
        sample=sample,
        evidence=evidence,
    )


def _rules(methods: Methods) -> list[str]:
    """Sentences for people: how weights are merged that the recipe's method is not made for."""
    rules = Counter(method.rule for method in methods.values() if method.rule)
    return [f"{count} weights are no matrices of layers: {rule}" for rule, count in rules.items()]


def _models(recipe: MergeRecipe) -> tuple[Any, ...]:
    """Return what of a recipe decides which weights correspond."""
    experts = [(each.model, each.parent) for each in recipe.experts]
    rules = recipe.allow_partial, recipe.allow_text_mllm, recipe.name_rules(), recipe.scope
    return recipe.base_model, recipe.mllm_model, experts, *rules


def _mapped(
    recipe: MergeRecipe,
) -> tuple[Checkpoint, Checkpoint, tuple[Checkpoint, ...], Mapping[int, Checkpoint], Coverage]:
    """Open the base, the MLLM, the experts and their parents, and map their weights."""
    base = open_checkpoint(recipe.base_model)
    # Side files that cannot be copied are refused now, and not after the work is done.
    if recipe.mllm_model is None:
        base = mllm = with_side_files(base)
    else:
        mllm = with_side_files(open_checkpoint(recipe.mllm_model))
    experts = tuple(open_expert(expert.model) for expert in recipe.experts)
    numbered = enumerate(recipe.experts, 1)
    parents = {n: open_checkpoint(each.parent) for n, each in numbered if each.parent is not None}
    coverage = map_roles(
        base,
        mllm,
        experts,
        parents,
        allow_partial=recipe.allow_partial,
        allow_text_mllm=recipe.allow_text_mllm,
        names=recipe.name_rules(),
        scope=recipe.scope,
    )
    _check_numbers(coverage)
    return base, mllm, experts, parents, coverage


def _sample(output: Output) -> tuple[tuple[LogicalWeight, tuple[slice, ...]], ...]:
    """Choose what the early look reads of the weights that are merged."""
    parts = {
        part.canonical: part
        for weight in output.weights
        for part in weight.slices
        if part.is_matrix
    }
    chosen = [parts[name] for name in tiles.looked_at([*(parts.keys() & output.methods.keys())])]
    return tuple(
        (part, tiles.look_blocks(part.canonical, part.shape, together=part.in_columns))
        for part in chosen
    )


def _bytes_of(sample: Sequence[tuple[LogicalWeight, Sequence[slice]]], *, far: bool = False) -> int:
    """Return what the early look reads of all inputs, or only of those on other machines.

    From there, rows that are stored as columns come with all that lies between them.
    """
    found = 0
    for part, blocks in sample:
        for source in (each for role in part.roles for each in role.parts):
            if far and source.in_columns:
                found += far_bytes(source.extents)
            elif not far or far_bytes(source.stored):
                found += source.loaded + sum(source.nbytes(rows) for rows in blocks)
    return found


def _check_numbers(coverage: Coverage) -> None:
    """Raise CoverageError for an in-scope tensor without numbers that can be merged."""
    for source in (
        part
        for weight in coverage.weights
        for logical in weight.slices
        for role in logical.roles
        for part in role.parts
    ):
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
    output: Output, scope: Scope, footprint: Footprint, shared: Concurrency
) -> tuple[CopyTask | WeightTask, ...]:
    """Return the tasks in the order of the output's bytes or, without known files, of its tensors.

    A tensor of which nothing is merged is copied if the output holds whole tensors; else it has no
    task.
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
                    resident=tuple(footprint.resident(part) for part in weight.slices),
                    methods=tuple(output.methods.get(part.canonical) for part in weight.slices),
                    filtered=tuple(scope.reason(part) for part in weight.slices),
                    halves=tuple(
                        1 if part.canonical in shared.beside else 2 for part in weight.slices
                    ),
                )
            )
        elif output.writes_rows:
            spec = output.mllm.tensors[name]
            decoded = output.mllm.decoded(spec)
            tasks.append(CopyTask(index, output.tensors[name], spec, decoded))
    return tuple(tasks)


def _travels(
    output: Output, tasks: Sequence[CopyTask | WeightTask], *, settled: bool, disk: int
) -> int:
    """Return the bytes from other machines that tasks read, in each survey and search again."""
    found = surveyed = passes = 0
    for task in tasks:
        found += far_bytes(task.read(rows=output.writes_rows))
        for number, method in enumerate(task.methods if isinstance(task, WeightTask) else ()):
            assert isinstance(task, WeightTask)
            far = far_bytes(task.weight.extents_of(task.weight.slices[number].roles))
            survey = None if method is None else method.survey()
            passes = max(passes, survey.passes if survey else 0)
            surveyed += far * (survey is not None)
            found += far * (method is not None and not settled)
    # What the disk keeps of one survey need not come for what follows.
    return found + passes * (surveyed - min(surveyed, disk))


def _predict(
    tasks: Sequence[CopyTask | WeightTask],
    footprint: Footprint,
    shared: Concurrency,
    *,
    settled: bool,
    looked: int,
    travels: int,
) -> Prediction:
    usual = most = vram = 0
    for task in tasks:
        if isinstance(task, CopyTask):
            copied = footprint.bytes_copied(task)
            usual, most = usual + copied, most + copied
            continue
        read = footprint.bytes_read(task)
        usual, most = usual + read[0], most + read[1]
        if not footprint.on_cpu:
            for part in task.weight.slices:
                vram = max(vram, footprint.fixed(part)[1] + footprint.kept(part))
    output = footprint.output
    disk = output.bytes_on_disk
    if not settled and not isinstance(output, evidence_kind()):
        disk += evidence_kind()(output.request).bytes_on_disk
    return Prediction(
        peak_memory=footprint.held + shared.peak,
        peak_vram=vram,
        bytes_read=usual,
        most_read=most,
        bytes_written=output.bytes_written,
        disk=disk,
        exact_writes=output.exact,
        looked=looked,
        travels=travels,
    )
