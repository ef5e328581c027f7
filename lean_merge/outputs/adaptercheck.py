"""Compare an adapter with a merge that is made again, a few rows at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lean_merge.checkpoints import TensorReader, TensorSpec, as_bytes, safetensors_dtype
from lean_merge.mapping import LogicalWeight, MappedWeight
from lean_merge.methods import Decision
from lean_merge.outputs.base import Comparison, ReadRows
from lean_merge.outputs.cutting import CutUpdate, cut_update
from lean_merge.outputs.differing import bytes_apart
from lean_merge.outputs.modules import RowRuns
from lean_merge.outputs.peft import ADAPTER, AdapterModule, cast_factors, gaps
from lean_merge.store import Difference
from lean_merge.tasks import CopyTask, Note, Truncated, WeightTask, to_note
from lean_merge.tasks.tiles import STRIP_ELEMENTS

_STEP = 1 << 18
"""The count of numbers that are compared at once, which is too small to matter to the budget."""
TOLERATED_UPDATE = 0.01
"""On another machine, an adapter's update may differ by this share (docs/durability.md)."""


@dataclass
class _Found:
    """The differences of one module: in bytes of A and B, and as a share of the update's norm.

    `tensors` are those that it is made of, of which `left` are still to come; `rank` is that of the
    parts that were compared, and `runs` are their rows.
    """

    module: AdapterModule
    tensors: tuple[str, ...]
    left: set[str]
    rank: int = 0
    runs: list[tuple[int, int, int]] = field(default_factory=list)
    fault: str = ""
    off_a: int = 0
    off_b: int = 0
    apart: float = 0.0


class AdapterComparison(Comparison):
    """A sink that compares a merge's factors with those of an adapter, a few rows at a time.

    Parameters
    ----------
    pieces
        A function that returns the modules that a logical weight of a tensor lies in, and its rows
        in each.
    tensors
        The modules to compare, by name, with the tensors in scope that each is made of.
    modules
        The same modules, without their parts.
    dtype
        The dtype of the factors in the file.
    rank, is_padded
        The recipe's `lora_rank` and `lora_uniform_rank`.
    stored, reader
        As `Output.comparison` has them.
    """

    def __init__(
        self,
        *,
        pieces: Callable[[MappedWeight, LogicalWeight], list[tuple[str, RowRuns]]],
        tensors: Mapping[str, Sequence[str]],
        modules: Mapping[str, AdapterModule],
        dtype: torch.dtype,
        rank: int | str,
        is_padded: bool,
        stored: Mapping[str, TensorSpec],
        reader: TensorReader,
    ) -> None:
        self._pieces = pieces
        self._dtype = dtype
        self._rank = rank
        self._is_padded = is_padded
        self._stored = stored
        self._reader = reader
        self._sampled = {name for names in tensors.values() for name in names}
        self._found = {
            name: _Found(modules[name], tuple(names), set(names)) for name, names in tensors.items()
        }
        specs = [stored[each.key_a] for each in modules.values() if each.key_a in stored]
        ranks = Counter(spec.shape[0] for spec in specs if spec.shape)
        self._usual = max(ranks, key=ranks.__getitem__, default=0)

    def finished(self, task: CopyTask | WeightTask) -> Any:
        """Report that tensors which are not to be compared are done."""
        return None if task.tensor.name in self._sampled else to_note(Note([]))

    def keep(
        self, task: WeightTask, weight: LogicalWeight, decision: Decision, read: ReadRows
    ) -> Truncated | None:
        """Compare the rows of the modules that belong to a logical weight."""
        update = cut_update(decision, self._rank)
        for name, runs in self._pieces(task.weight, weight):
            found = self._found.get(name)
            if found is None:
                continue
            stored = self._factors(found.module)
            if isinstance(stored, str):
                found.fault = stored
            elif stored is not None:
                self._compare(found, update, stored, runs)
            elif update is not None and update.rank:
                found.fault = "is missing, although the merge gives an update"
        return None if update is None else update.truncated

    def finish(self, task: CopyTask | WeightTask, note: Any) -> None:
        """Look at what no part fills, in the modules that this was the last tensor of."""
        for found in self._found.values():
            if task.tensor.name not in found.left:
                continue
            found.left.remove(task.tensor.name)
            stored = self._factors(found.module)
            if not found.left and isinstance(stored, tuple) and not found.fault:
                self._compare_rest(found, *stored)

    def _compare_rest(self, found: _Found, a: TensorSpec, b: TensorSpec) -> None:
        """Compare the sum of the parts' ranks with the module's, and what is left with zeros."""
        rank, module = a.shape[0], found.module
        if found.rank > rank or (found.rank < rank and not self._is_padded):
            found.fault = f"has rank {rank}, and the merge gives {found.rank}"
            return
        if self._is_padded and rank != self._usual:
            found.fault = f"has rank {rank}, and others have {self._usual}"
            return
        for row in range(found.rank, rank):
            zeros = torch.zeros(1, module.in_features, dtype=torch.float32)
            found.off_a += self._off(a, row * module.in_features, zeros)
        for first, count in gaps(found.runs, module.out_features):
            found.off_b += self._compare_b(b, 0, 0, None, ((0, first, count),))

    def _factors(self, module: AdapterModule) -> tuple[TensorSpec, TensorSpec] | str | None:
        """Return the stored A and B, the fault that they have, or None if absent."""
        a, b = self._stored.get(module.key_a), self._stored.get(module.key_b)
        if a is None and b is None:
            return None
        if a is None or b is None:
            return "has one factor only"
        rank = a.shape[0] if a.shape else 0
        wanted = (rank, module.in_features), (module.out_features, rank)
        dtype = safetensors_dtype(self._dtype)
        if (a.shape, b.shape) != wanted or {a.dtype, b.dtype} != {dtype} or not rank:
            return f"has factors of {a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}"
        return a, b

    def _compare(
        self,
        found: _Found,
        update: CutUpdate | None,
        stored: tuple[TensorSpec, TensorSpec],
        runs: RowRuns,
    ) -> None:
        (a, b), left = stored, found.rank
        rank = 0 if update is None else update.rank
        found.rank += rank
        found.runs += runs
        off_a = off_b = 0
        fits = found.rank <= a.shape[0]
        if fits:
            off_a = self._compare_a(a, left, update)
            off_b = self._compare_b(b, left, rank, update, runs)
            found.off_a, found.off_b = found.off_a + off_a, found.off_b + off_b
        if off_a or off_b or not fits:
            found.apart = max(found.apart, self._apart(update, a, b, runs))

    def _compare_a(self, spec: TensorSpec, first: int, update: CutUpdate | None) -> int:
        """Count the bytes of A's rows, from `first` on, that differ from the update's."""
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
        runs: RowRuns,
    ) -> int:
        """Count them in B's rows in `runs`, where the update has `rank` columns from `left` on."""
        off = done = 0
        width = spec.shape[1]
        for strip in self._rows_of_b(update, runs, width):
            for first, start, count in _inside(runs, done, strip.shape[0]):
                rows = torch.zeros(count, width, dtype=torch.float32)
                if rank:
                    rows[:, left : left + rank] = strip[start : start + count]
                off += self._off(spec, first * width, rows)
            done += strip.shape[0]
        return off

    def _rows_of_b(self, update: CutUpdate | None, runs: RowRuns, width: int) -> Iterator[Tensor]:
        height = max(1, STRIP_ELEMENTS // width)
        if update is not None and update.rank:
            yield from update.b()
            return
        rows = max(source + count for source, _, count in runs)
        for first in range(0, rows, height):
            yield torch.empty(min(height, rows - first), 0, dtype=torch.float32)

    def _off(self, spec: TensorSpec, first: int, numbers: Tensor) -> int:
        """Count the bytes of a factor, from its number `first` on, that differ from `numbers`."""
        dtype, off = self._dtype, 0
        flat = numbers.reshape(-1)
        for start in range(0, flat.numel(), _STEP):
            part = cast_factors(flat[start : start + _STEP], dtype, spec.name)
            there = self._numbers(spec, first + start, part.numel())
            off += bytes_apart(part.view(torch.uint8), there.view(torch.uint8))
        return off

    def _numbers(self, spec: TensorSpec, first: int, count: int) -> Tensor:
        there = torch.empty(count, dtype=self._dtype)
        self._reader.read_into(spec, first * there.itemsize, as_bytes(there))
        return there

    def _apart(
        self,
        update: CutUpdate | None,
        a: TensorSpec,
        b: TensorSpec,
        runs: RowRuns,
    ) -> float:
        """Compute ||stored - update|| / ||update||, Frobenius, of the rows in `runs`.

        It is computed from inner products of the factors, so that neither matrix is formed. The
        factors themselves are unique only up to a rotation, which may differ between machines.
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

    def differences(self, elsewhere: Set[str]) -> list[Difference]:
        """Return the differences.

        The update of a tensor in `elsewhere` may differ by `TOLERATED_UPDATE` of its norm.
        """
        differences = []
        for found in self._found.values():
            module = found.module
            if found.apart and not elsewhere.isdisjoint(found.tensors):
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


def _inside(runs: RowRuns, start: int, count: int) -> Iterator[tuple[int, int, int]]:
    """Yield the places in the module of an update's rows [start, start + count).

    Each item is (row of the module, row counted from `start`, how many rows).
    """
    for source, first, length in runs:
        low, high = max(start, source), min(start + count, source + length)
        if low < high:
            yield first + low - source, low - start, high - low
