"""The sinks of a prior: D is written at its place, or its factors wait until they are laid out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lean_merge.checkpoints import as_bytes
from lean_merge.errors import DataError
from lean_merge.mapping import LogicalWeight
from lean_merge.methods import Decision
from lean_merge.outputs.base import ReadRows, Sink
from lean_merge.outputs.blocks import BlockSink
from lean_merge.outputs.priornumbers import (
    Encoded,
    Span,
    difference_rows,
    lost_by_rounding,
    squared_norm,
    write_rows,
)
from lean_merge.outputs.priorsettings import PriorSettings
from lean_merge.store import OutputFolder, Shard, WriteBytes
from lean_merge.tasks import CopyTask, WeightTask, Written
from lean_merge.tasks.tiles import STRIP_ELEMENTS


class _Notes:
    """The facts of the weights of the task under way, which are noted once it is finished."""

    def __init__(self) -> None:
        self._facts: dict[str, dict[str, Any]] = {}

    def add(self, canonical: str, *, squared: float, lost: float, rank: int | None) -> None:
        kept = 1.0 if not squared else max(0.0, 1.0 - lost / squared)
        self._facts[canonical] = {"norm": math.sqrt(squared), "kept": kept, "rank": rank}

    def take(self, note: Any) -> dict[str, Any]:
        facts, self._facts = self._facts, {}
        return {"note": note, "prior": facts}


class WholeSink(Sink):
    """A sink that forms D from the rows of the models, and writes it at its place.

    Parameters
    ----------
    settings, shards
        The settings of the prior, and its weight files.
    folder
        Open; it stays unsealed.
    facts
        What is noted of every finished tensor, to which this adds.
    """

    def __init__(
        self,
        settings: PriorSettings,
        shards: Sequence[Shard],
        folder: OutputFolder,
        facts: dict[str, Any],
    ) -> None:
        self._settings, self._folder, self._facts = settings, folder, facts
        self._shards = {name: shard for shard in shards for name in shard.offsets}
        self._notes = _Notes()

    def _names(self, task: CopyTask | WeightTask) -> list[str]:
        name = task.tensor.name
        return [each for each in (f"{name}.scale", name) if each in self._shards]

    def keep(
        self, task: WeightTask, weight: LogicalWeight, decision: Decision, read: ReadRows
    ) -> Written | None:
        """Write the rows of D a strip at a time, with their scales."""
        writers = {n: self._folder.writer(self._shards[n], n) for n in self._names(task)}
        squared = lost = along = 0.0
        for rows, values in difference_rows(weight, decision, read):
            encoded = Encoded.of(values, self._settings.dtype, task.tensor.name)
            squared += squared_norm(values)
            decoded = encoded.decoded
            along += float((decoded.double() * values).sum())
            lost += squared_norm(decoded - values)
            write_rows(weight, rows, encoded, writers, task.tensor.name)
        self._notes.add(weight.canonical, squared=squared, lost=lost, rank=None)
        return None if decision.update is None else Written(along, squared)

    def finished(self, task: CopyTask | WeightTask) -> Any:
        """Return the engine's note from the folder's journal, if all of D is there."""
        found = [self._folder.finished.get(name) for name in self._names(task)]
        return found[-1]["note"] if found[-1] and all(found) else None

    def finish(self, task: CopyTask | WeightTask, note: Any) -> None:
        """Note the task in the folder's journal, once the bytes are on the disk."""
        facts = self._notes.take(note)
        for name in self._names(task):
            self._folder.finish_tensor(self._shards[name], name, facts)
        self._facts[task.tensor.name] = facts["prior"]

    def flush(self) -> None:
        """Send the written bytes to the disk."""
        self._folder.flush()


@dataclass(frozen=True, slots=True)
class CutDifference:
    """The difference of one logical weight in factors.

    Attributes
    ----------
    left, right : Tensor [n, r], [r, m]
        The factors in the orientation of the MLLM's tensor.
    squared, lost
        ||D||_F^2, and how much of it cutting and rounding lose.
    """

    left: Tensor
    right: Tensor
    squared: float
    lost: float

    @property
    def rank(self) -> int:
        """Return the rank r."""
        return self.left.shape[1]


def cut_difference(
    name: str, weight: LogicalWeight, decision: Decision, settings: PriorSettings
) -> CutDifference:
    """Choose the rank of a decision's update, and share the singular values among its factors.

    Raises
    ------
    DataError
        The update of the tensor `name` is NaN or Inf.
    """
    update = decision.update
    factors = None if update is None else update.factors()
    if update is None or factors is None:
        empty = torch.empty(0, 0, dtype=torch.float32)
        return CutDifference(empty, empty, 0.0, 0.0)
    left, right = factors
    # The columns of the left factor are orthogonal, and as long as the singular values.
    energies = left.double().square().sum(0)
    found = float(energies.sum())
    total = found / max(1e-12, 1 - update.omitted**2) if found else 0.0
    if not math.isfinite(total):
        raise DataError(
            f"The difference of {name} is NaN or Inf; check the numbers of this weight in both "
            "checkpoints."
        )
    rank = settings.chosen(energies.tolist(), total) if found else 0
    roots = energies[:rank].sqrt().sqrt().float()
    pair = left[:, :rank] / roots, right[:rank].T * roots
    lost = max(0.0, total - float(energies[:rank].sum()))
    lost += lost_by_rounding(*pair, settings.dtype, name) if rank else 0.0
    first, second = pair[::-1] if weight.place.width else pair
    return CutDifference(first.contiguous(), second.T.contiguous(), total, lost)


class FactorSink(BlockSink):
    """A sink that keeps the factors of D in blocks until their ranks are known.

    A block has the orientation of the MLLM's tensor, so both are turned where its rows are stored
    as columns.
    """

    def __init__(self, settings: PriorSettings, folder: OutputFolder) -> None:
        super().__init__(folder)
        self._settings = settings
        self._notes = _Notes()

    def keep(
        self, task: WeightTask, weight: LogicalWeight, decision: Decision, read: ReadRows
    ) -> None:
        """Cut D to its rank, and put its factors."""
        cut = cut_difference(task.tensor.name, weight, decision, self._settings)
        if cut.rank:
            for side, block in (("left", cut.left), ("right", cut.right)):
                self.put(f"{weight.canonical}.{side}", tuple(block.shape), [block])
        self._notes.add(weight.canonical, squared=cut.squared, lost=cut.lost, rank=cut.rank)

    def finished(self, task: CopyTask | WeightTask) -> Any:
        """Return the engine's note from the folder's journal."""
        result = super().finished(task)
        return result.get("note") if isinstance(result, dict) else None

    def finish(self, task: CopyTask | WeightTask, note: Any) -> None:
        """Note the facts in the journal too."""
        super().finish(task, self._notes.take(note))


@dataclass(frozen=True, slots=True)
class FactorPart:
    """One part's block of a factor, and its place in the whole factor.

    Attributes
    ----------
    read
        A function that fills a tensor with the block's numbers from one of them on.
    shape
        The block's shape, [n, rank] or [rank, n].
    span, first, rank
        The place of the part, the number of its first direction among those of its matrix, and how
        many it has.
    """

    read: Callable[[int, Tensor], None]
    shape: tuple[int, ...]
    span: Span
    first: int
    rank: int


FactorBlock = tuple[Callable[[int, Tensor], None], tuple[int, ...]]
"""A function that reads a block of numbers, and its shape."""


def factor_parts(
    task: WeightTask,
    spans: Mapping[str, Span],
    ranks: Mapping[str, int],
    block: Callable[[str], FactorBlock],
) -> dict[int, list[FactorPart]]:
    """Return the blocks of one side of a tensor's factors, by matrix."""
    found: dict[int, list[FactorPart]] = {}
    for part in task.weight.slices:
        span, rank = spans[part.canonical], ranks[part.canonical]
        own = found.setdefault(span.matrix or 0, [])
        if rank:
            first = sum(each.rank for each in own)
            own.append(FactorPart(*block(part.canonical), span, first, rank))
    return found


def stored_block(folder: OutputFolder, tensor: str, side: str, canonical: str) -> FactorBlock:
    """Return a factor of one part of a tensor, which waits in an unfinished output."""
    block = folder.blocks.groups[tensor].blocks[f"{canonical}.{side}"]
    return partial(folder.blocks.read, block), block.shape


def write_factor(
    name: str,
    shape: tuple[int, ...],
    parts: Mapping[int, Sequence[FactorPart]],
    writers: Mapping[str, WriteBytes],
    dtype: str,
) -> None:
    """Put one side of a tensor's factors together, a few rows of one matrix at a time.

    Each part has directions of its own, so that an entry is zero where its row or column belongs to
    another part.
    """
    *stack, height, width = shape
    is_left = name.endswith(".left")
    for matrix in range(stack[0] if stack else 1):
        for rows in _heights(height, width):
            values = torch.zeros(rows.stop - rows.start, width, dtype=torch.float32)
            for part in parts[matrix]:
                fill = _fill_left if is_left else _fill_right
                fill(part, rows, values)
            encoded = Encoded.of(values, dtype, name)
            item, first = encoded.numbers.element_size(), matrix * height + rows.start
            writers[name](first * width * item, as_bytes(encoded.numbers))
            if encoded.scales is not None:
                writers[f"{name}.scale"](first * 4, as_bytes(encoded.scales.contiguous()))


def _fill_left(part: FactorPart, rows: slice, values: Tensor) -> None:
    """Add a part's rows of the left factor."""
    every = Span(None, 0, ((0, part.shape[0]),)) if part.span.dim else part.span
    for there, own in every.within(rows):
        numbers = torch.empty(own.stop - own.start, part.rank, dtype=torch.float32)
        part.read(own.start * part.rank, numbers)
        at = slice(there.start - rows.start, there.stop - rows.start)
        values[at, part.first : part.first + part.rank] = numbers


def _fill_right(part: FactorPart, rows: slice, values: Tensor) -> None:
    """Add a part's rows of the right factor."""
    first, last = max(rows.start, part.first), min(rows.stop, part.first + part.rank)
    if first >= last:
        return
    width = part.shape[1]
    numbers = torch.empty(last - first, width, dtype=torch.float32)
    part.read((first - part.first) * width, numbers)
    at = slice(first - rows.start, last - rows.start)
    if not part.span.dim:
        values[at] = numbers
        return
    for there, own in part.span.within(slice(0, values.shape[1])):
        values[at, there] = numbers[:, own]


def _heights(height: int, width: int) -> Iterator[slice]:
    """Cut so many rows into strips."""
    step = max(1, STRIP_ELEMENTS // max(1, width))
    return (slice(first, min(height, first + step)) for first in range(0, height, step))
