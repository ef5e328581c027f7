"""Time two commits in turn on the same inputs: `python bench/paired.py OLD NEW [--size 1b]`.

Each round merges once by either tree, in a fresh process, with the inputs' bytes dropped from the
page cache before; which tree comes first alternates. Printed are the seconds of every round, the
median of the ratios NEW / OLD with its range, processor time, the same for each GB of the inputs,
and both peaks of anonymous memory. With --warm the inputs stay in the page cache, so that the
processor decides.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from statistics import median

import measure
from speed import triple_of
from structure import tree
from synthetic import add_size, shapes_of

MIB = 1 << 20


def once(
    root: Path, files: list[Path], options: argparse.Namespace, triple: Path
) -> dict[str, float]:
    """Merge by the tree, and tell seconds, processor seconds and peak bytes."""
    os.sync()
    if not options.warm:
        measure.drop_cache(files)
    probe = Path(__file__).with_name("probe.py")
    command = [sys.executable, str(probe), str(triple), "--output", options.output]
    command += ["--method", options.method, "--threads", str(options.threads)]
    done = measure.watch(command, PYTHONPATH=str(root))
    report = json.loads(done.output)
    return {
        "seconds": report["seconds"]["merge"],
        "processor": report["seconds"]["processor"],
        "peak": max(report["memory"]["peak_anonymous"], done.peak_anonymous),
        "merged": report["counts"]["merged"],
    }


def main() -> None:
    """Measure the two trees, and exit with 1 if the new one is slower or larger than allowed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("old")
    parser.add_argument("new")
    add_size(parser, size="1b", layers=None)
    parser.add_argument("--triple", type=Path, help="an existing triple of these shapes")
    parser.add_argument("--scratch", type=Path, help="where to write")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", default="checkpoint")
    parser.add_argument("--method", default="ip_merging")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--warm", action="store_true", help="leave the inputs in the page cache")
    parser.add_argument("--most", type=float, default=1.03, help="largest median ratio allowed")
    options = parser.parse_args()
    with (
        triple_of(options, shapes_of(options)) as folder,
        tree(options.old) as old,
        tree(options.new) as new,
    ):
        files = measure.weight_files(*(folder / role for role in ("base", "mllm", "expert")))
        size = measure.total_bytes(files) / measure.GB
        rounds = []
        for number in range(options.rounds):
            order = [("old", old), ("new", new)]
            both = {
                name: once(root, files, options, folder)
                for name, root in (order if number % 2 == 0 else reversed(order))
            }
            assert both["old"]["merged"] == both["new"]["merged"]
            rounds.append(both)
            print({name: round(each["seconds"], 2) for name, each in both.items()}, flush=True)
    for what in ("seconds", "processor"):
        found = sorted(each["new"][what] / each["old"][what] for each in rounds)
        print(f"{what}: median ratio {median(found):.3f}, from {found[0]:.3f} to {found[-1]:.3f}")
    for name in ("old", "new"):
        found = sorted(each[name]["processor"] / size for each in rounds)
        print(
            f"{name}: {median(found):.2f} processor seconds a GB of {size:.2f}, "
            f"from {found[0]:.2f} to {found[-1]:.2f}"
        )
        print(f"peak, {name}: {max(each[name]['peak'] for each in rounds) / MIB:.0f} MiB")
    slower = median(each["new"]["seconds"] / each["old"]["seconds"] for each in rounds)
    sys.exit(slower > options.most)


if __name__ == "__main__":
    main()
