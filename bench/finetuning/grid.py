"""Which runs there are, in the order in which they are made, and the marks that they leave."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from reproduction.exam import Marks

from finetuning.training import Pull

FILE = Path(__file__).parents[1] / "drift.json"
FAMILIES, SEEDS, COUNTS = (0, 1, 2), (0, 1, 2), (100, 300, 1000)
"""Embedded families, training seeds, and numbers of training problems."""
MODES, ALPHAS, RANKS = ("adaptive", "grad-norm", "absolute"), (0.3, 1.0, 3.0), (4, 16)
ABLATION = 300
"""The number of training problems at which ranks and LoRA are tried."""
ASKED = 600
"""Held-out problems for each task."""
TITLES = {"full": "", "gentle": "gentle: ", "lora": "LoRA: "}
MERGES: Mapping[str, tuple[str, dict[str, float]]] = {
    "ties 1": ("ties", {"scale": 1.0}),
    "task arithmetic 0.5": ("task_arithmetic", {"scale": 0.5}),
}
FIRST_MERGED = "ties 1"


@dataclass(frozen=True)
class Run:
    """One fine-tuning: what is trained on what, and from where.

    Attributes
    ----------
    family, seed, count
        The embedded family, the training seed, and the number of training problems.
    way
        One of `RATES`.
    pull
        None for plain fine-tuning.
    merged
        Whether it starts from `FIRST_MERGED` in the place of the MLLM.
    """

    family: int
    seed: int
    count: int
    way: str = "full"
    pull: Pull | None = None
    merged: bool = False

    @property
    def condition(self) -> str:
        """What is compared, whatever the family, seed and count."""
        name = "SFT" if self.pull is None else f"DRIFT {self.pull.mode} {self.pull.alpha:g}"
        if self.pull is not None and self.pull.rank != "full":
            name += f" rank {self.pull.rank}"
        if self.merged:
            name = f"{FIRST_MERGED}, then {name}"
        return f"{TITLES[self.way]}{name}"

    @property
    def key(self) -> str:
        """Its name in the results."""
        return f"{self.family}/{self.seed}/{self.count}/{self.condition}"


def first_runs() -> Iterator[Run]:
    """The modes over alpha at every count, beside plain fine-tuning and merging first."""
    for seed in SEEDS:
        for count in COUNTS:
            for family in FAMILIES:
                yield Run(family, seed, count)
                for alpha in (1.0, *(a for a in ALPHAS if a != 1.0)):
                    for mode in MODES:
                        yield Run(family, seed, count, pull=Pull(mode, alpha))
                yield Run(family, seed, count, merged=True)
        for family in FAMILIES:
            yield Run(family, seed, ABLATION, "gentle")
            for mode in MODES:
                yield Run(family, seed, ABLATION, "gentle", Pull(mode, 1.0))


def ablations(best: Pull) -> Iterator[Run]:
    """Priors of low rank and LoRA, in the best mode."""
    for seed in SEEDS:
        for family in FAMILIES:
            for rank in RANKS:
                yield Run(family, seed, ABLATION, pull=Pull(best.mode, best.alpha, rank))
            yield Run(family, seed, ABLATION, way="lora")
            for alpha in ALPHAS:
                yield Run(family, seed, ABLATION, way="lora", pull=Pull(best.mode, alpha))


class Results:
    """What was measured, in one JSON file, which is replaced after every run.

    Parameters
    ----------
    file
        The file; it need not exist.
    """

    def __init__(self, file: Path = FILE) -> None:
        self._file = file
        found = json.loads(file.read_text("utf-8")) if file.exists() else {}
        self.runs: dict[str, dict[str, Any]] = found.get("runs", {})
        self.figures: dict[str, Any] = found.get("figures", {})

    def add(self, key: str, marks: Mapping[Any, Marks], **facts: Any) -> None:
        """Keep which problems were answered rightly, and other facts."""
        right = {str(task): _packed(mark.right) for task, mark in marks.items()}
        self.runs[key] = {**facts, "right": right}
        self.save()

    def save(self) -> None:
        """Write the file."""
        content = {"asked": ASKED, "figures": self.figures, "runs": dict(sorted(self.runs.items()))}
        partial = self._file.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self._file)

    def right(self, key: str, task: str) -> NDArray[np.bool_] | None:
        """Which problems were answered rightly; None if it was not measured."""
        run = self.runs.get(key)
        if run is None:
            return None
        bits = np.frombuffer(base64.b64decode(run["right"][task]), dtype=np.uint8)
        return np.unpackbits(bits, count=ASKED).astype(bool)

    def pairs(
        self, condition: str, other: str, count: int, task: str
    ) -> list[tuple[str, NDArray[np.float64]]]:
        """For every family and seed with both: 1, 0 or -1 for each problem.

        A condition that does not depend on training, such as "mllm", stands for every count.
        """
        found = []
        for family in FAMILIES:
            for seed in SEEDS:
                both = [
                    self.right(key, task)
                    if (key := f"{family}/{seed}/{count}/{name}") in self.runs
                    else self.right(f"{family}/{name}", task)
                    for name in (condition, other)
                ]
                if both[0] is not None and both[1] is not None:
                    gained = both[0].astype(np.float64) - both[1].astype(np.float64)
                    found.append((f"{family}/{seed}", gained))
        return found

    def share(self, condition: str, count: int, task: str) -> float | None:
        """The mean share of right answers over the families and seeds that were measured."""
        names = [f"{f}/{s}/{count}/{condition}" for f in FAMILIES for s in SEEDS]
        names += [f"{f}/{condition}" for f in FAMILIES]
        every = [r for name in names if (r := self.right(name, task)) is not None]
        return float(np.mean([each.mean() for each in every])) if every else None

    def best(self) -> Pull | None:
        """The mode and alpha with the most picture sums at `ABLATION`, once all were measured."""
        every = (run for run in first_runs() if run.count == ABLATION and run.way == "full")
        keys = [run for run in every if run.pull is not None]
        if any(run.key not in self.runs for run in keys):
            return None
        pulls = list(dict.fromkeys(run.pull for run in keys if run.pull is not None))

        def score(pull: Pull) -> float:
            name = Run(0, 0, ABLATION, pull=pull).condition
            return self.share(name, ABLATION, "picture_sums") or 0.0

        return max(pulls, key=score)


def _packed(right: NDArray[np.bool_]) -> str:
    return base64.b64encode(np.packbits(right).tobytes()).decode()


def missing(results: Results, runs: Iterable[Run]) -> list[Run]:
    """The runs that were not made yet."""
    return [run for run in runs if run.key not in results.runs]
