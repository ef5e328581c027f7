"""Wall time of a merge over the disk's floor: at most 1.15 for a checkpoint, 0.7 for an adapter.

    python bench/speed.py [--size 1b] [--layers 22] [--rounds 3] [--lora] [--triple FOLDER]

Each round measures, with the inputs' cache dropped before each: the buffered floor, the merge, with
--lora the merge into an adapter, and the direct floor (see `bench/measure.py`). The targets are
asserted for the median of the ratios in a round, against the buffered floor. After the last round
the output is checked: a few weights against the float64 oracle, all that is out of scope byte for
byte. A triple is generated and removed, unless one is given. Size 7b has 4 layers unless more are
asked for; all 32 need 55 GB of disk.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import measure
import truth
from measure import GB, MIB, Floor, note
from probe import Probed, probe
from synthetic import SIZES, Recipe, Shapes, add_size, is_planted, shapes_of, write_triple

from lean_merge.methods.spectra import EXACT_BELOW

MOST, MOST_LORA = 1.15, 0.7
FEW = {"7b": 4, "13b": 2, "33b": 1, "70b": 1, "405b": 1}
"""Layers of the larger sizes unless others are asked for."""
CHECKED = 3
"""Weights compared with the oracle."""


@dataclass(frozen=True, slots=True)
class Round:
    """What was measured one after another; None where it was not to be had."""

    buffered: Floor
    merge: Probed
    lora: Probed | None
    direct: Floor | None

    def over(self, run: Probed, floor: Floor) -> float:
        """The merge's time over a floor's."""
        return run.seconds / floor.total


def measured(triple: Path, out: Path, *, lora: bool) -> Round:
    """One round; the outputs stay in `out`."""
    shutil.rmtree(out, ignore_errors=True)
    files = measure.weight_files(*(triple / role for role in ("base", "mllm", "expert")))
    written = measure.total_bytes(measure.weight_files(triple / "mllm"))
    _settle()
    buffered = measure.floor(files, written, direct=False)
    run = _merge(triple, files, out / "merged", "checkpoint")
    adapter = _merge(triple, files, out / "adapter", "lora") if lora else None
    _settle()
    try:
        direct = measure.floor(files, written, direct=True)
    except OSError:
        direct = None
    return Round(buffered, run, adapter, direct)


def _merge(triple: Path, files: Sequence[Path], out: Path, output: str) -> Probed:
    _settle()
    measure.drop_cache(files)
    run = probe(triple, "--output", output, "--keep", out)
    run.check()
    return run


def _settle() -> None:
    """Nothing written before is left to write."""
    os.sync()


def check(triple: Path, out: Path, shapes: Shapes, rounds: Sequence[Round]) -> list[truth.Accuracy]:
    """Compare the outputs of the last round with the oracle and the inputs."""
    adapter = out / "checked"
    names = chosen(shapes)
    options = [part for name in names for part in ("--include", name.replace(".", r"\."))]
    run = probe(triple, "--output", "lora", "--keep", adapter, *options)
    rows = {row["weight"]: row for row in rounds[-1].merge.report["weights"]}
    assert rows.keys() == {truth.canonical(name) for name in shapes.weights}
    updates = {name: truth.adapter_update(adapter, name) for name in names}
    for row in run.report["weights"]:
        assert row["selected"] == rows[row["weight"]]["selected"]
        assert row["lambda"] == rows[row["weight"]]["lambda"], "the same weight, decided twice"
    for name, update in updates.items():
        truth.check_stored(triple, out / "merged", name, update)
    copied = truth.check_rest(triple, out / "merged", shapes.weights)
    assert copied == rounds[-1].merge.report["counts"]["copied"]
    return [
        truth.compare(truth.expected(triple, name), rows[truth.canonical(name)], update)
        for name, update in updates.items()
    ]


def chosen(shapes: Shapes) -> list[str]:
    """The smallest weights that the planting makes likely to be selected, and one that it does not.

    Of different shapes, as far as there are; the largest have an oracle that takes minutes.
    """
    recipe = Recipe()
    order = sorted(shapes.weights, key=lambda n: (_size(shapes, n), n))
    # Those that are decomposed whole test no sketch.
    order = [n for n in order if min(shapes.weights[n]) > EXACT_BELOW] or order
    aligned = [name for name in order if is_planted(name, recipe)]
    first = {shapes.weights[name]: name for name in reversed(aligned)}
    picked = sorted(first.values(), key=lambda n: _size(shapes, n))[: CHECKED - 1]
    return [*picked, next(name for name in order if name not in aligned)]


def _size(shapes: Shapes, name: str) -> int:
    out_features, in_features = shapes.weights[name]
    return out_features * in_features


def report(arguments: argparse.Namespace, shapes: Shapes, rounds: Sequence[Round]) -> str:
    """The rounds as a table: medians, and in brackets every round."""
    kinds: list[tuple[str, list[Probed]]] = [("checkpoint", [r.merge for r in rounds])]
    adapters = [r.lora for r in rounds if r.lora is not None]
    if adapters:
        kinds.append(("adapter", adapters))
    rows = []
    for kind, runs in kinds:
        pairs = list(zip(rounds, runs, strict=True))
        direct = [r.over(run, r.direct) for r, run in pairs if r.direct is not None]
        rows.append(
            [
                f"{arguments.size}, {shapes.layers} layers",
                kind,
                f"{runs[0].report['bytes']['read'] / GB:.1f}",
                f"{runs[0].report['bytes']['written'] / GB:.2f}",
                measure.spread([run.seconds for run in runs], 1),
                measure.spread([run.process.seconds for run in runs], 1),
                measure.spread([r.buffered.total for r in rounds], 1),
                measure.spread([r.over(run, r.buffered) for r, run in pairs]),
                measure.spread(direct) if direct else "not to be had",
                f"{max(run.peak for run in runs) / MIB:.0f}",
                f"{max(run.process.peak_rss for run in runs) / MIB:.0f}",
                measure.cpu([run.process for run in runs]),
                ", ".join(f"{max(r.buffered.others, run.process.others):.0%}" for r, run in pairs),
            ]
        )
    header = ["triple", "output", "GB read", "GB written", "merge s", "process s", "floor s"]
    header += ["merge / floor", "merge / direct floor", "peak MiB", "peak RSS MiB"]
    header += ["CPU s, user + system", "others' share of the cores in each round"]
    return measure.table(header, rows)


def floors(rounds: Sequence[Round], read: int, written: int) -> str:
    """What the disk did, in a sentence."""
    parts = []
    for kind in ("buffered", "direct"):
        found = [f for r in rounds if (f := getattr(r, kind)) is not None]
        if found:
            reads = measure.spread([read / f.read / GB for f in found])
            writes = measure.spread([written / f.write / GB for f in found])
            parts.append(f"{kind}: read {reads} GB/s, write {writes} GB/s")
    return "Disk, " + "; ".join(parts) + "."


def missed(rounds: Sequence[Round]) -> list[str]:
    """The targets that the medians miss."""
    found = []
    ratio = median(r.over(r.merge, r.buffered) for r in rounds)
    if ratio > MOST:
        found.append(f"checkpoint: {ratio:.2f} of the floor, above {MOST}")
    adapters = [r.over(r.lora, r.buffered) for r in rounds if r.lora is not None]
    if adapters and median(adapters) > MOST_LORA:
        found.append(f"adapter: {median(adapters):.2f} of the floor, above {MOST_LORA}")
    return found


@contextmanager
def triple_of(
    arguments: argparse.Namespace, shapes: Shapes, *, text: bool = False
) -> Iterator[Path]:
    """The triple that is given, or a new one that is removed afterwards."""
    if arguments.triple is not None:
        yield arguments.triple
        return
    with measure.scratch(arguments.scratch, shapes.nbytes * 2) as folder:
        note(f"writing a triple of {shapes.nbytes / GB:.1f} GB")
        write_triple(folder, shapes, text=text)
        yield folder


def main() -> None:
    """Parse the arguments, measure, check, print, assert."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_size(parser, size="1b", layers=None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lora", action="store_true", help="measure the adapter output too")
    parser.add_argument("--triple", type=Path, help="an existing triple of these shapes")
    parser.add_argument("--scratch", type=Path, help="where to write")
    parser.add_argument("--no-check", action="store_true", help="leave the oracle out")
    parser.add_argument("--no-targets", action="store_true", help="do not fail if one is missed")
    arguments = parser.parse_args()
    if arguments.layers is None:
        arguments.layers = FEW.get(arguments.size, SIZES[arguments.size].layers)
    shapes = shapes_of(arguments)
    with triple_of(arguments, shapes) as triple, measure.scratch(triple, 0) as out:
        files = measure.weight_files(*(triple / role for role in ("base", "mllm", "expert")))
        read = measure.total_bytes(files)
        written = measure.total_bytes(measure.weight_files(triple / "mllm"))
        rounds = []
        for number in range(arguments.rounds):
            rounds.append(measured(triple, out, lora=arguments.lora))
            last = rounds[-1]
            note(
                f"round {number + 1}: {last.over(last.merge, last.buffered):.2f}, others took "
                f"{last.merge.process.others:.0%} of the cores during the merge and "
                f"{last.buffered.others:.0%} during the floor"
            )
        print(report(arguments, shapes, rounds))
        print("\n" + floors(rounds, read, written))
        if not arguments.no_check:
            print("\n" + accuracy(check(triple, out, shapes, rounds)), flush=True)
    failed = missed(rounds)
    if failed:
        print("\nMissed: " + "; ".join(failed) + ".")
    sys.exit(bool(failed) and not arguments.no_targets)


def accuracy(checked: Sequence[truth.Accuracy]) -> str:
    """The errors found, in a sentence."""
    each = [
        f"{a.name}: update {a.update:.2%}, lambda {a.ratio:.2%}"
        if a.selected
        else f"{a.name}: not selected, by both"
        for a in checked
    ]
    return "Against the float64 oracle, " + "; ".join(each) + "."


if __name__ == "__main__":
    main()
