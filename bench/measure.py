"""What the benchmarks share: floors of the disk, processes under watch, tables, and the machine.

The disk's floor is measured in two ways. `buffered` is what the targets are stated against: every
byte of the inputs read once, one file after another, then as many bytes written as the output has,
with fsync, both through the page cache. `direct` does the same past the page cache (O_DIRECT),
which is a stricter floor where filling the cache costs time of its own, as in virtual machines.
"""

from __future__ import annotations

import datetime
import mmap
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psutil
import torch

from lean_merge.sizes import format_size

ROOT = Path(__file__).parents[1]
MIB, GB = 1 << 20, 10**9
CHUNK = 8 << 20
"""Bytes of one read or write of a floor."""
_PAGE = 4096
_INTERVAL = 0.01
"""Seconds between two looks at a process's memory."""


@dataclass(frozen=True, slots=True)
class Floor:
    """Seconds of reading the inputs and of writing the output, and what others took meanwhile."""

    read: float
    write: float
    others: float

    @property
    def total(self) -> float:
        """Both, one after the other."""
        return self.read + self.write


@dataclass(frozen=True, slots=True)
class Finished:
    """A process that ended well: wall seconds, CPU seconds, peak bytes, what it printed.

    `others` is the share of all cores' time that other processes took meanwhile.
    """

    seconds: float
    user: float
    system: float
    peak_anonymous: int
    peak_rss: int
    others: float
    output: str


def weight_files(*folders: Path) -> list[Path]:
    """The safetensors files of checkpoints, in order."""
    return [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]


def total_bytes(files: Iterable[Path]) -> int:
    """Of all of them."""
    return sum(file.stat().st_size for file in files)


def drop_cache(files: Iterable[Path]) -> None:
    """Make the page cache forget these files, so that the next read is the disk's."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def floor(files: Sequence[Path], written: int, *, direct: bool) -> Floor:
    """Time of reading `files` cold and writing `written` bytes beside the first of them.

    Raises OSError where `direct` is not to be had on the file system.
    """
    drop_cache(files)
    others = Others()
    read = sequential_read(files, direct=direct)
    write = sequential_write(files[0].parent / "floor.partial", written, direct=direct)
    return Floor(read, write, others.share())


def sequential_read(files: Sequence[Path], *, direct: bool) -> float:
    """Seconds of reading every byte of `files`, one after another."""
    flags = os.O_RDONLY | (os.O_DIRECT if direct else 0)
    with mmap.mmap(-1, CHUNK) as buffer:
        start = time.perf_counter()
        for file in files:
            descriptor = os.open(file, flags)
            try:
                count = 0
                # A direct read that is not a whole number of blocks is the last.
                while (got := os.readv(descriptor, [buffer])) == CHUNK:
                    count += got
                assert count + got == os.fstat(descriptor).st_size, file
            finally:
                os.close(descriptor)
        return time.perf_counter() - start


def sequential_write(file: Path, size: int, *, direct: bool) -> float:
    """Seconds of writing `size` bytes to a new file, fsync included; the file is removed.

    Direct writes go to a preallocated file, without which each would wait for the journal.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | (os.O_DIRECT if direct else 0)
    with mmap.mmap(-1, CHUNK) as buffer:
        buffer[:] = os.urandom(1 << 16) * (CHUNK >> 16)
        data = memoryview(buffer)
        start = time.perf_counter()
        descriptor = os.open(file, flags)
        try:
            if direct:
                os.posix_fallocate(descriptor, 0, size)
            for offset in range(0, size, CHUNK):
                count = min(CHUNK, size - offset)
                count += -count % _PAGE if direct else 0
                assert os.pwrite(descriptor, data[:count], offset) == count
            os.ftruncate(descriptor, size)
            os.fsync(descriptor)
            return time.perf_counter() - start
        finally:
            os.close(descriptor)
            file.unlink()
            data.release()


def watch(command: Sequence[str | Path], **environment: str) -> Finished:
    """Run a command to its end, sampling its memory and that of its children.

    Raises RuntimeError with what it printed if it fails.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    others = Others()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        process = subprocess.Popen(
            [str(part) for part in command],
            stdout=out,
            stderr=errors,
            env={**os.environ, **environment},
        )
        anonymous = rss = 0
        try:
            while process.poll() is None:
                now = _memory(process.pid)
                anonymous, rss = max(anonymous, now[0]), max(rss, now[1])
                time.sleep(_INTERVAL)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        seconds = time.perf_counter() - start
        out.seek(0)
        errors.seek(0)
        text = out.read().decode()
        if process.returncode != 0:
            said = text + errors.read().decode(errors="replace")
            raise RuntimeError(f"{command[0]} ended with {process.returncode}: {said[-4000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    return Finished(seconds, user, system, anonymous, rss, others.share(), text)


def _memory(pid: int) -> tuple[int, int]:
    """Anonymous and resident bytes of a process and its children."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    except OSError:
        children = []
    fields = [_status(each) for each in (pid, *map(int, children))]
    return sum(f.get("RssAnon", 0) for f in fields), sum(f.get("VmRSS", 0) for f in fields)


def _status(pid: int) -> dict[str, int]:
    """The sizes in bytes that Linux tells of a process; none once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    parts = [line.split() for line in lines if line.endswith(" kB")]
    return {name.rstrip(":"): int(value) * 1024 for name, value, _ in parts}


def until_synced(files: Iterable[Path]) -> float:
    """Seconds until these files are on the disk: what a program left to the system, if it did."""
    start = time.perf_counter()
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    return time.perf_counter() - start


@contextmanager
def scratch(folder: Path | None, needed: int) -> Iterator[Path]:
    """A new folder with `needed` bytes of disk free, removed afterwards; in `folder` if given.

    Raises SystemExit, saying what lacks.
    """
    with tempfile.TemporaryDirectory(prefix="lean-merge-bench-", dir=folder) as made:
        free = shutil.disk_usage(made).free
        if free < needed * 1.05:
            raise SystemExit(
                f"This needs {format_size(needed)} of disk and {format_size(free)} are free; "
                "choose another place with --scratch, or fewer --layers."
            )
        yield Path(made)


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    assert all(len(line) == len(header) for line in lines), header
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median, and all values in the order measured."""
    each = ", ".join(f"{value:.{digits}f}" for value in values)
    return f"{median(values):.{digits}f} ({each})"


class Others:
    """What processes other than this one and its finished children take of the cores from now on.

    Threads of the system are among them: those that write back, and that free what is dropped.
    """

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._before = self._work()

    def _work(self) -> float:
        kinds = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
        own = sum(used.ru_utime + used.ru_stime for used in map(resource.getrusage, kinds))
        return cores_time()["at work"] - own

    def share(self) -> float:
        """Of all cores' time since the start, not below 0."""
        total = (time.perf_counter() - self._start) * (os.cpu_count() or 1)
        return max(0.0, (self._work() - self._before) / total)


def cores_time() -> dict[str, float]:
    """Seconds that all cores together spent so far: at work, idle, waiting for the disk, stolen."""
    first = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0]
    user, nice, system, idle, waiting, irq, softirq, stolen = map(int, first.split()[1:9])
    counts = {
        "at work": user + nice + system + irq + softirq,
        "idle": idle,
        "waiting for the disk": waiting,
        "taken by the host": stolen,
    }
    return {name: count / os.sysconf("SC_CLK_TCK") for name, count in counts.items()}


def cpu(runs: Sequence[Finished]) -> str:
    """Median CPU seconds, in the program and in the system."""
    user, system = (median(getattr(run, part) for run in runs) for part in ("user", "system"))
    return f"{user:.1f} + {system:.1f}"


def note(text: str) -> None:
    """Progress, for whoever waits; results go to standard output."""
    print(text, file=sys.stderr, flush=True)


def machine() -> str:
    """What decides the figures, in a line."""
    cores = len(os.sched_getaffinity(0))
    memory = round(psutil.virtual_memory().total / 2**30)
    info = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    bf16 = "AVX512-bf16" if "avx512_bf16" in info else "no bf16 arithmetic"
    virtual = ", virtual machine" if "hypervisor" in info else ""
    return f"{cores} cores, {bf16}, {memory} GiB{virtual}, torch {torch.__version__}"


def commit() -> str:
    """The short hash that is checked out, with a plus sign if files are changed."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "lean_merge", "bench/*.py")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def today() -> str:
    """The date, as in the results."""
    return datetime.date.today().isoformat()
