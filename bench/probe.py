"""Merges a triple in a fresh process and prints what its report says of memory, bytes and time.

    python bench/probe.py FOLDER [--memory 400MiB] [--rlimit-data BYTES] [--threads 2]
        [--output checkpoint] [--method ip_merging] [--threshold 0.4] [--include REGEX] [--keep OUT]

FOLDER holds `base`, `mllm` and `expert`, as `bench/synthetic.py` writes them. `seconds.merge` is
the whole of the merge inside the process: all but starting the interpreter and importing.
`seconds.processor` is what the merge took of all processors, of the user and the system.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import ROOT, Finished, watch

import lean_merge
from lean_merge.sizes import parse_size


@dataclass(frozen=True, slots=True)
class Probed:
    """A merge in a process of its own: its report, and the process as seen from outside."""

    report: dict[str, Any]
    process: Finished

    @property
    def seconds(self) -> float:
        """Of the merge alone."""
        seconds: float = self.report["seconds"]["merge"]
        return seconds

    @property
    def predicted(self) -> int:
        """Peak of anonymous bytes, by the plan."""
        predicted: int = self.report["memory"]["predicted_anonymous"]
        return predicted

    @property
    def peak(self) -> int:
        """Of anonymous bytes, by the process's own account or ours, whichever saw more."""
        own: int = self.report["memory"]["peak_anonymous"]
        return max(own, self.process.peak_anonymous)

    @property
    def share(self) -> float:
        """Observed peak over predicted."""
        return self.peak / self.predicted

    def check(self) -> None:
        """Assert what holds of every merge: bytes as predicted, memory not above."""
        count = self.report["bytes"]
        assert count["read"] <= count["read_most"], count
        if count["read_predicted"] == count["read_most"]:
            assert count["read"] == count["read_predicted"], count
        if count["written_predicted_exactly"]:
            assert count["written"] == count["written_predicted"], count
        assert self.peak <= self.predicted, (self.peak, self.predicted)


def merge(arguments: argparse.Namespace) -> dict[str, Any]:
    """The parts of the report that a benchmark looks at; the output is removed unless kept."""
    folder = arguments.folder
    recipe = lean_merge.MergeRecipe(
        base_model=str(folder / "base"),
        mllm_model=str(folder / "mllm"),
        experts=(lean_merge.Expert(str(folder / "expert")),),
        merge_method=arguments.method,
        parameters=() if arguments.threshold is None else (("threshold", arguments.threshold),),
        include=tuple(arguments.include),
        output=arguments.output,
    )
    resources = lean_merge.Resources(
        device="cpu", memory=arguments.memory, threads=arguments.threads
    )
    out = arguments.keep or folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    start, processor = time.perf_counter(), time.process_time()
    report = lean_merge.merge(recipe, out, resources=resources).report
    report["seconds"]["merge"] = time.perf_counter() - start
    report["seconds"]["processor"] = time.process_time() - processor
    if not arguments.keep:
        shutil.rmtree(out)
    return {key: report[key] for key in ("memory", "bytes", "counts", "seconds", "weights")}


def command(folder: Path, *options: object) -> list[str]:
    """The command that runs this file."""
    return [sys.executable, __file__, str(folder), *map(str, options)]


def probe(folder: Path, *options: object) -> Probed:
    """`merge` run by a new interpreter under watch; raises RuntimeError if it fails."""
    process = watch(command(folder, *options), PYTHONPATH=str(ROOT))
    return Probed(json.loads(process.output), process)


def refusal(folder: Path, *options: object) -> str:
    """What a new interpreter says when it refuses to merge."""
    done = subprocess.run(command(folder, *options), capture_output=True, text=True)
    assert done.returncode != 0, "it was to refuse"
    return done.stderr


def main() -> None:
    """Parse the arguments, merge, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--memory", type=parse_size)
    parser.add_argument("--rlimit-data", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", default="checkpoint")
    parser.add_argument("--method", default="ip_merging")
    parser.add_argument("--threshold", type=float)
    parser.add_argument("--include", action="append", default=[])
    parser.add_argument("--keep", type=Path, help="leave the output there")
    arguments = parser.parse_args()
    if arguments.rlimit_data is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (arguments.rlimit_data,) * 2)
    print(json.dumps(merge(arguments)))


if __name__ == "__main__":
    main()
