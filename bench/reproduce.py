"""The reproduction in miniature: measure every merge on every committed family, and write it down.

    python bench/reproduce.py                        # all of it, about a quarter of an hour
    python bench/reproduce.py --render               # tables and figures from results.json alone
    python bench/reproduce.py --problems 200 --out FOLDER   # a quick look; the documents stay

It writes bench/reproduction/results.json, the generated parts of docs/reproduction.md and the
figures in docs/reproduction, and prints the run time. Needs `pip install -e '.[bench]'`. What is
said of the family grown from SmolLM2 comes from bench/family/smol/results.json, which that family's
compare.py writes: its weights are not in the repository.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package, when not installed

from measure import commit, machine, note, today
from reproduction import claims, family, figures, measuring, page, results


def main() -> None:
    """Parse the arguments, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, nargs="+", default=family.seeds())
    parser.add_argument("--problems", type=int, default=measuring.PROBLEMS, help="of each task")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--only", nargs="+", metavar="GROUP", help="put these into the results")
    parser.add_argument("--kept", type=Path, help="keep marks here, and go on from those there")
    parser.add_argument("--render", action="store_true", help="measure nothing")
    parser.add_argument("--out", type=Path, help="write results.json and figures here alone")
    options = parser.parse_args()
    file = results.FILE if options.out is None else options.out / results.FILE.name
    if not options.render:
        data = measured(options)
        if options.only:
            data = results.joined(results.read(file).data, data)
        file.parent.mkdir(parents=True, exist_ok=True)
        results.write(data, file)
    found = results.Both(results.read(file), results.read(results.REAL))
    drawn = figures.write(found, figures.FOLDER if options.out is None else options.out)
    if options.out is None:
        page.write(found)
    for title, each in zip(results.FAMILIES, (found.seeds, found.real), strict=True):
        for claim, verdict, text in claims.judged(each):
            print(f"{title:8} {verdict:26} {claim.key}: {text}")
        print(f"{title}: measured in {each.data['run']['minutes']:.1f} minutes")
    print(f"{len(drawn)} figures")


def _said(arguments: list[str]) -> list[str]:
    """Return the arguments without the folder of marks, which changes no figure."""
    if "--kept" not in arguments:
        return arguments
    place = arguments.index("--kept")
    return arguments[:place] + arguments[place + 2 :]


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """All figures, and how they were had."""
    start = time.perf_counter()
    data = measuring.measure_all(
        options.seeds,
        problems=options.problems,
        workers=options.workers,
        groups=options.only,
        kept=options.kept,
        say=note,
    )
    return {
        "version": 1,
        "run": {
            "command": shlex.join(["python", "bench/reproduce.py", *_said(sys.argv[1:])]),
            "minutes": round((time.perf_counter() - start) / 60, 2),
            "workers": options.workers,
            "commit": commit(),
            "date": today(),
            "machine": machine(),
            "python": platform.python_version(),
        },
        **data,
    }


if __name__ == "__main__":
    main()
