"""What was measured as Markdown tables: the task vectors' spectra, and every model's marks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from lean_merge.demo.evaluate import Accuracy

Summary = Mapping[str, Any]

COLUMNS = {
    "read": "reads",
    "text_sums": "text sums",
    "picture_sums": "picture sums, `=` given",
    "picture_sums_alone": "picture sums alone",
    "picture_sums_seen": "question written down",
    "picture_sums_added": "result, the question given",
}


def marks_table(entries: Sequence[Mapping[str, Any]]) -> str:
    """All rows as a Markdown table: % right (Wilson 95 % interval)."""
    lines = ["| model | " + " | ".join(COLUMNS.values()) + " |"]
    lines.append("|---" * (len(COLUMNS) + 1) + "|")
    for entry in entries:
        cells = [_share(entry["tasks"].get(task)) for task in COLUMNS]
        lines.append(f"| {entry['group']}, {entry['name']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _share(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    of = Accuracy.of(found["right"][0], found["asked"])
    return f"{100 * of.share:.1f} ({100 * of.low:.1f} to {100 * of.high:.1f})"


def spectra_table(families: Mapping[str, Summary]) -> str:
    """Summaries of all matrices, a column for each family; medians where nothing else is said."""
    lines = ["| | " + " | ".join(families) + " |", "|---" * (len(families) + 1) + "|"]
    rows = [_spectra_of(summary) for summary in families.values()]
    lines += [f"| {title} | " + " | ".join(row[title] for row in rows) + " |" for title in rows[0]]
    return "\n".join(lines) + "\n"


def _spectra_of(all_: Summary) -> dict[str, str]:
    count = all_["matrices"]
    s_1, chosen = all_["s_1"], all_["selected"]

    def shares(values: Summary, at: Sequence[str]) -> str:
        return ", ".join(f"{100 * values[k]:.3g}" for k in at) + " %"

    def medians(fact: str) -> str:
        return ", ".join(f"{all_[f'{fact}_{kind}']['median']:.3g}" for kind in ("mllm", "expert"))

    def spreads(fact: str) -> str:
        each = (all_[f"{fact}_{kind}"] for kind in ("mllm", "expert"))
        return ", ".join(
            f"{100 * of['median']:.2g} % ({100 * of['low']:.2g} to {100 * of['high']:.2g})"
            for of in each
        )

    update = {kind: of["median"] for kind, of in all_["update"].items()}
    inside = {k: of["median"] for k, of in all_["inside"].items()}
    leading = ("1", "4", "16", "64")
    return {
        "matrices": str(count),
        "task vector over weight, MLLM and expert": spreads("relative"),
        "energy in the leading 1, 4, 16, 64 directions, MLLM": shares(
            all_["energy"]["mllm"], leading
        ),
        "the same, expert": shares(all_["energy"]["expert"], leading),
        "effective rank (exp of the entropy), MLLM and expert": medians("effective_rank"),
        "`s_1`: median (lowest to highest)": (
            f"{s_1['median']:.2f} ({s_1['low']:.2f} to {s_1['high']:.2f})"
        ),
        "`s_1` that unrelated directions reach once in a thousand times": (
            f"{all_['s_1_beyond_chance']} of {count}"
        ),
        "selected at 0.2, 0.4, 0.6, 0.8 by the first s": ", ".join(
            str(chosen[t]["first"]) for t in ("0.2", "0.4", "0.6", "0.8")
        ),
        "the same, by the largest": ", ".join(
            str(chosen[t]["max"]) for t in ("0.2", "0.4", "0.6", "0.8")
        ),
        "the largest s is the first": f"{all_['s_max_is_s_1']} of {count}",
        "the largest s is one of the first 16": f"{all_['s_max_within_16']} of {count}",
        "the largest s is the very last": f"{all_['s_max_is_the_last']} of {count}",
        "gap of sigma_1 below 5 % in either": f"{all_['no_gap']} of {count}",
        "lambda by all singular values, by 64": (
            f"{all_['lambda_full']['median']:.2f}, {all_['lambda_64']['median']:.2f}"
        ),
        "dM's energy inside 1, 16, 64 leading directions of dV": shares(inside, ("1", "16", "64")),
        "update over dM, softmax at temperature 1, 8, 32": shares(
            update, ("softmax 1", "softmax 8", "softmax 32")
        ),
        "update over dM, relative at 1, 8, 32": shares(
            update, ("relative 1", "relative 8", "relative 32")
        ),
        "cosine of v_1 with the largest input of plain text, MLLM and expert": medians("input"),
    }


def modules_table(anatomy: Mapping[str, Summary]) -> str:
    """What differs from module to module; medians, and of how many matrices."""
    head = ("module", "`s_1`", "largest s", "it is the last", "update over dM at 32")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for module, of in anatomy.items():
        if module == "all":
            continue
        last = f"{of['s_max_is_the_last']} of {of['matrices']}"
        update = f"{100 * of['update']['softmax 32']['median']:.2g} %"
        row = (module, f"{of['s_1']['median']:.2f}", f"{of['s_max']['median']:.2f}", last, update)
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def silenced_text(silenced: Mapping[str, Mapping[str, Any]]) -> str:
    """In how many matrices both spectra end in the channel that the norm silences."""
    found = [each for each in silenced.values() if each["ends_there"]]
    text = (
        f"In {len(found)} of {len(silenced)} gate and up matrices both spectra end in the channel "
        "whose weight in the norm before them is the smallest"
    )
    if not found:
        return f"{text}.\n"
    middle = median(each["weight"] for each in found)
    return f"{text}; in the median of these it is {middle:.1g} of the layer's median.\n"


def storage_table(storage: Mapping[str, Mapping[str, float]]) -> str:
    """Stored task vectors against those trained: medians and extremes over the matrices."""
    lines = ["| stored over trained | lowest | median | highest |", "|---|---|---|---|"]
    for name, of in storage.items():
        title = name.replace("_", " ").replace("mllm", "MLLM")
        lines.append(f"| {title} | {of['low']:.3f} | {of['median']:.3f} | {of['high']:.3f} |")
    return "\n".join(lines) + "\n"


def told(results: Mapping[str, Any]) -> str:
    """All of it, as results.md."""
    parts = [
        "Written by `compare.py`.\n",
        "## Task vectors\n",
        spectra_table({"this family": results["anatomy"]["all"], "first family": results["first"]}),
        "## By module\n",
        modules_table(results["anatomy"]),
    ]
    if "silenced" in results:
        parts.append(silenced_text(results["silenced"]))
    if "storage" in results:
        parts += ["## Stored in bf16\n", storage_table(results["storage"])]
    parts += [
        f"## Models\n\n% right of {results['problems']} (Wilson 95 % interval).\n",
        marks_table(results["candidates"]),
    ]
    return "# Results\n\n" + "\n".join(parts)
