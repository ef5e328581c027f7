"""A pool of threads with buffers of their own, and a fixed thread count for every kernel call."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from lean_merge.checkpoints import TensorReader

T = TypeVar("T")
R = TypeVar("R")


class Cancelled(Exception):
    """The pool was closed before the work was done."""


class Batch(Generic[R]):
    """A function's results over items, as threads make them."""

    def __init__(self, function: Callable[[Any], R], items: Iterable[Any]) -> None:
        self._function = function
        self._items = list(items)
        self._results: list[R | None] = [None] * len(self._items)
        self._next = 0
        self._running = 0
        self._error: BaseException | None = None
        self._moved = threading.Condition()

    def wait(self) -> None:
        """Until all items are done; raises what the function raised."""
        with self._moved:
            self._moved.wait_for(lambda: not self._running and not self.has_more)
        if self._error is not None:
            raise self._error

    def results(self) -> list[R]:
        """All of them in the order of the items, waited for as in `wait`."""
        self.wait()
        return self._results  # type: ignore[return-value]

    @property
    def has_more(self) -> bool:
        """Whether an item is not begun; after an error none is."""
        return self._error is None and self._next < len(self._items)

    def cancel(self) -> None:
        """Begin no further item; who waits for one that was not begun gets `Cancelled`."""
        with self._moved:
            if self.has_more:
                self._error = Cancelled()
            self._moved.notify_all()

    def take(self) -> Callable[[], None] | None:
        """The work on the next item, for the calling thread to do; None if there is none."""
        with self._moved:
            if not self.has_more:
                return None
            index, self._next = self._next, self._next + 1
            self._running += 1
        return lambda: self._run(index)

    def _run(self, index: int) -> None:
        error: BaseException | None = None
        try:
            self._results[index] = self._function(self._items[index])
        except BaseException as raised:
            error = raised
        with self._moved:
            self._running -= 1
            self._error = self._error or error
            self._moved.notify_all()


class Workers:
    """Runs functions over items in `count` threads; each kernel call uses one thread.

    What is asked for with `map` goes before what is asked for with `later`, which fills the gaps.
    Results never depend on `count`: items are independent, and sums are ordered by the caller.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._local = threading.local()
        self._now: deque[Batch[Any]] = deque()
        self._later: deque[Batch[Any]] = deque()
        self._closed = False
        self._moved = threading.Condition()
        self._threads = [
            threading.Thread(target=self._run, name=f"worker_{number}", daemon=True)
            for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """Results in the order of `items`; after an error no further item is begun."""
        return self.start(function, items).results()

    def start(self, function: Callable[[T], R], items: Iterable[T]) -> Batch[R]:
        """The same, not waited for."""
        return self._submit(self._now, function, items)

    def later(self, function: Callable[[T], R], items: Iterable[T]) -> Batch[R]:
        """The same again, done while the threads have nothing else to do."""
        return self._submit(self._later, function, items)

    def _submit(
        self, queue: deque[Batch[Any]], function: Callable[[T], R], items: Iterable[T]
    ) -> Batch[R]:
        batch: Batch[R] = Batch(function, items)
        with self._moved:
            if self._closed:
                batch.cancel()
            queue.append(batch)
            self._moved.notify_all()
        return batch

    def _run(self) -> None:
        torch.set_num_threads(1)
        while (work := self._take()) is not None:
            work()
            # While this thread waits for more, it would keep what the work was about.
            del work

    def _take(self) -> Callable[[], None] | None:
        """The next work, waited for; None once the pool is closed."""
        with self._moved:
            while not self._closed:
                for queue in (self._now, self._later):
                    while queue:
                        work = queue[0].take()
                        if work is not None:
                            return work
                        queue.popleft()
                self._moved.wait()
        return None

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
        """Begins nothing more, and waits for the threads to end."""
        with self._moved:
            self._closed = True
            for batch in (*self._now, *self._later):
                batch.cancel()
            self._moved.notify_all()
        for thread in self._threads:
            thread.join()


@dataclass(frozen=True, slots=True)
class Tools:
    """What a task is done with: who reads, and who computes."""

    reader: TensorReader
    workers: Workers
    non_finite: set[str] = field(default_factory=set)
    """Names of copied tensors that hold NaN or Inf."""


@dataclass(frozen=True, slots=True)
class Precision:
    """Torch's settings of how exactly products are made.

    float32 : as `torch.set_float32_matmul_precision` has it.
    bfloat16_sums : whether CUDA may add partial sums of bfloat16 products in bfloat16.
    """

    float32: str
    bfloat16_sums: bool

    @classmethod
    def now(cls) -> Precision:
        """Those in force."""
        reduced = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
        return cls(torch.get_float32_matmul_precision(), reduced)

    def set(self) -> None:
        """Put these in force."""
        torch.set_float32_matmul_precision(self.float32)
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = self.bfloat16_sums


@contextmanager
def full_float32() -> Iterator[None]:
    """Products in full precision on every device; what the caller had set is restored."""
    before = Precision.now()
    Precision("highest", False).set()
    try:
        yield
    finally:
        before.set()


@contextmanager
def worker_pool(count: int) -> Iterator[Workers]:
    """Workers, with one kernel thread in the calling thread too; torch's count is restored.

    The small dense problems between passes lose more to waking threads than they gain, and with
    one thread everywhere no result depends on how many there are.
    """
    before = torch.get_num_threads()
    workers = Workers(count)
    try:
        torch.set_num_threads(1)
        yield workers
    finally:
        workers.close()
        torch.set_num_threads(before)
