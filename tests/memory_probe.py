"""Merges a synthetic triple at 7B widths in a fresh process and prints its report's memory.

python tests/memory_probe.py FOLDER [MEMORY_BYTES [RLIMIT_DATA_BYTES]]
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import lean_merge


def main(folder: Path, memory: int | None, limit: int | None) -> None:
    """Print the memory and bytes of the report as JSON."""
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    recipe = lean_merge.MergeRecipe(
        base_model=str(folder / "base"),
        mllm_model=str(folder / "mllm"),
        experts=(lean_merge.Expert(str(folder / "expert")),),
    )
    resources = lean_merge.Resources(device="cpu", memory=memory, threads=2)
    report = lean_merge.merge(recipe, folder / "out", resources=resources, overwrite=True).report
    print(json.dumps({key: report[key] for key in ("memory", "bytes", "counts")}))


if __name__ == "__main__":
    numbers = [int(argument) for argument in sys.argv[2:]]
    main(Path(sys.argv[1]), *[*numbers, None, None][:2])
