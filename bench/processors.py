"""How far the numerical tests stay below their accuracy bars, under several instruction sets.

    python bench/processors.py [TESTS ...] [--quick] [--note] [--only NAME ...] [-n WORKERS]

The tests of linear algebra, of methods, and of the engine against the oracle run once for each
instruction set, in a process that may use no other; those that this processor lacks are named and
left out. Each kind of bfloat16 product in `tests/support/bfloat16.py` is tried under all of them.
For every bar the largest error is printed, and the margin: how many times larger it might be. With
--quick only sketches that once got worse as they went on are tried, and not under the largest set,
under which all other tests run. With --note the
table goes into `bench/RESULTS.md`. Exit code 1 if any test fails.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import measure
import torch
from all import put
from measure import ROOT, note, table

TESTS = ("linalg", "methods", "engine/test_numbers.py", "test_end_to_end.py")
QUICK = (
    "linalg/test_linalg.py",
    *("--noconftest", "-k", "goes_on and half and (once or processor or 256)"),
)


@dataclass(frozen=True, slots=True)
class Instructions:
    """A set of instructions, what torch calls the extension that it needs, and how to force it."""

    name: str
    needs: str
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_here(self) -> bool:
        """Whether this processor has them."""
        tell = getattr(torch.cpu, f"_is_{self.needs}_supported", None)
        return not self.needs or (tell is not None and bool(tell()))


def onednn(limit: str, needs: str, others: str) -> Instructions:
    """Instructions up to a limit of oneDNN's; `others` is the limit of torch's and of MKL's."""
    environment = {
        "ONEDNN_MAX_CPU_ISA": limit,
        "ATEN_CPU_CAPABILITY": others.lower(),
        "MKL_ENABLE_INSTRUCTIONS": others,
    }
    return Instructions(limit, needs, environment)


ALL = (
    Instructions("default", "", {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}),
    onednn("AVX2", "avx2", "AVX2"),
    onednn("AVX512_CORE", "avx512", "AVX512"),
    onednn("AVX512_CORE_BF16", "avx512_bf16", "AVX512"),
    onednn("AVX512_CORE_AMX", "amx_tile", "AVX512"),
)


def smaller() -> tuple[Instructions, ...]:
    """All but the largest that this processor has; at least the first."""
    return tuple(one for one in ALL if one.is_here)[:-1] or ALL[:1]


@dataclass(frozen=True, slots=True)
class Run:
    """What the tests gave under one instruction set: did they pass, and the largest errors."""

    passed: bool
    seconds: float
    worst: Mapping[tuple[str, float], float]


def run(one: Instructions, tests: tuple[str, ...], workers: int) -> Run:
    """Run the tests in a process of its own."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="bars-") as folder:
        file = Path(folder) / "bars"
        file.touch()
        bars = {"LEAN_MERGE_BARS": str(file), "OMP_NUM_THREADS": "1"}
        environment = {**os.environ, **one.environment, **bars}
        options = ["-p", "no:cacheprovider", *(["-n", str(workers)] if workers > 1 else [])]
        command = [sys.executable, "-m", "pytest", *options, *tests]
        done = subprocess.run(
            command, cwd=ROOT / "tests", env=environment, capture_output=True, text=True
        )
        if done.returncode:
            note(done.stdout[-4000:] + done.stderr[-2000:])
        worst: dict[tuple[str, float], float] = {}
        for line in file.read_text(encoding="utf-8").splitlines():
            found = json.loads(line)
            key = found["name"], found["bar"]
            worst[key] = max(worst.get(key, 0.0), found["error"])
    return Run(done.returncode == 0, time.perf_counter() - start, worst)


def margins(runs: Mapping[str, Run]) -> str:
    """A table of each bar, the largest error under each instruction set, and the margin."""
    keys = sorted({key for each in runs.values() for key in each.worst})
    rows = []
    for name, bar in keys:
        errors = [each.worst.get((name, bar)) for each in runs.values()]
        largest = max(error for error in errors if error is not None)
        shown = ["" if error is None else f"{error:.3g}" for error in errors]
        margin = f"{bar / largest:.3g}" if largest else "any"
        rows.append([name, f"{bar:g}", *shown, margin])
    return table(["bar of", "at most", *runs, "margin, times"], rows)


def main() -> None:
    """Parse the arguments, run the tests under each instruction set, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("tests", nargs="*", default=TESTS, help="in place of all")
    parser.add_argument(
        "--quick", action="store_true", help="one test, under all but the largest set"
    )
    parser.add_argument("--note", action="store_true", help="put the table into the results")
    parser.add_argument("--only", choices=[one.name for one in ALL], nargs="+")
    parser.add_argument("-n", dest="workers", type=int, default=1, help="tests at a time")
    arguments = parser.parse_args()
    runs = {}
    lacking = [one.name for one in ALL if not one.is_here]
    wanted = smaller() if arguments.quick else ALL
    for one in [one for one in wanted if one.name in (arguments.only or [one.name])]:
        if not one.is_here:
            note(f"{one.name}: left out, this processor lacks it")
            continue
        tests = QUICK if arguments.quick else tuple(arguments.tests)
        runs[one.name] = run(one, tests, arguments.workers)
        word = "passed" if runs[one.name].passed else "FAILED"
        note(f"{one.name}: {word}, {runs[one.name].seconds:.0f} s")
    command = " ".join(["python", "bench/processors.py", *sys.argv[1:]])
    text = (
        f"## {measure.today()}, commit {measure.commit()}, accuracy under instruction sets\n\n"
        f"{measure.machine()}. `{command}`\n\n{margins(runs)}\n\n"
        f"Not on this processor: {', '.join(lacking) or 'none'}.\n"
    )
    print(text)
    if arguments.note:
        put(text)
    sys.exit(0 if runs and all(each.passed for each in runs.values()) else 1)


if __name__ == "__main__":
    main()
