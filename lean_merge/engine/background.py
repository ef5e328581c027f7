"""Two threads beside a merge: one brings bytes into the page cache, the other flushes files."""

from __future__ import annotations

import abc
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TypeVar

from lean_merge.checkpoints import TensorReader, TensorSpec
from lean_merge.engine.workers import start_thread

_STEP = 8 << 20
FLUSH_EVERY = 128 << 20
"""After this many bytes, written bytes are sent to the disk and finished tensors journalled."""
FLUSH_SECONDS = 5.0
"""After this many seconds the same is done, for runs that write slowly."""


B = TypeVar("B", bound="_Background")


class _Background(abc.ABC):
    """A thread that runs while the context is open; it ends soon after `_closed` is set."""

    def __init__(self, name: str) -> None:
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @abc.abstractmethod
    def _run(self) -> None:
        """Do the thread's work until `_closed` is set."""

    def __enter__(self: B) -> B:
        start_thread(self._thread)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()


class ReadAhead(_Background):
    """A thread that brings the bytes of coming tasks into the page cache before they are used.

    Bytes in the page cache are not this program's memory, and the system takes them back when it
    needs the space. If bytes do not arrive in time, nothing is lost but the overlap.

    Parameters
    ----------
    reader
        A reader for this thread alone, because the system recognises sequential reads by the open
        file.
    tasks
        The tensors that each task reads, in the order of their use.
    ahead : int
        How many bytes may wait in the cache before their task is begun.
    """

    def __init__(
        self, reader: TensorReader, tasks: Sequence[Sequence[TensorSpec]], *, ahead: int
    ) -> None:
        super().__init__("read-ahead")
        self._reader = reader
        self._tasks = tasks
        self._ahead = ahead
        self._sizes = [sum(spec.nbytes for spec in specs) for specs in tasks]
        self._fetched: list[list[tuple[TensorSpec, int, int]]] = [[] for _ in tasks]
        self._used = 0
        self._asked = 0
        self._done: deque[int] = deque()
        self._to_drop: deque[tuple[TensorSpec, int, int]] = deque()
        self._past = 0

    def begin(self, index: int) -> None:
        """Take note that task `index` is begun, so that its bytes no longer count as ahead."""
        with self._changed:
            self._used += self._sizes[index]
            self._changed.notify_all()

    def done(self, index: int) -> None:
        """Take note that task `index` needs its bytes no longer; what was fetched is dropped."""
        with self._changed:
            self._done.append(index)
            self._past = index + 1
            self._changed.notify_all()

    def _run(self) -> None:
        # Bytes that others have cached before us stay in the cache. This is found out at once,
        # because later they could not be told from bytes that the system reads ahead by itself.
        cached = bytearray(
            self._reader.is_cached(spec, start, length)
            for _, spec, start, length in self._steps()
            if not self._closed
        )
        # `cached` has one byte for each step, or fewer if the context was closed meanwhile.
        for (index, spec, start, length), was_cached in zip(self._steps(), cached, strict=False):
            if not self._wait_for_room():
                break
            # If a task was faster than this thread, its bytes are not fetched.
            if index >= self._past and not was_cached:
                self._drop(length)
                self._fetched[index].append((spec, start, length))
                self._reader.prefetch(spec, start, length)
            self._asked += length
        self._wait_until_closed()
        self._drop(self._asked)

    def _steps(self) -> Iterator[tuple[int, TensorSpec, int, int]]:
        """Yield each task, each tensor that it reads, and its next bytes by start and length."""
        for index, specs in enumerate(self._tasks):
            for spec in specs:
                for start in range(0, spec.nbytes, _STEP):
                    yield index, spec, start, min(_STEP, spec.nbytes - start)

    def _wait_for_room(self) -> bool:
        """Wait until more may be fetched; return False if the context is closed before."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._asked - self._used < self._ahead)
            return not self._closed

    def _wait_until_closed(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed)

    def _drop(self, nbytes: int) -> None:
        """Drop `nbytes` of the fetched bytes that are done with, or all if there are fewer.

        This happens just before as many are fetched, so that the same pages are used again at once.
        Memory that is free for long goes back to the host of a virtual machine, which is slow to
        return it.
        """
        with self._changed:
            while self._done:
                fetched = self._fetched[self._done.popleft()]
                self._to_drop.extend(fetched)
                fetched.clear()
        while nbytes > 0 and self._to_drop:
            spec, start, length = self._to_drop.popleft()
            self._reader.drop(spec, start, length)
            nbytes -= length


class Flusher(_Background):
    """A thread that sends written bytes to the disk while more are made, so that the end is quick.

    An error of the disk is raised by the next `wrote`, or on leaving the context.

    Parameters
    ----------
    flush
        The function that sends them.
    """

    def __init__(self, flush: Callable[[], None]) -> None:
        super().__init__("flush")
        self._flush = flush
        self._pending = 0
        self._error: Exception | None = None

    def wrote(self, count: int) -> None:
        """Take note that `count` bytes more were written."""
        with self._changed:
            if self._error is not None:
                raise self._error
            self._pending += count
            if self._pending >= FLUSH_EVERY:
                self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._closed or self._pending >= FLUSH_EVERY, timeout=FLUSH_SECONDS
                )
                if self._closed:
                    return
                pending, self._pending = self._pending, 0
            if not pending:
                continue
            try:
                self._flush()
            except Exception as error:
                with self._changed:
                    self._error = error
                return

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)
        if kind is None and self._error is not None:
            raise self._error
