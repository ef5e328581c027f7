"""Memory and bytes at 7B widths: bounded, as predicted, and no more for more layers.

    python bench/memory.py [--scratch FOLDER] [--layers 2 4]

Makes synthetic triples (about 5 GB and 8 GB of disk, one after the other, removed afterwards),
merges each in a fresh process, and prints a row for each. Asserted: at most 600 MiB of anonymous
memory and 1 GiB of resident memory; observed over predicted memory in 0.7 .. 1.0; bytes read and
written exactly as predicted; and no growth when the layers double.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import measure
from measure import GB, MIB
from probe import Probed, probe
from synthetic import SIZES, write_triple

MOST, MOST_RSS = 600 * MIB, 1024 * MIB
GROWTH = 20 * MIB
SHARE = (0.7, 1.0)


def measured(scratch: Path | None, layers: int) -> Probed:
    """The merge of a triple with `layers` layers of 7B widths."""
    shapes = dataclasses.replace(SIZES["7b"], layers=layers, vocab=1000)
    with measure.scratch(scratch, shapes.nbytes * 3 // 2) as folder:
        write_triple(folder, shapes)
        measure.drop_cache(measure.weight_files(*(folder / r for r in ("base", "mllm", "expert"))))
        run = probe(folder)
    run.check()
    counts = run.report["counts"]
    assert counts["merged"] + counts["unchanged"] == 7 * layers, counts
    count = run.report["bytes"]
    assert count["read_predicted"] == count["read_most"], "all tiles were to be resident"
    return run


def row(layers: int, run: Probed) -> list[object]:
    """A line of the table."""
    count = run.report["bytes"]
    return [
        layers,
        f"{run.peak / MIB:.0f}",
        f"{run.predicted / MIB:.0f}",
        f"{run.share:.2f}",
        f"{run.process.peak_rss / MIB:.0f}",
        f"{count['read'] / GB:.2f}, exactly",
        f"{count['written'] / GB:.2f}, exactly",
    ]


def missed(runs: Sequence[Probed]) -> list[str]:
    """The bars that are not met."""
    found = []
    for run in runs:
        if run.peak > MOST:
            found.append(f"{run.peak / MIB:.0f} MiB, more than {MOST / MIB:.0f}")
        if run.process.peak_rss > MOST_RSS:
            found.append(f"{run.process.peak_rss / MIB:.0f} MiB resident")
        if not SHARE[0] <= run.share <= SHARE[1]:
            found.append(f"memory is {run.share:.2f} of the prediction")
    if runs[-1].peak - runs[0].peak >= GROWTH:
        found.append(f"it grew by {(runs[-1].peak - runs[0].peak) / MIB:.0f} MiB")
    return found


def main() -> None:
    """Measure, print, assert."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--scratch", type=Path, help="where to write")
    arguments = parser.parse_args()
    runs = [measured(arguments.scratch, layers) for layers in arguments.layers]
    header = ["7B widths, layers", "peak anonymous MiB", "predicted MiB", "observed / predicted"]
    header += ["peak RSS MiB", "GB read", "GB written"]
    print(measure.table(header, map(row, arguments.layers, runs)))
    failed = missed(runs)
    if failed:
        print("\nMissed: " + "; ".join(failed) + ".")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
