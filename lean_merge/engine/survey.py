"""Carry out the survey of all weights that a method may need before it decides on any of them.

Every run repeats the survey, even a resumed run or a verification. The weights are read in the
order of their canonical names, whatever files they are in, so that the sums are always the same.
"""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Any

import torch

from lean_merge.checkpoints import TensorReader, TensorSpec
from lean_merge.engine.background import ReadAhead
from lean_merge.engine.crew import CREW
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
    weights = [n for n, task in enumerate(plan.tasks) if isinstance(task, WeightTask)]
    crew = CREW.get()
    if not (any(index not in reused for index in weights) if crew is None else crew.surveys):
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
    own = TensorReader(seen=plan.seen, room=plan.arrivals)
    with own as reader, worker_pool(plan.workers) as workers:
        found = {key: _carried_out(group, reader, workers) for key, group in groups.items()}
        return found, reader.bytes_read


def _carried_out(group: _SharedSurvey, reader: TensorReader, workers: Workers) -> Any:
    weights = sorted(group.weights, key=lambda each: each.weight.canonical)
    look = group.survey.look()
    try:
        wanted = next(look)
        while True:
            products = partial(_products, wanted, reader, workers)
            crew = CREW.get()
            found = products(weights) if crew is None else crew.spread(weights, products)
            wanted = look.send(reduce(_sum, found))
    except StopIteration as end:
        return end.value


def _products(
    wanted: Sequence[Pass | None],
    reader: TensorReader,
    workers: Workers,
    weights: Sequence[_Surveyed],
) -> Iterator[Sequence[Products | None]]:
    """Make one pass over all rows of each weight, and yield its products."""
    nothing = torch.empty(0, dtype=torch.uint8)
    stored = [each.stored for each in weights]
    with (
        TensorReader(max_files=AHEAD_FILES) as apart,
        ReadAhead(apart, stored, ahead=READ_AHEAD) as read_ahead,
        reader.expecting(stored, again=True),
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
            yield vectors.run(wanted)
            read_ahead.done(index)
            reader.done(index)


def _sum(
    one: Sequence[Products | None], other: Sequence[Products | None]
) -> Sequence[Products | None]:
    return [None if a is None or b is None else a + b for a, b in zip(one, other, strict=True)]
