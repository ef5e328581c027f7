"""Keep bytes from other machines on the disk, up to a size that the user gives."""

from __future__ import annotations

import os
import threading
from bisect import bisect_right, insort
from pathlib import Path
from tempfile import mkstemp

from lean_merge.errors import OutputError

_SLOT = 4 << 20
"""The distance of places in the file; a block is no larger, and a smaller one leaves a hole."""


class DiskCache:
    """Blocks of bytes in an unnamed temporary file, which vanishes with the process.

    What is kept stays until it is forgotten, and what finds no room is not kept: of bytes that are
    read in the same order again and again, any other rule would keep fewer.

    Parameters
    ----------
    size
        The most bytes to keep.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.used = 0
        try:
            self._descriptor, name = mkstemp(prefix="lean-merge-")
            os.unlink(name)
        except OSError as error:
            raise _unwritable(error) from error
        self._lock = threading.Lock()
        self._kept: dict[Path, list[tuple[int, int, int]]] = {}
        self._free: list[int] = []
        self._slots = 0

    def put(self, file: Path, start: int, data: memoryview) -> bool:
        """Keep bytes of a file from `start` on, at most 4 MiB; return whether there is room.

        Raises
        ------
        OutputError
            The disk is full or broken.
        """
        with self._lock:
            if self.used + data.nbytes > self.size:
                return False
            self.used += data.nbytes
            slot = self._free.pop() if self._free else self._slots
            self._slots = max(self._slots, slot + 1)
        at = 0
        try:
            while at < data.nbytes:
                at += os.pwrite(self._descriptor, data[at:], slot * _SLOT + at)
        except OSError as error:
            raise _unwritable(error) from error
        with self._lock:
            insort(self._kept.setdefault(file, []), (start, start + data.nbytes, slot))
        return True

    def get(self, file: Path, start: int, out: memoryview) -> bool:
        """Fill `out` with bytes of a file from `start` on, and return whether all are kept."""
        stop, at, pieces = start + out.nbytes, start, []
        with self._lock:
            kept = self._kept.get(file, [])
            while at < stop:
                index = bisect_right(kept, (at, 1 << 63, 0)) - 1
                if index < 0 or kept[index][1] <= at:
                    return False
                first, last, slot = kept[index]
                until = min(last, stop)
                pieces.append((at - start, until - start, slot * _SLOT + at - first))
                at = until
        for begin, end, place in pieces:
            while begin < end:
                data = os.pread(self._descriptor, end - begin, place)
                out[begin : begin + len(data)] = data
                begin, place = begin + len(data), place + len(data)
        return True

    def forget(self, file: Path, start: int, stop: int) -> None:
        """Let go of the blocks that lie within the bytes [start, stop) of a file."""
        with self._lock:
            kept = self._kept.get(file, [])
            gone = [each for each in kept if start <= each[0] and each[1] <= stop]
            if gone:
                self._kept[file] = [each for each in kept if each not in gone]
                self.used -= sum(each[1] - each[0] for each in gone)
                self._free += [each[2] for each in gone]


def _unwritable(error: OSError) -> OutputError:
    return OutputError(
        f"The cache for bytes from other machines cannot be written ({error.strerror}); give less "
        "with --remote-cache, or set TMPDIR to a folder on another disk."
    )


_lock = threading.Lock()
_caches: dict[int, DiskCache] = {}


def disk_cache(size: int) -> DiskCache | None:
    """Return the process's cache of a size; None for no size."""
    if not size:
        return None
    with _lock:
        if size not in _caches:
            _caches[size] = DiskCache(size)
        return _caches[size]
