"""The page's tables of methods: what each brings, at which scale, and what foretells that."""

from __future__ import annotations

from statistics import fmean, median

from reproduction.claims import shown
from reproduction.grids import BY_GROUP, GRIDS, KINDS, Grid
from reproduction.results import FAMILIES, Both, Results
from reproduction.scales import (
    KEPT,
    MEASURED_RULES,
    RULES,
    TASK,
    Rule,
    best,
    cosine,
    cost,
    cost_of_chance,
    default,
    gain,
    harms,
    helps,
    measured_grids,
    names,
    norm_ratio,
    overlap,
)
from reproduction.tables import cell, table

NOTHING = "none"


def methods(both: Both) -> str:
    """Every method at its default and at its best, and where it helps or harms."""
    results = both.seeds
    every = range(len(results.seeds))
    rows = []
    for grid in sorted(measured_grids(results), key=lambda grid: list(KINDS).index(grid.kind)):
        own, top = default(results, grid), best(results, grid, every)
        rows.append(
            (
                grid.title,
                f"`{grid.method}`, `{grid.axis}`",
                str(results.entry(grid.group, top)["tasks"][TASK]["asked"]),
                *_at(results, grid, own),
                *_at(results, grid, top),
                _listed(results, grid, helps(results, grid)),
                _listed(results, grid, harms(results, grid)),
            )
        )
    head = ("method", "name, parameter", "problems", "default", "picture sums there", "reads there")
    head = (*head, "best of the grid", "picture sums there", "reads there")
    text = table((*head, "helps in every seed at", "harms in some seed at"), rows)
    missing = [grid.title for grid in GRIDS if not names(results, grid)]
    if missing:
        text += f"\n\nNot measured, though the script can: {'; '.join(missing)}."
    return text


def _at(results: Results, grid: Grid, name: str | None) -> tuple[str, str, str]:
    """Return a value with its changes in picture sums and in reading."""
    if name is None:
        return f"{grid.default:g}", "", ""
    changes = [results.change(grid.group, name, task) for task in (TASK, KEPT)]
    return name, cell(changes[0]), shown(changes[1])


def _listed(results: Results, grid: Grid, found: list[str]) -> str:
    if len(found) == len(names(results, grid)):
        return "all of the grid"
    return ", ".join(found) or NOTHING


def scales(both: Both) -> str:
    """The best scale of each method in each family, and what another family's best costs."""
    results = both.seeds
    (rule,) = MEASURED_RULES.values()
    rows = []
    for grid in measured_grids(results):
        cells = []
        lost = []
        for index in range(len(results.seeds)):
            top = best(results, grid, [index])
            cells.append(f"{top}: {gain(results, grid, top, index):+.1f}")
            found = cost(results, rule, grid, index)
            lost.append("" if found is None else f"{found:.1f}")
        few = names(both.real, grid)
        if few:
            top = best(both.real, grid, [0])
            there = f"{top}: {gain(both.real, grid, top, 0):+.1f} (of {', '.join(few)})"
        else:
            there = "not measured"
        rows.append((grid.title, grid.axis, *cells, ", ".join(lost), there))
    seeds = (f"seed {seed}" for seed in results.seeds)
    lost_head = "points lost with the best of the other two"
    return table(("method", "parameter", *seeds, lost_head, FAMILIES[1]), rows)


def rules(both: Both) -> str:
    """What each rule costs against the best value of the grid, over all methods."""
    results = both.seeds
    grids = measured_grids(results)
    rows = [_rule_row(title, results, rule, grids) for title, rule in RULES.items()]
    rows += [_rule_row(title, results, rule, grids) for title, rule in MEASURED_RULES.items()]
    chance = [
        [cost_of_chance(results, grid, index) for grid in grids]
        for index in range(len(results.seeds))
    ]
    rows.append(_costs("any value of the grid, drawn by chance", chance))
    head = ("rule", *(f"seed {seed}" for seed in results.seeds), "mean")
    return table(head, rows)


def _rule_row(title: str, results: Results, rule: Rule, grids: list[Grid]) -> tuple[str, ...]:
    lost = [
        [found for grid in grids if (found := cost(results, rule, grid, index)) is not None]
        for index in range(len(results.seeds))
    ]
    return _costs(title, lost)


def _costs(title: str, lost: list[list[float]]) -> tuple[str, ...]:
    cells = [f"{fmean(each):.1f} ({max(each):.1f})" if each else "" for each in lost]
    every = [value for each in lost for value in each]
    return title, *cells, f"{fmean(every):.1f}" if every else ""


def numbers(both: Both) -> str:
    """What is known of each family without measuring, beside two methods' best scales."""
    rows = []
    shown_beside = [BY_GROUP[group] for group in ("task arithmetic", "ties")]
    for results in (both.seeds, both.real):
        for index, facts in enumerate(results.data["facts"]):
            title = str(results.seeds[index]) if results is both.seeds else FAMILIES[1]
            angle = cosine(results, index)
            row = [title, f"{norm_ratio(results, index):.2f}"]
            row.append("not recorded" if angle is None else f"{angle:.3f}")
            row.append(f"{100 * overlap(results, index):.0f} %")
            row.append(f"{median(weight['s_1'] for weight in facts['weights']):.2f}")
            for grid in shown_beside:
                found = names(results, grid)
                row.append(best(results, grid, [index]) if len(found) > 1 else "")
            rows.append(row)
    head = ("family", "norm of dV over that of dM", "cosine of the two")
    head = (*head, "dM in the MLLM's leading 8", "median s_1")
    return table((*head, *(f"best scale of {grid.title}" for grid in shown_beside)), rows)
