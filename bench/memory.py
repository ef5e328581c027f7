"""Peak memory at 7B widths: it stays below 600 MiB and does not grow with the layers.

    python bench/memory.py [FOLDER]

Makes two synthetic triples (about 8 GB and 5 GB of disk, one after the other, removed afterwards),
merges each in a fresh process, asserts the bars, and prints a row for each.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
import tempfile
from pathlib import Path

from probe import in_fresh_process
from synthetic import SIZES, write_triple

MIB = 1 << 20
MOST = 600 * MIB
GROWTH = 20 * MIB


def peaks(folder: Path, layers: int) -> dict[str, int]:
    """Memory of the merge of a triple with `layers` layers of 7B widths, in bytes."""
    shapes = dataclasses.replace(SIZES["7b"], layers=layers, vocab=1000)
    try:
        write_triple(folder, shapes)
        report = in_fresh_process(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    counts = report["counts"]
    assert counts["merged"] + counts["unchanged"] == 7 * layers, counts
    assert report["bytes"]["read"] == report["bytes"]["read_predicted"]
    memory: dict[str, int] = report["memory"]
    return memory


def main(folder: Path) -> None:
    """Measure at 2 and 4 layers, assert, print."""
    print("layers  anonymous MiB  predicted MiB  file-backed MiB")
    measured = {}
    for layers in (2, 4):
        memory = measured[layers] = peaks(folder / f"{layers}", layers)
        print(
            f"{layers:>6}  {memory['peak_anonymous'] / MIB:>13.0f}"
            f"  {memory['predicted_anonymous'] / MIB:>13.0f}"
            f"  {memory['peak_file_backed'] / MIB:>15.0f}",
            flush=True,
        )
    for memory in measured.values():
        assert memory["peak_anonymous"] <= MOST
        assert memory["peak_anonymous"] <= memory["predicted_anonymous"]
    growth = measured[4]["peak_anonymous"] - measured[2]["peak_anonymous"]
    print(f"growth when the layers double: {growth / MIB:+.1f} MiB")
    assert growth < GROWTH


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            main(Path(scratch))
