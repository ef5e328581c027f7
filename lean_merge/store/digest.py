"""Compute the CRC-32 of bytes that arrive in any order, from any thread.

CRC-32s of neighbouring parts combine to that of the whole (M. Adler, zlib's crc32_combine), so a
digest depends on the bytes alone and not on how they were cut.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from functools import lru_cache

from lean_merge.store.storage import read_all

try:
    # It is over ten times as fast on processors that multiply without carries.
    from isal.isal_zlib import crc32 as crc32
except ImportError:
    from zlib import crc32 as crc32

_POLYNOMIAL = 0xEDB88320
_ONE = 1 << 31
"""The polynomial 1, as the bits of a CRC-32 are ordered: the highest bit is x^0."""


def _multiply(first: int, second: int) -> int:
    """Multiply two polynomials over GF(2), modulo CRC-32's."""
    product, bit = 0, _ONE
    while first:
        if first & bit:
            product ^= second
            first ^= bit
        bit >>= 1
        second = (second >> 1) ^ (_POLYNOMIAL if second & 1 else 0)
    return product


@lru_cache(maxsize=1024)
def _shift(length: int) -> int:
    """Return x^(8 length), modulo CRC-32's polynomial: what `length` bytes do to a CRC."""
    power, result = _ONE >> 8, _ONE
    while length:
        if length & 1:
            result = _multiply(power, result)
        power = _multiply(power, power)
        length >>= 1
    return result


def combine_crc32(first: int, second: int, length: int) -> int:
    """Return the CRC-32 of two joined parts from those of each; the second has `length` bytes."""
    return _multiply(_shift(length), first) ^ second


class RangeDigests:
    """The CRC-32s of the bytes that are written to one file; several threads may use it.

    Parameters
    ----------
    starts
        The offsets of the ranges that `take` will be asked for; parts do not join across them.
    """

    def __init__(self, starts: Iterable[int]) -> None:
        self._starts = frozenset(starts)
        self._runs: dict[int, tuple[int, int]] = {}
        """For each part that is written without a gap, by its start: its end and its digest."""
        self._begins: dict[int, int] = {}
        """The start of each part, by its end."""
        self._lock = threading.Lock()

    def add(self, offset: int, data: memoryview) -> None:
        """Add `data`, which is written at `offset`, to the digests."""
        with self._lock:
            start, digest = self._before(offset) or (offset, 0)
        # This is done without the lock, so that other threads can run meanwhile.
        digest = crc32(data, digest)
        end = offset + data.nbytes
        with self._lock:
            # Neighbours join at once, so that small parts in any order do not pile up.
            if (before := self._before(start)) is not None:
                start, digest = before[0], combine_crc32(before[1], digest, end - start)
            if end not in self._starts and end in self._runs:
                last, after = self._runs.pop(end)
                del self._begins[last]
                digest, end = combine_crc32(digest, after, last - end), last
            if start in self._runs or end in self._begins:
                raise ValueError(f"The bytes [{start}, {end}) were written twice.")
            self._runs[start] = end, digest
            self._begins[end] = start

    def _before(self, offset: int) -> tuple[int, int] | None:
        """Remove the part that ends at `offset`, and return its start and its digest."""
        if offset in self._starts or offset not in self._begins:
            return None
        start = self._begins.pop(offset)
        return start, self._runs.pop(start)[1]

    def take(self, start: int, length: int) -> int:
        """Return the digest of a range, which is then forgotten.

        Raises ValueError if some byte of it was not written, or was written twice.
        """
        if length == 0:
            return 0
        with self._lock:
            inside = [first for first in self._runs if start <= first < start + length]
            if inside != [start] or self._runs[start][0] != start + length:
                raise ValueError(f"The {length} bytes at {start} were not written once each.")
            end, digest = self._runs.pop(start)
            del self._begins[end]
        return digest


def range_digest(descriptor: int, start: int, length: int, buffer: memoryview) -> int | None:
    """Return the CRC-32 of bytes of a file, read through `buffer`; None if it is shorter."""
    digest = 0
    for position in range(start, start + length, len(buffer)):
        part = buffer[: min(len(buffer), start + length - position)]
        if read_all(descriptor, part, position) != len(part):
            return None
        digest = crc32(part, digest)
    return digest
