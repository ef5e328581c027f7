"""Weights of 70B and 405B width under --memory 1GiB, 7B widths under 400MiB, and refusals.

    python bench/budget.py [--only 70b] [--scratch FOLDER]

For each shape a triple with one weight, or few, is written by streaming (7.9 GB of disk at 405B
width), merged with all the memory it wants, and again under the ceiling, in a process whose data
segment is limited by the system (RLIMIT_DATA) as well. Asserted: the outputs are the same byte for
byte, selection and lambda are what was planted, passes are at most 16, peaks are below the ceiling
and the prediction, and bytes read are within the prediction. Then a ceiling far too small must be
refused, naming the smallest that works, and that one must work.

RLIMIT_DATA counts address space, also what is reserved for stacks and never touched. So the
limit is the ceiling plus what a process with lean-merge imported has reserved beyond what it uses,
and the stacks of its threads.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import measure
from measure import GB, MIB, ROOT, note
from probe import Probed, probe, refusal
from synthetic import SIZES, Recipe, Shapes, is_planted, write_triple

import lean_merge
from lean_merge.sizes import format_size, parse_size

PASSES = 16
RATIO = 0.015
SHARE = (0.7, 1.0)
"""Observed over predicted memory."""
THREADS = 5
"""Threads beside the main one: two workers, read-ahead, write-behind and the sampler."""
STACK = 8 * MIB
STARTS = 4 * MIB
"""What two starts of an interpreter differ by."""


@dataclass(frozen=True, slots=True)
class Case:
    """A triple and the ceiling that it must merge under."""

    title: str
    shapes: Shapes
    memory: str
    recipe: Recipe


def cases() -> dict[str, Case]:
    """By the name of the size."""

    def one(size: str, *leaves: str) -> Shapes:
        return dataclasses.replace(SIZES[size], layers=1, vocab=64, vision_layers=1, only=leaves)

    # A weight that is selected takes the most passes, and the most memory.
    selected = Recipe(aligned=1.0)
    return {
        "7b": Case("7B, all weights of a layer", one("7b"), "400MiB", Recipe()),
        "70b": Case(
            "8192 x 28672 and its transpose", one("70b", "down_proj", "up_proj"), "1GiB", selected
        ),
        "405b": Case("16384 x 53248", one("405b", "down_proj"), "1GiB", selected),
    }


def reserved() -> int:
    """Bytes of address space that an import of lean-merge reserves and does not use."""
    code = (
        "import lean_merge\n"
        "for line in open('/proc/self/status'):\n"
        "    if line.startswith(('VmData', 'RssAnon')): print(line.split()[1])"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    anonymous, data = sorted(int(part) * 1024 for part in done.stdout.split())
    return data - anonymous


def limited(folder: Path, out: Path, ceiling: int, beyond: int) -> Probed:
    """A merge under `ceiling`, held by the system as well."""
    limit = ceiling + beyond + THREADS * STACK
    run = probe(folder, "--memory", ceiling, "--rlimit-data", limit, "--keep", out)
    run.check()
    assert run.peak <= ceiling, (run.peak, ceiling)
    return run


def smallest(folder: Path) -> int:
    """The smallest ceiling that works, from the refusal of one that does not."""
    said = refusal(folder, "--memory", "170MiB")
    found = re.search(r"--memory (\d+)MiB", said)
    assert found is not None, said
    return int(found[1]) * MIB


def check_planted(run: Probed, case: Case) -> None:
    """Assert that what was planted is selected and nothing else, and lambda.

    Both task vectors have spectra of one kind, so lambda is 1.
    """
    rows = {row["weight"]: row for row in run.report["weights"]}
    for name in case.shapes.weights:
        row = rows[name.removeprefix("model.").removesuffix(".weight")]
        assert row["selected"] == is_planted(name, case.recipe), row
        if row["selected"]:
            assert abs(row["lambda"] - 1) <= RATIO, row


def planned_passes(folder: Path) -> int:
    """The most passes over a weight that the plan counts on."""
    recipe = lean_merge.MergeRecipe(
        base_model=str(folder / "base"),
        mllm_model=str(folder / "mllm"),
        experts=(lean_merge.Expert(str(folder / "expert")),),
    )
    plan = lean_merge.plan(recipe, lean_merge.Resources(device="cpu", threads=2))
    # Item size decides bytes, not passes.
    return max(
        method.cost(part.shape, item=2).passes
        for task in plan.weights
        for part, method in zip(task.weight.slices, task.methods, strict=True)
        if method is not None
    )


def check_same(first: Path, second: Path) -> None:
    """Assert that two checkpoints have the same bytes."""
    files = measure.weight_files(first)
    assert files and [f.name for f in files] == [f.name for f in measure.weight_files(second)]
    for file in files:
        subprocess.run(["cmp", file, second / file.name], check=True)


def row(case: Case, given: str, run: Probed, planned: int) -> list[object]:
    """A line of the table."""
    passes = max(each["passes"] for each in run.report["weights"])
    assert passes <= planned, (passes, planned)
    count = run.report["bytes"]
    return [
        case.title,
        given,
        f"{passes} of {planned}",
        f"{run.seconds:.1f}",
        f"{run.peak / MIB:.0f}",
        f"{run.predicted / MIB:.0f}",
        f"{run.share:.2f}",
        f"{count['read'] / GB:.1f} of {count['read_most'] / GB:.1f}",
    ]


def measured(case: Case, scratch: Path | None, beyond: int) -> tuple[list[list[object]], list[str]]:
    """The lines of the table for one case, and what it misses."""
    missed = []
    ceiling = parse_size(case.memory)
    with measure.scratch(scratch, case.shapes.nbytes * 2) as folder:
        note(f"{case.title}: writing {case.shapes.nbytes / GB:.1f} GB")
        write_triple(folder, case.shapes, case.recipe)
        note("with all the memory that it wants")
        full = probe(folder, "--keep", folder / "full")
        full.check()
        check_planted(full, case)
        planned = planned_passes(folder)
        if planned > PASSES:
            missed.append(f"{case.title}: {planned} passes are planned, more than {PASSES}")
        runs = {"as wanted": full}
        least = smallest(folder)
        note(f"the smallest that works is {format_size(least)}")
        for title, given in ((case.memory, ceiling), ("the smallest", least + STARTS)):
            if given < least:
                missed.append(f"{case.title}: {title} is refused; {format_size(least)} is named")
                continue
            run = limited(folder, folder / "tight", given, beyond)
            check_same(folder / "full", folder / "tight")
            shutil.rmtree(folder / "tight")
            assert [r["lambda"] for r in run.report["weights"]] == [
                r["lambda"] for r in full.report["weights"]
            ]
            runs[f"{title}, {format_size(given)}"] = run
    for title, run in runs.items():
        if not SHARE[0] <= run.share <= SHARE[1]:
            missed.append(f"{case.title}, {title}: memory is {run.share:.3f} of the prediction")
    return [row(case, title, run, planned) for title, run in runs.items()], missed


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments, measure, assert, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", choices=cases(), action="append", help="one of the cases")
    parser.add_argument("--scratch", type=Path, help="where to write")
    parser.add_argument("--no-targets", action="store_true", help="do not fail if one is missed")
    options = parser.parse_args(arguments)
    beyond = reserved()
    header = ["weights", "--memory", "passes, of at most", "merge s", "peak MiB", "predicted MiB"]
    header += ["observed / predicted", "GB read, of at most"]
    lines, missed = [], []
    for name in options.only or cases():
        rows, failed = measured(cases()[name], options.scratch, beyond)
        lines, missed = lines + rows, missed + failed
    print(measure.table(header, lines))
    print(f"\nAddress space reserved beyond what is used: {beyond / MIB:.0f} MiB.")
    if missed:
        print("\nMissed: " + "; ".join(missed) + ".")
    sys.exit(bool(missed) and not options.no_targets)


if __name__ == "__main__":
    main()
