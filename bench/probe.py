"""Merges a triple in a fresh process and prints what its report says of memory, bytes and time.

    python bench/probe.py FOLDER [--output lora] [--memory 400MiB] [--rlimit-data BYTES]

FOLDER holds `base`, `mllm` and `expert`, as `bench/synthetic.py` writes them.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import lean_merge
from lean_merge.sizes import parse_size


def merge(folder: Path, output: str, memory: int | None, threads: int) -> dict[str, Any]:
    """The parts of the report that a benchmark looks at; the output is removed."""
    recipe = lean_merge.MergeRecipe(
        base_model=str(folder / "base"),
        mllm_model=str(folder / "mllm"),
        experts=(lean_merge.Expert(str(folder / "expert")),),
        output=output,
    )
    resources = lean_merge.Resources(device="cpu", memory=memory, threads=threads)
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    report = lean_merge.merge(recipe, out, resources=resources).report
    shutil.rmtree(out)
    return {key: report[key] for key in ("memory", "bytes", "counts", "seconds")}


def in_fresh_process(folder: Path, *options: str) -> dict[str, Any]:
    """`merge` run by a new interpreter; raises CalledProcessError if it fails."""
    command = [sys.executable, __file__, str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def main() -> None:
    """Parse the arguments, merge, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", default="checkpoint")
    parser.add_argument("--memory", type=parse_size)
    parser.add_argument("--rlimit-data", type=int)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.rlimit_data is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (arguments.rlimit_data,) * 2)
    found = merge(arguments.folder, arguments.output, arguments.memory, arguments.threads)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
