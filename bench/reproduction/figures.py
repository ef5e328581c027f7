"""The page's figures, drawn from the results alone; the same results give the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from reproduction.candidates import RANKS, STAGE_SETS, THRESHOLDS
from reproduction.family import ROOT
from reproduction.grids import BY_GROUP, KINDS
from reproduction.results import TASKS, TITLES, Both, Results
from reproduction.scales import KEPT, TASK, default, measured_grids, names

FOLDER = ROOT / "docs" / "reproduction"
LARGEST = 200_000
"""Bytes of a figure at most."""
_COLOURS = (
    *("#1b6ca8", "#c8553d", "#588b3f", "#7d5ba6", "#b8860b"),
    *("#2a9d8f", "#d16ba5", "#6c6c6c", "#8c4a2f"),
)
_STYLE = {
    "svg.hashsalt": "reproduction",  # or ids would be drawn anew each time
    "svg.fonttype": "path",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}


def write(both: Both, folder: Path = FOLDER) -> list[Path]:
    """Draw all figures; return their files. Those of the real model's family have its prefix."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    drawn = {name: (draw, both.seeds) for name, draw in FIGURES.items()}
    drawn |= {f"smollm2-{name}": (FIGURES[name], both.real) for name in OF_REAL if name in FIGURES}
    with _style():
        for name, (draw, results) in drawn.items():
            figure = draw(results)
            file = folder / f"{name}.svg"
            figure.savefig(file, metadata={"Date": None, "Creator": None})
            if file.stat().st_size > LARGEST:
                raise ValueError(f"{file.name} has {file.stat().st_size} bytes")
            written.append(file)
    return written


@contextmanager
def _style() -> Iterator[None]:
    with matplotlib.rc_context(_STYLE):
        yield


def methods(results: Results) -> Figure:
    """Picture sums against reading, a curve over the scale for each method, by kinds.

    A curve begins at the smallest value; a large dot stands at the default, and the curves of the
    other kinds are grey.
    """
    grids = measured_grids(results)
    figure = Figure(figsize=(9.6, 8.4), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, sharey=True).flatten()
    for panel, (kind, title) in zip(axes, KINDS.items(), strict=True):
        colours = iter(_COLOURS)
        for grid in sorted(grids, key=lambda grid: grid.kind == kind):
            found = names(results, grid)
            x, y = (
                [results.change(grid.group, name, task).mean for name in found]
                for task in (TASK, KEPT)
            )
            mine = grid.kind == kind
            colour = next(colours) if mine else "#d0d0d0"
            label = grid.title if mine else None
            panel.plot(x, y, ".-", color=colour, linewidth=1.3, markersize=4, label=label)
            own = default(results, grid)
            if mine and own is not None:
                place = found.index(own)
                panel.plot(x[place], y[place], "o", color=colour, markersize=7)
            if mine:
                ends = {found[0]: (x[0], y[0]), found[-1]: (x[-1], y[-1])}
                for name, point in ends.items():
                    panel.annotate(
                        name, point, (3, 3), textcoords="offset points", color=colour, fontsize=7
                    )
        panel.plot(0, 0, "k*", markersize=9, label="MLLM")
        low, high = panel.get_ylim()
        panel.set_ylim(min(low, -1), max(high, 1))
        panel.set_title(title)
        panel.legend(loc="lower right", fontsize=7)
    for panel in axes[2:]:
        panel.set_xlabel("picture sums, points against the MLLM")
    for panel in axes[::2]:
        panel.set_ylabel("reads, points against the MLLM")
    return figure


def thresholds(results: Results) -> Figure:
    """Points against the MLLM over the threshold, for every set of stages."""
    groups = {"all three": "threshold", **{t: f"stages: {t}" for t in STAGE_SETS}}
    figure, panels = _panels(TASKS)
    for task, panel in panels.items():
        for colour, (title, group) in zip(_COLOURS, groups.items(), strict=False):
            swept = results.measured(group, THRESHOLDS)
            _line(panel, results, group, swept, task, colour, title)
        panel.set_xlabel("threshold")
    return _labelled(figure, panels)


def merges(results: Results) -> Figure:
    """Points against the MLLM over the weight of the simple merges; IP-Merging's best as a line."""
    figure, panels = _panels(TASKS)
    for task, panel in panels.items():
        for colour, group in zip(_COLOURS, ("task arithmetic", "linear", "ties"), strict=False):
            grid = BY_GROUP[group]
            _line(panel, results, group, names(results, grid), task, colour, grid.title)
        swept = results.measured("threshold", THRESHOLDS)
        if swept:
            best = max(results.change("threshold", name, task).mean for name in swept)
            title = "IP-Merging, best threshold"
            panel.axhline(best, color=_COLOURS[3], linestyle="--", label=title)
        panel.set_xlabel("weight or scale")
    return _labelled(figure, panels)


def spectra(results: Results) -> Figure:
    """sigma_i / sigma_1 of both task vectors, and how much of dM lies in which directions."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for index, facts in enumerate(results.data["facts"]):
        for colour, (role, title) in zip(
            _COLOURS, (("mllm", "MLLM"), ("expert", "expert")), strict=False
        ):
            values = facts["spectra"][role]
            label = title if index == 0 else None
            left.plot(range(1, len(values) + 1), values, color=colour, alpha=0.7, label=label)
        for colour, (title, values) in zip(_COLOURS, facts["energy"].items(), strict=False):
            label = f"{title} leading k" if title != "random" else "k random"
            right.plot(
                range(1, len(values) + 1),
                [100 * value for value in values],
                color=colour,
                alpha=0.7,
                label=label if index == 0 else None,
            )
    left.set(xscale="log", yscale="log", xlabel="i", ylabel="sigma_i / sigma_1, mean of weights")
    right.set(xscale="log", xlabel="k directions", ylabel="% of the energy of dM inside")
    left.legend(loc="lower left")
    figure.legend(*right.get_legend_handles_labels(), loc="outside right upper")
    return figure


def rank(results: Results) -> Figure:
    """Text sums against the number of directions that dM is cut to."""
    groups = {
        "base + dM cut to rank k": "base + dM cut to rank",
        "MLLM + dM cut to rank k": "dM cut to rank",
        "MLLM + dM on the MLLM's leading k": "dM on the MLLM's leading directions",
        "MLLM + dM on k random directions": "dM on random directions",
    }
    figure, panels = _panels(("text_sums", "picture_sums"))
    for task, panel in panels.items():
        for colour, (title, group) in zip(_COLOURS, groups.items(), strict=False):
            ranks = [str(k) for k in RANKS if task in _tasks(results, group, str(k))]
            if ranks:
                _line(panel, results, group, ranks, task, colour, title, shares=True)
        panel.set_xscale("log", base=2)
        panel.set_xticks(RANKS, [str(k) for k in RANKS])
        panel.set_xlabel("k")
        mllm = fmean(results.share("models", "mllm", task))
        panel.axhline(mllm, color="grey", linestyle=":", label="MLLM")
        panel.axhline(
            fmean(results.share("threshold", "0", task)),
            color=_COLOURS[4],
            linestyle="--",
            label="IP-Merging, all weights",
        )
    return _labelled(figure, panels, "% right")


def lengths(results: Results) -> Figure:
    """The gain of every merge, by the loss, against the length of its update."""
    kinds: dict[str, Callable[[str], bool]] = {
        "IP-Merging, any option": _is_ours,
        "IP-Merging stretched": lambda group: group.startswith("update as long"),
        "dM, whole or of some weights": lambda group: (
            group
            in ("task arithmetic", "lambda dM of", "stages: select", "stages: select, rescale")
        ),
        "dM on random directions": lambda group: "random directions" in group,
        "dM on the MLLM's leading directions": lambda group: group.startswith("dM on the MLLM's"),
    }
    figure, panels = _panels(("text_sums", "picture_sums"))
    for task, panel in panels.items():
        for colour, (title, belongs) in zip(_COLOURS, kinds.items(), strict=False):
            points = [
                (norm, -change)
                for entry in results.with_task(task)
                if belongs(entry["group"])
                for norm, change in zip(
                    entry["norm"], entry["tasks"][task]["loss_change"], strict=True
                )
                if 0 < norm <= 1.2
            ]
            panel.scatter(
                [x for x, _ in points], [y for _, y in points], s=9, color=colour, label=title
            )
        panel.set_xlabel("length of the update over that of dM")
    return _labelled(figure, panels, "fall of the loss, nats an answer")


FIGURES: dict[str, Callable[[Results], Figure]] = {
    "methods": methods,
    "thresholds": thresholds,
    "merges": merges,
    "spectra": spectra,
    "rank": rank,
    "lengths": lengths,
}

OF_REAL = ("merges", "thresholds", "spectra")
"""Those that are also drawn for the family grown from a real model."""


def _is_ours(group: str) -> bool:
    ours = ("threshold", "temperature", "relative", "scale", "select_by", "nuclear", "similarity")
    return group.startswith(ours) or group in ("stages: select, project", "stored in bf16")


def _tasks(results: Results, group: str, name: str) -> dict[str, Any]:
    tasks: dict[str, Any] = results.entry(group, name)["tasks"]
    return tasks


def _panels(tasks: Sequence[str]) -> tuple[Figure, dict[str, Any]]:
    figure = Figure(figsize=(3.2 * len(tasks) + 0.6, 3.4), layout="constrained")
    axes = figure.subplots(1, len(tasks), squeeze=False)[0]
    panels = dict(zip(tasks, axes, strict=True))
    for task, panel in panels.items():
        panel.set_title(TITLES[task])
    return figure, panels


def _line(
    panel: Any,
    results: Results,
    group: str,
    found: Sequence[str],
    task: str,
    colour: str,
    title: str,
    *,
    shares: bool = False,
) -> None:
    """The mean over seeds as a line, each seed as a dot, the interval over problems as a band."""
    if not found:
        return
    places = [float(name) for name in found]
    if shares:
        values = [results.share(group, name, task) for name in found]
    else:
        changes = [results.change(group, name, task) for name in found]
        values = [[difference for difference, _ in change.of_seeds] for change in changes]
        low = [change.over_problems[0] for change in changes]
        high = [change.over_problems[1] for change in changes]
        panel.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
    panel.plot(places, [fmean(each) for each in values], color=colour, label=title)
    for seed in range(len(values[0])):
        panel.plot(places, [each[seed] for each in values], ".", color=colour, markersize=3)


def _labelled(
    figure: Figure, panels: dict[str, Any], label: str = "points against the MLLM"
) -> Figure:
    first = next(iter(panels.values()))
    first.set_ylabel(label)
    handles, titles = first.get_legend_handles_labels()
    figure.legend(handles, titles, loc="outside lower center", ncols=len(panels))
    return figure
