"""A pool of threads with buffers of their own, and a fixed thread count for every kernel call."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")


class Workers:
    """Runs functions over items in `count` threads; each kernel call uses one thread.

    Results never depend on `count`: items are independent, and sums are ordered by the caller.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._local = threading.local()
        self._pool = ThreadPoolExecutor(
            count, thread_name_prefix="worker", initializer=lambda: torch.set_num_threads(1)
        )

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """Results in the order of `items`; after an error no further item is begun."""
        futures = [self._pool.submit(function, item) for item in items]
        _, waiting = wait(futures, return_when=FIRST_EXCEPTION)
        for future in waiting:
            future.cancel()
        wait(futures)
        for future in futures:
            if not future.cancelled() and (error := future.exception()) is not None:
                raise error
        return [future.result() for future in futures]

    def buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """This thread's reused CPU buffer of that name, as an uninitialised tensor of `shape`."""
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
            # Views of the old one would keep it alive; few shapes are in use at a time.
            views.clear()
            buffers.pop(name, None)
            held = buffers[name] = torch.empty(size, dtype=torch.uint8)
        view = views[name, shape, dtype] = held[:size].view(dtype).view(shape)
        return view

    def close(self) -> None:
        """Waits for the threads to end."""
        self._pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def full_float32() -> Iterator[None]:
    """Float32 products in full precision on every device; what the caller had set is restored."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def worker_pool(count: int) -> Iterator[Workers]:
    """Workers, with one kernel thread in the calling thread too; torch's count is restored.

    The small dense problems between passes lose more to waking threads than they gain, and with
    one thread everywhere no result depends on how many there are.
    """
    before = torch.get_num_threads()
    workers = Workers(count)
    try:
        workers.map(lambda _: None, range(count))
        torch.set_num_threads(1)
        yield workers
    finally:
        workers.close()
        torch.set_num_threads(before)
