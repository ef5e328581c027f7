"""CRC-32 of bytes that arrive in any order, from any thread.

CRC-32s of neighbouring parts combine to that of the whole (M. Adler, zlib's crc32_combine), so a
digest depends on the bytes alone and not on how they were cut.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from functools import lru_cache

from lean_merge.store.storage import read_all

try:
    # Over ten times as fast where the processor multiplies without carries.
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
    """Return the CRC-32 of two parts from those of each, the second of `length` bytes."""
    return _multiply(_shift(length), first) ^ second


class RangeDigests:
    """CRC-32s of what is written to one file; threads may share one.

    Parameters
    ----------
    starts
        Offsets that begin a range to be asked for: nothing is put together across them.
    """

    def __init__(self, starts: Iterable[int]) -> None:
        self._starts = frozenset(starts)
        self._runs: dict[int, tuple[int, int]] = {}
        """Ends and digests of what is written without a gap, by where it begins."""
        self._begins: dict[int, int] = {}
        """Where each begins, by its end."""
        self._lock = threading.Lock()

    def add(self, offset: int, data: memoryview) -> None:
        """Take `data` into account, which is written at `offset`."""
        with self._lock:
            start, digest = self._before(offset) or (offset, 0)
        # Outside the lock: other threads may run meanwhile.
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
        """Take out what ends at `offset`: where it begins, and its digest."""
        if offset in self._starts or offset not in self._begins:
            return None
        start = self._begins.pop(offset)
        return start, self._runs.pop(start)[1]

    def take(self, start: int, length: int) -> int:
        """Return the digest of a range, which is then forgotten.

        Raises ValueError if not every byte of it was written, or some were twice.
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
