"""Measure how much memory the machine has free, and how much this process uses."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil

_STATM = "/proc/self/statm"
_CGROUP = "/sys/fs/cgroup"
_OWN_GROUPS = "/proc/self/cgroup"


@dataclass(frozen=True, slots=True)
class Usage:
    """Resident memory in bytes: `anonymous` is allocated, `file_backed` are mapped files."""

    anonymous: int
    file_backed: int


def usage() -> Usage:
    """Return the process's present resident memory.

    Only Linux tells both kinds apart. Elsewhere all of it counts as anonymous.
    """
    try:
        # The file counts in pages. Reading it takes a quarter of the time of /proc/self/status.
        statm = os.open(_STATM, os.O_RDONLY)
        try:
            _, resident, shared = os.read(statm, 256).split()[:3]
        finally:
            os.close(statm)
    except (OSError, ValueError):
        return Usage(anonymous=psutil.Process().memory_info().rss, file_backed=0)
    return Usage(
        anonymous=(int(resident) - int(shared)) * mmap.PAGESIZE,
        file_backed=int(shared) * mmap.PAGESIZE,
    )


def available() -> int:
    """Return the bytes that can be allocated without swapping and within the limits of all groups.

    A control group is a container, or what the system confines a job to. Groups lie inside each
    other, and the page cache of a group does not count, because it is given up first.
    """
    free = int(psutil.virtual_memory().available)
    return max(0, min([free, *(limit - held for limit, held in _groups())]))


def _groups() -> Iterator[tuple[int, int]]:
    """Yield the limit of each control group that this process is in, and what the group holds."""
    try:
        lines = Path(_OWN_GROUPS).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        root, limit, anonymous = Path(_CGROUP), "memory.max", "anon"
        if controllers:
            if "memory" not in controllers.split(","):
                continue
            root, limit, anonymous = root / "memory", "memory.limit_in_bytes", "total_rss"
        inner = Path(path.lstrip("/"))
        # A container may not see the folders above its own, which is then the root.
        for folder in dict.fromkeys(root / each for each in (inner, *inner.parents)):
            try:
                most = int((folder / limit).read_text(encoding="ascii"))
                rows = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
                yield most, next(int(r.split()[1]) for r in rows if r.split()[0] == anonymous)
            except (OSError, ValueError, IndexError, StopIteration):
                continue


def release_free_memory() -> None:
    """Give the unused memory of the allocator back to the system, if the C library is glibc.

    Each thread allocates from a heap of its own, and their fragments would add up over weights.
    """
    trim = getattr(_libc(), "malloc_trim", None)
    if trim is not None:
        trim(0)


@cache
def _libc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if sys.platform == "linux" else None


class PeakSampler:
    """A context manager that samples the process's memory from a thread.

    Attributes
    ----------
    start, peak
        The process's memory when the sampler was made, and the most that it held since.
    """

    def __init__(self, interval: float = 0.01) -> None:
        self._interval = interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory-sampler", daemon=True)
        self.start = self.peak = usage()

    def sample(self) -> None:
        """Take one sample now."""
        now = usage()
        self.peak = Usage(
            anonymous=max(self.peak.anonymous, now.anonymous),
            file_backed=max(self.peak.file_backed, now.file_backed),
        )

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            self.sample()

    def __enter__(self) -> PeakSampler:
        # Where no thread can be started, the samples that are asked for must do.
        with suppress(RuntimeError):
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()
        self.sample()
