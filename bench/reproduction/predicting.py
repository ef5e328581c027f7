"""Rank correlations: which number, known before a merge, tells what the merge will bring."""

from __future__ import annotations

from collections.abc import Sequence

from scipy import stats

from reproduction.results import Results

SINGLE_PREDICTORS = {
    "s_1": "s_1",
    "s_max": "largest s_i",
    "length": "length of what is added",
    "energy_kept": "energy kept by gamma^2",
}
"""Keys of a weight's facts, and their titles; `length` is measured on what was added."""
TASK = "text_sums"
_ORACLES = ("one weight", "models")


def single_ranks(results: Results, kind: str, key: str) -> list[tuple[float, float]]:
    """Spearman's rho with its p of each seed, over the weights, each merged alone.

    Parameters
    ----------
    kind : {"whole", "update"}
        lambda dM of the weight, or IP-Merging's update of it.
    key
        One of `SINGLE_PREDICTORS`.
    """
    group = f"one weight: {kind}"
    names = results.names(group)
    found = []
    for index, facts in enumerate(results.data["facts"]):
        gains = [-results.loss(group, name, TASK)[index] for name in names]
        if key == "length":
            known = [results.entry(group, name)["norm"][index] for name in names]
        else:
            known = [facts["weights"][int(name)][key] for name in names]
        found.append(spearman(known, gains))
    return found


def pooled_rank(results: Results, task: str) -> list[tuple[float, float]]:
    """The same over whole merges: the length of the update and the gain, by the loss.

    Merges that reach beyond dM's own length are left out: there lengths begin to harm.
    """
    found = []
    for index in range(len(results.seeds)):
        pairs = [
            (entry["norm"][index], -entry["tasks"][task]["loss_change"][index])
            for entry in results.with_task(task)
            if not entry["group"].startswith(_ORACLES) and 0 < entry["norm"][index] <= 1.05
        ]
        found.append(spearman([x for x, _ in pairs], [y for _, y in pairs]))
    return found


def spearman(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """rho and its two-sided p."""
    outcome = stats.spearmanr(first, second)
    return float(outcome.statistic), float(outcome.pvalue)
