"""Carry out the survey of all weights that a method may need before it decides on any of them.

Every run repeats the survey, even a resumed run or a verification. The weights are read in the
order of their canonical names, whatever files they are in, so that the sums are always the same.
"""

from __future__ import annotations

from collections.abc import Container, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lean_merge.checkpoints import TensorReader, TensorSpec
from lean_merge.checkpoints.elsewhere import Room
from lean_merge.engine.background import ReadAhead
from lean_merge.engine.scheduler import AHEAD_FILES, READ_AHEAD
from lean_merge.engine.taskvectors import TaskVectors
from lean_merge.engine.workers import Workers, worker_pool
from lean_merge.linalg import Pass, Products
from lean_merge.mapping import LogicalWeight
from lean_merge.methods import Method, Survey
from lean_merge.plan import Plan
from lean_merge.tasks import WeightTask, task_dtype


@dataclass(frozen=True, slots=True)
class _Surveyed:
    """A weight, the method that merges it, and the parts of stored tensors that it is read from."""

    weight: LogicalWeight
    method: Method[Any]
    stored: Sequence[TensorSpec]


@dataclass(frozen=True, slots=True)
class _SharedSurvey:
    """A survey, and the weights that share it."""

    survey: Survey
    weights: list[_Surveyed] = field(default_factory=list)


def survey(plan: Plan, reused: Container[int]) -> tuple[dict[Hashable, Any], int]:
    """Carry out the surveys of a plan's methods.

    Parameters
    ----------
    reused
        The places in the plan of the tasks that an interrupted run finished. Nothing is surveyed if
        no weight is left to decide.

    Returns
    -------
    dict
        The results of the surveys, by their keys.
    int
        The number of bytes that were read.

    Raises
    ------
    DataError
        Some number is NaN or Inf, or a difference overflows.
    """
    groups: dict[Hashable, _SharedSurvey] = {}
    tasks = [each for each in enumerate(plan.tasks) if isinstance(each[1], WeightTask)]
    if all(index in reused for index, _ in tasks):
        return {}, 0
    for task in plan.weights:
        for weight, method in zip(task.weight.slices, task.methods, strict=True):
            asked = None if method is None else method.survey()
            if method is not None and asked is not None:
                stored = task.weight.extents_of(weight.roles)
                group = groups.setdefault(asked.key, _SharedSurvey(asked))
                group.weights.append(_Surveyed(weight, method, stored))
    if not groups:
        return {}, 0
    with TensorReader(seen=plan.seen) as reader, worker_pool(plan.workers) as workers:
        found = {
            key: _carried_out(group, reader, workers, plan.arrivals)
            for key, group in groups.items()
        }
        return found, reader.bytes_read


def _carried_out(group: _SharedSurvey, reader: TensorReader, workers: Workers, room: Room) -> Any:
    weights = sorted(group.weights, key=lambda each: each.weight.canonical)
    look = group.survey.look()
    try:
        wanted = next(look)
        while True:
            wanted = look.send(_sums(weights, wanted, reader, workers, room))
    except StopIteration as end:
        return end.value


def _sums(
    weights: Sequence[_Surveyed],
    wanted: Sequence[Pass | None],
    reader: TensorReader,
    workers: Workers,
    room: Room,
) -> list[Products | None]:
    """Make one pass over all rows of all weights, and add up the weights' products."""
    nothing = torch.empty(0, dtype=torch.uint8)
    sums: list[Products | None] = []
    stored = [each.stored for each in weights]
    with (
        TensorReader(max_files=AHEAD_FILES) as apart,
        ReadAhead(apart, stored, ahead=READ_AHEAD) as read_ahead,
        reader.expecting(stored, room, again=True),
    ):
        for index, each in enumerate(weights):
            read_ahead.begin(index)
            dtype = task_dtype(each.method, each.weight)
            vectors = TaskVectors(
                each.weight,
                reader=reader,
                workers=workers,
                arena=nothing,
                resident=0,
                task_dtype=dtype,
                dtype=dtype,
                differences=each.method.differences,
            )
            found = vectors.run(wanted)
            sums = [_added(*pair) for pair in zip(sums, found, strict=True)] if sums else found
            read_ahead.done(index)
            reader.done(index)
    return sums


def _added(first: Products | None, second: Products | None) -> Products | None:
    return None if first is None or second is None else first + second
