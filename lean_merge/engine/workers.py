"""Worker threads that do urgent jobs before those that can wait, with one thread per kernel."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from lean_merge.errors import BudgetError

T = TypeVar("T")
R = TypeVar("R")

_Job = tuple[Future[Any], Callable[[Any], Any], Any]


def start_thread(thread: threading.Thread) -> None:
    """Start a thread. Raises BudgetError where the system lets this process have no more."""
    try:
        thread.start()
    except RuntimeError as error:
        raise BudgetError(
            f"No more threads can be started ({error}); allow more processes (ulimit -u), or use "
            "fewer with --threads 1."
        ) from error


class Workers:
    """A pool of `count` threads, each with buffers of its own; a kernel call uses one thread.

    Results never depend on `count`: items are independent, and sums are ordered by the caller.
    """

    def __init__(self, count: int, name: str = "worker") -> None:
        self.count = count
        self._local = threading.local()
        self._urgent: deque[_Job] = deque()
        self._patient: deque[_Job] = deque()
        self._closed = False
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        try:
            for number in range(count):
                thread = threading.Thread(target=self._run, name=f"{name}_{number}", daemon=True)
                start_thread(thread)
                self._threads.append(thread)
        except BaseException:
            self.close()
            raise

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """Return the results in the order of `items`, all computed before anything that can wait.

        After an error no further item is begun. When no thread is at work on any item, the call
        raises what the function raised.
        """
        jobs = self.submit(function, items)
        try:
            return list(map(Future.result, jobs))
        finally:
            settle(jobs)
            # An error holds this frame, and through it would hold itself and the job's data.
            jobs.clear()

    def submit(
        self, function: Callable[[T], R], items: Iterable[T], *, can_wait: bool = False
    ) -> list[Future[R]]:
        """Ask for the same without waiting for it.

        Jobs that `can_wait` are done in their order while no other jobs are asked for.
        """
        jobs: list[_Job] = [(Future(), function, item) for item in items]
        with self._changed:
            if self._closed:
                settle([future for future, _, _ in jobs])
            else:
                (self._patient if can_wait else self._urgent).extend(jobs)
                self._changed.notify_all()
        return [future for future, _, _ in jobs]

    def _run(self) -> None:
        torch.set_num_threads(1)
        torch.set_flush_denormal(False)
        while (job := self._next()) is not None:
            future, function, item = job
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(item))
                except BaseException as error:
                    future.set_exception(error)
            # Otherwise this thread would hold the job's data while it waits for the next job.
            del job, future, function, item

    def _next(self) -> _Job | None:
        """Wait for the next job and return it; return None once the pool is closed."""
        with self._changed:
            while not self._closed:
                for queue in (self._urgent, self._patient):
                    if queue:
                        return queue.popleft()
                self._changed.wait()
        return None

    def buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return this thread's reused CPU buffer `name` as an uninitialised tensor of `shape`."""
        local: dict[str, Any] = self._local.__dict__
        buffers: dict[str, Tensor] = local.setdefault("buffers", {})
        views: dict[tuple[str, tuple[int, ...], torch.dtype], Tensor]
        views = local.setdefault("views", {})
        view = views.get((name, shape, dtype))
        if view is not None:
            return view
        size = math.prod(shape) * dtype.itemsize
        held = buffers.get(name)
        if held is None or held.numel() < size:
            # Views of the old buffer would keep it alive; few shapes are in use at a time.
            views.clear()
            buffers.pop(name, None)
            held = buffers[name] = torch.empty(size, dtype=torch.uint8)
        view = views[name, shape, dtype] = held[:size].view(dtype).view(shape)
        return view

    def close(self) -> None:
        """Cancel the jobs that are not begun, and wait for the threads to end."""
        with self._changed:
            self._closed = True
            settle([future for future, _, _ in (*self._urgent, *self._patient)])
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()


def settle(jobs: Sequence[Future[Any]]) -> None:
    """Cancel the jobs that are not begun, and wait until the others are over, however they end."""
    for job in jobs:
        job.cancel()
    for job in jobs:
        if not job.cancelled():
            job.exception()


@contextmanager
def worker_pool(count: int, name: str = "worker") -> Iterator[Workers]:
    """Open a pool of workers. Raises as `start_thread`."""
    workers = Workers(count, name)
    try:
        yield workers
    finally:
        workers.close()
