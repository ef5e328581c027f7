"""CRC-32 of bytes that arrive in any order, from any thread.

CRC-32s of neighbouring parts combine to that of the whole (M. Adler, zlib's crc32_combine), so a
digest depends on the bytes alone and not on how they were cut.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Iterable
from functools import lru_cache

from lean_merge.output.storage import read_all

_POLYNOMIAL = 0xEDB88320
_ONE = 1 << 31
"""The polynomial 1, as the bits of a CRC-32 are ordered: the highest bit is x^0."""


def _multiply(first: int, second: int) -> int:
    """Product of two polynomials over GF(2), modulo CRC-32's."""
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
    """x^(8 length), modulo CRC-32's polynomial: what `length` bytes do to a CRC before them."""
    power, result = _ONE >> 8, _ONE
    while length:
        if length & 1:
            result = _multiply(power, result)
        power = _multiply(power, power)
        length >>= 1
    return result


def combine(first: int, second: int, length: int) -> int:
    """CRC-32 of two parts, from those of each and the `length` of the second in bytes."""
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
        self._lock = threading.Lock()

    def add(self, offset: int, data: memoryview) -> None:
        """`data` is written at `offset`."""
        run = None
        if offset not in self._starts:
            with self._lock:
                run = self._runs.pop(offset, None)
        start, digest = run or (offset, 0)
        # Outside the lock: zlib lets other threads run meanwhile.
        digest = zlib.crc32(data, digest)
        with self._lock:
            self._runs[offset + data.nbytes] = start, digest

    def take(self, start: int, length: int) -> int:
        """The digest of a range, which is then forgotten.

        Raises
        ------
        ValueError
            Not every byte of it was written, or some were twice.
        """
        with self._lock:
            inside = sorted(
                (first, end, digest)
                for end, (first, digest) in self._runs.items()
                if start <= first < start + length
            )
            position, whole = start, 0
            for first, end, digest in inside:
                if first != position:
                    break
                whole = combine(whole, digest, end - first)
                position = end
            if position != start + length or (inside and inside[-1][1] != position):
                raise ValueError(f"The {length} bytes at {start} were not written once each.")
            for _, end, _ in inside:
                del self._runs[end]
        return whole


def range_digest(descriptor: int, start: int, length: int, buffer: memoryview) -> int | None:
    """CRC-32 of bytes of a file, read through `buffer`; None if the file is shorter. OSError."""
    digest = 0
    for position in range(start, start + length, len(buffer)):
        part = buffer[: min(len(buffer), start + length - position)]
        if read_all(descriptor, part, position) != len(part):
            return None
        digest = zlib.crc32(part, digest)
    return digest
