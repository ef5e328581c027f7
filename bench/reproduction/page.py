"""The generated parts of docs/reproduction.md, between markers; the rest is written by hand."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from scipy import stats

from lean_merge.linalg import log_omitted
from reproduction.candidates import (
    LINEAR_WEIGHTS,
    RANKS,
    STAGE_SETS,
    TA_WEIGHTS,
    THRESHOLDS,
    TIES_SCALES,
)
from reproduction.claims import DEFAULT, judged
from reproduction.family import ROOT, folder_of
from reproduction.predicting import SINGLE_PREDICTORS, pooled_rank, single_ranks
from reproduction.results import TASKS, TITLES, Change, Results

PAGE = ROOT / "docs" / "reproduction.md"
_PART = re.compile(r"<!-- measured: (?P<name>[a-z ]+) -->\n.*?<!-- end -->", re.DOTALL)
SUMS = ("text_sums", "picture_sums")


def filled(text: str, results: Results) -> str:
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
        return f"<!-- measured: {name} -->\n{PARTS[name](results)}\n<!-- end -->"

    return _PART.sub(replaced, text)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(change: Change, *, seeds: bool = False) -> str:
    """A mean difference in points with its interval over the problems, and over the seeds."""
    low, high = change.over_problems
    text = f"{change.mean:+.1f} ({low:+.1f} to {high:+.1f})"
    if seeds and change.over_seeds is not None:
        text += f" [{change.over_seeds[0]:+.1f} to {change.over_seeds[1]:+.1f}]"
    return text


# --- the parts ----------------------------------------------------------------------------


def run(results: Results) -> str:
    """How it was run."""
    of = results.data["run"]
    seeds = ", ".join(map(str, results.seeds))
    text = (
        f"`{of['command']}`, {of['minutes']:.1f} minutes with {of['workers']} processes of one "
        f"thread, {results.data['cpu_minutes']:.1f} minutes of CPU ({of['machine']}), "
        f"commit {of['commit']}, {of['date']}: "
        f"{len(results.data['candidates'])} models for each of the seeds {seeds}, "
        f"{results.data['problems']} held-out problems a task."
    )
    for later in of.get("added", []):
        text += f" Added later: `{later['command']}`, commit {later['commit']}."
    return text


def claims(results: Results) -> str:
    """The paper's claims with their verdicts."""
    rows = [
        (claim.says, claim.here, f"**{verdict}**", found)
        for claim, verdict, found in judged(results)
    ]
    return table(("claim", "tested here as", "verdict", "found, in points: mean (each seed)"), rows)


def families(results: Results) -> str:
    """The seeds that were trained, and whether each is a fair question."""
    rows = []
    for seed in results.seeds:
        log = training_log(seed)
        abilities, conditions = log["abilities"], log["conditions"]
        failed = [name.replace("_", " ") for name, met in conditions["met"].items() if not met]
        angles = conditions["leading_angles"]["s_1"]
        rows.append(
            (
                str(seed),
                _percent(abilities["base"]["text_sums"]),
                _percent(abilities["expert"]["text_sums"]),
                *(_percent(abilities["mllm"][task]) for task in TASKS),
                f"{conditions['task_vector_of_mllm']['overall_percent']:.1f}, "
                f"{conditions['task_vector_of_expert']['overall_percent']:.1f} %",
                f"{angles['median']:.2f}, {angles['largest']:.2f}",
                "all met" if not failed else "not met: " + ", ".join(failed),
            )
        )
    head = ("seed", "base adds", "expert adds", "MLLM reads", "adds in text", "adds in pictures")
    return table((*head, "task vectors", "s_1 median, largest", "conditions"), rows)


def models(results: Results) -> str:
    """Every plain way to merge, and IP-Merging over the threshold."""
    rows = [_row(results, "MLLM", "models", "mllm"), _row(results, "base", "models", "base")]
    rows.append(_row(results, "expert", "models", "expert"))
    for title, group, weights in (
        ("Task Arithmetic", "task arithmetic", TA_WEIGHTS),
        ("MLLM toward expert", "linear", LINEAR_WEIGHTS),
        ("TIES", "ties", TIES_SCALES),
        ("IP-Merging, threshold", "threshold", THRESHOLDS),
    ):
        rows += [_row(results, f"{title} {w:g}", group, f"{w:g}") for w in weights]
    head = ("model", "length", "changed", *(TITLES[task] for task in TASKS))
    return table(head, rows)


def stages(results: Results) -> str:
    """The paper's Table 5 over thresholds."""
    groups = {**{title: f"stages: {title}" for title in STAGE_SETS}, "all three": "threshold"}
    rows = []
    for name in results.names("stages: select"):
        for task in SUMS:
            changes = [cell(results.change(group, name, task)) for group in groups.values()]
            rows.append((name, TITLES[task], *changes))
    return table(("threshold", "task", *groups), rows)


def options(results: Results) -> str:
    """The parameters beside threshold and stages."""
    rows = []
    for threshold in ("0.4", "0"):
        for title, group in (
            ("temperature", f"temperature at {threshold}"),
            ("importance relative, temperature", f"relative at {threshold}"),
            ("scale", f"scale at {threshold}"),
        ):
            names = results.names(group)
            rows += [
                _row(results, f"threshold {threshold}, {title} {name}", group, name)
                for name in names
            ]
        rows.append(_row(results, f"threshold {threshold}, defaults", "threshold", threshold))
        for group in ("nuclear: top_q", "similarity_weight: sigma", "stored in bf16"):
            rows.append(_row(results, f"threshold {threshold}, {group}", group, threshold))
    for name in results.names("select_by: max"):
        rows.append(_row(results, f"threshold {name}, select_by: max", "select_by: max", name))
    return table(("model", "length", "changed", *(TITLES[task] for task in TASKS)), rows)


def rank(results: Results) -> str:
    """How much of the skill survives when dM is cut, and how."""
    groups = {
        "base + dM cut to rank k": "base + dM cut to rank",
        "MLLM + dM cut to rank k": "dM cut to rank",
        "MLLM + dM without those": "dM without its leading directions",
        "MLLM + dM on the MLLM's leading k": "dM on the MLLM's leading directions",
        "MLLM + dM on k random": "dM on random directions",
    }
    rows = []
    for k in map(str, RANKS):
        cells = [k]
        for group in groups.values():
            share = fmean(results.share(group, k, "text_sums"))
            length = fmean(results.entry(group, k)["norm"])
            cells.append(
                f"{share:.1f}" if group.startswith("base") else f"{share:.1f} at {length:.2f}"
            )
        rows.append(cells)
    return table(("k", *groups), rows)


def lengths(results: Results) -> str:
    """Updates made as long as lambda dM."""
    rows = [_row(results, "lambda dM, threshold 0", "stages: select, rescale", "0")]
    for name in results.names("update as long as lambda dM"):
        how, threshold = name.split(", ")
        title = f"IP-Merging at threshold {threshold}, {how} as long as lambda dM"
        rows.append(_row(results, title, "update as long as lambda dM", name))
    for name in results.names("random directions as long as lambda dM"):
        title = f"dM on {name} random direction{'s' if name != '1' else ''}, each weight as long"
        rows.append(_row(results, title, "random directions as long as lambda dM", name))
    return table(("model", "length", "changed", *(TITLES[task] for task in TASKS)), rows)


def selection(results: Results) -> str:
    """lambda dM of some weights, by what they were chosen."""
    rows = []
    for count in ("4", "8", "14"):
        for kind in ("largest", "smallest", "random"):
            names = [
                name for name in results.names("lambda dM of") if name.startswith(f"{count} {kind}")
            ]
            changes = [
                [results.change("lambda dM of", n, task).mean for n in names] for task in SUMS
            ]
            lengths = [value for n in names for value in results.entry("lambda dM of", n)["norm"]]
            title = {"largest": "largest s_1", "smallest": "smallest s_1", "random": "at random"}[
                kind
            ]
            cells = [f"{fmean(each):+.1f}" for each in changes]
            rows.append((count, title, f"{fmean(lengths):.2f}", *cells))
    head = ("weights", "chosen by", "length", *(TITLES[task] for task in SUMS))
    return table(head, rows)


def predictors(results: Results) -> str:
    """What tells beforehand which weight will bring something, and how much a merge will."""
    rows = []
    for kind, title in (("whole", "lambda dM"), ("update", "IP-Merging's update")):
        for key, name in SINGLE_PREDICTORS.items():
            ranks = single_ranks(results, kind, key)
            cells = [f"{rho:+.2f} (p {p:.2g})" for rho, p in ranks]
            rows.append((f"one weight, {title}", name, *cells))
    for task in SUMS:
        cells = [f"{rho:+.2f} (p {p:.1g})" for rho, p in pooled_rank(results, task)]
        rows.append((f"whole merges, {TITLES[task]}", "length of the update", *cells))
    return table(("gain of", "predicted by", *(f"seed {seed}" for seed in results.seeds)), rows)


def auto(results: Results) -> str:
    """What `--threshold auto` is for each family, beside the best of the sweep."""
    rows = []
    for index, facts in enumerate(results.data["facts"]):
        said = facts["auto"]
        row = [str(results.seeds[index]), f"{said['chance']:.2f}", f"{said['bearable']:.2f}"]
        row += ["yes" if said["gap"] else "no", f"{said['p_value']:.1g}"]
        row.append(f"{said['threshold']:.2f}")
        row.append(str(results.entry("threshold auto", "auto")["changed"][index]))
        for task in SUMS:
            difference, (low, high) = results.change("threshold auto", "auto", task).of_seeds[index]
            row.append(f"{difference:+.1f} ({low:+.1f} to {high:+.1f})")
            sweep = {
                f"{t:g}": results.change("threshold", f"{t:g}", task).of_seeds[index][0]
                for t in THRESHOLDS
            }
            best = max(sweep, key=lambda name: sweep[name])
            row.append(f"{sweep[best]:+.1f} at {best}")
        rows.append(row)
    head = ["seed", "chance", "bearable", "gap", "p of unrelated", "auto", "selected"]
    for task in SUMS:
        head += [TITLES[task], "best of the sweep"]
    return table(head, rows)


def energies(results: Results) -> str:
    """Where the energy of dM lies."""
    rows = []
    for seed, facts in zip(results.seeds, results.data["facts"], strict=True):
        inside = facts["energy"]
        kept = [weight["energy_kept"] for weight in facts["weights"]]
        above = [w["energy_kept"] for w in facts["weights"] if w["s_1"] >= float(DEFAULT)]
        rows.append(
            (
                str(seed),
                *(f"{100 * inside['its own'][k - 1]:.0f} %" for k in (1, 8)),
                *(
                    f"{100 * inside[b][k - 1]:.1f} %"
                    for b in ("the MLLM's", "random")
                    for k in (1, 8)
                ),
                f"{100 * median(kept):.1f} %, {100 * max(kept):.1f} %",
                f"{100 * median(above):.1f} %" if above else "none",
            )
        )
    head = ("seed", "own, k = 1", "own, 8", "MLLM's, 1", "MLLM's, 8", "random, 1", "random, 8")
    return table((*head, "gamma^2: median, largest", f"of those at {DEFAULT}"), rows)


def dimension(results: Results) -> str:
    """By arithmetic alone: how far one direction must stand out of q - 1 random ones."""
    rows = []
    for width in (128, 1024, 2048, 4096):
        directions = min(1024, width)
        chance = float(stats.norm.ppf(0.995)) / width**0.5
        tail = log_omitted(directions - 1, in_features=width, temperature=TEMPERATURE)
        shares = [1 / (1 + math.exp(tail - TEMPERATURE * s)) ** 2 for s in (0.3, 0.4, 0.5)]
        cells = [f"{share:.3f}" for share in shares]
        rows.append(
            (str(width), str(directions), f"{chance:.3f}", f"{tail / TEMPERATURE:.2f}", *cells)
        )
    head = ("width", "directions q", "1 % of random s_i above", "gamma_1 = 1/2 at s_1 =")
    return table((*head, "gamma_1^2 at 0.3", "at 0.4", "at 0.5"), rows)


TEMPERATURE = 32.0
PARTS: dict[str, Callable[[Results], str]] = {
    "run": run,
    "claims": claims,
    "families": families,
    "models": models,
    "stages": stages,
    "options": options,
    "rank": rank,
    "energies": energies,
    "dimension": dimension,
    "lengths": lengths,
    "auto": auto,
    "selection": selection,
    "predictors": predictors,
}


def training_log(seed: int) -> dict[str, Any]:
    """What training wrote about a family."""
    text = (folder_of(seed) / "training_log.json").read_text(encoding="utf-8")
    log: dict[str, Any] = json.loads(text)
    return log


def write(results: Results, page: Path = PAGE) -> None:
    """Write the generated parts anew."""
    page.write_text(filled(page.read_text(encoding="utf-8"), results), encoding="utf-8")


def _percent(score: dict[str, float]) -> str:
    return f"{100 * score['share']:.1f} ({100 * score['low']:.1f} to {100 * score['high']:.1f})"


def _row(results: Results, title: str, group: str, name: str) -> list[str]:
    """Mean share of each task, and the change against the MLLM."""
    entry = results.entry(group, name)
    changed = _span(entry["changed"])
    text = group == "models"
    cells = [title, "" if text else f"{fmean(entry['norm']):.3f}", "" if text else changed]
    for task in TASKS:
        if task not in entry["tasks"]:
            cells.append("")
            continue
        share = f"{fmean(results.share(group, name, task)):.1f}"
        change = results.change(group, name, task)
        is_mllm = (group, name) == ("models", "mllm")
        cells.append(share if is_mllm else f"{share}: {cell(change, seeds=True)}")
    return cells


def _span(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"
