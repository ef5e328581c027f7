"""Bring the differences of single weights from the disk, a few at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from lean_merge.drift.prior import Prior, PriorFactors
from lean_merge.drift.rectangles import Rectangle

_STRIP = 1 << 21
"""Numbers that are brought at a time."""
_HELD = 1 << 24
"""Numbers of a difference beyond which a CPU reads it again rather than holding it."""

Strip = tuple[Rectangle, int, int, Tensor]
"""A block of the model's weight, the rows (first, stop) of it, and D there [stop - first, *]."""


@dataclass(frozen=True, slots=True)
class Brought:
    """Strips of a difference that can be gone through more than once.

    Attributes
    ----------
    make
        Returns the strips, from the first.
    held
        The tensors on the device that they are made from.
    """

    make: Callable[[], Iterable[Strip]]
    held: Sequence[Tensor] = ()

    def __iter__(self) -> Iterator[Strip]:
        return iter(self.make())


@dataclass(slots=True)
class WeightDifference:
    """The difference D [out, in] of one logical weight, on the disk.

    Attributes
    ----------
    prior
        What reads it.
    name
        The tensor of the prior that holds it.
    stored
        The blocks of that tensor.
    wanted
        The blocks of the model's weight, whose rows and columns are wanted.
    keep
        Whether factors stay on the device once they are loaded.
    """

    prior: Prior
    name: str
    stored: Sequence[Rectangle]
    wanted: Sequence[Rectangle]
    keep: bool = False
    _kept: dict[Rectangle, PriorFactors] | None = None

    def bring(self, device: torch.device, dtype: torch.dtype) -> Brought:
        """Return D in strips of rows.

        Factors are brought, and multiplied strip by strip. A whole D lies on the device as long as
        the result lives; a CPU reads one again that is large.
        """
        if self.prior.weights[self.name].rank is not None:
            kept = self._kept
            if kept is None:
                kept = {each: self._factors(each, device, dtype) for each in self.stored}
            if self.keep:
                self._kept = kept
            held = [each for pair in kept.values() for each in (pair.left, pair.right)]
            return Brought(lambda: self._strips(lambda *at: _product(kept, *at)), held)

        def read() -> Iterator[Strip]:
            return self._strips(lambda *at: self._rows(device, dtype, *at))

        numbers = sum((each.stop - each.first) * (each.right - each.left) for each in self.wanted)
        if device.type == "cpu" and numbers > _HELD:
            return Brought(read)
        strips = [*read()]
        return Brought(lambda: strips, [strip for *_, strip in strips])

    def _strips(self, get: Callable[[Rectangle, int, int, int, int], Tensor]) -> Iterator[Strip]:
        for block in self.wanted:
            for stored in self.stored:
                first, end = max(block.first, stored.first), min(block.stop, stored.stop)
                # A matrix of a stack is read as a whole, however few rows of it are wanted.
                height = max(1, _STRIP // (block.right - block.left))
                height = height if stored.matrix is None else max(1, end - first)
                for start in range(first, end, height):
                    stop = min(start + height, end)
                    strip = get(stored, start, stop, block.left, block.right)
                    yield block, start, stop, strip

    def _rows(
        self, device: torch.device, dtype: torch.dtype, stored: Rectangle, *at: int
    ) -> Tensor:
        first, stop, left, right = at
        start = stored.start + first - stored.first
        if stored.matrix is None:
            rows = slice(start, start + stop - first)
            loaded = self.prior.load(self.name, device, dtype, rows=rows)
            assert not isinstance(loaded, PriorFactors)
            return loaded.matrix[:, left:right]
        rows = slice(stored.matrix, stored.matrix + 1)
        loaded = self.prior.load(self.name, device, dtype, rows=rows)
        assert not isinstance(loaded, PriorFactors)
        matrix = loaded.matrix[0].T if stored.turned else loaded.matrix[0]
        return matrix[start : start + stop - first, left:right]

    def _factors(self, stored: Rectangle, device: torch.device, dtype: torch.dtype) -> PriorFactors:
        """Return the factors of a block's rows, [rows, r] and [r, in]."""
        end = stored.start + stored.stop - stored.first
        matrix = stored.matrix
        rows = slice(stored.start, end) if matrix is None else slice(matrix, matrix + 1)
        found = self.prior.load(self.name, device, dtype, rows=rows)
        assert isinstance(found, PriorFactors)
        if matrix is None:
            return found
        left, right = found.left[0], found.right[0]
        left, right = (right.T, left.T) if stored.turned else (left, right)
        return PriorFactors(left[stored.start : end], right)


def _product(kept: dict[Rectangle, PriorFactors], stored: Rectangle, *at: int) -> Tensor:
    first, stop, left, right = at
    factors = kept[stored]
    rows = factors.left[first - stored.first : stop - stored.first]
    return rows @ factors.right[:, left:right]


def ahead(
    loads: Sequence[Callable[[], Brought]], device: torch.device, count: int
) -> Iterator[Brought]:
    """Yield what each of `loads` returns, in order, while a thread brings the next ones.

    Parameters
    ----------
    loads
        Functions that bring something to `device`.
    device
        On CUDA the thread has a stream of its own, for which the caller's stream waits.
    count
        How many are brought ahead of the one that the caller holds; 0 needs no thread.
    """
    if not count:
        for load in loads:
            yield load()
        return
    cuda: Any = torch.cuda
    stream = cuda.Stream(device) if device.type == "cuda" else None

    def bring(load: Callable[[], Brought]) -> tuple[Brought, Any]:
        if stream is None:
            return load(), None
        with cuda.device(device), cuda.stream(stream):
            return load(), stream.record_event()

    todo = iter(loads)
    with ThreadPoolExecutor(1) as thread:
        under_way = deque(thread.submit(bring, load) for load in islice(todo, count))
        while under_way:
            found, event = under_way.popleft().result()
            if event is not None:
                current = cuda.current_stream(device)
                current.wait_event(event)
                for tensor in found.held:
                    tensor.record_stream(current)
            under_way.extend(thread.submit(bring, load) for load in islice(todo, 1))
            yield found
            del found
