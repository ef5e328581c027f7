"""Tell how much of a file the system's page cache holds, and bring more of it there."""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import cache

import numpy as np

_CACHESTAT = 451
"""The system call's number on every 64-bit Linux except Alpha; it exists since Linux 6.5."""
_MADV_HUGEPAGE = 14
_MADV_POPULATE_READ = 22
"""This advice exists since Linux 5.14."""


class _Range(ctypes.Structure):
    _fields_ = (("start", ctypes.c_uint64), ("length", ctypes.c_uint64))


class _Counts(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in ("cached", "dirty", "written_back", "evicted", "recently_evicted")
    )


def cached_share(descriptor: int, start: int, length: int) -> float:
    """Return the share of [start, start + length) in memory; 1 if the system does not tell.

    Nothing is read. Raises OSError.
    """
    if length <= 0 or (library := _library()) is None:
        return 1.0
    first, size = _from_page(start, length)
    pages = -(-size // mmap.PAGESIZE)
    count = _cachestat(library, descriptor, first, size)
    if count is None:
        count = _mincore(library, descriptor, first, size)
    return 1.0 if count is None else min(1.0, count / pages)


def _cachestat(library: ctypes.CDLL, descriptor: int, start: int, size: int) -> int | None:
    """Count the pages in memory by a system call; return None if there is no such call."""
    if sys.maxsize < 1 << 32:
        return None
    counts = _Counts()
    failed = library.syscall(
        ctypes.c_long(_CACHESTAT),
        ctypes.c_uint(descriptor),
        ctypes.byref(_Range(start, size)),
        ctypes.byref(counts),
        ctypes.c_uint(0),
    )
    return None if failed else int(counts.cached)


def _mincore(library: ctypes.CDLL, descriptor: int, start: int, size: int) -> int | None:
    """Count the pages in memory by mapping the file, which takes some fifty times longer."""
    resident = np.zeros(-(-size // mmap.PAGESIZE), dtype=np.uint8)
    with mmap.mmap(descriptor, size, offset=start, access=mmap.ACCESS_READ) as mapping:
        failed = library.mincore(
            _address(mapping), ctypes.c_size_t(size), ctypes.c_void_p(resident.ctypes.data)
        )
    return None if failed else int((resident & 1).sum())


def fetch(descriptor: int, start: int, length: int) -> bool:
    """Bring the bytes [start, start + length) of a file into memory; return False if impossible.

    They are mapped for a moment, and the system is asked to populate the mapping. It then fetches
    them in the largest pages that it has, which takes a third of the time that it needs for the
    small pages of POSIX_FADV_WILLNEED. Nothing here touches the mapping, so that a file that has
    become shorter is an error like others. Raises OSError, and ValueError if the file is shorter.
    """
    if length <= 0 or (library := _library()) is None:
        return False
    first, size = _from_page(start, length)
    with mmap.mmap(descriptor, size, offset=first, access=mmap.ACCESS_READ) as mapping:
        address = _address(mapping)
        library.madvise(address, ctypes.c_size_t(size), _MADV_HUGEPAGE)
        return not library.madvise(address, ctypes.c_size_t(size), _MADV_POPULATE_READ)


def _from_page(start: int, length: int) -> tuple[int, int]:
    """Return the start and length of the range, extended to where a mapping may begin."""
    first = start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    return first, start + length - first


def _address(mapping: mmap.mmap) -> ctypes.c_void_p:
    return ctypes.c_void_p(np.frombuffer(mapping, dtype=np.uint8).ctypes.data)


@cache
def _library() -> ctypes.CDLL | None:
    return ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
