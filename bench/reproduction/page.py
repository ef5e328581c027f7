"""The generated parts of docs/reproduction.md, between markers; the rest is written by hand."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from lean_merge.demo.evaluate import Accuracy
from reproduction import methodtables, tables
from reproduction.claims import NOT_REPRODUCED, REPRODUCED, judged
from reproduction.family import ROOT, folder_of
from reproduction.results import FAMILIES, TASKS, Both, Results
from reproduction.tables import table

PAGE = ROOT / "docs" / "reproduction.md"
_PART = re.compile(r"<!-- measured: (?P<name>[a-z ]+) -->\n.*?<!-- end -->", re.DOTALL)


def filled(text: str, both: Both) -> str:
    """The page with every generated part written anew; what stands between them is left alone.

    Raises
    ------
    ValueError
        The page lacks a part, or has one that is not known.
    """
    found = [match["name"] for match in _PART.finditer(text)]
    if sorted(found) != sorted(PARTS):
        raise ValueError(f"{PAGE.name} must have each of {', '.join(PARTS)} once, not {found}")

    def replaced(match: re.Match[str]) -> str:
        name = match["name"]
        return f"<!-- measured: {name} -->\n{PARTS[name](both)}\n<!-- end -->"

    return _PART.sub(replaced, text)


# --- the parts ----------------------------------------------------------------------------


def run(both: Both) -> str:
    """How it was run."""
    results = both.seeds
    first = {**results.data["run"], "cpu_minutes": results.data["cpu_minutes"]}
    parts = []
    for of in (first, *first.get("added", [])):
        parts.append(
            f"`{of['command']}`, {of['minutes']:.1f} minutes with {of['workers']} "
            f"process{'es' if of['workers'] > 1 else ''} of one thread, "
            f"{of['cpu_minutes']:.1f} minutes of CPU ({of['machine']}), commit {of['commit']}, "
            f"{of['date']}."
        )
    seeds = ", ".join(map(str, results.seeds))
    parts.append(
        f"In all {len(results.data['candidates'])} models for each of the seeds {seeds}, and "
        f"{results.data['problems']} held-out problems a task."
    )
    of = both.real.data["run"]
    parts.append(
        f"The rows of {FAMILIES[1]}: `{of['command']}`, {of['minutes']:.1f} minutes with "
        f"one thread ({of['machine']}), commit {of['commit']}, {of['date']}: "
        f"{len(both.real.data['candidates'])} models of one seed, "
        f"{both.real.data['problems']} held-out problems a task."
    )
    return "\n\n".join(parts)


def claims(both: Both) -> str:
    """The paper's claims with their verdicts on both kinds of families."""
    rows = [
        (claim.says, claim.here, f"**{verdict}**", found, f"**{other}**", found_there)
        for (claim, verdict, found), (_, other, found_there) in zip(
            judged(both.seeds), judged(both.real), strict=True
        )
    ]
    head = ("claim", "tested here as")
    for title, each in zip(FAMILIES, ("mean (each seed)", "difference (interval)"), strict=True):
        head = (*head, f"{title}: verdict", f"found, in points: {each}")
    return table(head, rows)


def agreement(both: Both) -> str:
    """On which claims the two kinds of families agree, in words."""
    pairs = list(zip(judged(both.seeds), judged(both.real), strict=True))
    tested = [
        (re.split(r":| \(", claim.says)[0].rstrip("."), here, there)
        for (claim, here, _), (_, there, _) in pairs
        if {here, there} <= {REPRODUCED, NOT_REPRODUCED}
    ]
    text = f"{len(tested)} of {len(pairs)} claims were tested on both."
    for verdict, title in ((REPRODUCED, "Reproduced"), (NOT_REPRODUCED, "Not reproduced")):
        said = [says for says, here, there in tested if here == there == verdict]
        text += f"\n\n{title} by both ({len(said)}): {_listed(said)}"
    apart = [f"{says} ({FAMILIES[1]}: {there})" for says, here, there in tested if here != there]
    return f"{text}\n\nTold differently ({len(apart)}): {_listed(apart)}"


def _listed(said: Sequence[str]) -> str:
    return "; ".join(said) + "." if said else "none."


def families(both: Both) -> str:
    """The families that were trained, and whether each seed's is a fair question."""
    rows = []
    for seed in both.seeds.seeds:
        log = training_log(seed)
        abilities, conditions = log["abilities"], log["conditions"]
        failed = [name.replace("_", " ") for name, met in conditions["met"].items() if not met]
        angles = conditions["leading_angles"]["s_1"]
        rows.append(
            (
                str(seed),
                *(_counted(abilities[role]["text_sums"]) for role in ("base", "expert")),
                *(_counted(abilities["mllm"][task]) for task in TASKS),
                f"{conditions['task_vector_of_mllm']['overall_percent']:.1f}, "
                f"{conditions['task_vector_of_expert']['overall_percent']:.1f} %",
                f"{angles['median']:.2f}, {angles['largest']:.2f}",
                "all met" if not failed else "not met: " + ", ".join(failed),
            )
        )
    rows.append(_family_of(both.real))
    head = ("family", "base adds", "expert adds", "MLLM reads", "adds in text", "adds in pictures")
    return table((*head, "task vectors", "s_1 median, largest", "conditions"), rows)


def _family_of(results: Results) -> Sequence[str]:
    """The real model's family in the same columns, from its results."""

    def share(role: str, task: str) -> str:
        found = results.entry("models", role)["tasks"][task]
        return _percent(found["right"][0], found["asked"])

    weights = results.data["facts"][0]["weights"]
    base = math.hypot(*(weight["base"] for weight in weights))
    lengths = [100 * math.hypot(*(w[role] for w in weights)) / base for role in ("mllm", "expert")]
    first = [weight["s_1"] for weight in weights]
    return (
        FAMILIES[1],
        *(share(role, "text_sums") for role in ("base", "expert")),
        *(share("mllm", task) for task in TASKS),
        f"{lengths[0]:.1f}, {lengths[1]:.1f} %",
        f"{median(first):.2f}, {max(first):.2f}",
        "not applied",
    )


PARTS: dict[str, Callable[[Both], str]] = {
    "run": run,
    "methods": methodtables.methods,
    "scales": methodtables.scales,
    "numbers": methodtables.numbers,
    "rules": methodtables.rules,
    "claims": claims,
    "agreement": agreement,
    "families": families,
    "models": tables.models,
    "stages": tables.stages,
    "options": tables.options,
    "rank": tables.rank,
    "energies": tables.energies,
    "dimension": tables.dimension,
    "lengths": tables.lengths,
    "auto": tables.auto,
    "selection": tables.selection,
    "predictors": tables.predictors,
}


def training_log(seed: int) -> dict[str, Any]:
    """What training wrote about a family."""
    text = (folder_of(seed) / "training_log.json").read_text(encoding="utf-8")
    log: dict[str, Any] = json.loads(text)
    return log


def write(both: Both, page: Path = PAGE) -> None:
    """Write the generated parts anew."""
    page.write_text(filled(page.read_text(encoding="utf-8"), both), encoding="utf-8")


def _percent(correct: int, total: int) -> str:
    of = Accuracy.of(correct, total)
    return f"{100 * of.share:.1f} ({100 * of.low:.1f} to {100 * of.high:.1f})"


def _counted(score: Mapping[str, int]) -> str:
    return _percent(score["correct"], score["total"])
