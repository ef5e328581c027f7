"""Compare a prior with the differences of its models, which are formed again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from lean_merge.checkpoints import TensorReader, TensorSpec, as_bytes
from lean_merge.mapping import LogicalWeight, MappedWeight
from lean_merge.methods import Decision
from lean_merge.outputs.base import Comparison, ReadRows
from lean_merge.outputs.differing import bytes_apart
from lean_merge.outputs.priornumbers import Encoded, Span, difference_rows, write_rows
from lean_merge.outputs.priorsettings import PriorSettings
from lean_merge.outputs.priorsinks import (
    CutDifference,
    FactorBlock,
    cut_difference,
    factor_parts,
    write_factor,
)
from lean_merge.store import Difference, Spans, WriteBytes
from lean_merge.tasks import CopyTask, Note, WeightTask, to_note


class PriorComparison(Comparison):
    """A sink that compares the bytes of a prior with those that would be written now.

    Parameters
    ----------
    settings, spans
        The settings of the prior, and the places of its logical weights.
    names, shapes_of
        Functions that return the names of a task's tensors, and the shapes of a tensor's factors
        from the ranks of its parts.
    stored, reader, sampled
        As `Output.comparison` has them.
    """

    def __init__(
        self,
        settings: PriorSettings,
        spans: Mapping[str, Span],
        names: Callable[[CopyTask | WeightTask], Sequence[str]],
        shapes_of: Callable[[MappedWeight, Mapping[str, int]], Mapping[str, tuple[int, ...]]],
        *,
        stored: Mapping[str, TensorSpec],
        reader: TensorReader,
        sampled: Set[str],
    ) -> None:
        self._settings, self._spans = settings, spans
        self._names, self._shapes_of = names, shapes_of
        self._stored, self._reader = stored, reader
        self._sampled = sampled
        self._cut: dict[str, CutDifference] = {}
        self._off: dict[str, int] = {}
        self._faults: list[tuple[str, Difference]] = []
        self._origin: dict[str, str] = {}

    def finished(self, task: CopyTask | WeightTask) -> Any:
        """Report that tensors which are not to be compared are done."""
        return None if task.tensor.name in self._sampled else to_note(Note([]))

    def keep(
        self, task: WeightTask, weight: LogicalWeight, decision: Decision, read: ReadRows
    ) -> None:
        """Compare the rows of a whole difference, or cut it and compare once all parts are cut."""
        settings, name = self._settings, task.tensor.name
        if not self._settings.is_whole:
            self._cut[weight.canonical] = cut_difference(name, weight, decision, settings)
            return
        writers = {each: self._writer(each, name) for each in self._names(task)}
        for rows, values in difference_rows(weight, decision, read):
            write_rows(weight, rows, Encoded.of(values, settings.dtype, name), writers, name)

    def finish(self, task: CopyTask | WeightTask, note: Any) -> None:
        """Compare the factors of a tensor, whose parts were all cut."""
        if self._settings.is_whole or not isinstance(task, WeightTask) or not self._cut:
            return
        ranks = {part.canonical: self._cut[part.canonical].rank for part in task.weight.slices}
        for name, shape in self._shapes_of(task.weight, ranks).items():
            stored = self._stored.get(name)
            if stored is None or stored.shape != shape:
                there = "is missing" if stored is None else f"is {[*stored.shape]}"
                file = "" if stored is None else stored.file.name
                fault = Difference(file, name, f"{there} instead of {[*shape]}")
                self._faults.append((task.tensor.name, fault))
                continue
            writers = {
                each: self._writer(each, task.tensor.name)
                for each in (name, f"{name}.scale")
                if each in self._stored
            }
            parts = factor_parts(task, self._spans, ranks, self._block(name.rpartition(".")[2]))
            write_factor(name, shape, parts, writers, self._settings.dtype)
        self._cut = {}

    def _block(self, side: str) -> Callable[[str], FactorBlock]:
        """Return what gives the factors in memory as `stored_block` gives those on the disk."""

        def block(canonical: str) -> FactorBlock:
            factor: Tensor = getattr(self._cut[canonical], side)

            def read(first: int, out: Tensor) -> None:
                out.view(-1).copy_(factor.view(-1)[first : first + out.numel()])

            return read, tuple(factor.shape)

        return block

    def _writer(self, name: str, origin: str) -> WriteBytes:
        """Return a function that reads where a prior would be written, and counts what differs."""
        self._origin[name] = origin

        def compare(offset: int, data: memoryview, spans: Spans | None = None) -> None:
            data, done = data.cast("B"), 0
            for first, length in spans or [(0, data.nbytes)]:
                here = torch.frombuffer(data[done : done + length], dtype=torch.uint8)
                there = torch.empty(length, dtype=torch.uint8)
                self._reader.read_into(self._stored[name], offset + first, as_bytes(there))
                if not torch.equal(here, there):
                    self._off[name] = self._off.get(name, 0) + bytes_apart(here, there)
                done += length

        return compare

    def differences(self, elsewhere: Set[str]) -> list[Difference]:
        """Return the differences.

        Factors that other arithmetic cut may differ in every byte, and are not compared.
        """
        skipped = set() if self._settings.is_whole else {*elsewhere}
        found = [fault for origin, fault in self._faults if origin not in skipped]
        for name, off in self._off.items():
            if self._origin[name] not in skipped:
                fault = f"{off} bytes are not what the models give"
                found.append(Difference(self._stored[name].file.name, name, fault))
        return found
