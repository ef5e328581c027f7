"""The threads that compute: what they do first, how errors and the end reach who waits."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError
from typing import Any

import pytest
import torch

from lean_merge.engine.workers import Workers, settle, start_thread, worker_pool
from lean_merge.errors import BudgetError


def test_results_come_in_the_order_of_the_items():
    with worker_pool(3) as workers:
        assert workers.map(lambda item: item * item, range(50)) == [n * n for n in range(50)]
        assert workers.map(str, []) == []


def test_what_can_wait_is_done_when_nothing_else_is_asked_for():
    order: list[str] = []
    begun, go_on = threading.Event(), threading.Event()

    def first(name: str) -> None:
        begun.set()
        assert go_on.wait(20)
        order.append(name)

    with worker_pool(1) as workers:
        jobs = workers.submit(first, ["first"])
        assert begun.wait(20)
        jobs += workers.submit(order.append, ["rows 1", "rows 2"], can_wait=True)
        jobs += workers.submit(order.append, ["pass"])
        go_on.set()
        for job in jobs:
            job.result()
    assert order == ["first", "pass", "rows 1", "rows 2"]


def test_an_error_is_raised_once_nobody_is_at_work_on_the_rest():
    at_work: set[int] = set()
    done: list[int] = []
    failed, begun = threading.Event(), threading.Barrier(2)

    def work(item: int) -> None:
        at_work.add(item)
        try:
            if item < 2:
                begun.wait(20)
            if item == 0:
                failed.set()
                raise ArithmeticError("the first")
            assert failed.wait(20)
            done.append(item)
        finally:
            at_work.remove(item)

    with worker_pool(2) as workers:
        with pytest.raises(ArithmeticError, match="the first"):
            workers.map(work, range(100))
        assert not at_work and 1 in done and len(done) < 100
        assert workers.map(str, [1]) == ["1"]


def test_an_error_does_not_hold_what_the_work_was_about():
    """So that memory is free again without the garbage collector."""

    class Large:
        alive = 0

        def __init__(self) -> None:
            Large.alive += 1

        def __del__(self) -> None:
            Large.alive -= 1

    def fail(item: int) -> None:
        large = Large()
        raise ArithmeticError(large is None)

    with worker_pool(1) as workers:
        try:
            workers.map(fail, range(3))
        except ArithmeticError:
            pass
        workers.map(str, [1])
        assert Large.alive == 0


def test_the_end_of_a_pool_reaches_who_waits():
    begun, go_on = threading.Event(), threading.Event()
    seen: list[Any] = []

    def slow(item: int) -> int:
        begun.set()
        assert go_on.wait(20)
        return item

    workers = Workers(1)
    [running, waiting] = workers.submit(slow, [1, 2])

    def wait() -> None:
        try:
            seen.append(waiting.result())
        except CancelledError:
            seen.append("cancelled")

    other = threading.Thread(target=wait)
    other.start()
    assert begun.wait(20)
    threading.Timer(0.05, go_on.set).start()
    workers.close()
    other.join(20)
    assert running.result() == 1 and seen == ["cancelled"]
    assert all(job.cancelled() for job in workers.submit(slow, [3]))
    with pytest.raises(CancelledError):
        workers.map(slow, [4])


def test_settling_leaves_nothing_running():
    with worker_pool(1) as workers:
        jobs = workers.submit(lambda item: 1 // item, [1, 0, 2])
        settle(jobs)
        assert all(job.done() for job in jobs)


def test_buffers_are_a_threads_own_and_used_again():
    with worker_pool(2) as workers:
        meet = threading.Barrier(2)

        def address(_: int) -> int:
            meet.wait(20)
            buffer = workers.buffer("a", (4, 4), torch.float32)
            assert workers.buffer("a", (2,), torch.int64).data_ptr() == buffer.data_ptr()
            assert workers.buffer("b", (2,), torch.int64).data_ptr() != buffer.data_ptr()
            return buffer.data_ptr()

        first, second = workers.map(address, range(2))
        assert first != second
        assert {*workers.map(address, range(2))} == {first, second}


def test_a_pool_that_cannot_have_its_threads_ends_in_a_sentence(monkeypatch: pytest.MonkeyPatch):
    """And in no thread, not even those that could be started."""
    started = []

    def start(thread: threading.Thread) -> None:
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        real(thread)

    real = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(BudgetError, match=r"No more threads can be started .*--threads 1"):
        with worker_pool(3):
            raise AssertionError("it was opened")
    assert len(started) == 2 and not any(thread.is_alive() for thread in started)
    with pytest.raises(BudgetError):
        start_thread(threading.Thread())
