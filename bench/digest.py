"""How fast one thread takes digests of bytes: `python bench/digest.py`."""

from __future__ import annotations

import hashlib
import os
import time
import zlib
from collections.abc import Callable

SIZE = 64 << 20
PART = 256 << 10
"""Bytes at once: a strip of rows."""
ROUNDS = 5


def speed(digest: Callable[[memoryview], object], data: memoryview) -> float:
    """GB/s, the best of some rounds."""
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for position in range(0, SIZE, PART):
            digest(data[position : position + PART])
        best = min(best, time.perf_counter() - start)
    return SIZE / best / 1e9


def main() -> None:
    """Prints a line for each digest."""
    data = memoryview(os.urandom(SIZE))
    print(f"crc32    {speed(zlib.crc32, data):5.2f} GB/s")
    for name in ("sha1", "sha256", "sha512", "blake2b", "blake2s"):
        print(
            f"{name:<8} {speed(lambda part, n=name: hashlib.new(n, part).digest(), data):5.2f} GB/s"
        )


if __name__ == "__main__":
    main()
