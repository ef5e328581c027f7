"""What goes on beside the engine's loop: analyses ahead of it, and bytes asked for and dropped."""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lean_merge.checkpoints import TensorSpec
from lean_merge.engine import ahead
from lean_merge.engine.ahead import Ahead
from lean_merge.engine.prefetch import Prefetcher
from lean_merge.engine.workers import worker_pool
from lean_merge.plan.budget import aligned

STEP = 8 << 20


@dataclass
class FakePart:
    """A part whose `weight` is the number of bytes that it wants to stay."""

    tag: int
    weight: int
    beside: bool
    number: int = 0
    tools: Any = None
    task: Any = field(
        default_factory=lambda: SimpleNamespace(resident=(1,), methods=("a",), filtered=("",))
    )


class FakeAnalyst:
    """Marks the memory that it is given, and sees who is at work at the same time."""

    def __init__(self, parts: list[FakePart]) -> None:
        self._coming = iter(parts)
        self._lock = threading.Lock()
        self.begun = 0

    def decide(self, method: Any, weight: int, *, resident: int, arena: Any, tools: Any) -> Any:
        with self._lock:
            part = next(self._coming)
            self.begun += 1
        assert part.weight == weight and arena.numel() >= weight
        arena.fill_(part.tag)
        return part, arena


PARTS = st.lists(st.tuples(st.integers(0, 300), st.booleans()), min_size=1, max_size=8)


@given(PARTS, st.booleans())
def test_analyses_share_the_arena_and_come_in_order(parts: list[tuple[int, bool]], eager: bool):
    """Marked memory stays as it is until `done`, whoever else is analysed meanwhile."""
    all_parts = [FakePart(tag + 1, *part) for tag, part in enumerate(parts)]
    sizes = [aligned(part.weight) for part in all_parts]
    paired = [aligned(part.weight) for part in all_parts if part.beside]
    plan = SimpleNamespace(arena=max([*sizes, 2 * max(paired, default=0)]))
    # Two drivers would take parts in any order: the marks need them in the order of the tasks.
    with patch.object(ahead, "tile_bytes", lambda weight: weight), worker_pool(1) as drivers:
        analyst = FakeAnalyst(all_parts)
        analyses = Ahead(plan, analyst, drivers, all_parts, eager=eager)  # type: ignore[arg-type]
        for number, expected in enumerate(all_parts):
            part, arena = analyses.next()  # type: ignore[misc]
            assert part is expected
            drivers.map(lambda _: None, [0])
            pair = all_parts[number : number + 2]
            together = len(pair) == 2 and all(each.beside for each in pair)
            assert analyst.begun == number + 1 + together
            assert bool((arena == part.tag).all())
            analyses.done()
            drivers.map(lambda _: None, [0])
            assert analyst.begun >= min(number + 2, len(all_parts)) or not eager


class FakeReader:
    """Remembers what it was asked for, and knows some bytes already."""

    def __init__(self, cached: set[str]) -> None:
        self._cached = cached
        self.asked: Counter[tuple[str, int, int]] = Counter()
        self.dropped: Counter[tuple[str, int, int]] = Counter()

    def is_cached(self, spec: TensorSpec, start: int, length: int) -> bool:
        del start, length
        return spec.name in self._cached

    def prefetch(self, spec: TensorSpec, start: int, length: int) -> None:
        self.asked[spec.name, start, length] += 1

    def drop(self, spec: TensorSpec, start: int, length: int) -> None:
        assert self.asked[spec.name, start, length], "what was cached before stays"
        self.dropped[spec.name, start, length] += 1


def tensor(name: str, size: int) -> TensorSpec:
    return TensorSpec(name, "U8", (size,), Path("file"), 0, size)


@given(
    st.lists(st.lists(st.integers(1, 3 * STEP), max_size=3), min_size=1, max_size=5),
    st.sets(st.integers(0, 4)),
    st.integers(1, 4 * STEP),
)
def test_what_was_asked_for_is_dropped_once(
    sizes: list[list[int]], cached: set[int], ahead_bytes: int
):
    """All that is read ahead leaves the cache when its task is done, even as the context closes."""
    tasks = [
        [tensor(f"{task} {number}", size) for number, size in enumerate(each)]
        for task, each in enumerate(sizes)
    ]
    reader = FakeReader(
        {spec.name for task in cached & {*range(len(tasks))} for spec in tasks[task]}
    )
    with Prefetcher(reader, tasks, ahead=ahead_bytes) as prefetcher:  # type: ignore[arg-type]
        for index in range(len(tasks)):
            prefetcher.begin(index)
            prefetcher.done(index)
    assert reader.dropped == reader.asked


def waited(condition: Any) -> bool:
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.001)
    return bool(condition())


def test_no_more_is_asked_for_than_may_wait():
    tasks = [[tensor(str(number), STEP)] for number in range(6)]
    reader = FakeReader(set())
    with Prefetcher(reader, tasks, ahead=2 * STEP) as prefetcher:  # type: ignore[arg-type]
        assert waited(lambda: len(reader.asked) == 2)
        prefetcher.begin(0)
        assert waited(lambda: len(reader.asked) == 3)
        time.sleep(0.02)
        assert len(reader.asked) == 3 and not reader.dropped
        prefetcher.done(0)
        time.sleep(0.02)
        assert not reader.dropped, "its pages serve again for the next"
        prefetcher.begin(1)
        assert waited(lambda: len(reader.asked) == 4)
        assert reader.dropped == {("0", 0, STEP): 1}


def test_a_merge_that_ends_at_once_does_not_wait_for_what_is_cached():
    """Where the system is slow to tell, it is not asked about the whole of all files first."""
    asked = threading.Event()

    class Slow(FakeReader):
        def is_cached(self, spec: TensorSpec, start: int, length: int) -> bool:
            asked.set()
            time.sleep(0.02)
            return super().is_cached(spec, start, length)

    tasks = [[tensor(str(number), 100 * STEP)] for number in range(100)]
    reader = Slow(set())
    start = time.monotonic()
    with Prefetcher(reader, tasks, ahead=STEP):  # type: ignore[arg-type]
        assert asked.wait(10)
    assert time.monotonic() - start < 20 and not reader.asked


def test_nothing_is_asked_for_that_was_used_before_its_turn():
    """A merge that is faster than its read-ahead does not bring back what it is through with."""
    tasks = [[tensor(str(number), STEP)] for number in range(4)]
    reader = FakeReader(set())
    with Prefetcher(reader, tasks, ahead=STEP) as prefetcher:  # type: ignore[arg-type]
        assert waited(lambda: len(reader.asked) == 1)
        prefetcher.done(2)
        for index in range(4):
            prefetcher.begin(index)
        assert waited(lambda: ("3", 0, STEP) in reader.asked)
    assert {name for name, _, _ in reader.asked} == {"0", "3"}


@pytest.mark.parametrize("size", [0, 1, 64, 65])
def test_places_begin_at_whole_lines(size: int):
    assert aligned(size) % 64 == 0 and 0 <= aligned(size) - size < 64
    assert (
        torch.empty(aligned(size), dtype=torch.uint8)[aligned(size) // 2 // 64 * 64 :].numel() % 64
        == 0
    )
