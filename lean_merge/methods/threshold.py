"""Derive an expert's threshold from the similarities of all weights.

The threshold lies above what chance explains, and in the gap between two groups if there is one;
docs/method.md gives the reasons.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from lean_merge.linalg.null import Split, null_cdf, null_quantile, otsu_split, uniform_distance
from lean_merge.methods.base import FAR

FALSE = 0.01
"""The probability that any weight at all passes for related by chance."""
SEPARABLE = 0.8
"""Two classes count as distinct if this share of the variance lies between them. The share is 0.75
for evenly spread values and 0.64 for normally distributed ones."""
LEAST_GAP = 0.05
"""Two neighbouring similarities that differ by this much differ by more than their noise."""
RELATED_P = 0.01
"""Task vectors count as related if the p-value is smaller than this."""


@dataclass(frozen=True, slots=True)
class Sample:
    """The similarity of one weight for one expert, and what is needed to judge it.

    Attributes
    ----------
    similarity
        The similarity that is compared with the threshold.
    in_features
        The dimension n of the null law.
    directions
        The number of cosines of which `similarity` is the largest; it is 1 for s_1.
    bearable
        From this similarity on, directions aligned by chance carry little of the update.
    ratios
        ||dV|| / ||W_0|| and ||dM|| / ||W_0||.
    """

    similarity: float
    in_features: int
    directions: int
    bearable: float
    ratios: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Suggestion:
    """The threshold that one expert's similarities suggest, and how it was found.

    Attributes
    ----------
    chance
        The largest similarity that chance explains in any of the weights.
    bearable
        From this similarity on, directions aligned by chance carry little of the update.
    split
        The two groups of the similarities; None if there is no gap that chance cannot explain.
    auto
        The suggested threshold.
    explanation
        How the threshold was found, in sentences.
    related
        Kolmogorov and Smirnov's distance from the null law, and its p-value.
    warnings
        Sentences for people that say why the pair looks unrelated, if it does.
    samples
        The samples that were given.
    """

    chance: float
    bearable: float
    split: Split | None
    auto: float
    explanation: str
    related: tuple[float, float]
    warnings: tuple[str, ...]
    samples: tuple[Sample, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the entry of analysis.json that describes this suggestion."""
        quantiles = [_quantile(each, 0.99) for each in self.samples]
        values = sorted(each.similarity for each in self.samples)
        steps = [step / 100 for step in range(101)]
        return {
            "null": {
                "quantile_99": median(quantiles) if quantiles else None,
                "chance": self.chance,
                "expected_false": FALSE,
                "distance": self.related[0],
                "p_value": self.related[1],
            },
            "bearable": self.bearable,
            "gap": None
            if self.split is None
            else {
                "below": self.split.below,
                "above": self.split.above,
                "separability": self.split.separability,
            },
            "auto": self.auto,
            "explanation": self.explanation,
            "counts": [
                {"threshold": step, "selected": len(values) - bisect.bisect_left(values, step)}
                for step in steps
            ],
        }


def suggest_threshold(samples: Sequence[Sample]) -> Suggestion:
    """Suggest a threshold for one expert, and test whether the expert is related at all."""
    found = tuple(samples)
    if not found:
        text = "No weight of this expert differs from the base's, so there is nothing to select."
        return Suggestion(1.0, 0.0, None, 1.0, text, (0.0, 1.0), (), ())
    chance = max(_quantile(each, 1 - FALSE / len(found)) for each in found)
    bearable = max(each.bearable for each in found)
    related = sorted(each.similarity for each in found if each.similarity >= chance)
    test = uniform_distance(
        [null_cdf(each.similarity, each.in_features, directions=each.directions) for each in found]
    )
    split = otsu_split([each.similarity for each in found])
    if split is not None and (
        split.separability < SEPARABLE
        or split.above - split.below < LEAST_GAP
        or split.above < chance
    ):
        split = None
    middle = 0.0 if split is None else (split.below + split.above) / 2
    # Similarities are accurate to about two decimals.
    auto = min(1.0, math.ceil(max(chance, bearable, middle) * 100 - 1e-9) / 100)
    return Suggestion(
        chance=chance,
        bearable=bearable,
        split=split,
        auto=auto,
        explanation=_explained(found, chance, bearable, len(related), split, auto),
        related=test,
        warnings=_warnings(found, chance, len(related), test[1]),
        samples=found,
    )


def _quantile(sample: Sample, probability: float) -> float:
    return null_quantile(probability, sample.in_features, directions=sample.directions)


def _explained(
    samples: Sequence[Sample],
    chance: float,
    bearable: float,
    related: int,
    split: Split | None,
    auto: float,
) -> str:
    text = (
        f"By chance, any of {len(samples)} weights of these shapes has a similarity of "
        f"{chance:.3f} or more with a probability of {FALSE:.0%}; {related} have. "
    )
    if not related:
        return text + f"The threshold is {auto:.2f}, so that none is selected."
    if split is None:
        text += "There is no gap that would tell two groups apart. "
    else:
        text += (
            f"All fall into two groups (Otsu's split, {split.separability:.0%} of the variance "
            f"between them), with none between {split.below:.3f} and {split.above:.3f}. "
        )
    if bearable >= max(chance, (split.below + split.above) / 2 if split else 0.0):
        text += (
            f"Below {bearable:.2f}, directions that align by chance would carry a good part of an "
            "update. "
        )
    count = sum(each.similarity >= auto for each in samples)
    return text + f"The threshold is {auto:.2f}, from which {count} weights are selected."


def _warnings(
    samples: Sequence[Sample], chance: float, beyond_chance: int, p_value: float
) -> tuple[str, ...]:
    warnings = []
    if not beyond_chance or p_value >= RELATED_P:
        warnings.append(
            f"the pair looks unrelated: {beyond_chance} of {len(samples)} weights have a "
            f"similarity above {chance:.3f}, which chance explains (Kolmogorov-Smirnov test "
            f"against the law of random directions: p = {p_value:.2g})"
        )
    for role, ratios in (
        ("MLLM", [each.ratios[0] for each in samples]),
        ("expert", [each.ratios[1] for each in samples]),
    ):
        if median(ratios) > FAR:
            warnings.append(
                f"the {role} was hardly tuned from this base: its task vectors have "
                f"{median(ratios):.2f} of the base's norm in the median, where tuning leaves a few "
                "hundredths; similarities then compare the base with itself"
            )
    return tuple(warnings)
