"""Cost over size: 1B to 70B widths in one table, and what the threshold selects at each.

    python bench/growth.py [--sizes 1b 3b 7b 13b 33b 70b] [--scratch FOLDER]

One triple after the other is written with few layers and small embeddings (5 GB at most, with its
output 7), merged from a cold cache, analysed twice more for the other thresholds, and removed.
Half of the weights have leading directions planted at a cosine of 0.5, the others have unrelated
ones. Asserted: each merge reads what the plan predicts and stays inside its memory, at 0.3 and 0.4
what is planted is selected and nothing else, at 0.6 nothing. A straight line is fitted to seconds
over bytes read.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import measure
import numpy as np
from measure import GB, MIB, note
from probe import Probed, probe
from synthetic import SIZES, Recipe, Shapes, is_planted, write_triple

LAYERS = {"tiny": 2, "1b": 8, "3b": 4, "7b": 2, "13b": 1, "33b": 1, "70b": 1}
RECIPE = Recipe(cosine=0.5)
THRESHOLDS = (0.3, 0.4, 0.6)


@dataclass(frozen=True, slots=True)
class Point:
    """One size: its merge at 0.4, and the selections by threshold."""

    size: str
    shapes: Shapes
    run: Probed
    planted: set[str]
    selected: dict[float, set[str]]
    similarity: tuple[float, float]
    """Smallest planted and largest other."""

    @property
    def read(self) -> float:
        """GB read."""
        count: int = self.run.report["bytes"]["read"]
        return count / GB

    @property
    def cpu(self) -> float:
        """Seconds, starting the interpreter included."""
        return self.run.process.user + self.run.process.system

    def row(self) -> list[object]:
        """A line of the table."""
        seconds = self.run.report["seconds"]
        counts = ", ".join(str(len(self.selected[t])) for t in THRESHOLDS)
        return [
            f"{self.size}, {self.shapes.layers}",
            f"{self.read:.2f}",
            f"{seconds['analyze']:.1f}",
            f"{self.run.seconds:.1f}",
            f"{self.run.seconds / self.read:.2f}",
            f"{self.cpu:.1f}",
            f"{self.run.peak / MIB:.0f}",
            f"{self.run.predicted / MIB:.0f}",
            f"{self.run.share:.2f}",
            f"{counts}; {len(self.planted)} of {len(self.shapes.weights)}",
            f"{self.similarity[0]:.2f}, {self.similarity[1]:.2f}",
        ]


def measured(size: str, scratch: Path | None) -> Point:
    """The point of one size."""
    shapes = dataclasses.replace(SIZES[size], layers=LAYERS[size], vocab=1000, vision_layers=1)
    with measure.scratch(scratch, shapes.nbytes * 3 // 2) as folder:
        note(f"{size}: writing {shapes.nbytes / GB:.1f} GB")
        write_triple(folder, shapes, RECIPE)
        measure.drop_cache(measure.weight_files(*(folder / r for r in ("base", "mllm", "expert"))))
        runs = {0.4: probe(folder)}
        for threshold in THRESHOLDS:
            if threshold not in runs:
                runs[threshold] = probe(folder, "--output", "none", "--threshold", threshold)
    for run in runs.values():
        run.check()
    planted = {
        name.removeprefix("model.").removesuffix(".weight")
        for name in shapes.weights
        if is_planted(name, RECIPE)
    }
    first = {row["weight"]: row["similarity_first"] for row in runs[0.3].report["weights"]}
    return Point(
        size=size,
        shapes=shapes,
        run=runs[0.4],
        planted=planted,
        selected={threshold: _selected(run) for threshold, run in runs.items()},
        similarity=(
            min((first[name] for name in planted), default=0.0),
            max((s for name, s in first.items() if name not in planted), default=0.0),
        ),
    )


def _selected(run: Probed) -> set[str]:
    return {row["weight"] for row in run.report["weights"] if row["selected"]}


def check(point: Point) -> None:
    """Assert that the selections are what was planted."""
    for threshold, selected in point.selected.items():
        wanted = point.planted if threshold < RECIPE.cosine else set()
        assert selected == wanted, (point.size, threshold, selected ^ wanted)


def fit(points: Sequence[Point]) -> str:
    """Lines of seconds over GB read, in sentences.

    Those of the CPU tell how the work grows; wall time has the disk's moods in it.
    """
    read = np.array([point.read for point in points])
    kinds = {
        "wall time": [point.run.seconds for point in points],
        "CPU time": [point.cpu for point in points],
    }
    told = []
    for kind, values in kinds.items():
        seconds = np.array(values)
        slope, start = np.polyfit(read, seconds, 1)
        errors = seconds - (slope * read + start)
        explained = 1 - (errors**2).sum() / ((seconds - seconds.mean()) ** 2).sum()
        power = np.polyfit(np.log(read), np.log(seconds), 1)[0]
        told.append(
            f"Of {kind}, the line {slope:.2f} x GB read + {start:.1f} s explains {explained:.0%} "
            f"of the variance and is off by {abs(errors).max():.1f} s at most; the exponent of a "
            f"power law is {power:.2f}."
        )
    return " ".join(told)


def main() -> None:
    """Parse the arguments, measure, assert, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    sizes = list(LAYERS)
    parser.add_argument("--sizes", choices=sizes, nargs="+", default=sizes[1:])
    parser.add_argument("--scratch", type=Path, help="where to write")
    arguments = parser.parse_args()
    points = []
    for size in arguments.sizes:
        points.append(measured(size, arguments.scratch))
        note(str(points[-1].row()))
    header = ["widths, layers", "GB read", "SVD s", "merge s", "s / GB", "CPU s", "peak MiB"]
    header += ["predicted MiB", "observed / predicted"]
    header += ["selected at 0.3, 0.4, 0.6; planted", "s_1: least planted, most other"]
    print(measure.table(header, [point.row() for point in points]), flush=True)
    for point in points:
        check(point)
    if len(points) > 2:
        print("\n" + fit(points))


if __name__ == "__main__":
    main()
