"""Compare an adapter with a merge that is made again, a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lean_merge.checkpoints import TensorReader, TensorSpec, as_bytes, safetensors_dtype
from lean_merge.mapping import LogicalWeight, MappedWeight
from lean_merge.methods import Decision
from lean_merge.outputs.base import Comparison, ReadRows
from lean_merge.outputs.cutting import CutUpdate, cut_update
from lean_merge.outputs.differing import bytes_apart
from lean_merge.outputs.peft import ADAPTER, AdapterModule, cast_factors
from lean_merge.store import Difference
from lean_merge.tasks import CopyTask, Note, Truncated, WeightTask, to_note
from lean_merge.tasks.tiles import STRIP_ELEMENTS

_STEP = 1 << 18
"""The count of numbers that are compared at once, which is too small to matter to the budget."""
TOLERATED_UPDATE = 0.01
"""On another machine, an adapter's update may differ by this share (docs/durability.md)."""


@dataclass
class _Found:
    """The differences of one module: in bytes of A and B, and as a share of the update's norm."""

    module: AdapterModule
    fault: str = ""
    off_a: int = 0
    off_b: int = 0
    apart: float = 0.0


class AdapterComparison(Comparison):
    """A sink that compares a merge's factors with those of an adapter, a few rows at a time.

    Parameters
    ----------
    module
        A function that returns the module of a tensor in scope, without its parts.
    dtype
        The dtype of the factors in the file.
    rank
        The recipe's `lora_rank`: a number, or "auto".
    stored, reader, sampled
        As `Output.comparison` has them.
    """

    def __init__(
        self,
        module: Callable[[MappedWeight], AdapterModule],
        dtype: torch.dtype,
        rank: int | str,
        stored: Mapping[str, TensorSpec],
        reader: TensorReader,
        sampled: Set[str],
    ) -> None:
        self._module = module
        self._dtype = dtype
        self._rank = rank
        self._stored = stored
        self._reader = reader
        self._sampled = sampled
        self._done = 0
        self._found: dict[str, _Found] = {}

    def finished(self, task: CopyTask | WeightTask) -> Any:
        """Report that tensors which are not to be compared are done."""
        return None if task.tensor.name in self._sampled else to_note(Note([]))

    def keep(
        self, task: WeightTask, weight: LogicalWeight, decision: Decision, read: ReadRows
    ) -> Truncated | None:
        """Compare the rows of a module that belong to a logical weight."""
        found = self._found.setdefault(task.tensor.name, _Found(self._module(task.weight)))
        update = cut_update(decision, self._rank)
        stored = self._factors(found.module, weight.shape[1], task)
        if isinstance(stored, str):
            found.fault = stored
        elif stored is not None:
            self._compare(found, update, stored, weight.row_runs)
        elif update is not None and update.rank:
            found.fault = "is missing, although the merge gives an update"
        return None if update is None else update.truncated

    def finish(self, task: CopyTask | WeightTask, note: Any) -> None:
        """Compare the sum of the parts' ranks with the module's rank."""
        found, done = self._found[task.tensor.name], self._done
        self._done = 0
        spec = self._stored.get(found.module.key_a)
        if spec is not None and not found.fault and done != spec.shape[0]:
            found.fault = f"has rank {spec.shape[0]}, and the merge gives {done}"

    def _factors(
        self, module: AdapterModule, in_features: int, task: WeightTask
    ) -> tuple[TensorSpec, TensorSpec] | str | None:
        """Return the stored A and B, the fault that they have, or None if absent."""
        a, b = self._stored.get(module.key_a), self._stored.get(module.key_b)
        if a is None and b is None:
            return None
        if a is None or b is None:
            return "has one factor only"
        rank = a.shape[0] if a.shape else 0
        wanted = (rank, in_features), (task.weight.mllm.shape[0], rank)
        dtype = safetensors_dtype(self._dtype)
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
        runs: tuple[tuple[int, int], ...],
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

    def _rows_of_b(
        self, update: CutUpdate | None, runs: tuple[tuple[int, int], ...], width: int
    ) -> Iterator[Tensor]:
        height = max(1, STRIP_ELEMENTS // width)
        if update is not None and update.rank:
            yield from update.b()
            return
        rows = sum(count for _, count in runs)
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
        runs: tuple[tuple[int, int], ...],
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
    """Yield the places of rows [start, start + count), counted through all `runs` in order.

    Each item is (row of the whole, row counted from `start`, how many rows).
    """
    done = 0
    for first, length in runs:
        low, high = max(start, done), min(start + count, done + length)
        if low < high:
            yield first + low - done, low - start, high - low
        done += length
