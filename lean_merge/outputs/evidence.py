"""The sink that keeps what an analysis gathers, and decides nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lean_merge.mapping import LogicalWeight
from lean_merge.methods import Decision, Evidence
from lean_merge.methods.plainfacts import plain_portrait, to_plain
from lean_merge.outputs.base import ReadRows
from lean_merge.outputs.sinks import BlockSink
from lean_merge.store import Block, OutputFolder
from lean_merge.tasks import CopyTask, WeightTask
from lean_merge.tasks.tiles import STRIP_ELEMENTS, sampled_rows


class EvidenceSink(BlockSink):
    """Facts with the engine's notes, factors as blocks.

    Parameters
    ----------
    folder
        Open; it stays unsealed.
    """

    def __init__(self, folder: OutputFolder) -> None:
        super().__init__(folder)
        self._waiting: dict[str, Any] = {}

    def keep(
        self, task: WeightTask, weight: LogicalWeight, decision: Decision, read: ReadRows
    ) -> None:
        """Keep the evidence of one weight, if it was looked at."""
        evidence = decision.evidence
        self._waiting[weight.canonical] = None
        if evidence is not None:
            plain = to_plain(evidence.facts)
            plain["base_norm"] = base_norm(weight, read)
            for expert, portrait in zip(plain["experts"], evidence.portraits, strict=True):
                expert.update(plain_portrait(portrait))
            self._waiting[weight.canonical] = plain
            self._put_factors(weight, evidence)

    def _put_factors(self, weight: LogicalWeight, evidence: Evidence) -> None:
        """Directions become rows, so that few of them are read at once."""
        every, factors = torch.arange(evidence.facts.stored), evidence.factors
        self._put_rows(f"{weight.canonical}.mllm.vectors", factors.vectors(every))
        for k in range(len(weight.experts)):
            self._put_rows(f"{weight.canonical}.expert{k + 1}.images", factors.images(k, every))

    def _put_rows(self, name: str, columns: Tensor) -> None:
        """`columns` [length, r] as rows, a few at a time."""
        length, count = columns.shape
        height = max(1, STRIP_ELEMENTS // length)
        firsts = range(0, count, height)
        rows = (columns[:, first : first + height].T.contiguous() for first in firsts)
        self.put(name, (count, length), rows)

    def finished(self, task: CopyTask | WeightTask) -> Any:
        """The engine's note in the folder's journal."""
        result = super().finished(task)
        return result.get("note") if isinstance(result, dict) else None

    def finish(self, task: CopyTask | WeightTask, note: Any) -> None:
        """The facts go there too."""
        super().finish(task, {"note": note, "evidence": self._waiting})
        self._waiting = {}


def gathered_evidence(folder: OutputFolder, tasks: Sequence[WeightTask]) -> dict[str, Any]:
    """By canonical name, what was kept of every weight; None where it was not looked at."""
    results = (folder.blocks.groups[task.tensor.name].result for task in tasks)
    return {name: plain for result in results for name, plain in result["evidence"].items()}


def gathered_factors(folder: OutputFolder, tasks: Sequence[WeightTask]) -> dict[str, Block]:
    """The blocks of all weights, by name."""
    groups = (folder.blocks.groups[task.tensor.name] for task in tasks)
    return {name: block for group in groups for name, block in group.blocks.items()}


def base_norm(weight: LogicalWeight, read: ReadRows) -> float:
    """||W_0||_F as the first rows have it, for a comparison of magnitudes."""
    out_features, in_features = weight.shape
    values = read(weight.base, slice(0, sampled_rows(weight.shape)))
    mean = float(values.double().square().mean())
    return math.sqrt(mean * out_features * in_features)
