"""The thread that reads ahead: what is asked for, and what leaves the page cache."""

from __future__ import annotations

import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from lean_merge.checkpoints import TensorSpec
from lean_merge.engine.background import ReadAhead

STEP = 8 << 20


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
    with ReadAhead(reader, tasks, ahead=ahead_bytes) as read_ahead:  # type: ignore[arg-type]
        for index in range(len(tasks)):
            read_ahead.begin(index)
            read_ahead.done(index)
    assert reader.dropped == reader.asked


def waited(condition: Any) -> bool:
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.001)
    return bool(condition())


def test_no_more_is_asked_for_than_may_wait():
    tasks = [[tensor(str(number), STEP)] for number in range(6)]
    reader = FakeReader(set())
    with ReadAhead(reader, tasks, ahead=2 * STEP) as read_ahead:  # type: ignore[arg-type]
        assert waited(lambda: len(reader.asked) == 2)
        read_ahead.begin(0)
        assert waited(lambda: len(reader.asked) == 3)
        time.sleep(0.02)
        assert len(reader.asked) == 3 and not reader.dropped
        read_ahead.done(0)
        time.sleep(0.02)
        assert not reader.dropped, "its pages serve again for the next"
        read_ahead.begin(1)
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
    with ReadAhead(reader, tasks, ahead=STEP):  # type: ignore[arg-type]
        assert asked.wait(10)
    assert time.monotonic() - start < 20 and not reader.asked


def test_nothing_is_asked_for_that_was_used_before_its_turn():
    """A merge that is faster than its read-ahead does not bring back what it is through with."""
    tasks = [[tensor(str(number), STEP)] for number in range(4)]
    reader = FakeReader(set())
    with ReadAhead(reader, tasks, ahead=STEP) as read_ahead:  # type: ignore[arg-type]
        assert waited(lambda: len(reader.asked) == 1)
        read_ahead.done(2)
        for index in range(4):
            read_ahead.begin(index)
        assert waited(lambda: ("3", 0, STEP) in reader.asked)
    assert {name for name, _, _ in reader.asked} == {"0", "3"}
