"""Deal the tensors of a plan to ranks, and let each rank carry out its own."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence, Set
from typing import Any

from lean_merge.mapping import LogicalWeight
from lean_merge.methods import Decision
from lean_merge.outputs.base import ReadRows, Sink
from lean_merge.plan import Plan
from lean_merge.store import Shard, WriteBytes
from lean_merge.tasks import CopyTask, Note, Stored, WeightTask, to_note

_SKIPPED = to_note(Note([]))


RUNS = 8
"""So many parts of the model each rank gets, if all are on one machine. Layers at other depths may
take longer, because more of their weights are selected."""


def deal(plan: Plan, todo: Sequence[int], size: int, runs: int = 1) -> list[list[int]]:
    """Deal tasks to `size` ranks, so that all read and write about as many bytes.

    A byte takes longer where a method decides than where a tensor is copied, so tasks of either
    kind are dealt by themselves. Each rank gets neighbours, because files are read faster in order,
    and tasks that make the same tensors of the output go to the same rank.

    Parameters
    ----------
    todo
        The places in the plan of the tasks to be dealt, in order.
    runs
        How many runs of neighbours each rank gets.

    Returns
    -------
    list of list of int
        The places of each rank's tasks, in order.
    """
    kinds: dict[bool, list[list[int]]] = {}
    for group in _together(plan, todo):
        kinds.setdefault(any(_is_decided(plan, index) for index in group), []).append(group)
    shares: list[list[int]] = [[] for _ in range(size)]
    for groups in kinds.values():
        costs = [sum(_bytes_moved(plan, index) for index in group) for group in groups]
        for group, run in zip(groups, dealt(costs, size * runs), strict=True):
            there, back = divmod(run, size)
            shares[size - 1 - back if there % 2 else back] += group
    return [sorted(share) for share in shares]


def dealt(costs: Sequence[int], size: int) -> list[int]:
    """Return the rank of each item, so that neighbours stay together and ranks get equal costs."""
    total, done, ranks = sum(costs), 0, []
    for cost in costs:
        # An item belongs to the rank in whose part of all costs its middle lies.
        ranks.append(min((2 * done + cost) * size // (2 * total), size - 1) if total else 0)
        done += cost
    return ranks


def _together(plan: Plan, todo: Sequence[int]) -> list[list[int]]:
    """Put tasks together that make the same tensors, such as the factors of a fused module."""
    groups: list[list[int]] = []
    group_of: dict[str, list[int]] = {}
    for index in todo:
        names = plan.output.names(plan.tasks[index])
        merged = [index]
        known = {id(group_of[name]): group_of[name] for name in names if name in group_of}
        for other in known.values():
            groups.remove(other)
            merged = other + merged
        groups.append(merged)
        for each in merged:
            group_of |= dict.fromkeys(plan.output.names(plan.tasks[each]), merged)
    return groups


def _is_decided(plan: Plan, index: int) -> bool:
    task = plan.tasks[index]
    return isinstance(task, WeightTask) and any(method is not None for method in task.methods)


def _bytes_moved(plan: Plan, index: int) -> int:
    task = plan.tasks[index]
    read = task.read(rows=plan.output.writes_rows)
    return task.tensor.nbytes + sum(spec.nbytes for spec in read)


def edges(shards: Sequence[Shard], owners: Mapping[str, int]) -> set[str]:
    """Return the tensors beside which another rank writes into the same file.

    Parameters
    ----------
    owners
        The rank that writes a tensor, by its name; what an earlier run wrote has none.
    """
    found: set[str] = set()
    for shard in shards:
        names = list(shard.offsets)
        for one, other in itertools.pairwise(names):
            if one in owners and other in owners and owners[one] != owners[other]:
                found |= {one, other}
    return found


class ShareSink(Sink):
    """A sink that takes a rank's own tasks, and tells the engine that all others are done.

    Parameters
    ----------
    sink
        The sink that stores.
    own
        The names of the output's tensors that this rank makes.

    Attributes
    ----------
    notes
        The notes on the tasks that were finished, by the tensors' names.
    """

    def __init__(self, sink: Sink, own: Set[str]) -> None:
        self._sink = sink
        self._own = own
        self.notes: dict[str, Any] = {}

    def writer(self, task: CopyTask | WeightTask) -> WriteBytes | None:
        """Return the sink's function."""
        return self._sink.writer(task)

    def keep(
        self, task: WeightTask, weight: LogicalWeight, decision: Decision, read: ReadRows
    ) -> Stored:
        """Let the sink store an update."""
        return self._sink.keep(task, weight, decision, read)

    def finished(self, task: CopyTask | WeightTask) -> Any:
        """Return a note that says nothing for the tasks of other ranks."""
        return None if task.tensor.name in self._own else _SKIPPED

    def finish(self, task: CopyTask | WeightTask, note: Any) -> None:
        """Let the sink record the task, and keep the note."""
        self._sink.finish(task, note)
        self.notes[task.tensor.name] = note

    def flush(self) -> None:
        """Let the sink send its bytes to the disk."""
        self._sink.flush()


class NoteSink(Sink):
    """A sink that knows what all ranks did, and lets nothing be done again.

    Parameters
    ----------
    notes
        The ranks' notes, by the names of the output's tensors.
    sink
        The sink that knows the tasks of which no rank has a note.
    """

    def __init__(self, notes: Mapping[str, Any], sink: Sink) -> None:
        self._notes = notes
        self._sink = sink

    def finished(self, task: CopyTask | WeightTask) -> Any:
        """Return the note on a task."""
        note = self._notes.get(task.tensor.name)
        return self._sink.finished(task) if note is None else note
