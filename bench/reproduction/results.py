"""The measured figures as they lie in results.json, with the questions that are asked of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reproduction import intervals

FILE = Path(__file__).parent / "results.json"
REAL = Path(__file__).parents[1] / "family" / "smol" / "results.json"
"""Of the family grown from SmolLM2, in the same form; its weights are not in the repository."""
TASKS = ("read", "text_sums", "picture_sums")
TITLES = {"read": "reads", "text_sums": "text sums", "picture_sums": "picture sums"}


class NotMeasured(KeyError):
    """A candidate that a run did not measure."""


@dataclass(frozen=True)
class Change:
    """One model against the MLLM in one task, in points (hundredths of the problems).

    Attributes
    ----------
    of_seeds
        The difference of each seed, with its 95 % interval over the problems.
    mean
        Over the seeds.
    over_problems, over_seeds
        95 % intervals of the mean: for these families, and for families trained like these. Where
        there is one seed, the former is that seed's, and the latter None.
    """

    of_seeds: tuple[tuple[float, intervals.Interval], ...]
    mean: float
    over_problems: intervals.Interval
    over_seeds: intervals.Interval | None

    def is_above(self, bar: float = 0.0) -> bool:
        """In every seed, the whole interval."""
        return all(low > bar for _, (low, _) in self.of_seeds)

    def is_below(self, bar: float = 0.0) -> bool:
        """In every seed, the whole interval."""
        return all(high < bar for _, (_, high) in self.of_seeds)


class Results:
    """What a run measured.

    Parameters
    ----------
    data : dict
        As `measuring.measure_all` gives it.
    """

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data
        self.seeds: list[int] = data["seeds"]
        self._of = {(c["group"], c["name"]): c for c in data["candidates"]}
        self._changes: dict[tuple[str, str, str], Change] = {}

    def __contains__(self, key: tuple[str, str]) -> bool:
        return key in self._of

    def entry(self, group: str, name: str) -> dict[str, Any]:
        """A candidate's figures. Raises NotMeasured."""
        if (group, name) not in self._of:
            raise NotMeasured(f"{group}, {name}")
        return self._of[group, name]

    def names(self, group: str) -> list[str]:
        """The candidates of a group, in order."""
        return [name for each, name in self._of if each == group]

    def measured(self, group: str, values: Iterable[float]) -> list[str]:
        """Those of a group's candidates, named by a number, that were measured, in this order."""
        return [name for name in (f"{value:g}" for value in values) if (group, name) in self]

    def with_task(self, task: str) -> Iterator[dict[str, Any]]:
        """All candidates that were measured in a task."""
        return (each for each in self.data["candidates"] if task in each["tasks"])

    def share(self, group: str, name: str, task: str) -> list[float]:
        """The share of right answers of each seed, in percent."""
        found = self.entry(group, name)["tasks"][task]
        return [100 * right / found["asked"] for right in found["right"]]

    def loss(self, group: str, name: str, task: str) -> list[float]:
        """The change of the answers' cross-entropy of each seed, in nats."""
        losses: list[float] = self.entry(group, name)["tasks"][task]["loss_change"]
        return losses

    def change(self, group: str, name: str, task: str) -> Change:
        """Against the MLLM on the same problems."""
        key = group, name, task
        if key not in self._changes:
            self._changes[key] = self._change(*key)
        return self._changes[key]

    def _change(self, group: str, name: str, task: str) -> Change:
        found = self.entry(group, name)["tasks"][task]
        of_seeds = []
        for gained, lost in zip(found["gained"], found["lost"], strict=True):
            low, high = intervals.paired(gained, lost, found["asked"])
            difference = 100 * (gained - lost) / found["asked"]
            of_seeds.append((difference, (100 * low, 100 * high)))
        return Change(
            of_seeds=tuple(of_seeds),
            mean=sum(d for d, _ in of_seeds) / len(of_seeds),
            over_problems=(
                of_seeds[0][1] if len(of_seeds) == 1 else _points(found["over_problems"])
            ),
            over_seeds=_points(found["over_seeds"]) if found["over_seeds"] else None,
        )


@dataclass(frozen=True)
class Both:
    """The figures of the embedded families, and those of the family grown from a real model."""

    seeds: Results
    real: Results

    def holding(self, group: str, name: str) -> Iterator[tuple[str, Results]]:
        """Those that measured a candidate, with their titles."""
        for title, results in zip(FAMILIES, (self.seeds, self.real), strict=True):
            if (group, name) in results:
                yield title, results


FAMILIES = ("embedded", "SmolLM2")


def _points(interval: list[float]) -> intervals.Interval:
    return 100 * interval[0], 100 * interval[1]


def joined(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Old figures with new ones of some candidates put in.

    Raises
    ------
    ValueError
        They are not of the same seeds and problems, or the MLLM did not answer the same.
    """
    before, after = Results(old), Results(new)
    for key in ("seeds", "problems", "weights"):
        if old[key] != new[key]:
            raise ValueError(f"{key} differ: {old[key]} and {new[key]}")
    if before.entry("models", "mllm") != after.entry("models", "mllm"):
        raise ValueError("the MLLM's answers differ; measure everything anew")
    of = {(c["group"], c["name"]): c for c in (*old["candidates"], *new["candidates"])}
    later = {**new["run"], "cpu_minutes": new["cpu_minutes"]}
    added = [*old["run"].get("added", []), later]
    run = {**old["run"], "added": added}
    facts = [{**was, **now} for was, now in zip(old["facts"], new["facts"], strict=True)]
    return {**old, "run": run, "facts": facts, "candidates": list(of.values())}


def read(file: Path = FILE) -> Results:
    """Read what `write` wrote."""
    return Results(json.loads(file.read_text(encoding="utf-8")))


def write(data: dict[str, Any], file: Path = FILE) -> None:
    """One line for each candidate, so that a diff shows what changed."""
    head = {key: value for key, value in data.items() if key != "candidates"}
    lines = [f"{json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
    rows = ",\n".join(json.dumps(each) for each in data["candidates"])
    text = "{\n" + "\n".join(lines) + f'\n"candidates": [\n{rows}\n]\n}}\n'
    file.write_text(text, encoding="utf-8")
