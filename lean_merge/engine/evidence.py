"""The sink that keeps what an analysis gathers, and decides nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lean_merge.budget import READ_ELEMENTS, STRIP_ELEMENTS, strip_rows
from lean_merge.checkpoints import LogicalWeight
from lean_merge.engine.sinks import Sink, Tools
from lean_merge.engine.taskvectors import TaskVectors
from lean_merge.methods import Decision, Evidence
from lean_merge.methods.plainfacts import plain_portrait, to_plain
from lean_merge.output import FactorStore, StoredTensor
from lean_merge.tasks import CopyTask, WeightTask


@dataclass(frozen=True, slots=True)
class Entry:
    """What is kept of one weight, as JSON has it, and where its factors wait.

    `evidence` is None for a weight that was not looked at.
    """

    evidence: dict[str, Any] | None = None
    tensors: tuple[StoredTensor, ...] = ()


class EvidenceSink(Sink):
    """Facts in memory, factors in a store.

    Parameters
    ----------
    store
        Where the factors wait.

    Attributes
    ----------
    entries
        By canonical name, in the order of the tasks.
    """

    def __init__(self, store: FactorStore) -> None:
        self._store = store
        self.entries: dict[str, Entry] = {}

    def copy(self, task: CopyTask, tools: Tools) -> Callable[[], None]:
        """An analysis has no tensor out of scope."""
        return _nothing

    def update(
        self, task: WeightTask, vectors: TaskVectors, decision: Decision, tools: Tools
    ) -> Callable[[], None]:
        """The evidence goes to the store."""
        weight, evidence = vectors.weight, decision.evidence
        if evidence is None:
            self.entries[weight.canonical] = Entry()
            return _nothing
        plain = to_plain(evidence.facts)
        plain["base_norm"] = base_norm(weight, tools)
        for expert, portrait in zip(plain["experts"], evidence.portraits, strict=True):
            expert.update(plain_portrait(portrait))
        self.entries[weight.canonical] = Entry(plain, self._store_factors(weight, evidence))
        return _nothing

    def _store_factors(self, weight: LogicalWeight, evidence: Evidence) -> tuple[StoredTensor, ...]:
        """Directions become rows, so that few of them are read at once."""
        out_features, in_features = weight.shape
        every = torch.arange(evidence.facts.stored)
        stored = [
            self._append(
                f"{weight.canonical}.mllm.vectors", evidence.factors.vectors(every), in_features
            )
        ]
        for k in range(len(weight.experts)):
            name = f"{weight.canonical}.expert{k + 1}.images"
            stored.append(self._append(name, evidence.factors.images(k, every), out_features))
        return tuple(stored)

    def _append(self, name: str, columns: Tensor, length: int) -> StoredTensor:
        """`columns` [length, r] as rows, a few at a time."""
        count = columns.shape[1]
        height = max(1, STRIP_ELEMENTS // length)
        starts = [
            self._store.append(columns[:, first : first + height].T.contiguous())
            for first in range(0, count, height)
        ]
        return StoredTensor(name, (count, length), starts[0] if starts else 0)


def base_norm(weight: LogicalWeight, tools: Tools) -> float:
    """||W_0||_F as the first rows have it, for a comparison of magnitudes."""
    out_features, in_features = weight.shape
    rows = slice(0, sampled_rows(weight))
    values = weight.base.read(rows, tools.reader, tools.workers.buffer, "base")
    mean = float(values.double().square().mean())
    return math.sqrt(mean * out_features * in_features)


def sampled_rows(weight: LogicalWeight) -> int:
    """How many of the base's rows `base_norm` reads."""
    return min(weight.shape[0], strip_rows(weight.shape[1], READ_ELEMENTS))


def _nothing() -> None:
    """There is nothing to wait for."""
