"""Evidence in miniature for DRIFT: fine-tune the embedded families with it and without.

    python bench/drift.py                    # every run that is missing, into bench/drift.json
    python bench/drift.py --seconds 600      # stop after so many seconds; the next call goes on
    python bench/drift.py --render           # write the tables of docs/drift.md from drift.json
    python bench/drift.py --memory           # memory and time of a step at the size of SmolLM2-135M

A family's models come with the package. What is trained and what is asked stands in
bench/finetuning/training.py and grid.py. Each run takes ten to twenty seconds on one core; two
processes that share the work (--share 0/2 and 1/2, each with a --file of its own, joined by
--join) take half as long.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import lru_cache
from pathlib import Path
from tempfile import gettempdir

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # the package, when not installed

import torch
from finetuning.grid import (
    ASKED,
    FILE,
    FIRST_MERGED,
    MERGES,
    Results,
    Run,
    ablations,
    first_runs,
    missing,
)
from finetuning.training import Trainee
from reproduction.family import Family

CACHE = Path(gettempdir()) / "lean-merge-drift"


class Bench:
    """The families as they are needed, one at a time in memory."""

    def __init__(self, results: Results, cache: Path) -> None:
        self._results, self._cache = results, cache

    @lru_cache(maxsize=3)  # noqa: B019  # it lives as long as the program
    def trainee(self, number: int) -> tuple[Family, Trainee]:
        """A family, whose models without training are measured when it is first asked for."""
        family = Family(number, problems=ASKED)
        trainee = Trainee(family, self._cache)
        if f"{number}/MLLM" not in self._results.runs:
            self._results.add(f"{number}/MLLM", trainee.exam.take(family.mllm))
        for name in MERGES:
            if f"{number}/{name}" not in self._results.runs:
                marks = trainee.exam.take(self.merged(family, name))
                self._results.add(f"{number}/{name}", marks)
        return family, trainee

    @staticmethod
    def merged(family: Family, name: str) -> dict[str, torch.Tensor]:
        """The weights of a merge."""
        method, parameters = MERGES[name]
        return dict(family.merged(method, **parameters))

    def make(self, run: Run) -> None:
        """Train and measure."""
        family, trainee = self.trainee(run.family)
        start = self.merged(family, FIRST_MERGED) if run.merged else family.mllm
        began = time.process_time()
        done = trainee.train(run.count, run.seed, start=start, way=run.way, pull=run.pull)
        marks = trainee.exam.take(done.weights)
        self._results.add(
            run.key,
            marks,
            loss=round(sum(done.losses[-10:]) / 10, 5),
            seconds=round(done.seconds, 2),
            processor=round(time.process_time() - began, 2),
        )


def fill(results: Results, cache: Path, *, seconds: float, share: tuple[int, int]) -> None:
    """Make all runs that are missing, first those of every mode, then the others."""
    ends = time.monotonic() + seconds
    bench = Bench(results, cache)
    while True:
        todo = missing(results, first_runs())
        if not todo and (best := results.best()) is not None:
            todo = missing(results, ablations(best))
        todo = [run for run in todo if run.family % share[1] == share[0]]
        if not todo or time.monotonic() > ends:
            print(f"{len(results.runs)} entries, {len(todo)} runs left", flush=True)
            return
        bench.make(todo[0])
        told = results.runs[todo[0].key]
        print(f"{todo[0].key}: {told['processor']} s, loss {told['loss']}", flush=True)


def main() -> None:
    """Run, render or measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--render", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--share", default="0/1", help="this one's share of the families, as 0/2")
    parser.add_argument("--file", type=Path, default=FILE)
    parser.add_argument("--join", type=Path, nargs="*", default=[], help="files to take over")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where priors are kept")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = Results(options.file)
    for each in options.join:
        results.runs |= Results(each).runs
        results.save()
    if options.memory:
        from finetuning.cost import measure_cost

        results.figures["cost"] = measure_cost(options.cache)
        results.save()
    if options.render:
        from finetuning.page import render

        render(results)
    if not (options.render or options.memory or options.join):
        number, count = map(int, options.share.split("/"))
        fill(results, options.cache, seconds=options.seconds, share=(number, count))


if __name__ == "__main__":
    main()
