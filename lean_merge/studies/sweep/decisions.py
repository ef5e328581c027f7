"""What is decided for every weight before a byte is written, and which files that makes equal."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from lean_merge.engine.run import RunResult
from lean_merge.mapping import LogicalWeight
from lean_merge.methods import Decision
from lean_merge.outputs.base import ReadRows, Sink
from lean_merge.plan import Plan
from lean_merge.store import JOURNAL, EqualShard, read_journal
from lean_merge.tasks import CopyTask, Note, WeightResult, WeightTask, from_note, to_note


class DigestSink(Sink):
    """Keeps a digest of what is decided for each part of each tensor in scope."""

    def __init__(self) -> None:
        self.digests: dict[str, list[bytes]] = {}

    def keep(
        self, task: WeightTask, weight: LogicalWeight, decision: Decision, read: ReadRows
    ) -> None:
        """Note the digest."""
        digest = b"" if decision.update is None else decision.update.digest()
        self.digests.setdefault(task.tensor.name, []).append(digest)


@dataclass(frozen=True, slots=True)
class Decisions:
    """Of one point: what is decided, by the name of each tensor in scope.

    Attributes
    ----------
    digests
        Equal where the output's bytes are.
    weights
        Of each tensor, its logical weights.
    """

    digests: Mapping[str, tuple[bytes, ...]]
    weights: Mapping[str, tuple[WeightResult, ...]] = field(repr=False)

    @classmethod
    def of(cls, sink: DigestSink, result: RunResult) -> Decisions:
        """From a run into `sink`."""
        weights: dict[str, tuple[WeightResult, ...]] = {}
        for weight in result.weights:
            weights[weight.name] = (*weights.get(weight.name, ()), weight)
        return cls({name: tuple(parts) for name, parts in sink.digests.items()}, weights)

    @property
    def digest(self) -> str:
        """Of all of them; equal for points with equal outputs."""
        whole = hashlib.sha256()
        for name, parts in sorted(self.digests.items()):
            whole.update(repr((name, parts)).encode())
        return whole.hexdigest()

    @property
    def selected(self) -> int:
        """Logical weights that at least one expert is selected for."""
        return sum(
            any(record.selected for record in weight.experts)
            for weights in self.weights.values()
            for weight in weights
        )

    @property
    def update_norm(self) -> float:
        """Root of the sum of the squared norms of all updates."""
        norms = (
            record.update_norm or 0.0
            for weights in self.weights.values()
            for weight in weights
            for record in weight.experts
            if record.selected
        )
        return math.sqrt(sum(norm**2 for norm in norms))


@dataclass(frozen=True, slots=True)
class Made:
    """A complete output, and the digests of what was decided for it."""

    folder: Path
    digests: Mapping[str, tuple[bytes, ...]]


def equal_shards(plan: Plan, decided: Decisions, made: Sequence[Made]) -> list[EqualShard]:
    """The weight files of a point that earlier points hold byte for byte.

    Those of which every tensor has the same decision there, or none because it is out of scope. An
    adapter has no such files.
    """
    tasks: dict[str, list[CopyTask | WeightTask]] = {s.file_name: [] for s in plan.shards}
    for task in plan.tasks if plan.shards else ():
        tasks[plan.shards[task.shard].file_name].append(task)
    notes = lru_cache(maxsize=2)(_notes)
    found = []
    for file_name, inside in tasks.items():
        names = [task.tensor.name for task in inside if isinstance(task, WeightTask)]
        for each in made:
            if all(each.digests.get(name) == decided.digests[name] for name in names):
                results = dict(_results(inside, decided, notes(each.folder)))
                found.append(EqualShard(file_name, each.folder, results))
                break
    return found


def _notes(folder: Path) -> Mapping[str, Any]:
    """What the journal of a complete output notes of its tensors; nothing if it is gone."""
    try:
        journal = read_journal(folder / JOURNAL)
    except OSError:
        journal = None
    return {} if journal is None else {n: r.get("result") for n, r in journal.tensors.items()}


def _results(
    tasks: Sequence[CopyTask | WeightTask], decided: Decisions, notes: Mapping[str, Any]
) -> Iterator[tuple[str, Any]]:
    """What is to be noted of each tensor here: this point's decisions, and what storing told."""
    for task in tasks:
        name = task.tensor.name
        note = from_note(notes.get(name))
        if note is None:
            continue
        stored = {weight.canonical: weight.stored for weight in note.weights}
        weights = [
            replace(weight, stored=stored.get(weight.canonical))
            for weight in decided.weights.get(name, ())
        ]
        yield name, to_note(Note(weights, non_finite=note.non_finite))
