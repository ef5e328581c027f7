"""The paper's claims, and those of others about it, each with the test it is put to here.

The rules were fixed before the figures of more than one seed were known. A claim about a rise or a
fall holds if the 95 % interval of the paired difference lies on its side in every seed. One was
added with the family grown from a real model, whose MLLM adds nothing: what is not there cannot
fall.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from reproduction.candidates import STAGE_SETS, THRESHOLDS
from reproduction.grids import BY_GROUP
from reproduction.results import Change, NotMeasured, Results

REPRODUCED, NOT_REPRODUCED = "reproduced", "not reproduced"
NOT_TESTABLE = "not testable at this size"
NOT_MEASURED = "not measured"
VERDICTS = (REPRODUCED, NOT_REPRODUCED, NOT_TESTABLE)
DEFAULT = "0.4"
KEPT = 0.5
"""Points within which an ability counts as kept: what the paper reports of MMMU."""


Judge = Callable[[Results], tuple[str, str]]


@dataclass(frozen=True)
class Claim:
    """What is claimed, how it is tested here, and the test: a verdict and what was found."""

    key: str
    says: str
    here: str
    judge: Judge


def shown(change: Change) -> str:
    """A mean difference with each seed's, or of one seed with its interval."""
    if len(change.of_seeds) == 1:
        difference, (low, high) = change.of_seeds[0]
        return f"{difference:+.1f} ({low:+.1f} to {high:+.1f})"
    each = ", ".join(f"{difference:+.1f}" for difference, _ in change.of_seeds)
    return f"{change.mean:+.1f} ({each})"


def _verdict(holds: bool) -> str:
    return REPRODUCED if holds else NOT_REPRODUCED


def _gains(results: Results) -> tuple[str, str]:
    found = {t: results.change("threshold", DEFAULT, t) for t in ("picture_sums", "text_sums")}
    best = _best(results)
    best_change = results.change("threshold", best, "picture_sums")
    text = (
        f"picture sums {shown(found['picture_sums'])}, text sums {shown(found['text_sums'])}; "
        f"at the best threshold, {best}, picture sums {shown(best_change)}"
    )
    return _verdict(found["picture_sums"].is_above()), text


def _keeps(results: Results) -> tuple[str, str]:
    change = results.change("threshold", DEFAULT, "read")
    holds = change.is_above(-KEPT) and change.is_below(KEPT)
    return _verdict(holds), f"reads {shown(change)}"


def _falls(group: str, task: str, title: str) -> Judge:
    def judge(results: Results) -> tuple[str, str]:
        names = results.measured(group, BY_GROUP[group].values)
        changes = {name: results.change(group, name, task) for name in names}
        if "1" not in changes:
            raise NotMeasured(f"{group}, 1")
        if not all(results.share("models", "mllm", task)):
            return NOT_TESTABLE, f"the MLLM has no {title} right, and nothing to lose"
        falling = [weight for weight, change in changes.items() if change.is_below()]
        ends = "; ".join(f"at {weight} {shown(change)}" for weight, change in changes.items())
        return _verdict("1" in falling), f"{title}: {ends}"

    return judge


def _beats(results: Results) -> tuple[str, str]:
    task = "picture_sums"
    ours = results.share("threshold", _best(results), task)
    lines, behind = [], True
    for title, group in (
        ("Task Arithmetic", "task arithmetic"),
        ("TIES", "ties"),
    ):
        best = _best_of(results, group, BY_GROUP[group].values)
        theirs = results.share(group, best, task)
        behind = behind and all(a > b for a, b in zip(ours, theirs, strict=True))
        ahead = ", ".join(f"{a - b:+.1f}" for a, b in zip(ours, theirs, strict=True))
        lines.append(f"{ahead} points against {title} at {best}")
    return _verdict(behind), "picture sums, each at its best: " + "; ".join(lines)


def _absent(results: Results) -> tuple[str, str]:
    change = results.change("threshold", DEFAULT, "picture_sums")
    small = all(low < 1 for _, (low, _) in change.of_seeds)
    return _verdict(small), f"picture sums {shown(change)}"


def _best(results: Results) -> str:
    return _best_of(results, "threshold", THRESHOLDS)


def _best_of(results: Results, group: str, values: tuple[float, ...]) -> str:
    """The one with the best mean of picture sums among those that were measured."""
    names = results.measured(group, values)
    if not names:
        raise NotMeasured(group)
    return max(names, key=lambda name: results.change(group, name, "picture_sums").mean)


def _best_threshold(results: Results) -> tuple[str, str]:
    best = _best(results)
    names = results.measured("threshold", THRESHOLDS)
    changes = {name: results.change("threshold", name, "picture_sums") for name in names}
    text = ", ".join(f"{name}: {change.mean:+.1f}" for name, change in changes.items())
    # A best among thresholds that do nothing would be chance.
    holds = best in ("0.3", "0.4") and changes[best].is_above()
    return _verdict(holds), f"picture sums by threshold {text}"


def _stages(results: Results) -> tuple[str, str]:
    task = "picture_sums"
    whole = results.change("threshold", DEFAULT, task)
    parts = {t: results.change(f"stages: {t}", DEFAULT, task) for t in STAGE_SETS}
    holds = all(
        mine > other
        for change in parts.values()
        for (mine, _), (other, _) in zip(whole.of_seeds, change.of_seeds, strict=True)
    )
    text = "; ".join(f"{title} {shown(change)}" for title, change in parts.items())
    return _verdict(holds), f"picture sums at {DEFAULT}: {text}; all three {shown(whole)}"


def _projection(results: Results) -> tuple[str, str]:
    """Whole task vectors of the selected weights harm, and their projection does not."""
    plain = results.change("stages: select", DEFAULT, "picture_sums")
    reads = results.change("stages: select", DEFAULT, "read")
    holds = plain.is_below() or reads.is_below()
    return _verdict(
        holds
    ), f"select at {DEFAULT}: picture sums {shown(plain)}, reads {shown(reads)}"


def _spectra(results: Results) -> tuple[str, str]:
    lines, holds = [], True
    for facts in results.data["facts"]:
        halves = [_half(facts["spectra"][role]) for role in ("mllm", "expert")]
        lines.append(f"{halves[0]} and {halves[1]}")
        holds = holds and max(halves) <= len(facts["spectra"]["mllm"]) // 4
    text = "directions until sigma falls to half of sigma_1, MLLM and expert: " + "; ".join(lines)
    return _verdict(holds), text


def _half(spectrum: list[float]) -> int:
    return sum(value >= 0.5 for value in spectrum)


def _similarity(results: Results) -> tuple[str, str]:
    lines, gap = [], True
    for facts in results.data["facts"]:
        values = sorted(weight["s_1"] for weight in facts["weights"])
        above = sum(value >= float(DEFAULT) for value in values)
        median = (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2
        lines.append(f"median {median:.2f}, {above} of {len(values)} at {DEFAULT} or above")
        gap = gap and above < len(values) / 2
    return _verdict(gap), "s_1: " + "; ".join(lines)


def _none(reason: str) -> Judge:
    return lambda results: (NOT_TESTABLE, reason)


CLAIMS: tuple[Claim, ...] = (
    Claim(
        "gains",
        "IP-Merging raises multimodal mathematics: MathVerse +3.7, MathVista +2.8 on average.",
        "Picture sums rise at the default threshold.",
        _gains,
    ),
    Claim(
        "keeps",
        "Other abilities stay: MMMU within 0.5.",
        f"Reading stays within {KEPT} points.",
        _keeps,
    ),
    Claim(
        "task arithmetic falls",
        "Plain Task Arithmetic falls: MathVerse 11.3 to 9.8 (LLaVA).",
        "Picture sums fall at weight 1.",
        _falls("task arithmetic", "picture_sums", "picture sums"),
    ),
    Claim(
        "ties falls",
        "TIES loses 6.9 on MMMU (LLaVA).",
        "Reading falls at scale 1.",
        _falls("ties", "read", "reads"),
    ),
    Claim(
        "beats",
        "IP-Merging stands above Task Arithmetic and TIES (also for Qwen3-VL-8B in 2026).",
        "Its best threshold is above the best weight of each, in every seed.",
        _beats,
    ),
    Claim(
        "absent",
        "The gain is absent in some families (tables of 2026: Qwen2.5-VL-7B +0.3, 3B -1.0).",
        "A rise of a point or more in picture sums is not certain in any seed.",
        _absent,
    ),
    Claim(
        "threshold",
        "A threshold of 0.3 to 0.4 is best for LLaVA.",
        "The best mean of picture sums lies there, and picture sums rise.",
        _best_threshold,
    ),
    Claim(
        "stages",
        "Selection, rescaling and projection each help (Table 5).",
        "At the default threshold all three give more picture sums than any smaller set.",
        _stages,
    ),
    Claim(
        "projection",
        "Task vectors must be projected, or the MLLM's alignment suffers.",
        "Unprojected task vectors of the selected weights cost picture sums or reading.",
        _projection,
    ),
    Claim(
        "spectra",
        "A few singular values lead both task vectors' spectra (Figure 4, in kind).",
        "Mean sigma_i / sigma_1 falls to a half within the first quarter of the directions.",
        _spectra,
    ),
    Claim(
        "gap",
        "There is a large gap between the two parameter spaces; few weights align.",
        f"s_1 is below {DEFAULT} in most weights.",
        _similarity,
    ),
    Claim(
        "qwen",
        "For Qwen a threshold of 0.6 is best.",
        "One architecture tells nothing of another.",
        _none("all families here are of one architecture, Llama"),
    ),
    Claim(
        "benchmarks",
        "The gains hold over benchmarks and pairs of models.",
        "One skill and one expert.",
        _none("there is one skill, adding, and one expert in each family"),
    ),
    Claim(
        "cost",
        "Building costs 520 s, of which SVD 310; plain interpolation 35 s (tables of 2026).",
        "These models merge in seconds or less.",
        _none("bench/RESULTS.md has times at the widths of 1B and 7B models"),
    ),
)


def judged(results: Results) -> Iterator[tuple[Claim, str, str]]:
    """Every claim with its verdict and what was found, or that something it needs is missing."""
    for claim in CLAIMS:
        try:
            verdict, found = claim.judge(results)
        except NotMeasured as missing:
            yield claim, NOT_MEASURED, str(missing.args[0])
            continue
        assert verdict in VERDICTS
        yield claim, verdict, found
