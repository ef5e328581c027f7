"""What the system's page cache holds of a file."""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import cache

import numpy as np


def cached_share(descriptor: int, start: int, length: int) -> float:
    """Share of the pages of [start, start + length) in memory; 1 where the system does not tell.

    Mapping a file reads nothing. Raises OSError.
    """
    mincore = _mincore()
    if mincore is None or length <= 0:
        return 1.0
    first = start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    size = start + length - first
    resident = np.zeros(-(-size // mmap.PAGESIZE), dtype=np.uint8)
    with mmap.mmap(descriptor, size, offset=first, access=mmap.ACCESS_READ) as mapping:
        address = np.frombuffer(mapping, dtype=np.uint8).ctypes.data
        failed = mincore(
            ctypes.c_void_p(address), ctypes.c_size_t(size), ctypes.c_void_p(resident.ctypes.data)
        )
    return 1.0 if failed else float((resident & 1).mean())


@cache
def _mincore() -> ctypes._NamedFuncPointer | None:
    return ctypes.CDLL(None, use_errno=True).mincore if sys.platform == "linux" else None
