"""The null law and what is made of it: chance, gaps, and pairs that are not related."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from lean_merge.linalg.null import null_cdf, null_quantile, otsu_split, uniform_distance
from lean_merge.methods.threshold import FALSE, Sample, suggest_threshold

NUMBERS = st.lists(st.floats(0, 1, allow_nan=False), min_size=2, max_size=40)


def samples(similarities, width: int = 1024, bearable: float = 0.0, ratio: float = 0.02):
    return [Sample(float(s), width, 1, bearable, (ratio, ratio)) for s in similarities]


@pytest.mark.parametrize("width", [16, 128, 1024])
@pytest.mark.parametrize("directions", [1, 8])
def test_the_null_law_is_that_of_drawn_directions(width: int, directions: int):
    """Against 200,000 cosines of Gaussian vectors with one axis, within four standard errors."""
    random = np.random.default_rng(0)
    count = 200_000 // directions
    normal = random.standard_normal((count * directions, 1)) ** 2
    rest = random.chisquare(width - 1, (count * directions, 1))
    cosines = np.sqrt(normal / (normal + rest)).reshape(count, directions).max(axis=1)
    for probability in (0.5, 0.9, 0.99):
        bound = null_quantile(probability, width, directions=directions)
        error = math.sqrt(probability * (1 - probability) / count)
        assert abs((cosines <= bound).mean() - probability) < 4 * error
        assert null_cdf(bound, width, directions=directions) == pytest.approx(probability)


@given(st.floats(0, 1), st.integers(2, 20_000), st.integers(1, 100))
def test_the_null_law_is_the_beta_law_of_scipy(value: float, width: int, directions: int):
    law = stats.beta(0.5, (width - 1) / 2)
    below = null_cdf(value, width, directions=directions)
    assert below == pytest.approx(law.cdf(value**2) ** directions, rel=1e-9, abs=1e-300)
    # Below this, scipy's search for a root gives up.
    assume(value == 0 or value ** (1 / directions) > 1e-12)
    bound = null_quantile(value, width, directions=directions)
    assert bound**2 == pytest.approx(law.ppf(value ** (1 / directions)), rel=1e-6, abs=1e-300)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=300))
def test_the_distance_from_uniform_is_kolmogorovs_and_smirnovs(probabilities: list[float]):
    found = stats.ks_1samp(probabilities, stats.uniform.cdf, alternative="less")
    assert uniform_distance(probabilities) == pytest.approx((found.statistic, found.pvalue))


@given(NUMBERS)
def test_otsu_finds_the_best_of_all_splits(values: list[float]):
    """Against trying every cut between two different values."""
    split = otsu_split(values)
    ordered = sorted(values)
    best = 0.0
    for cut in range(1, len(ordered)):
        low, high = np.array(ordered[:cut]), np.array(ordered[cut:])
        if low[-1] < high[0]:
            share = len(low) * len(high) / len(ordered) ** 2
            best = max(best, share * (high.mean() - low.mean()) ** 2)
    if split is None:
        assert ordered[-1] - ordered[0] <= 1e-9
        return
    assert split.below < split.above
    assert split.separability * np.var(ordered) == pytest.approx(best, rel=1e-5, abs=1e-22)


def test_unrelated_similarities_select_nothing_and_warn():
    """What the null law itself draws: the threshold is above all, in 99 of 100 draws."""
    random = np.random.default_rng(1)
    false = warned = 0
    for _ in range(100):
        found = suggest_threshold(samples(np.abs(random.standard_normal(200)) / 32))
        false += any(each.similarity >= found.auto for each in found.samples)
        warned += any("looks unrelated" in line for line in found.warnings)
    assert false <= 5 and warned >= 95


def test_two_groups_are_told_apart_and_the_gap_is_named():
    found = suggest_threshold(samples([*np.linspace(0.2, 0.3, 40), *np.linspace(0.6, 0.7, 40)]))
    assert 0.3 < found.auto < 0.6 and found.split is not None
    assert "none between 0.300 and 0.600" in found.explanation
    assert "40 weights are selected" in found.explanation and not found.warnings


def test_the_gap_may_lie_between_chance_and_the_related():
    """A handful of near equal similarities is one group, not two."""
    random = np.random.default_rng(2)
    null = np.abs(random.standard_normal(50)) / 32
    found = suggest_threshold(samples([*null, 0.798, 0.8, 0.801]))
    assert found.split is not None and found.split.above == 0.798
    assert null.max() < found.auto < 0.798
    assert suggest_threshold(samples([0.798, 0.8, 0.801])).split is None


def test_without_a_gap_what_chance_does_not_explain_is_selected():
    found = suggest_threshold(samples(np.linspace(0.2, 0.7, 60)))
    assert found.split is None and "no gap" in found.explanation
    bound = null_quantile(1 - FALSE / 60, 1024)
    assert found.chance == pytest.approx(bound) and bound <= found.auto <= bound + 0.01


def test_where_chance_would_carry_the_update_the_threshold_is_higher():
    found = suggest_threshold(samples(np.linspace(0.15, 0.7, 60), bearable=0.33))
    assert found.auto == 0.33 and "directions that align by chance" in found.explanation


def test_a_model_that_is_far_from_the_base_is_said():
    found = suggest_threshold(samples(np.linspace(0.4, 0.9, 30), ratio=1.3))
    lines = [line for line in found.warnings if "hardly tuned from this base" in line]
    assert len(lines) == 2 and "1.30" in lines[0]


def test_no_weight_at_all_is_no_error():
    found = suggest_threshold([])
    assert found.auto == 1.0 and found.to_dict()["counts"][0] == {"threshold": 0.0, "selected": 0}


@given(st.lists(st.floats(0, 1), max_size=60), st.sampled_from([8, 300, 5000]), st.floats(0, 1))
def test_any_similarities_give_a_threshold_that_counts(values: list[float], width, bearable):
    found = suggest_threshold(samples(values, width, bearable))
    plain = found.to_dict()
    counts = [each["selected"] for each in plain["counts"]]
    assert 0 <= found.auto <= 1 and counts == sorted(counts, reverse=True)
    assert counts[0] == len(values)
