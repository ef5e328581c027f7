"""IP-Merging's randomized path against the naive float64 oracle, by stated bars."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from statistics import median

import numpy as np
import pytest
import torch
from support import bars, bfloat16, oracle
from support.drive import drive, products
from support.spectra import NOISE, triple

from lean_merge.errors import RecipeError
from lean_merge.linalg.sketch import Sketch
from lean_merge.methods import Combined, alignment, ip_merging, spectra
from lean_merge.methods.ip_merging import IPMerging, IPMergingParameters
from lean_merge.methods.spectra import EXACT_BELOW

SHAPES = {"square": (560, 560), "tall": (760, 530), "wide": (530, 760)}
DTYPES = {
    "bfloat16": (torch.bfloat16, torch.bfloat16, bfloat16.multiply),
    "bfloat16, coarse": (torch.bfloat16, torch.bfloat16, bfloat16.KINDS["rounded sums of 256"]),
    "bfloat16 in float32": (torch.bfloat16, torch.float32, torch.matmul),
    "float16": (torch.float16, torch.float32, torch.matmul),
    "float32": (torch.float32, torch.float32, torch.matmul),
}
"""Storage dtype, arithmetic dtype, and what makes the products."""


@cache
def known(
    kind: str, stored: torch.dtype, shape: str
) -> tuple[tuple[torch.Tensor, ...], oracle.Oracle]:
    """A triple, and what the oracle says of it."""
    weights = triple(SHAPES[shape], kind, seed=list(SHAPES).index(shape), dtype=stored)
    return weights, oracle.ip_merging(*as_float64(*weights))


def task_vectors(*weights: torch.Tensor) -> list[torch.Tensor]:
    """W_role - W_0 as the engine forms them: in the common storage dtype."""
    base, *others = weights
    return [other - base for other in others]


def as_float64(*weights: torch.Tensor) -> list[oracle.Matrix]:
    return [weight.double().numpy() for weight in weights]


def relative_error(decision, expected: oracle.Oracle) -> float:
    left, right = decision.update.factors()
    update = (left.double() @ right.double()).numpy()
    difference = update - expected.update
    return float(math.sqrt((difference**2).sum() / (expected.update**2).sum()))


def check_agreement(storage: str, spectra_and_shapes: Iterable[tuple[str, str]]) -> None:
    """Update within 1 % (median) and 3 % (worst), lambda 0.5 % and 1.5 %, same selection."""
    stored, arithmetic, multiply = DTYPES[storage]
    updates, ratios = [], []
    for kind, shape in spectra_and_shapes:
        weights, expected = known(kind, stored, shape)
        assert min(weights[0].shape) > EXACT_BELOW, "the sketch must be what is tested"
        vectors = task_vectors(*weights)
        method = IPMerging([IPMergingParameters()])
        decision, passes = drive(method, vectors, dtype=arithmetic, multiply=multiply)
        record = decision.experts[0]
        assert abs(expected.similarity[0] - 0.4) >= 0.02, "a borderline case tests nothing"
        assert record.selected and expected.selected
        bars.hold("s_1", abs(record.similarity_first - expected.similarity[0]), 5e-3)
        assert record.gap == expected.gap
        assert passes <= 16
        updates.append(relative_error(decision, expected))
        ratios.append(bars.relative(record.lambda_, expected.ratio))
        norm = math.sqrt((expected.update**2).sum())
        bars.hold("norm of an update", bars.relative(record.update_norm, norm), 0.03)
    bars.hold("update, median", median(updates), 0.01, updates)
    bars.hold("update, worst", max(updates), 0.03, updates)
    bars.hold("lambda, median", median(ratios), 0.005, ratios)
    bars.hold("lambda, worst", max(ratios), 0.015, ratios)


@pytest.mark.parametrize("storage", list(DTYPES))
def test_update_lambda_and_selection_agree_with_the_oracle(storage: str) -> None:
    """Each storage meets each spectrum and each shape; each spectrum meets each shape in a dtype.

    An oracle takes longer than all else, and those of one dtype serve three storages.
    """
    dtypes = list(dict.fromkeys(stored for stored, _, _ in DTYPES.values()))
    turn = dtypes.index(DTYPES[storage][0])
    shapes = list(SHAPES)
    check_agreement(
        storage, [(kind, shapes[(n + turn) % len(shapes)]) for n, kind in enumerate(NOISE)]
    )


@pytest.mark.durability
@pytest.mark.parametrize("kind", list(NOISE))
@pytest.mark.parametrize("storage", list(DTYPES))
def test_every_spectrum_of_every_storage_agrees_with_the_oracle(kind: str, storage: str) -> None:
    check_agreement(storage, [(kind, shape) for shape in SHAPES])


def test_lambda_is_right_where_the_two_spectra_differ() -> None:
    """No error of the nuclear norms may hide by cancelling between equal spectra."""
    ratios = []
    kinds = list(NOISE)
    for number, kind in enumerate(kinds):
        shape = (640, 600)
        base, mllm, _ = triple(shape, kind, seed=10 + number, dtype=torch.float32)
        other_base, _, other = triple(
            shape, kinds[(number + 1) % len(kinds)], seed=10 + number, dtype=torch.float32
        )
        expert = base + (other - other_base)
        expected = oracle.ip_merging(*as_float64(base, mllm, expert), threshold=0.0)
        decision, _ = drive(
            IPMerging([IPMergingParameters(threshold=0.0)]),
            task_vectors(base, mllm, expert),
            dtype=torch.float32,
        )
        ratios.append(bars.relative(decision.experts[0].lambda_, expected.ratio))
    bars.hold("lambda, median", median(ratios), 0.005, ratios)
    bars.hold("lambda, worst", max(ratios), 0.015, ratios)


@pytest.mark.parametrize("cosine", [0.30, 0.37, 0.43, 0.50])
def test_selection_is_the_oracles_near_the_threshold(cosine: float) -> None:
    """Wherever |s_1 - S_alpha| >= 0.02."""
    for seed in range(3):
        weights = triple(
            (640, 560), "low rank plus noise", seed=seed, dtype=torch.bfloat16, cosines=(cosine,)
        )
        expected = oracle.ip_merging(*as_float64(*weights))
        if abs(expected.similarity[0] - 0.4) < 0.02:
            continue
        decision, _ = drive(
            IPMerging([IPMergingParameters()]), task_vectors(*weights), dtype=torch.bfloat16
        )
        assert decision.experts[0].selected == expected.selected


def test_unrelated_task_vectors_are_not_selected_and_cost_few_passes() -> None:
    weights = triple((640, 640), "flat power law", seed=5, dtype=torch.bfloat16, cosines=())
    decision, passes = drive(
        IPMerging([IPMergingParameters()]), task_vectors(*weights), dtype=torch.bfloat16
    )
    record = decision.experts[0]
    assert not record.selected and decision.update is None
    assert "< threshold" in record.reason
    assert passes <= 6


@pytest.mark.parametrize("cosine", [0.0, 0.37])
def test_one_pass_is_enough_where_first_directions_are_clearly_apart(cosine: float) -> None:
    """Near the threshold the first Krylov block decides nothing."""
    generator = torch.Generator().manual_seed(0)
    shape = 2304, 2048
    rights = torch.linalg.qr(torch.randn(shape[1], 2, generator=generator))[0].T
    rights = torch.stack([rights[0], cosine * rights[0] + math.sqrt(1 - cosine**2) * rights[1]])
    vectors = []
    for right in rights:
        left = torch.randn(shape[0], 1, generator=generator) / math.sqrt(shape[0])
        noise = torch.randn(shape, generator=generator) / 100
        vectors.append(noise.add_(left * right, alpha=20.0))
    decision, passes = drive(IPMerging([IPMergingParameters()]), vectors, dtype=torch.float32)
    record = decision.experts[0]
    assert not record.selected
    assert (passes == 1) == (cosine == 0.0)
    assert record.similarity_first == pytest.approx(cosine, abs=0.02)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_a_krylov_block_holds_the_first_direction_as_well_as_is_said(
    decay: float, wide: bool
) -> None:
    generator = torch.Generator().manual_seed(1)
    shape = (260, 300) if wide else (300, 260)
    left, right = (torch.linalg.qr(torch.randn(n, 260, generator=generator))[0] for n in shape)
    matrix = (left * (1 + torch.arange(260)) ** -decay) @ right.T
    sketch = Sketch(
        shape,
        block=32,
        dtype=torch.float32,
        device=torch.device("cpu"),
        seed=0,
        name="w",
        role="mllm",
    )
    while sketch.depth == 0:
        sketch.absorb(products(matrix, sketch.next_pass(), torch.float32))
    triplets = sketch.krylov.singular_triplets(32)
    found = spectra.Spectrum(triplets.sigma, triplets.vectors, triplets.angles, rank=32, gap=0.0)
    block = torch.linalg.qr(sketch.krylov.z[0])[0]
    sine = float((right[:, 0] - block @ (block.T @ right[:, 0])).norm())
    assert sine <= spectra.outside(found, float(matrix.double().square().sum())) + 1e-6


def test_an_ill_defined_first_direction_is_flagged() -> None:
    """Equal leading singular values: v_1 is arbitrary, and the report says so."""
    task = torch.zeros(600, 560)
    task[0, 0] = task[1, 1] = 0.5
    task[2, 2] = 0.2
    decision, _ = drive(
        IPMerging([IPMergingParameters()]), [task, task.clone()], dtype=torch.float32
    )
    assert decision.experts[0].gap is True


@pytest.mark.parametrize("shape", [(640, 560), (200, 300)])
def test_zero_and_rank_deficient_task_vectors(shape: tuple[int, int]) -> None:
    """Rank 0 is not selected, with that reason; beyond the rank nothing enters."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(n, 5, generator=generator) for n in shape)
    task = left @ right.T * 1e-3
    zero = torch.zeros(shape)
    method = IPMerging([IPMergingParameters()])
    decision, _ = drive(method, [zero, task], dtype=torch.float32)
    assert decision.experts[0].reason == "the MLLM's task vector is zero"
    assert decision.experts[0].rank == 0 and decision.update is None
    decision, _ = drive(method, [task, zero], dtype=torch.float32)
    assert decision.experts[0].reason == "the expert's task vector is zero"
    decision, _ = drive(method, [task, 0.5 * task], dtype=torch.float32)
    record = decision.experts[0]
    assert record.selected and record.rank == 5
    assert record.lambda_ == pytest.approx(2.0, rel=1e-4)
    expected = oracle.ip_merging(*(m.double().numpy() for m in (zero, task, 0.5 * task)))
    assert relative_error(decision, expected) < 0.01


@pytest.mark.parametrize(
    "options",
    [
        {"importance": "relative"},
        {"nuclear": "top_q"},
        {"similarity_weight": "sigma"},
        {"select_by": "max", "threshold": 0.5},
        {"temperature": 8.0},
        {"temperature": 1.0},
        {"rank": 24},
        {"rank": 200},
        {"svd": "exact"},
        {"scale": 0.5},
        {"stages": ("select", "project")},
    ],
    ids=str,
)
def test_every_option_agrees_with_the_oracle(options: dict) -> None:
    weights = triple((640, 560), "power law", seed=1, dtype=torch.float32)
    asked = {name: value for name, value in options.items() if name not in ("rank", "svd")}
    expected = oracle.ip_merging(*as_float64(*weights), **asked)
    parameters = IPMergingParameters(**options)
    decision, _ = drive(IPMerging([parameters]), task_vectors(*weights), dtype=torch.float32)
    assert decision.experts[0].selected == expected.selected
    assert relative_error(decision, expected) <= 0.01
    if options.get("svd") == "exact":
        assert relative_error(decision, expected) <= 5e-4


@pytest.mark.parametrize("stages", [("select",), ("select", "rescale")])
def test_stages_without_projection_add_the_whole_task_vector(stages: tuple[str, ...]) -> None:
    weights = triple((640, 560), "power law", seed=1, dtype=torch.float32)
    expected = oracle.ip_merging(*as_float64(*weights), stages=stages)
    method = IPMerging([IPMergingParameters(stages=stages, scale=0.7)])
    vectors = task_vectors(*weights)
    decision, _ = drive(method, vectors, dtype=torch.float32)
    ratio = expected.ratio if "rescale" in stages else 1.0
    assert isinstance(decision.update, Combined)
    assert decision.update.coefficients == pytest.approx((0.0, 0.7 * ratio), rel=5e-3)


def test_several_experts_are_independent_and_summed() -> None:
    """Step 8: each expert is identified, rescaled and projected alone; updates add up."""
    base, mllm, first = triple((640, 560), "power law", seed=1, dtype=torch.float32)
    _, _, unrelated = triple((640, 560), "power law", seed=2, dtype=torch.float32, cosines=())
    second = base + (unrelated - triple((640, 560), "power law", seed=2, dtype=torch.float32)[0])
    third = base + 2 * (first - base)
    own = IPMergingParameters()
    method = IPMerging([own, own, replace(own, scale=0.25)])
    decision, _ = drive(method, task_vectors(base, mllm, first, second, third), dtype=torch.float32)
    assert [record.selected for record in decision.experts] == [True, False, True]
    expected = oracle.ip_merging(*as_float64(base, mllm, first))
    again = oracle.ip_merging(*as_float64(base, mllm, third), scale=0.25)
    expected.update = expected.update + again.update
    assert relative_error(decision, expected) <= 0.01


def test_the_computed_rank_sees_no_direction_beyond_it_and_says_how_far_it_looked() -> None:
    """The bound on what is omitted holds under the random law only: here is where it fails."""
    generator = torch.Generator().manual_seed(4)
    count, rank = 640, 400
    values = torch.exp(-torch.arange(count) / 400.0)
    values[0] = 1.2
    left, right = (torch.linalg.qr(torch.randn(count, count, generator=generator))[0] for _ in "ab")
    planted = [0, rank]
    drawn = torch.randn(count, count, generator=generator)
    drawn[:, :2] = right[:, planted]
    fresh = torch.linalg.qr(drawn)[0]
    rest = [index for index in range(count) if index not in planted]
    expert_right = torch.empty(count, count)
    expert_right[:, planted], expert_right[:, rest] = fresh[:, :2], fresh[:, 2:]
    task_mllm = (left * values) @ right.T
    task_expert = (left * values) @ expert_right.T
    expected = oracle.ip_merging(
        *(m.double().numpy() for m in (torch.zeros(count, count), task_mllm, task_expert))
    )
    assert expected.similarity[[0, rank]] == pytest.approx(1.0, abs=1e-3), (
        "an aligned direction is planted beyond r"
    )
    decision, _ = drive(
        IPMerging([IPMergingParameters(rank=64)]), [task_mllm, task_expert], dtype=torch.float32
    )
    assert decision.experts[0].computed_rank == 64
    assert relative_error(decision, expected) > 0.05
    whole, _ = drive(
        IPMerging([IPMergingParameters(svd="exact")]), [task_mllm, task_expert], dtype=torch.float32
    )
    assert whole.experts[0].computed_rank == count
    assert relative_error(whole, expected) < 1e-3


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"threshold": 1.5}, "threshold"),
        ({"threshold": math.nan}, "threshold"),
        ({"temperature": -1.0}, "temperature"),
        ({"scale": math.inf}, "scale"),
        ({"rank": 0}, "rank"),
        ({"rank": "many"}, "rank"),
        ({"select_by": "last"}, "select_by"),
        ({"nuclear": "half"}, "nuclear"),
        ({"stages": ("project",)}, "stages"),
        ({"stages": ()}, "stages"),
        ({"stages": ("select", "select")}, "stages"),
        ({"svd": "fast"}, "svd"),
    ],
    ids=str,
)
def test_parameters_that_make_no_sense_are_refused(options: dict, word: str) -> None:
    with pytest.raises(RecipeError, match=word):
        IPMergingParameters(**options)


@pytest.mark.parametrize("shape", [(640, 560), (200, 300)], ids=["sketched", "exact"])
def test_an_expert_that_left_a_weight_alone_does_not_disturb_the_others(
    shape: tuple[int, int],
) -> None:
    base, mllm, expert = triple(shape, "power law", seed=1, dtype=torch.float32)
    method = IPMerging([IPMergingParameters()] * 2)
    decision, _ = drive(method, task_vectors(base, mllm, base, expert), dtype=torch.float32)
    assert [record.selected for record in decision.experts] == [False, True]
    assert decision.experts[0].reason == "the expert's task vector is zero"
    expected = oracle.ip_merging(*as_float64(base, mllm, expert))
    assert relative_error(decision, expected) <= 0.01


@pytest.mark.parametrize("index", [10, 30])
def test_select_by_max_finds_a_direction_behind_the_first(index: int) -> None:
    cosines = tuple(0.6 if i == index else 0.05 for i in range(index + 1))
    weights = triple((620, 560), "power law", seed=2, dtype=torch.float32, cosines=cosines)
    expected = oracle.ip_merging(*as_float64(*weights), select_by="max")
    assert expected.selected and int(expected.similarity.argmax()) == index
    method = IPMerging([IPMergingParameters(select_by="max")])
    decision, _ = drive(method, task_vectors(*weights), dtype=torch.float32)
    record = decision.experts[0]
    assert record.selected
    assert record.similarity_max == pytest.approx(expected.similarity.max(), abs=0.01)
    assert relative_error(decision, expected) <= 0.03


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_small_forced_rank_keeps_the_leading_direction(rank: int) -> None:
    weights = triple((640, 560), "power law", seed=1, dtype=torch.float32)
    expected = oracle.ip_merging(*as_float64(*weights))
    method = IPMerging([IPMergingParameters(rank=rank)])
    decision, _ = drive(method, task_vectors(*weights), dtype=torch.float32)
    assert decision.experts[0].computed_rank == rank
    # With s = .8, .7, ... the first direction carries all but 5 % of the update at tau = 32.
    assert relative_error(decision, expected) <= 0.1


def test_the_gap_is_seen_at_rank_one_too() -> None:
    task = torch.diag(torch.tensor([1.0, 0.999, *[0.5] * 558]))
    for options in ({}, {"rank": 1}, {"rank": 1, "svd": "exact"}):
        method = IPMerging([IPMergingParameters(**options)])
        decision, _ = drive(method, [task, task], dtype=torch.float32)
        assert decision.experts[0].gap is True, options


@pytest.mark.parametrize("shape", [(900, 700), (700, 900)], ids=["tall", "wide"])
def test_a_low_rank_expert_has_its_rank_and_lambda(shape: tuple[int, int]) -> None:
    """A LoRA expert in float32 beside a tuning of full rank: rounding is not taken for rank."""
    base, mllm, _ = triple(shape, "power law", seed=3, dtype=torch.float32)
    generator = torch.Generator().manual_seed(9)
    task_mllm = mllm - base
    right = torch.linalg.svd(task_mllm, full_matrices=False)[2][:8]
    left = torch.randn(shape[0], 8, generator=generator) / shape[0] ** 0.5
    task_expert = left * torch.linspace(1.0, 0.4, 8) @ right * 0.2
    decision, _ = drive(
        IPMerging([IPMergingParameters()]), [task_mllm, task_expert], dtype=torch.float32
    )
    zero = torch.zeros(shape)
    expected = oracle.ip_merging(*as_float64(zero, task_mllm, task_expert))
    record = decision.experts[0]
    assert record.rank == expected.subspace == 8
    assert record.lambda_ == pytest.approx(expected.ratio, rel=0.015)
    assert relative_error(decision, expected) <= 0.03


def test_memory_and_passes_that_are_stated_hold_for_every_rank() -> None:
    for rank in ("auto", 1, 16, 100):
        method = IPMerging([IPMergingParameters(rank=rank)])
        cost = method.cost((16384, 53248), item=2)
        assert 0 < cost.usual_passes <= cost.passes <= 16
        assert method.cost((4096, 4096), item=2).widest >= 32
    low = IPMerging([IPMergingParameters(threshold=0.2)]).cost((4096, 4096), item=2)
    assert low.workspace < 200 << 20


def published(dv: oracle.Matrix, dm: oracle.Matrix, most: int) -> oracle.Matrix:
    """The update of the published code at a threshold of 0, with absolute cosines."""
    _, sigma_v, right_v = np.linalg.svd(dv, full_matrices=False)
    left_m, sigma_m, right_m = np.linalg.svd(dm, full_matrices=False)
    cosines = np.abs(np.einsum("ij,ij->i", right_v[:most], right_m[:most]))
    weights = np.exp(32 * (cosines - cosines.max()))
    gamma = weights / weights.sum()
    cut = (left_m[:, :most] * sigma_m[:most]) @ right_m[:most]
    ratio = sigma_v[:most].sum() / sigma_m[:most].sum()
    return ratio * (cut @ right_v[:most].T * gamma**2) @ right_v[:most]


@pytest.mark.parametrize("most", [1024, 12])
def test_the_published_variant_is_the_published_rule(most: int, monkeypatch: pytest.MonkeyPatch):
    """With 12 directions in the place of 1,024, so that the expert is cut."""
    for module in (spectra, alignment, ip_merging):
        monkeypatch.setattr(module, "MAX_SUBSPACE", most)
    base, mllm, expert = triple((70, 60), "power law", seed=3, dtype=torch.float32)
    method = IPMerging([IPMergingParameters(variant="published", threshold=0.0)])
    decision, _ = drive(method, [mllm - base, expert - base], dtype=torch.float32)
    left, right = decision.update.factors()
    expected = published(*((each - base).double().numpy() for each in (mllm, expert)), most)
    found = (left.double() @ right.double()).numpy()
    assert math.sqrt(((found - expected) ** 2).sum() / (expected**2).sum()) < 2e-4
    record = decision.experts[0]
    assert record.selected and record.rank == min(most, 60)


def test_the_published_variant_selects_by_the_largest_similarity():
    base, mllm, expert = triple((70, 60), "power law", seed=3, dtype=torch.float32)
    first, largest = (
        drive(
            IPMerging([IPMergingParameters(variant=variant, threshold=0.9)]),
            [mllm - base, expert - base],
            dtype=torch.float32,
        )[0].experts[0]
        for variant in ("paper", "published")
    )
    assert first.reason.startswith(f"similarity {first.similarity_first:.4f}")
    assert largest.reason.startswith(f"similarity {largest.similarity_max:.4f}")


def test_the_published_variant_has_one_rule():
    assert IPMergingParameters(variant="published").rank == 1024
    with pytest.raises(RecipeError, match="variant: published has rank: 1024, not 64"):
        IPMergingParameters(variant="published", rank=64)
    with pytest.raises(RecipeError, match="variant must be one of paper, published"):
        IPMergingParameters(variant="original")
