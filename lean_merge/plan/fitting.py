"""Fit weights into memory: choose what stays resident, and what is analysed at the same time.

The choice follows from headers, the methods' costs and the formulas. No result depends on it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from lean_merge import memory
from lean_merge.checkpoints import Checkpoint, WeightSource, torch_dtype
from lean_merge.checkpoints.elsewhere import FAR_FILES, ON_THE_WAY, Room, far_bytes
from lean_merge.mapping import LogicalWeight
from lean_merge.methods import AnalysisCost
from lean_merge.outputs import Output
from lean_merge.plan import formulas
from lean_merge.plan.resources import ResolvedResources, arithmetic_dtype
from lean_merge.sizes import format_size
from lean_merge.tasks import (
    CopyTask,
    WeightTask,
    formed_from,
    needs_analysis,
    task_dtype,
    tiles,
)

_HEAVY = 1e10
"""Operations of decompositions from which two weights are analysed at a time in any memory."""
_OPERATIONS = 20e9
"""Operations a second of a decomposition in float64 on one core of a present machine."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Footprint:
    """The bytes that each weight of an output holds and reads under given ceilings.

    Attributes
    ----------
    output
        The output, with the method of each weight.
    device, workers
        The torch device that computes, and the number of worker threads.
    memory, vram
        The ceilings on the process's anonymous memory and on device memory; 0 for none.
    held
        Anonymous bytes of the process before the merge, and of what is held all the time.
    most
        Bytes on the host of the weight that holds most with no tile resident. All weights share
        what stays resident, so that must fit beside this one.
    arrivals
        The room for bytes from other machines, whose memory is part of `held`.
    looks
        What was found at each weight: there are thousands, and planning asks many times.
    """

    output: Output
    device: str
    workers: int
    memory: int
    vram: int
    held: int
    most: int = 0
    arrivals: Room = field(default_factory=Room)
    looks: dict[tuple[str, str, str], Any] = field(default_factory=dict, repr=False)

    @property
    def weights(self) -> list[LogicalWeight]:
        """Return the logical weights of all tensors in scope."""
        return [part for weight in self.output.weights for part in weight.slices]

    @property
    def on_cpu(self) -> bool:
        """Return whether the arithmetic runs on the CPU."""
        return torch.device(self.device).type == "cpu"

    def shape(self, weight: LogicalWeight, device: str = "") -> formulas.WeightShape:
        """Return the sizes of a weight that the formulas need, for `device` or else the plan's."""
        place = device or self.device
        return self._once(("shape", weight.canonical, place), lambda: self._shape(weight, place))

    def _once(self, key: tuple[str, str, str], look: Callable[[], T]) -> T:
        """Return what a look at a weight finds; each weight is looked at once, however often."""
        if key not in self.looks:
            self.looks[key] = look()
        found: T = self.looks[key]
        return found

    def _shape(self, weight: LogicalWeight, device: str) -> formulas.WeightShape:
        method = self.output.methods.get(weight.canonical)
        task = task_dtype(method, weight)
        strips = 0 if method is None else method.cost(weight.shape, item=task.itemsize).scratch
        out_features, in_features = weight.shape
        strip = min(out_features, tiles.strip_rows(in_features, tiles.READ_ELEMENTS))
        tile = min(out_features, tiles.tile_rows(in_features))
        scratch = [s.scratch(tile if s.in_columns else strip) for s in weight.roles]
        rounding = self.output.recipe.rounding
        return formulas.WeightShape(
            out_features=out_features,
            in_features=in_features,
            roles=len(weight.others),
            stored_item=max(torch_dtype(source.dtype).itemsize for source in weight.roles),
            task_item=task.itemsize,
            arithmetic_item=arithmetic_dtype(task, device).itemsize,
            widened=any(torch_dtype(source.dtype) != task for source in weight.roles),
            scratch=scratch[0] + max(scratch[1:]) + scratch[1],
            held=sum(source.held for source in weight.roles),
            columns=any(source.in_columns for source in weight.roles),
            written=strips + formulas.written_strips(rounding) if self.output.writes_rows else 0,
        )

    def cost(self, weight: LogicalWeight, device: str = "") -> AnalysisCost:
        """Return the most that analysing a weight and storing its update may cost."""
        place = device or self.device
        return self._once(("cost", weight.canonical, place), lambda: self._cost(weight, place))

    def _cost(self, weight: LogicalWeight, device: str) -> AnalysisCost:
        method = self.output.methods.get(weight.canonical)
        if method is None or not needs_analysis(method, weight):
            return AnalysisCost()
        cost = method.cost(weight.shape, item=self.shape(weight, device).arithmetic_item)
        # The update is stored after the analysis has released its workspace. If memory is tight, no
        # other analysis begins before that.
        storing = self.output.storing_bytes(method.largest_rank(weight.shape) or 0)
        return dataclasses.replace(cost, workspace=max(cost.workspace, storing))

    # --- what a weight holds --------------------------------------------------------------------

    def fixed(self, weight: LogicalWeight) -> tuple[int, int]:
        """Return the bytes held on the host and on the device with no tile resident."""
        # The CPU needs its share on any device: it solves the small problems, and does all of the
        # analysis if the device runs out of memory.
        cost = self.cost(weight, "cpu")
        host = formulas.host_bytes(
            self.shape(weight, "cpu"),
            widest=cost.widest,
            workspace=cost.workspace,
            workers=self.workers,
        )
        if self.on_cpu or not cost.passes:
            return host, 0
        cost = self.cost(weight)
        device = formulas.device_bytes(
            self.shape(weight), widest=cost.widest, workspace=cost.workspace, workers=self.workers
        )
        return host, device

    def resident(self, weight: LogicalWeight) -> int:
        """Return how many tiles of a weight stay resident in the memory that is left."""
        shape = self.shape(weight)
        if self.cost(weight).passes == 0:
            return 0
        if self.on_cpu:
            return formulas.resident_tiles(shape, self.memory - self.held - self.most)
        if not self.vram:
            return shape.tiles
        return formulas.resident_tiles(shape, self.vram - self.fixed(weight)[1])

    def kept(self, weight: LogicalWeight) -> int:
        """Return the bytes of a weight's resident tiles."""
        return self.resident(weight) * self.shape(weight).resident_tile

    def second(self, weight: LogicalWeight) -> int:
        """Return the host bytes of a weight analysed beside another, without its resident tiles."""
        cost, shape = self.cost(weight), self.shape(weight)
        return formulas.second_bytes(shape, widest=cost.widest, workspace=cost.workspace)

    def waiting(self, weight: LogicalWeight) -> int:
        """Return the host bytes of updates that wait while the next weight is analysed."""
        method = self.output.methods.get(weight.canonical)
        if method is None or not self.cost(weight).workspace:
            return 0
        rank = method.largest_rank(weight.shape) or 0
        update, kept = method.update_bytes(weight.shape), self.shape(weight).held
        return self.output.waiting_bytes(update, rank, kept)

    def feeding(self) -> int:
        """Return the host bytes for bringing tiles to the device: pinned slots and libraries."""
        if self.on_cpu or not any(self.cost(weight).passes for weight in self.weights):
            return 0
        largest = max(self.shape(weight).resident_tile for weight in self.weights)
        slots = formulas.ring_slots(self.workers)
        return formulas.ring_bytes(largest, slots) + formulas.DEVICE_LIBRARIES

    # --- what a task reads ----------------------------------------------------------------------

    def bytes_copied(self, task: CopyTask) -> int:
        """Return how many bytes a task out of scope reads."""
        if not task.decoded:
            return task.source.nbytes
        return sum(each.loaded + each.nbytes(slice(0, each.shape[0])) for each in task.decoded)

    def bytes_read(self, task: WeightTask) -> tuple[int, int]:
        """Return how many bytes an in-scope task reads usually, and if all passes are made.

        Rows that stay resident are read once. The others are read again in every pass, and are
        counted as if each pass wanted them of every role.
        """
        usual = most = 0
        parts = zip(task.weight.slices, task.methods, task.resident, strict=True)
        for weight, method, resident in parts:
            cost, height = self.cost(weight), weight.shape[0]
            kept = min(height, resident * tiles.tile_rows(weight.shape[1]))
            a_pass = _row_bytes(formed_from(weight, [True] * len(weight.others), method))
            loaded = sum(source.loaded for source in weight.roles)
            once = cost.recalled + loaded + kept * a_pass
            survey = None if method is None else method.survey()
            if survey is not None:
                once += survey.passes * (loaded + height * a_pass)
            if self.output.samples_base and cost.passes:
                once += weight.base.nbytes(slice(0, tiles.sampled_rows(weight.shape)))
            if self.output.writes_rows or self.output.forms_updates:
                wanted = method.reads_task_vectors() if method else ()
                added = formed_from(weight, wanted, method)
                # Tiles that stay on another device are not brought back.
                formed_again = height - kept if self.on_cpu else height
                once += formed_again * _row_bytes(added)
                once += height * _row_bytes([weight.mllm]) if self.output.writes_rows else 0
            again = (height - kept) * a_pass
            usual += once + cost.usual_passes * again
            most += once + cost.passes * again
        return usual, most


def fit(output: Output, machine: ResolvedResources) -> tuple[Footprint, tuple[str, ...]]:
    """Find what the output's weights hold on the machine; with notes, in sentences for people.

    Where the device was not asked for and is too small, the CPU takes its place.
    """
    # A pass has so many parts, and two weights may be analysed at a time.
    useful = min(machine.threads, 2 * tiles.LANES * (len(output.recipe.experts) + 1))
    workers = min(useful, tiles.LANES)
    held = memory.usage().anonymous + output.held_bytes + _decoding_bytes(output.mllm, useful)
    logical = sum(len(weight.slices) for weight in output.weights)
    copied = len(output.tensors) if output.writes_rows else 0
    held += formulas.record_bytes(logical, copied, experts=len(output.recipe.experts))
    found = Footprint(output, machine.device, workers, machine.memory, machine.vram, held)
    notes: tuple[str, ...] = ()
    needed = max((found.fixed(weight)[1] for weight in found.weights), default=0)
    if machine.is_default and 0 < machine.vram < needed:
        notes = (
            f"{machine.device} has {format_size(machine.vram)} to spare and {format_size(needed)} "
            "are needed, so the CPU is used; --device and --vram ask for it all the same",
        )
        found = dataclasses.replace(found, device="cpu", vram=0)
    held = found.held + found.feeding()
    most = max((found.fixed(weight)[0] for weight in found.weights), default=0)
    room = _arrivals(output, machine.memory - held - most, machine.remote_cache)
    found = dataclasses.replace(found, held=held + room.memory, arrivals=room, most=most)
    if found.on_cpu and useful > workers:
        found, more = _with_more_workers(found, useful)
        notes += more
    return found, notes


def _with_more_workers(found: Footprint, threads: int) -> tuple[Footprint, tuple[str, ...]]:
    """Return the footprint with as many workers as fit, and a note if not all `threads` do.

    The tiles of a weight go before further workers, since tiles that are read again cost more.
    """
    next_one = dataclasses.replace(found, workers=found.workers + 1)
    each = max((next_one.fixed(one)[0] - found.fixed(one)[0] for one in found.weights), default=1)
    shapes = map(found.shape, found.weights)
    needed = found.held + found.most + max((s.tiles * s.resident_tile for s in shapes), default=0)
    more = threads - found.workers
    fitting = min(more, max(0, found.memory - needed) // each)
    workers, all_in = found.workers + fitting, -(-(needed + more * each) >> 20)
    note = f"{workers} of {threads} threads fit; --memory {all_in}MiB has room for all"
    found = dataclasses.replace(found, workers=workers, most=found.most + fitting * each)
    return found, () if fitting == more else (note,)


def check_fits(tasks: Sequence[CopyTask | WeightTask], footprint: Footprint) -> None:
    """Check that each weight fits at least with no tile resident.

    Raises
    ------
    BudgetError
        One does not; the message names the smallest ceiling that works for all.
    """
    needs = [
        (*footprint.fixed(part), task.weight.mllm)
        for task in tasks
        if isinstance(task, WeightTask)
        for part in task.weight.slices
    ]
    if not needs:
        return
    host, _, largest = max(needs, key=lambda need: need[0])
    name = f"{largest.name} {list(largest.shape)}"
    formulas.check_ceiling(
        footprint.held + host, footprint.memory, what="Memory", flag="--memory", name=name
    )
    if not footprint.on_cpu and footprint.vram:
        _, device, largest = max(needs, key=lambda need: need[1])
        name = f"{largest.name} {list(largest.shape)}"
        formulas.check_ceiling(
            device, footprint.vram, what="Device memory", flag="--vram", name=name
        )


def long_work(footprint: Footprint) -> tuple[str, ...]:
    """Return a note if decompositions of whole matrices take more than a quarter of an hour."""
    operations = sum(footprint.cost(weight).operations for weight in footprint.weights)
    hours = operations / _OPERATIONS / 3600
    if hours < 0.25:
        return ()
    return (
        f"decomposing whole matrices takes up to {hours:.1f} hours on one core at "
        f"{_OPERATIONS / 1e9:.0f} billion operations a second; where the method has a rank, a "
        "small one takes a fraction of it",
    )


def _decoding_bytes(mllm: Checkpoint, workers: int) -> int:
    """Return the most bytes held to write tensors out of scope that are stored with scales.

    Each worker has a strip as it is stored, in float32, and rounded. At most eight tensors wait,
    with their scales.
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


def _arrivals(output: Output, free: int, disk: int) -> Room:
    """Return the room in which each byte from other machines is read once; none if none comes.

    A weight is held until it is written, in memory or, if that is not `free` and the disk has the
    room, there. What is on its way for the next weights is always in memory.
    """
    far = [
        far_bytes(weight.extents_of(part for each in weight.slices for part in each.roles))
        for weight in output.weights
    ]
    is_far = any(far) or any(file in FAR_FILES for file in output.mllm.files)
    if not is_far:
        return Room()
    largest = max(far, default=0)
    if largest + ON_THE_WAY > free and largest <= disk:
        return Room(ON_THE_WAY, disk)
    # Where there is memory, another weight may come while the largest is merged.
    ahead = max(0, min(largest, (free - largest - ON_THE_WAY) // 2))
    return Room(ON_THE_WAY + largest + ahead, disk)


def _row_bytes(sources: Sequence[WeightSource]) -> int:
    return sum(source.nbytes(slice(0, 1)) for source in sources)


@dataclass(frozen=True, slots=True)
class Concurrency:
    """The weights that may share the host's memory at the same time.

    Attributes
    ----------
    arena : int
        Bytes for the tiles that stay: of any weight, or of two that are analysed at a time.
    peak : int
        The most bytes that weights hold, with the arena.
    beside : frozenset of str
        Canonical names of the weights of which two may be analysed at a time.
    waiting : int
        How many updates may wait to be stored while another weight is analysed.
    """

    arena: int
    peak: int
    beside: frozenset[str] = frozenset()
    waiting: int = 0


def concurrency(footprint: Footprint) -> Concurrency:
    """Choose which weights are analysed two at a time; all others are analysed one by one."""
    waiting = max((footprint.waiting(weight) for weight in footprint.weights), default=0)
    found, count = _beside_waiting(footprint, waiting), footprint.output.most_waiting
    if footprint.arrivals.memory or footprint.held + found.peak + waiting > footprint.memory:
        # Bytes from other machines are held for one tensor at a time.
        count = 0 if footprint.arrivals.memory else max(0, count - 1)
        found, waiting = _beside_waiting(footprint, 0), 0
    return dataclasses.replace(found, peak=found.peak + waiting, waiting=count)


def _beside_waiting(footprint: Footprint, waiting: int) -> Concurrency:
    """Share the memory that is left beside `waiting` bytes of updates that wait to be stored."""
    weights = footprint.weights
    if not footprint.on_cpu:
        return Concurrency(0, footprint.most)
    kept = {weight.canonical: formulas.aligned(footprint.kept(weight)) for weight in weights}
    largest = max(kept.values(), default=0)
    alone = Concurrency(largest, footprint.most + largest)
    if not footprint.output.in_pairs or footprint.workers < 2 or footprint.arrivals.memory:
        return alone
    sizes = {
        weight.canonical: (
            kept[weight.canonical],
            footprint.second(weight),
            footprint.fixed(weight)[0],
        )
        for weight in weights
        if footprint.cost(weight).passes
    }
    # Decompositions of large matrices keep one core busy each, whatever the others do.
    heavy = any(footprint.cost(weight).operations > _HEAVY for weight in weights)
    limit = footprint.memory if heavy else min(footprint.memory, formulas.FULL_SPEED)
    limit -= footprint.held + waiting
    # Weights are many and sizes are few: a mixture has thousands of weights of one size. The
    # largest sizes are left out, one after another, until two of the rest fit.
    order = sorted(set(sizes.values()), key=lambda size: (size[0] + size[1], size), reverse=True)
    for number in range(len(order)):
        small = set(order[number:])
        each, extra, fixed = (max(column) for column in zip(*small, strict=True))
        arena = max(largest, 2 * each)
        peak = arena + max(footprint.most, fixed + extra)
        names = frozenset(name for name, size in sizes.items() if size in small)
        if peak <= limit and len(names) > 1:
            return Concurrency(arena, peak, names)
    return alone
