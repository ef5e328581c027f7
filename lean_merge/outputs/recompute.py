"""Sinks that compare what a merge gives with what is stored, and store nothing."""

from __future__ import annotations

import abc
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lean_merge.checkpoints import (
    TensorReader,
    TensorSpec,
    as_bytes,
    safetensors_dtype,
    torch_dtype,
)
from lean_merge.mapping import LogicalWeight
from lean_merge.methods import Decision
from lean_merge.outputs.adapter import CutUpdate, cut_update
from lean_merge.outputs.base import ReadRows, Sink, Spans, WriteBytes
from lean_merge.outputs.peft import ADAPTER, AdapterModule, cast_factors
from lean_merge.plan import Plan
from lean_merge.store import Difference
from lean_merge.tasks import CopyTask, Note, Truncated, WeightTask, to_note
from lean_merge.tasks.tiles import STRIP_ELEMENTS

_STEP = 1 << 18
"""Bytes that are compared at once: so few that no budget need count them."""
TOLERATED = 0.001
"""Share of a weight's entries that another machine or library may round differently by more than
one unit in the last place (docs/method.md)."""
TOLERATED_UPDATE = 0.01
"""Share of its norm by which an adapter's update may differ there (docs/durability.md)."""


class Comparison(Sink):
    """A sink that compares, and tells what it found."""

    def __init__(
        self,
        plan: Plan,
        stored: Mapping[str, TensorSpec],
        reader: TensorReader,
        sampled: set[str],
    ) -> None:
        self._plan = plan
        self._stored = stored
        self._reader = reader
        self._sampled = sampled

    @abc.abstractmethod
    def differences(self, elsewhere: set[str]) -> list[Difference]:
        """What was found.

        Those tensors of the MLLM that were merged by other arithmetic, `elsewhere`, need not agree
        to the last bit.
        """


class CheckpointComparison(Comparison):
    """Compares what a merge gives with what is stored, tile by tile.

    Parameters
    ----------
    plan
        Of the merge.
    stored
        The output's tensors; others are left out.
    reader
        For them.
    sampled
        Names of the tensors in scope to merge again.
    """

    def __init__(
        self,
        plan: Plan,
        stored: Mapping[str, TensorSpec],
        reader: TensorReader,
        sampled: set[str],
    ) -> None:
        super().__init__(plan, stored, reader, sampled)
        self._off: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()
        self._local = threading.local()

    def finished(self, task: CopyTask | WeightTask) -> Any:
        """Tensors that are not to be compared count as done."""
        wanted = isinstance(task, CopyTask) or task.tensor.name in self._sampled
        return None if wanted and task.tensor.name in self._stored else to_note(Note([]))

    def writer(self, task: CopyTask | WeightTask) -> WriteBytes:
        """What stands in for writing: reads what is stored there, and counts what differs."""
        name = task.tensor.name
        kinds = (torch.uint8, torch_dtype(task.tensor.dtype))
        if isinstance(task, CopyTask):
            kinds = (torch.uint8, torch.uint8)

        def compare(offset: int, data: memoryview, spans: Spans | None = None) -> None:
            data, done, off = data.cast("B"), 0, [0, 0]
            for first, length in spans or [(0, data.nbytes)]:
                for start in range(0, length, _STEP):
                    part = data[done + start : done + min(start + _STEP, length)]
                    room = self._buffer()[: part.nbytes]
                    position = offset + first + start
                    self._reader.read_into(self._stored[name], position, as_bytes(room))
                    if not torch.equal(torch.frombuffer(part, dtype=torch.uint8), room):
                        for number, kind in enumerate(kinds):
                            of_merge = torch.frombuffer(part, dtype=kind)
                            off[number] += _apart(of_merge, room.view(kind))
                done += length
            if off[0]:
                with self._lock:
                    before = self._off.get(name, (0, 0))
                    self._off[name] = before[0] + off[0], before[1] + off[1]

        return compare

    def _buffer(self) -> Tensor:
        """This thread's."""
        found: Tensor | None = getattr(self._local, "buffer", None)
        if found is None:
            found = self._local.buffer = torch.empty(_STEP, dtype=torch.uint8)
        return found

    def differences(self, elsewhere: set[str]) -> list[Difference]:
        """As ever; `elsewhere` entries may differ by a last place, `TOLERATED` of them by more."""
        found = []
        for task in self._plan.tasks:
            name = task.tensor.name
            off, apart = self._off.get(name, (0, 0))
            file = self._plan.shards[task.shard].file_name
            if isinstance(task, CopyTask) and off:
                found.append(Difference(file, name, f"{off} bytes are not the MLLM's"))
            elif isinstance(task, WeightTask) and name not in elsewhere and off:
                found.append(Difference(file, name, f"{off} bytes are not what the merge gives"))
            elif apart > TOLERATED * _entries(task):
                fault = f"{apart} of {_entries(task)} entries differ by more than a last place"
                found.append(Difference(file, name, fault))
        return found


@dataclass
class _Found:
    """What is wrong with one module: bytes of A and of B, and the share of the update's norm."""

    module: AdapterModule
    fault: str = ""
    off_a: int = 0
    off_b: int = 0
    apart: float = 0.0


class AdapterComparison(Comparison):
    """Compares the factors that a merge gives with those of an adapter, a few rows at a time.

    Parameters
    ----------
    plan
        Of the merge.
    stored
        The adapter's tensors.
    reader
        For them.
    sampled
        Names of the MLLM's tensors to merge again, whose factors are as the journal has them.
    """

    def __init__(
        self,
        plan: Plan,
        stored: Mapping[str, TensorSpec],
        reader: TensorReader,
        sampled: set[str],
    ) -> None:
        super().__init__(plan, stored, reader, sampled)
        self._done = 0
        self._found: dict[str, _Found] = {}

    def finished(self, task: CopyTask | WeightTask) -> Any:
        """Tensors that are not to be compared count as done."""
        return None if task.tensor.name in self._sampled else to_note(Note([]))

    def keep(
        self, task: WeightTask, weight: LogicalWeight, decision: Decision, read: ReadRows
    ) -> Truncated | None:
        """Some rows of a module, or all."""
        found = self._found.setdefault(
            task.tensor.name, _Found(self._plan.adapter_module(task, ()))
        )
        update = cut_update(self._plan, decision)
        stored = self._factors(found.module, weight.shape[1], task)
        if isinstance(stored, str):
            found.fault = stored
        elif stored is not None:
            self._compare(found, update, stored, weight.row_runs)
        elif update is not None and update.rank:
            found.fault = "is missing, although the merge gives an update"
        return None if update is None else Truncated(update.rank, update.cut.error)

    def finish(self, task: CopyTask | WeightTask, note: Any) -> None:
        """The ranks of the parts add up to the module's."""
        found, done = self._found[task.tensor.name], self._done
        self._done = 0
        spec = self._stored.get(found.module.key_a)
        if spec is not None and not found.fault and done != spec.shape[0]:
            found.fault = f"has rank {spec.shape[0]}, and the merge gives {done}"

    def _factors(
        self, module: AdapterModule, in_features: int, task: WeightTask
    ) -> tuple[TensorSpec, TensorSpec] | str | None:
        """A and B as they are stored, what is wrong with them, or None if there are none."""
        a, b = self._stored.get(module.key_a), self._stored.get(module.key_b)
        if a is None and b is None:
            return None
        if a is None or b is None:
            return "has one factor only"
        rank = a.shape[0] if a.shape else 0
        wanted = (rank, in_features), (task.weight.mllm.shape[0], rank)
        dtype = safetensors_dtype(self._plan.adapter_dtype)
        if (a.shape, b.shape) != wanted or {a.dtype, b.dtype} != {dtype} or not rank:
            return f"has factors of {a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}"
        return a, b

    def _compare(
        self,
        found: _Found,
        update: CutUpdate | None,
        stored: tuple[TensorSpec, TensorSpec],
        runs: tuple[tuple[int, int], ...],
    ) -> None:
        (a, b), left = stored, self._done
        rank = 0 if update is None else update.rank
        self._done += rank
        off_a = off_b = 0
        fits = self._done <= a.shape[0]
        if fits:
            off_a = self._compare_a(a, left, update)
            off_b = self._compare_b(b, left, rank, update, runs)
            found.off_a, found.off_b = found.off_a + off_a, found.off_b + off_b
        if off_a or off_b or not fits:
            found.apart = max(found.apart, self._apart(update, a, b, runs))

    def _compare_a(self, spec: TensorSpec, first: int, update: CutUpdate | None) -> int:
        """Bytes of A's rows from `first` on that are not those of the update."""
        off = 0
        for strip in () if update is None else update.a():
            off += self._off(spec, first * strip.shape[1], strip)
            first += strip.shape[0]
        return off

    def _compare_b(
        self,
        spec: TensorSpec,
        left: int,
        rank: int,
        update: CutUpdate | None,
        runs: tuple[tuple[int, int], ...],
    ) -> int:
        """The same of B's rows in `runs`, which are zero but for columns `left` to left + rank."""
        off = done = 0
        width = spec.shape[1]
        for strip in self._rows_of_b(update, runs, width):
            for first, start, count in _inside(runs, done, strip.shape[0]):
                rows = torch.zeros(count, width)
                if rank:
                    rows[:, left : left + rank] = strip[start : start + count]
                off += self._off(spec, first * width, rows)
            done += strip.shape[0]
        return off

    def _rows_of_b(
        self, update: CutUpdate | None, runs: tuple[tuple[int, int], ...], width: int
    ) -> Iterator[Tensor]:
        height = max(1, STRIP_ELEMENTS // width)
        if update is not None and update.rank:
            yield from update.b()
            return
        rows = sum(count for _, count in runs)
        for first in range(0, rows, height):
            yield torch.empty(min(height, rows - first), 0)

    def _off(self, spec: TensorSpec, first: int, numbers: Tensor) -> int:
        """How many bytes of a factor, from its number `first` on, are not those of `numbers`."""
        dtype, off = self._plan.adapter_dtype, 0
        flat = numbers.reshape(-1)
        for start in range(0, flat.numel(), _STEP):
            part = cast_factors(flat[start : start + _STEP], dtype, spec.name)
            there = self._numbers(spec, first + start, part.numel())
            off += _apart(part.view(torch.uint8), there.view(torch.uint8))
        return off

    def _numbers(self, spec: TensorSpec, first: int, count: int) -> Tensor:
        there = torch.empty(count, dtype=self._plan.adapter_dtype)
        self._reader.read_into(spec, first * there.itemsize, as_bytes(there))
        return there

    def _apart(
        self,
        update: CutUpdate | None,
        a: TensorSpec,
        b: TensorSpec,
        runs: tuple[tuple[int, int], ...],
    ) -> float:
        """||stored - update|| / ||update|| of the rows in `runs`, Frobenius.

        By inner products of the factors, so that neither is formed: those are unique up to a
        rotation only, and another machine may find another.
        """
        rank = a.shape[0]
        kept = 0 if update is None else update.rank
        of_b = torch.zeros(rank + kept, rank + kept, dtype=torch.float64)
        of_a = torch.zeros_like(of_b)
        done = 0
        for strip in self._rows_of_b(update, runs, rank):
            for first, start, count in _inside(runs, done, strip.shape[0]):
                there = self._numbers(b, first * rank, count * rank).view(count, rank)
                both = torch.cat([there.double(), -strip[start : start + count].double()], dim=1)
                of_b.addmm_(both.T, both)
            done += strip.shape[0]
        width = max(1, STRIP_ELEMENTS // (rank + kept))
        for first in range(0, a.shape[1], width):
            count = min(width, a.shape[1] - first)
            rows = [self._numbers(a, row * a.shape[1] + first, count) for row in range(rank)]
            both = torch.stack(rows).double()
            if update is not None:
                ours = update.cut.of_right @ update.right[:, first : first + count]
                both = torch.cat([both, ours.double()])
            of_a.addmm_(both, both.T)
        products = of_a * of_b
        norm = float(products[rank:, rank:].sum())
        return (max(0.0, float(products.sum())) / norm) ** 0.5 if norm else float("inf")

    def differences(self, elsewhere: set[str]) -> list[Difference]:
        """As ever; `elsewhere` an update may differ by `TOLERATED_UPDATE` of its norm."""
        differences = []
        for name, found in self._found.items():
            module = found.module
            if name in elsewhere and found.apart:
                if not found.apart <= TOLERATED_UPDATE:
                    fault = f"the update differs from the merge's by {found.apart:.2%} of its norm"
                    differences.append(Difference(ADAPTER, module.key_b, fault))
                continue
            if found.fault:
                differences.append(Difference(ADAPTER, module.key_a, found.fault))
                continue
            for key, off in ((module.key_a, found.off_a), (module.key_b, found.off_b)):
                if off:
                    fault = f"{off} bytes are not what the merge gives"
                    differences.append(Difference(ADAPTER, key, fault))
        return differences


def _inside(
    runs: tuple[tuple[int, int], ...], start: int, count: int
) -> Iterator[tuple[int, int, int]]:
    """Rows [start, start + count) of those that lie in `runs` one after another.

    As (row of the whole, row counted from `start`, how many).
    """
    done = 0
    for first, length in runs:
        low, high = max(start, done), min(start + count, done + length)
        if low < high:
            yield first + low - done, low - start, high - low
        done += length


def _entries(task: CopyTask | WeightTask) -> int:
    return task.tensor.nbytes // torch_dtype(task.tensor.dtype).itemsize


def _apart(one: torch.Tensor, other: torch.Tensor) -> int:
    """How many bytes differ, or how many floating-point numbers by more than one last place."""
    if one.dtype == torch.uint8:
        return int((one != other).sum())
    return int(((_rank(one) - _rank(other)).abs() > 1).sum())


def _rank(numbers: torch.Tensor) -> torch.Tensor:
    """Numbers' places in the order of all numbers of their dtype, as int64; both zeros are 0."""
    width = numbers.element_size() * 8
    kind = {16: torch.int16, 32: torch.int32, 64: torch.int64}[width]
    bits = numbers.view(kind).long()
    return torch.where(bits < 0, -(bits + (1 << (width - 1))), bits)


__all__ = ["AdapterComparison", "CheckpointComparison", "Comparison"]
