"""Share open files between threads, and hold only a few of them at once."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(slots=True)
class _Handle:
    descriptor: int
    users: int = 0


class DescriptorPool:
    """A pool of file descriptors by path, in which the least recently used are closed first.

    A descriptor in use is never closed, so with more than `limit` files in use at one moment the
    pool grows past `limit` for that moment.

    Parameters
    ----------
    flags
        Flags of `os.open`; close-on-exec and binary mode are added.
    limit
        The number of files to hold open, at least 1.
    sync
        Whether to fsync before closing, because a write-back error after the last close of a file
        would never be reported.
    """

    def __init__(self, flags: int, *, limit: int = 64, sync: bool = False) -> None:
        self._flags = flags | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        self._limit = limit
        self._sync = sync
        self._handles: OrderedDict[Path, _Handle] = OrderedDict()
        self._lock = threading.Lock()
        self._closed = False

    def __len__(self) -> int:
        return len(self._handles)

    @contextmanager
    def use(self, file: Path) -> Iterator[int]:
        """Hold a descriptor of `file` open inside the block. Raises OSError."""
        with self._lock:
            if self._closed:
                raise ValueError("The pool of open files is closed.")
            handle = self._handles.get(file)
            if handle is None:
                self._shrink(self._limit - 1)
                handle = self._handles[file] = _Handle(os.open(file, self._flags))
            self._handles.move_to_end(file)
            handle.users += 1
        try:
            yield handle.descriptor
        finally:
            with self._lock:
                handle.users -= 1
                if self._closed and not handle.users:
                    os.close(handle.descriptor)

    def _shrink(self, size: int) -> None:
        idle = [file for file, handle in self._handles.items() if not handle.users]
        for file in idle[: max(0, len(self._handles) - size)]:
            descriptor = self._handles.pop(file).descriptor
            try:
                if self._sync:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def close(self) -> None:
        """Close all files, those in use as soon as they are not; this may be called twice."""
        with self._lock:
            self._closed = True
            while self._handles:
                _, handle = self._handles.popitem()
                if not handle.users:
                    os.close(handle.descriptor)
