"""Where the time of a merge goes at 7B widths: wall and CPU seconds of its parts, by thread time.

    python bench/profile_merge.py [--size 7b] [--layers 2] [--triple FOLDER]

The functions that do the work are wrapped for one merge from a cold cache. What a function calls
that is wrapped too counts there and not here, so the parts add up. The rest of the threads' time is
waiting: for the disk's bytes to come ahead, for one another, for the end.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import measure
from measure import GB
from speed import triple_of
from synthetic import add_size, shapes_of

import lean_merge
from lean_merge.checkpoints import reader
from lean_merge.engine import scheduler, sums, taskvectors, update
from lean_merge.linalg import krylov, sketch
from lean_merge.methods import ip_merging, spectra
from lean_merge.store import folder as output

PARTS: dict[str, list[tuple[Any, str]]] = {
    "reading rows": [(reader.TensorReader, "read_spans")],
    "forming task vectors": [(taskvectors.TaskVectors, "_subtract")],
    "products": [(sums.Sums, "add")],
    "summing partial sums": [(sums.Sums, "finish")],
    "starts of sketches": [(sketch.Sketch, "__init__")],
    "Krylov steps": [(sketch.Sketch, "absorb")],
    "Ritz vectors": [(spectra, "_spectrum"), (krylov.BlockKrylov, "settled")],
    "sums of spectra": [(sketch.Sketch, "sums"), (sketch.Sketch, "own_sums")],
    "whole spectra of small weights": [(spectra, "exact_spectrum")],
    "judging and deciding": [
        (ip_merging, "align"),
        (ip_merging.IPMerging, "_judge"),
        (ip_merging.IPMerging, "_decision"),
    ],
    "adding and rounding": [(update.RowWriter, "write_tile")],
    "writing": [(output, "write_all")],
    "digests": [(output.RangeDigests, "add")],
    "flushing to the disk": [(output.OutputFolder, "flush")],
    "asking ahead": [(reader.TensorReader, "prefetch"), (reader.TensorReader, "is_cached")],
    "leaving the cache": [(reader.TensorReader, "drop")],
    "trimming the heap": [(scheduler, "release_free_memory")],
    "sealing": [(output.OutputFolder, "seal")],
}
"""Functions by what they are for; names that a module imports are wrapped where they are used."""
ALWAYS = ("reading rows", "forming task vectors", "adding and rounding", "writing", "sealing")
WORKERS = 2
BACKGROUND = {"flushing to the disk", "asking ahead", "leaving the cache"}


class Clock:
    """Wall and CPU seconds of each part, over all threads, without those of parts inside it."""

    def __init__(self) -> None:
        self.wall: dict[str, float] = defaultdict(float)
        self.cpu: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self.now: dict[str, str] = {}
        """What each thread, by name, is at."""
        self._local = threading.local()
        self._lock = threading.Lock()

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Counts the block's time as `part`."""
        inner: list[list[float]] = self._local.__dict__.setdefault("inner", [])
        inner.append([0.0, 0.0])
        name = threading.current_thread().name
        outer = self.now.get(name, "")
        self.now[name] = part
        wall, cpu = time.perf_counter(), time.thread_time()
        try:
            yield
        finally:
            spent = time.perf_counter() - wall, time.thread_time() - cpu
            self.now[name] = outer
            own = inner.pop()
            if inner:
                inner[-1] = [inner[-1][0] + spent[0], inner[-1][1] + spent[1]]
            with self._lock:
                self.wall[part] += spent[0] - own[0]
                self.cpu[part] += spent[1] - own[1]
                self.calls[part] += 1

    def wrap(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, its time counted as `part`."""

        @functools.wraps(function)
        def wrapped(*arguments: Any, **options: Any) -> Any:
            with self.timed(part):
                return function(*arguments, **options)

        return wrapped


class Sampler:
    """Counts, at intervals, how many of the workers are at something, and what the others wait for.

    A context; it samples while it is open.
    """

    def __init__(self, clock: Clock, interval: float = 0.005) -> None:
        self._clock = clock
        self._interval = interval
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="profile", daemon=True)
        self.busy: dict[int, int] = defaultdict(int)
        self.meanwhile: dict[str, int] = defaultdict(int)
        """Samples with an idle worker, by what the other threads that matter were at."""

    def _run(self) -> None:
        while not self._closed.wait(self._interval):
            now = dict(self._clock.now)
            workers = [part for name, part in now.items() if name.startswith("worker") and part]
            self.busy[len(workers)] += 1
            if len(workers) < WORKERS:
                calling = now.get("MainThread", "")
                at = [*workers, *([f"{calling} (calling thread)"] if calling else [])]
                self.meanwhile[" and ".join(at) or "nothing that is named"] += 1

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        self._thread.join()

    def report(self) -> str:
        """In two sentences."""
        total = sum(self.busy.values())
        shares = ", ".join(f"{n}: {self.busy[n] / total:.0%}" for n in sorted(self.busy))
        most = sorted(self.meanwhile.items(), key=lambda item: -item[1])[:8]
        text = "; ".join(f"{part} {count / total:.0%}" for part, count in most)
        return (
            f"Of the time, so many workers were at something: {shares}. With one idle or both, "
            f"what went on was: {text}."
        )


@dataclass(frozen=True, slots=True)
class Profile:
    """One merge: its parts, wall and CPU seconds, those of the machine's cores, and its report."""

    clock: Clock
    wall: float
    cpu: float
    cores: dict[str, float]
    workers: Sampler
    report: dict[str, Any]


def profiled(triple: Path, out: Path) -> Profile:
    """A cold merge with two workers, wrapped."""
    clock = Clock()
    recipe = lean_merge.MergeRecipe(
        base_model=str(triple / "base"),
        mllm_model=str(triple / "mllm"),
        experts=(lean_merge.Expert(str(triple / "expert")),),
    )
    measure.drop_cache(measure.weight_files(*(triple / r for r in ("base", "mllm", "expert"))))
    with ExitStack() as stack:
        for part, places in PARTS.items():
            for owner, name in places:
                wrapped = clock.wrap(part, getattr(owner, name))
                stack.enter_context(patch.object(owner, name, wrapped))
        wall, cpu = time.perf_counter(), time.process_time()
        sampler = stack.enter_context(Sampler(clock))
        cores = measure.cores_time()
        resources = lean_merge.Resources(device="cpu", threads=WORKERS)
        report = lean_merge.merge(recipe, out, resources=resources).report
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    after = measure.cores_time()
    spent = {name: after[name] - before for name, before in cores.items()}
    return Profile(clock, wall, cpu, spent, sampler, report)


def report_of(profile: Profile) -> str:
    """The parts as a table, the largest first."""
    clock, wall, cpu = profile.clock, profile.wall, profile.cpu
    assert all(clock.calls[part] for part in ALWAYS), "what is wrapped is no longer called"
    rows = []
    for part in sorted(clock.wall, key=lambda p: -clock.wall[p]):
        thread = (
            "a thread of its own" if part in BACKGROUND else f"{clock.wall[part] / wall / 2:.0%}"
        )
        rows.append(
            [part, clock.calls[part], f"{clock.wall[part]:.2f}", f"{clock.cpu[part]:.2f}", thread]
        )
    busy = sum(seconds for part, seconds in clock.wall.items() if part not in BACKGROUND)
    rest = max(0.0, 2 * wall - busy)
    rows.append(
        [
            "the rest: waiting, and what is not wrapped",
            "",
            f"{rest:.2f}",
            "",
            f"{rest / wall / 2:.0%}",
        ]
    )
    known = sum(clock.cpu.values())
    rows.append(["all", "", f"{wall:.2f} x 2", f"{cpu:.2f}, {known / cpu:.0%} named", "100%"])
    header = ["part", "calls", "wall s in threads", "CPU s", "of two workers' time"]
    return measure.table(header, rows)


def main() -> None:
    """Parse the arguments, merge, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_size(parser, size="7b", layers=2)
    parser.set_defaults(vocab=1000)
    parser.add_argument("--triple", type=Path, help="an existing triple of these shapes")
    parser.add_argument("--scratch", type=Path, help="where to write")
    arguments = parser.parse_args()
    shapes = shapes_of(arguments)
    with triple_of(arguments, shapes) as triple, tempfile.TemporaryDirectory(dir=triple) as out:
        profile = profiled(triple, Path(out) / "out")
    report = profile.report
    rows = {row["weight"] for row in report["weights"]}
    assert len(rows) == len(shapes.weights) and report["counts"]["merged"] > 0
    assert report["bytes"]["read"] == report["bytes"]["read_predicted"]
    read = report["bytes"]["read"] / GB
    print(f"{arguments.size} widths, {shapes.layers} layers, {read:.1f} GB read:\n")
    print(report_of(profile))
    phases = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in report["seconds"].items())
    cores = ", ".join(f"{seconds:.1f} s {name}" for name, seconds in profile.cores.items())
    print(f"\nPhases of the calling thread: {phases}; {profile.wall:.1f} s in all.")
    print(f"All cores of the machine together: {cores}.")
    print(profile.workers.report())


if __name__ == "__main__":
    main()
