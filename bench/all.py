"""Runs every benchmark at the small sizes, in under 20 minutes, and notes the figures.

    python bench/all.py [--note] [--scratch FOLDER] [--environment FOLDER] [--only speed ...]

What they print goes to standard output as one dated section of `bench/RESULTS.md`; with --note it
is put there, above the older ones. Exit code 1 if any benchmark failed, or missed a target.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import measure
from measure import ROOT, note

RESULTS = ROOT / "bench" / "RESULTS.md"
MARK = "<!-- newest first -->\n"
LIMIT = 20 * 60


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A script, its options at the small sizes, and what it shows."""

    script: str
    options: tuple[str, ...]
    title: str

    @property
    def command(self) -> str:
        """As a person types it."""
        return " ".join(["python", f"bench/{self.script}.py", *self.options])


ALL = (
    Benchmark("speed", ("--size", "1b", "--layers", "8", "--lora"), "Time over the disk's floor"),
    Benchmark(
        "speed", ("--size", "7b", "--layers", "2", "--vocab", "8000", "--no-check"), "The same, 7B"
    ),
    Benchmark("peers", ("--size", "1b"), "Peers"),
    Benchmark("memory", (), "Memory and bytes"),
    Benchmark("budget", (), "Wide weights in little memory"),
    Benchmark("growth", (), "Growth"),
    Benchmark("profile_merge", (), "Where the time goes"),
)
KEEPS_ENVIRONMENT = {"peers"}


def run(benchmark: Benchmark, extra: Sequence[str]) -> tuple[str, bool]:
    """What it printed, as part of a section, and whether it ended well."""
    note(f"== {benchmark.command}")
    start = time.perf_counter()
    script = str(ROOT / "bench" / f"{benchmark.script}.py")
    command = [sys.executable, script, *benchmark.options, *extra]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    seconds = time.perf_counter() - start
    ending = "" if done.returncode == 0 else f"\n\nIt ended with code {done.returncode}."
    head = f"### {benchmark.title}\n\n`{benchmark.command}`, {seconds:.0f} s\n\n"
    return head + done.stdout.strip() + ending + "\n", done.returncode == 0


def section(parts: Sequence[str], seconds: float) -> str:
    """All of it under one dated heading."""
    head = f"## {measure.today()}, commit {measure.commit()}\n\n{measure.machine()}. "
    return head + f"All in {seconds / 60:.1f} minutes.\n\n" + "\n".join(parts)


def put(text: str) -> None:
    """Into the results, above the older sections."""
    before, mark, after = RESULTS.read_text(encoding="utf-8").partition(MARK)
    assert mark, f"{RESULTS} has lost its mark"
    RESULTS.write_text(f"{before}{mark}\n{text}{after}", encoding="utf-8")


def main() -> None:
    """Parse the arguments, run, print, note."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    names = list(dict.fromkeys(benchmark.script for benchmark in ALL))
    parser.add_argument("--only", choices=names, nargs="+", default=names)
    parser.add_argument("--note", action="store_true", help="put the section into the results")
    parser.add_argument("--scratch", type=Path, help="where to write")
    parser.add_argument("--environment", type=Path, help="where mergekit is, or is to be kept")
    arguments = parser.parse_args()
    start = time.perf_counter()
    parts, fine = [], True
    for benchmark in [each for each in ALL if each.script in arguments.only]:
        extra = [] if arguments.scratch is None else ["--scratch", str(arguments.scratch)]
        if benchmark.script in KEEPS_ENVIRONMENT and arguments.environment is not None:
            extra += ["--environment", str(arguments.environment)]
        text, ended_well = run(benchmark, extra)
        parts.append(text)
        fine = fine and ended_well
    seconds = time.perf_counter() - start
    text = section(parts, seconds)
    print(text)
    if arguments.note:
        put(text)
    if seconds > LIMIT:
        note(f"this took longer than {LIMIT // 60} minutes")
        fine = False
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()
