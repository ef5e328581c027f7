"""Bring bytes from other machines in the order of their use, many ranges at a time."""

from __future__ import annotations

import threading
from bisect import bisect_right, insort
from collections import deque
from itertools import islice
from pathlib import Path

import numpy as np

from lean_merge.checkpoints.elsewhere import FAR_FILES, ON_THE_WAY, Arrivals, Ranges, Room, Tasks
from lean_merge.checkpoints.remote.client import (
    MOST_CONNECTIONS,
    TRAFFIC,
    ClosedError,
    RangedFile,
)
from lean_merge.checkpoints.remote.diskcache import disk_cache
from lean_merge.errors import BudgetError, CheckpointError, LeanMergeError

BLOCK = 4 << 20
"""The most bytes that one request asks for."""
_LEAST_CONNECTIONS = 8
_LOOKAHEAD = 64
"""Among so many coming blocks, those that follow each other in their file are joined."""


class _Arrival:
    """Bytes [start, stop) of a file, which come for one task.

    `unread` counts the bytes that nobody has read yet. Where a block is `kept`, in "memory" or on
    "disk", it stays until its task is done; if it is not (""), it goes once all of it is read.
    """

    __slots__ = ("data", "error", "file", "is_here", "kept", "start", "stop", "task", "unread")

    def __init__(self, file: Path, start: int, stop: int, task: int, *, kept: str) -> None:
        self.file, self.start, self.stop, self.task, self.kept = file, start, stop, task, kept
        self.unread = stop - start
        self.data: memoryview | None = None
        self.is_here = False
        self.error: Exception | None = None

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


class MovingWindow(Arrivals):
    """A window of bytes from other machines that moves over the tasks in their order.

    Several connections fetch blocks, as many as bandwidth times delay asks for. A task that takes
    no more than the room less `ON_THE_WAY` is held whole until it is done, so that each of its
    bytes travels once however often it is read. A larger one goes to the disk as it comes, if there
    is room for it, or else is let go as it is read. Tasks are done one after the other, so the
    first that is not done always has room. Bytes that no task names are fetched when they are asked
    for.

    Parameters
    ----------
    tasks
        The parts of tensors that each task reads, in order; those in local files are passed over.
    room
        The most bytes to hold in memory, and to keep on the disk.
    again
        Whether the same bytes will be read again after all tasks are done, so that the disk is to
        keep what it has room for.
    """

    def __init__(self, tasks: Tasks, room: Room, *, again: bool) -> None:
        self._tasks = [
            [(spec.file, spec.offset, spec.nbytes) for spec in specs if spec.file in FAR_FILES]
            for specs in tasks
        ]
        self._room = max(room.memory, ON_THE_WAY)
        self._disk = disk_cache(room.disk)
        self._again = again
        self._changed = threading.Condition()
        self._closed = threading.Event()
        self._queue: deque[_Arrival] = deque()
        self._blocks: dict[Path, list[_Arrival]] = {}
        self._listed = self._first = 0
        self._held = self._busy = self._promised = 0
        self._threads: list[threading.Thread] = []
        for number in range(MOST_CONNECTIONS):
            thread = threading.Thread(target=self._run, name=f"arrivals_{number}", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                if self._threads:
                    break
                raise BudgetError(
                    f"No more threads can be started ({error}); allow more processes (ulimit -u)."
                ) from error
            self._threads.append(thread)

    def close(self) -> None:
        with self._changed:
            self._closed.set()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def done(self, index: int) -> None:
        with self._changed:
            self._first = index + 1
            self._listed = max(self._listed, self._first)
            for file, blocks in self._blocks.items():
                for block in blocks:
                    if block.task <= index and block.data is not None and block.is_here:
                        self._let_go(block)
                    if block.task <= index and self._disk is not None and not self._again:
                        self._disk.forget(file, block.start, block.stop)
                self._blocks[file] = [block for block in blocks if block.task > index]
            self._queue = deque(block for block in self._queue if block.task > index)
            self._changed.notify_all()

    # --- reading ----------------------------------------------------------------------------------

    def read(self, file: Path, ranges: Ranges, out: memoryview) -> None:
        at = 0
        first, last = min(start for start, _ in ranges), max(stop for _, stop in ranges)
        if not self._knows(file, first, last):
            FAR_FILES[file].read(ranges, out)
            return
        for start, stop in ranges:
            while start < stop:
                block, until = self._next(file, start, stop)
                part = out[at : at + until - start]
                if block is None:
                    FAR_FILES[file].read([(start, until)], part)
                else:
                    self._copy(block, start, part)
                at, start = at + until - start, until

    def _knows(self, file: Path, first: int, last: int) -> bool:
        """Return whether any block of the tasks under way holds any byte of [first, last)."""
        with self._changed:
            while self._listed <= self._first and self._listed < len(self._tasks):
                self._list_next()
            blocks = self._blocks.get(file, ())
            return any(block.start < last and block.stop > first for block in blocks)

    def _next(self, file: Path, start: int, stop: int) -> tuple[_Arrival | None, int]:
        """Return the block that holds the byte `start`, if there is one, and up to where."""
        with self._changed:
            blocks = self._blocks.get(file, [])
            at = bisect_right(blocks, start, key=_start_of)
            # Blocks of several tasks may overlap, and the earliest task's is there first.
            holding = [each for each in blocks[max(0, at - 8) : at] if each.stop > start]
            if holding:
                block = min(holding, key=lambda each: each.task)
                return block, min(stop, block.stop)
            following = blocks[at].start if at < len(blocks) else stop
            return None, min(stop, following)

    def _copy(self, block: _Arrival, start: int, out: memoryview) -> None:
        with self._changed:
            self._changed.wait_for(lambda: block.is_here or self._closed.is_set())
            if block.error is not None:
                raise block.error
            if not block.is_here:
                raise ClosedError
            data = block.data
        if data is None:
            if self._disk is not None and self._disk.get(block.file, start, out):
                return
            # It was read before, and is not kept.
            FAR_FILES[block.file].read([(start, start + out.nbytes)], out)
            return
        out[:] = data[start - block.start : start - block.start + out.nbytes]
        if block.kept != "memory":
            with self._changed:
                block.unread -= out.nbytes
                if block.unread <= 0 and block.data is not None:
                    self._let_go(block)
                    self._blocks[block.file].remove(block)
                    self._changed.notify_all()

    def _let_go(self, block: _Arrival) -> None:
        self._held -= block.nbytes
        block.data = None

    # --- fetching ---------------------------------------------------------------------------------

    def _run(self) -> None:
        while (blocks := self._take()) is not None:
            error: Exception | None = None
            promised = blocks[0].nbytes * (blocks[0].kept == "disk")
            file = FAR_FILES[blocks[0].file]
            assert isinstance(file, RangedFile)
            try:
                self._fetch(file, blocks)
            except (LeanMergeError, ClosedError) as failure:
                error = failure
            except Exception as failure:
                error = CheckpointError(f"{file.label}: cannot be read ({type(failure).__name__}).")
            with self._changed:
                self._busy -= 1
                self._promised -= promised
                for block in blocks:
                    block.is_here, block.error = True, error
                    if block.task < self._first or block.kept == "disk":
                        self._let_go(block)
                self._changed.notify_all()

    def _fetch(self, file: RangedFile, blocks: list[_Arrival]) -> None:
        """Fill blocks that follow each other, from the disk if it has them; keep there what may."""
        parts = [block.data for block in blocks if block.data is not None]
        if self._disk is None:
            file.fetch(blocks[0].start, parts, self._closed)
            return
        (block,), (data,) = blocks, parts
        if self._disk.get(block.file, block.start, data):
            return
        file.fetch(block.start, parts, self._closed)
        is_kept = (block.kept == "disk" or self._again) and self._disk.put(
            block.file, block.start, data
        )
        if block.kept == "disk" and not is_kept:
            block.kept = ""

    def _take(self) -> list[_Arrival] | None:
        """Wait until there is room for the next blocks, and return them; None in the end."""
        with self._changed:
            while not self._closed.is_set():
                while len(self._queue) < _LOOKAHEAD and self._listed < len(self._tasks):
                    self._list_next()
                if not self._queue and self._listed >= len(self._tasks):
                    return None
                if self._queue and self._busy < self._wanted and self._has_room():
                    return self._taken()
                self._changed.wait()
        return None

    @property
    def _wanted(self) -> int:
        """Return how many requests keep the link full while each waits for its first byte."""
        needed = 2 + int(2 * TRAFFIC.under_way / BLOCK)
        return min(MOST_CONNECTIONS, max(_LEAST_CONNECTIONS, needed))

    def _has_room(self) -> bool:
        block = self._queue[0]
        if block.kept == "disk" and block.task > self._first and self._disk is not None:
            # Earlier tasks give their room on the disk back when they are done.
            if self._disk.used + self._promised + block.nbytes > self._disk.size:
                return False
        return not self._held or self._held + block.nbytes <= self._room

    def _taken(self) -> list[_Arrival]:
        blocks = [self._queue.popleft()]
        size = blocks[0].nbytes
        # Blocks that come before their turn must leave the first task its room.
        most = min(BLOCK, self._room - self._held, size + ON_THE_WAY // 2 - self._early)
        for block in [*islice(self._queue, _LOOKAHEAD if self._disk is None else 0)]:
            last = blocks[-1]
            follows = block.file == last.file and block.start == last.stop
            if follows and size + block.nbytes <= most:
                self._queue.remove(block)
                blocks.append(block)
                size += block.nbytes
        for block in blocks:
            block.data = np.empty(block.nbytes, dtype=np.uint8).data
        self._held += size
        self._promised += size * (blocks[0].kept == "disk")
        self._busy += 1
        return blocks

    @property
    def _early(self) -> int:
        """Return the bytes of blocks that were taken before those of an earlier task."""
        turn = self._queue[0].task if self._queue else len(self._tasks)
        blocks = (block for blocks in self._blocks.values() for block in blocks)
        return sum(each.nbytes for each in blocks if each.task > turn and each.data is not None)

    def _list_next(self) -> None:
        """List the blocks of the next task."""
        parts = self._tasks[self._listed]
        whole = sum(nbytes for _, _, nbytes in parts)
        kept = "memory" if whole <= self._room - ON_THE_WAY else ""
        if not kept and self._disk is not None and whole <= self._disk.size:
            kept = "disk"
        for file, offset, nbytes in parts:
            for start in range(offset, offset + nbytes, BLOCK):
                stop = min(start + BLOCK, offset + nbytes)
                block = _Arrival(file, start, stop, self._listed, kept=kept)
                self._queue.append(block)
                insort(self._blocks.setdefault(file, []), block, key=_start_of)
        self._listed += 1


def _start_of(block: _Arrival) -> int:
    return block.start
