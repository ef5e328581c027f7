"""The memory that a plan's weights hold and the bytes that they read, from headers alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lean_merge.checkpoints import WeightSource, common_dtype, torch_dtype
from lean_merge.mapping import LogicalWeight
from lean_merge.methods import AnalysisCost
from lean_merge.outputs import Output
from lean_merge.plan import budget
from lean_merge.plan.resources import arithmetic_dtype
from lean_merge.tasks import CopyTask, WeightTask, formed_from, needs_analysis, tiles


@dataclass(frozen=True, slots=True)
class Layout:
    """What all weights of a plan have in common that decides how much memory each takes."""

    output: Output
    device: str
    workers: int
    memory: int
    vram: int
    held: int
    """Anonymous bytes of the process before the merge, and those that the output holds."""
    rounding: str = "nearest"
    """How rows are rounded when they are written."""
    most: int = 0
    """Bytes on the host of the weight that holds most with no tile resident. All weights share the
    memory of the tiles that stay, so these must have room beside that one."""

    def shape(self, weight: LogicalWeight, device: str = "") -> budget.WeightShape:
        """Describe a weight for the formulas, with products on the plan's device or another."""
        task = common_dtype(source.dtype for source in weight.roles)
        out_features, in_features = weight.shape
        strip = min(out_features, tiles.strip_rows(in_features, tiles.READ_ELEMENTS))
        tile = min(out_features, tiles.tile_rows(in_features))
        scratch = [s.scratch(tile if s.in_columns else strip) for s in weight.roles]
        return budget.WeightShape(
            out_features=out_features,
            in_features=in_features,
            roles=len(weight.others),
            stored_item=max(torch_dtype(source.dtype).itemsize for source in weight.roles),
            task_item=task.itemsize,
            arithmetic_item=arithmetic_dtype(task, device or self.device).itemsize,
            widened=any(torch_dtype(source.dtype) != task for source in weight.roles),
            scratch=scratch[0] + max(scratch[1:]) + scratch[1],
            held=sum(source.held for source in weight.roles),
            columns=any(source.in_columns for source in weight.roles),
            written=budget.written_strips(self.rounding) if self.output.writes_rows else 0,
        )

    @property
    def on_cpu(self) -> bool:
        return torch.device(self.device).type == "cpu"

    def cost(self, weight: LogicalWeight, device: str = "") -> AnalysisCost:
        """Give the most that the analysis of a weight costs, with the output's work after it."""
        method = self.output.methods.get(weight.canonical)
        if method is None or not needs_analysis(weight):
            return AnalysisCost()
        cost = method.cost(weight.shape, item=self.shape(weight, device).arithmetic_item)
        # The analysis has let go of its own by then, and no other is begun where memory is tight.
        storing = self.output.storing_bytes(method.largest_rank(weight.shape))
        return dataclasses.replace(cost, workspace=max(cost.workspace, storing))

    def fixed(self, weight: LogicalWeight) -> tuple[int, int]:
        """Count the bytes on the host and on the device with no tile resident."""
        # The CPU's share on any device: small problems, and all if that one runs out of memory.
        cost = self.cost(weight, "cpu")
        host = budget.host_bytes(
            self.shape(weight, "cpu"),
            widest=cost.widest,
            workspace=cost.workspace,
            workers=self.workers,
        )
        if self.on_cpu or not cost.passes:
            return host, 0
        cost = self.cost(weight)
        device = budget.device_bytes(
            self.shape(weight), widest=cost.widest, workspace=cost.workspace, workers=self.workers
        )
        return host, device

    def waiting(self, weight: LogicalWeight) -> int:
        """Count the bytes on the host of updates that wait to be stored while the next is found."""
        method = self.output.methods.get(weight.canonical)
        if method is None or not self.cost(weight).workspace:
            return 0
        rank, kept = method.largest_rank(weight.shape), self.shape(weight).held
        return self.output.waiting_bytes(weight.shape, rank, kept)

    def feeding(self, weights: Sequence[LogicalWeight]) -> int:
        """Count the bytes on the host that it takes to bring tiles to the device.

        They are pinned memory, and that of the device's libraries.
        """
        if self.on_cpu or not any(self.cost(weight).passes for weight in weights):
            return 0
        largest = max(self.shape(weight).resident_tile for weight in weights)
        slots = budget.ring_slots(self.workers)
        return budget.ring_bytes(largest, slots) + budget.DEVICE_LIBRARIES

    def needs(self, weight: LogicalWeight) -> tuple[int, int]:
        """Count the bytes on host and device without which the weight cannot be merged."""
        host, device = self.fixed(weight)
        return self.held + host, device

    def resident(self, weight: LogicalWeight) -> int:
        """Count the tiles that may stay in what the weight's needs leave free."""
        shape = self.shape(weight)
        _, device = self.needs(weight)
        if self.cost(weight).passes == 0:
            return 0
        if self.on_cpu:
            return budget.resident_tiles(shape, self.memory - self.held - self.most)
        return budget.resident_tiles(shape, self.vram - device) if self.vram else shape.tiles

    def kept(self, weight: LogicalWeight) -> int:
        """Count the bytes of the tiles that stay."""
        return self.resident(weight) * self.shape(weight).resident_tile

    def second(self, weight: LogicalWeight) -> int:
        """Count the host's bytes, but for tiles, of a weight that is analysed beside another."""
        cost = self.cost(weight)
        return budget.second_bytes(self.shape(weight), widest=cost.widest, workspace=cost.workspace)

    def bytes_copied(self, task: CopyTask) -> int:
        """Count the bytes that a task out of scope reads."""
        if not task.decoded:
            return task.source.nbytes
        return sum(each.loaded + each.nbytes(slice(0, each.shape[0])) for each in task.decoded)

    def bytes_read(self, task: WeightTask) -> tuple[int, int]:
        """Count the bytes that an in-scope task reads, usually and with all passes of its analysis.

        Rows that stay resident are read once, and the others again in every pass, of every role.
        """
        usual = most = 0
        parts = zip(task.weight.slices, task.methods, task.resident, strict=True)
        for weight, method, resident in parts:
            cost, height = self.cost(weight), weight.shape[0]
            kept = min(height, resident * tiles.tile_rows(weight.shape[1]))
            a_pass = _row_bytes(formed_from(weight, [True] * len(weight.others)))
            once = cost.recalled + sum(source.loaded for source in weight.roles) + kept * a_pass
            if self.output.samples_base and cost.passes:
                once += weight.base.nbytes(slice(0, tiles.sampled_rows(weight.shape)))
            if self.output.writes_rows:
                added = formed_from(weight, method.reads_task_vectors() if method else ())
                # Tiles that stay on another device are not brought back.
                formed_again = height - kept if self.on_cpu else height
                once += height * _row_bytes([weight.mllm]) + formed_again * _row_bytes(added)
            again = (height - kept) * a_pass
            usual += once + cost.usual_passes * again
            most += once + cost.passes * again
        return usual, most


def _row_bytes(sources: Sequence[WeightSource]) -> int:
    return sum(source.nbytes(slice(0, 1)) for source in sources)


@dataclass(frozen=True, slots=True)
class Room:
    """How weights share the host's memory.

    Attributes
    ----------
    arena : int
        Bytes for the tiles that stay: of any weight, or of two that are analysed at a time.
    peak : int
        Most bytes that weights hold, the arena included.
    beside : frozenset of str
        Canonical names of the weights of which two may be analysed at a time.
    waiting : int
        How many updates may wait to be stored while another weight is analysed.
    """

    arena: int
    peak: int
    beside: frozenset[str] = frozenset()
    waiting: int = 0


def share_room(weights: Sequence[LogicalWeight], layout: Layout) -> Room:
    """Share the host's memory among weights, of which two small ones may be analysed at a time."""
    waiting = max((layout.waiting(weight) for weight in weights), default=0)
    room, fewer = _room(weights, layout, waiting), 0
    if layout.held + room.peak + waiting > layout.memory:
        room, waiting, fewer = _room(weights, layout, 0), 0, 1
    return dataclasses.replace(
        room, peak=room.peak + waiting, waiting=max(0, layout.output.most_waiting - fewer)
    )


def _room(weights: Sequence[LogicalWeight], layout: Layout, waiting: int) -> Room:
    """Share what is left beside so many bytes that wait."""
    if not layout.on_cpu:
        return Room(0, layout.most)
    kept = {weight.canonical: budget.aligned(layout.kept(weight)) for weight in weights}
    largest = max(kept.values(), default=0)
    alone = Room(largest, layout.most + largest)
    if not layout.output.in_pairs or layout.workers < 2:
        return alone
    sizes = {
        w.canonical: (kept[w.canonical], layout.second(w), layout.fixed(w)[0])
        for w in weights
        if layout.cost(w).passes
    }
    limit = min(layout.memory, budget.FULL_SPEED) - layout.held - waiting
    # Weights are many and sizes are few: a mixture has thousands of one.
    order = sorted(set(sizes.values()), key=lambda size: (size[0] + size[1], size), reverse=True)
    for number in range(len(order)):
        small = set(order[number:])
        each, extra, fixed = (max(column) for column in zip(*small, strict=True))
        arena = max(largest, 2 * each)
        peak = arena + max(layout.most, fixed + extra)
        names = frozenset(name for name, size in sizes.items() if size in small)
        if peak <= limit and len(names) > 1:
            return Room(arena, peak, names)
    return alone


def check_budget(tasks: Sequence[WeightTask], layout: Layout) -> None:
    """Raise BudgetError, with the smallest that works for all weights, if one does not fit."""
    needs = [
        (*layout.needs(part), task.weight.mllm) for task in tasks for part in task.weight.slices
    ]
    if not needs:
        return
    host, _, largest = max(needs, key=lambda need: need[0])
    name = f"{largest.name} {list(largest.shape)}"
    budget.check_fits(host, layout.memory, what="Memory", flag="--memory", name=name)
    if not layout.on_cpu and layout.vram:
        _, device, largest = max(needs, key=lambda need: need[1])
        name = f"{largest.name} {list(largest.shape)}"
        budget.check_fits(device, layout.vram, what="Device memory", flag="--vram", name=name)
