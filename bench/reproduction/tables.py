"""The page's tables of merges and task vectors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean, median

from scipy import stats

from lean_merge.linalg.similarity import log_omitted
from reproduction.candidates import RANKS, SHOWN, STAGE_SETS, THRESHOLDS
from reproduction.claims import DEFAULT
from reproduction.grids import GRIDS
from reproduction.predicting import SINGLE_PREDICTORS, pooled_rank, single_ranks
from reproduction.results import FAMILIES, TASKS, TITLES, Both, Change, Results

SUMS = ("text_sums", "picture_sums")
TEMPERATURE = 32.0
HEAD = ("model", "family", "length", "changed", *(TITLES[task] for task in TASKS))


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


def models(both: Both) -> str:
    """Every method over its grid, and IP-Merging over the threshold as well."""
    rows = _rows(both, "MLLM", "models", "mllm") + _rows(both, "base", "models", "base")
    rows += _rows(both, "base, shown three sums", "models", SHOWN)
    rows += _rows(both, "expert", "models", "expert")
    for grid in GRIDS:
        for value in grid.values:
            title = f"{grid.title}, {grid.axis} {value:g}"
            rows += _rows(both, title, grid.group, f"{value:g}")
    for value in THRESHOLDS:
        rows += _rows(both, f"IP-Merging, threshold {value:g}", "threshold", f"{value:g}")
    rows += _rows(both, "IP-Merging, threshold auto", "threshold auto", "auto")
    return table(HEAD, rows)


def stages(both: Both) -> str:
    """The paper's Table 5 over thresholds."""
    groups = {**{title: f"stages: {title}" for title in STAGE_SETS}, "all three": "threshold"}
    rows = []
    for name in both.seeds.names("stages: select"):
        for title, results in both.holding("stages: select", name):
            for task in SUMS if results is both.seeds else TASKS:
                changes = [
                    cell(results.change(group, name, task)) if (group, name) in results else ""
                    for group in groups.values()
                ]
                rows.append((name, title, TITLES[task], *changes))
    return table(("threshold", "family", "task", *groups), rows)


def options(both: Both) -> str:
    """The parameters beside threshold and stages."""
    rows = []
    for threshold in ("0.4", "0"):
        for title, group in (
            ("temperature", f"temperature at {threshold}"),
            ("importance relative, temperature", f"relative at {threshold}"),
            ("scale", f"scale at {threshold}"),
        ):
            for name in both.seeds.names(group):
                rows += _rows(both, f"threshold {threshold}, {title} {name}", group, name)
        rows += _rows(both, f"threshold {threshold}, defaults", "threshold", threshold)
        for group in ("nuclear: top_q", "similarity_weight: sigma", "stored in bf16"):
            rows += _rows(both, f"threshold {threshold}, {group}", group, threshold)
    for name in both.seeds.names("select_by: max"):
        rows += _rows(both, f"threshold {name}, select_by: max", "select_by: max", name)
    return table(HEAD, rows)


def rank(both: Both) -> str:
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
        for title, results in both.holding("base + dM cut to rank", k):
            cells = [k, title]
            for group in groups.values():
                if (group, k) not in results:
                    cells.append("")
                    continue
                share = fmean(results.share(group, k, "text_sums"))
                length = fmean(results.entry(group, k)["norm"])
                is_base = group.startswith("base")
                cells.append(f"{share:.1f}" if is_base else f"{share:.1f} at {length:.2f}")
            rows.append(cells)
    return table(("k", "family", *groups), rows)


def lengths(both: Both) -> str:
    """Updates made as long as lambda dM."""
    rows = _rows(both, "lambda dM, threshold 0", "stages: select, rescale", "0")
    rows += _rows(both, "lambda dM, threshold 0.4", "stages: select, rescale", "0.4")
    for name in both.seeds.names("update as long as lambda dM"):
        how, threshold = name.split(", ")
        title = f"IP-Merging at threshold {threshold}, {how} as long as lambda dM"
        rows += _rows(both, title, "update as long as lambda dM", name)
    for name in both.seeds.names("random directions as long as lambda dM"):
        title = f"dM on {name} random direction{'s' if name != '1' else ''}, each weight as long"
        rows += _rows(both, title, "random directions as long as lambda dM", name)
    return table(HEAD, rows)


def selection(both: Both) -> str:
    """lambda dM of some weights, by what they were chosen."""
    results = both.seeds
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


def predictors(both: Both) -> str:
    """What tells beforehand which weight will bring something, and how much a merge will."""
    results = both.seeds
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


def auto(both: Both) -> str:
    """What `--threshold auto` is for each family, beside the best of the sweep."""
    rows = []
    for title, results in both.holding("threshold auto", "auto"):
        swept = results.measured("threshold", THRESHOLDS)
        for index, facts in enumerate(results.data["facts"]):
            said = facts["auto"]
            row = [str(results.seeds[index]) if results is both.seeds else title]
            row += [f"{said['chance']:.2f}", f"{said['bearable']:.2f}"]
            row += ["yes" if said["gap"] else "no", f"{said['p_value']:.1g}"]
            row.append(f"{said['threshold']:.2f}")
            row.append(str(results.entry("threshold auto", "auto")["changed"][index]))
            for task in SUMS:
                change = results.change("threshold auto", "auto", task).of_seeds[index]
                difference, (low, high) = change
                row.append(f"{difference:+.1f} ({low:+.1f} to {high:+.1f})")
                sweep = {
                    name: results.change("threshold", name, task).of_seeds[index][0]
                    for name in swept
                }
                best = max(sweep, key=lambda name: sweep[name])
                row.append(f"{sweep[best]:+.1f} at {best}")
            rows.append(row)
    head = ["family", "chance", "bearable", "gap", "p of unrelated", "auto", "selected"]
    for task in SUMS:
        head += [TITLES[task], "best of the sweep"]
    return table(head, rows)


def energies(both: Both) -> str:
    """Where the energy of dM lies."""
    rows = []
    titles = (*map(str, both.seeds.seeds), FAMILIES[1])
    found = (*both.seeds.data["facts"], *both.real.data["facts"])
    for title, facts in zip(titles, found, strict=True):
        inside = facts["energy"]
        kept = [weight["energy_kept"] for weight in facts["weights"]]
        above = [w["energy_kept"] for w in facts["weights"] if w["s_1"] >= float(DEFAULT)]
        rows.append(
            (
                title,
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
    head = ("family", "own, k = 1", "own, 8", "MLLM's, 1", "MLLM's, 8", "random, 1", "random, 8")
    return table((*head, "gamma^2: median, largest", f"of those at {DEFAULT}"), rows)


def dimension(both: Both) -> str:
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


def _rows(both: Both, title: str, group: str, name: str) -> list[list[str]]:
    """A row for each kind of families that measured it."""
    return [_row(each, title, family, group, name) for family, each in both.holding(group, name)]


def _row(results: Results, title: str, family: str, group: str, name: str) -> list[str]:
    """Mean share of each task, and the change against the MLLM."""
    entry = results.entry(group, name)
    changed = _span(entry["changed"])
    text = group == "models"
    cells = [title, family, "" if text else f"{fmean(entry['norm']):.3f}", "" if text else changed]
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
