"""The tables and verdicts of docs/drift.md, from bench/drift.json."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from reproduction import intervals

from finetuning.cost import PRIORS
from finetuning.grid import (
    ABLATION,
    ALPHAS,
    ASKED,
    COUNTS,
    FAMILIES,
    FIRST_MERGED,
    MERGES,
    MODES,
    RANKS,
    SEEDS,
    Results,
    ablations,
    first_runs,
    missing,
)
from finetuning.training import BATCH, LORA_RANK, RATES, STEPS

PAGE = Path(__file__).parents[2] / "docs" / "drift.md"
TASKS = {"picture_sums": "picture sums", "text_sums": "text sums", "read": "reading"}
DEFAULT = "DRIFT adaptive 1"
HARM = -1.0
"""Reading counts as kept if its interval lies above this many points."""


@dataclass(frozen=True)
class Change:
    """A paired difference in points: the mean over runs, and its 95 % interval over problems."""

    mean: float
    low: float
    high: float
    runs: int

    def __str__(self) -> str:
        return f"{self.mean:+.1f} ({self.low:+.1f} to {self.high:+.1f})"

    @property
    def is_rise(self) -> bool:
        """The whole interval lies above zero."""
        return self.low > 0

    @property
    def is_fall(self) -> bool:
        """The whole interval lies below zero."""
        return self.high < 0


def change(
    results: Results, condition: str, other: str, count: int, task: str = "picture_sums"
) -> Change | None:
    """Compare two conditions on the same problems, after training on the same ones."""
    pairs = results.pairs(condition, other, count, task)
    if not pairs:
        return None
    every = np.stack([gained for _, gained in pairs])
    low, high = intervals.over_problems(every)
    return Change(100 * float(every.mean()), 100 * low, 100 * high, len(pairs))


def conditions() -> list[str]:
    """What was tried at every count."""
    modes = [f"DRIFT {mode} {alpha:g}" for mode in MODES for alpha in ALPHAS]
    return ["SFT", *modes, f"{FIRST_MERGED}, then SFT"]


def render(results: Results) -> None:
    """Replace the parts of the page that lie between marks."""
    text = PAGE.read_text("utf-8")
    for name, lines in (("cost", _cost(results)), ("evidence", _body(results))):
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, found, rest = text.partition(begin)
        if not found or end not in rest:
            raise ValueError(f"{PAGE} lacks {begin} and {end}.")
        body = "\n".join(lines).rstrip()
        text = f"{before}{begin}\n\n{body}\n\n{end}{rest.partition(end)[2]}"
    PAGE.write_text(text, encoding="utf-8")


def _cost(results: Results) -> Iterator[str]:
    cost = results.figures.get("cost")
    if cost is None:
        yield "It has not been measured yet."
        return
    yield "| prior | forward, backward | pull | of a step | before the pull | held by the pull |"
    yield "|---|---|---|---|---|---|"
    for name in PRIORS:
        row = cost[name]
        whole = row["forward and backward, s"] + row["step, s"]
        pull, held = row.get("pull, s"), row.get("held by the pull, MiB")
        told = ["", ""] if pull is None else [f"{pull:.2f} s", f"{100 * pull / whole:.1f} %"]
        cells = [name, f"{row['forward and backward, s']:.1f} s", *told]
        cells += [f"{row['before the pull, MiB']:,.0f} MiB"]
        cells += ["" if held is None else f"{held:.0f} MiB"]
        yield f"| {' | '.join(cells)} |"
    yield ""
    yield f"Measured with {cost['threads']} threads, {cost['machine']}."


def _body(results: Results) -> Iterator[str]:
    yield from _setting(results)
    yield ""
    yield from _models(results)
    yield ""
    yield from _modes(results)
    yield ""
    yield from _kept(results)
    yield ""
    yield from _ablation(results)
    yield ""
    yield "### The paper's claims"
    yield ""
    yield "| claim | counts as reproduced here if | verdict | figures |"
    yield "|---|---|---|---|"
    for claim in claims(results):
        yield "| " + " | ".join(claim) + " |"


def _setting(results: Results) -> Iterator[str]:
    left = len(missing(results, first_runs()))
    best = results.best()
    more = 0 if best is None else len(missing(results, ablations(best)))
    made = sum(run.key in results.runs for run in first_runs())
    yield (
        f"Every run makes {STEPS} steps of {BATCH} picture sums with AdamW (rate "
        f"{RATES['full']:g}, gently {RATES['gentle']:g}, for LoRA of rank "
        f"{LORA_RANK} {RATES['lora']:g}; warm-up and half a cosine), on "
        f"{', '.join(f'{c:,}' for c in COUNTS)} training problems, and moves the language model's "
        f"matrices alone. The expert is the family's own. There are {len(FAMILIES)} families and "
        f"{len(SEEDS)} training seeds. {ASKED} held-out problems of each task are asked; "
        "differences are in points, paired by problem, with 95 % intervals over the problems of "
        "the mean over families and seeds. `python bench/drift.py` makes the runs that are "
        "missing, and `python bench/drift.py --render` writes what follows from bench/drift.json."
    )
    yield ""
    if left or best is None or more:
        rest = "ranks and LoRA not yet" if best is None else f"{more} of ranks and LoRA are missing"
        yield (
            f"**Not all of it has been run**: {made} of {made + left} runs of the modes are there, "
            f"and {rest}. Rows tell how many runs they stand on."
        )
    else:
        yield f"All {made} runs of the modes, and all of ranks and LoRA, have been made."


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _models(results: Results) -> Iterator[str]:
    yield "| without training | " + " | ".join(TASKS.values()) + " |"
    yield "|---" * (len(TASKS) + 1) + "|"
    for name in ("MLLM", *MERGES):
        shares = [_share(results.share(name, 0, task)) for task in TASKS]
        yield f"| {name} | " + " | ".join(shares) + " |"


def _modes(results: Results) -> Iterator[str]:
    yield "Picture sums: the share of plain fine-tuning (SFT), and every condition against it."
    yield ""
    yield "| condition | " + " | ".join(f"{c:,} problems | runs" for c in COUNTS) + " |"
    yield "|---" * (2 * len(COUNTS) + 1) + "|"
    for name in conditions():
        cells = []
        for count in COUNTS:
            found = change(results, name, "SFT", count)
            if name == "SFT":
                told = _share(results.share("SFT", count, "picture_sums"))
            else:
                told = "not run" if found is None else str(found)
            cells.append(f"{told} | {0 if found is None else found.runs}")
        yield f"| {name} | " + " | ".join(cells) + " |"


def _kept(results: Results) -> Iterator[str]:
    yield "Text sums and reading of the same runs, against SFT."
    yield ""
    heads = [f"{TASKS[t]}, {c:,}" for t in ("text_sums", "read") for c in COUNTS]
    yield "| condition | " + " | ".join(heads) + " |"
    yield "|---" * (len(heads) + 1) + "|"
    for name in conditions():
        cells = []
        for task in ("text_sums", "read"):
            for count in COUNTS:
                found = change(results, name, "SFT", count, task)
                told = _share(results.share("SFT", count, task)) if name == "SFT" else ""
                cells.append(told or ("not run" if found is None else str(found)))
        yield f"| {name} | " + " | ".join(cells) + " |"


def _ablation(results: Results) -> Iterator[str]:
    yield f"A gentler rate, {RATES['gentle']:g}, with {ABLATION} problems."
    yield ""
    yield "| condition | picture sums | text sums | reading | runs |"
    yield "|---|---|---|---|---|"
    shares = [_share(results.share("gentle: SFT", ABLATION, task)) for task in TASKS]
    yield f"| gentle: SFT | {' | '.join(shares)} | |"
    for mode in MODES:
        yield _row(results, f"gentle: DRIFT {mode} 1", "gentle: SFT")
    yield ""
    best = results.best()
    if best is None:
        yield "Ranks and LoRA are tried in the best mode, which is not known yet."
        return
    whole = f"DRIFT {best.mode} {best.alpha:g}"
    yield (
        f"Ranks of the prior and LoRA, with {ABLATION} problems, in the mode and alpha that had "
        f"the most picture sums there ({whole})."
    )
    yield ""
    yield "| condition | against | picture sums | text sums | reading | runs |"
    yield "|---|---|---|---|---|---|"
    rows = [(whole, "SFT"), *((f"{whole} rank {rank}", "SFT") for rank in RANKS)]
    rows += [("LoRA: SFT", "SFT")]
    rows += [(f"LoRA: DRIFT {best.mode} {alpha:g}", "LoRA: SFT") for alpha in ALPHAS]
    for name, other in rows:
        yield _row(results, name, other, f"{name} | {other}")


def _row(results: Results, name: str, other: str, title: str = "") -> str:
    found = [change(results, name, other, ABLATION, task) for task in TASKS]
    told = ["not run" if each is None else str(each) for each in found]
    return f"| {title or name} | {' | '.join(told)} | {0 if found[0] is None else found[0].runs} |"


def claims(results: Results) -> Iterator[tuple[str, str, str, str]]:
    """Every claim with its rule, its verdict and the figures that decide it."""
    gains = [change(results, DEFAULT, "SFT", count) for count in COUNTS]
    yield (
        "SFT with DRIFT (adaptive, alpha 1) is better than SFT alone.",
        "The interval of picture sums lies above 0 at every number of problems.",
        _verdict(gains, lambda each: each.is_rise),
        _figures(COUNTS, gains),
    )
    merges = [change(results, name, "MLLM", COUNTS[0]) for name in MERGES]
    yield (
        "Untuned merges fall below the MLLM.",
        "Each merge's interval of picture sums lies below 0.",
        _verdict(merges, lambda each: each.is_fall),
        _figures(MERGES, merges),
    )
    above = [change(results, DEFAULT, name, count) for name in MERGES for count in COUNTS]
    yield (
        "DRIFT is better than merging alone.",
        "Its interval against each merge lies above 0 at every number of problems.",
        _verdict(above, lambda each: each.is_rise),
        _figures([f"{name}, {count:,}" for name in MERGES for count in COUNTS], above),
    )
    order = [
        change(results, DEFAULT, "DRIFT grad-norm 1", ABLATION),
        change(results, "DRIFT grad-norm 1", "DRIFT absolute 1", ABLATION),
    ]
    yield (
        "Adaptive is better than grad-norm, and that than absolute.",
        f"Both intervals lie above 0, with {ABLATION} problems and alpha 1.",
        _verdict(order, lambda each: each.is_rise),
        _figures(["adaptive against grad-norm", "grad-norm against absolute"], order),
    )
    reads = [change(results, DEFAULT, "SFT", count, "read") for count in COUNTS]
    yield (
        "What the MLLM sees is preserved.",
        f"The interval of reading against SFT lies above {HARM:g} points.",
        _verdict(reads, lambda each: each.low > HARM),
        _figures(COUNTS, reads),
    )


def _verdict(found: Sequence[Change | None], holds: Callable[[Change], bool]) -> str:
    """Say whether a claim holds in every comparison, and so far only if runs are missing."""
    made = [each for each in found if each is not None]
    if len(made) < len(found):
        return "not measured yet" if not made else "open, since comparisons are missing"
    held = [holds(each) for each in made]
    told = "reproduced" if all(held) else "in part" if any(held) else "not reproduced"
    every = min(each.runs for each in made) == len(FAMILIES) * len(SEEDS)
    return f"**{told}**" if every else f"**{told}** so far"


def _figures(names: Iterable[str | int], found: Sequence[Change | None]) -> str:
    told = []
    for name, each in zip(names, found, strict=True):
        title = f"{name:,}" if isinstance(name, int) else name
        told.append(f"{title}: {'not run' if each is None else each}")
    return "; ".join(told)
