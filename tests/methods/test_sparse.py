"""Linear, spherical and sparse merges against their formulas in float64, before rounding."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracle
from support.adapters import by_hand
from support.drive import drive, rows_of
from support.families import cases, contents, write_triple
from support.invariance import cut_tiles, identity
from support.oracle import Matrix
from torch import Tensor

from lean_merge import Event, verify
from lean_merge.errors import RecipeError
from lean_merge.linalg.chance import fill_uniform
from lean_merge.linalg.ranks import fill_row_ranks
from lean_merge.methods import all_methods
from lean_merge.plan.parameters import build_method
from lean_merge.recipe import Expert, MergeRecipe

METHODS = all_methods()
SUMS = ("breadcrumbs", "dare_linear", "della_linear")
ELECTIONS = ("ties", "breadcrumbs_ties", "dare_ties", "della")
SPARSE = (*SUMS, *ELECTIONS)
BETWEEN = ("linear", "slerp")
NAME, SEED = "layers.0.w", 7


def vectors(count: int, shape: tuple[int, int] = (37, 53), *, about: float = 0.0) -> list[Tensor]:
    """Random matrices, close to one that has entries of about the size `about`."""
    generator = torch.Generator().manual_seed(count)
    common = about * torch.randn(shape, generator=generator)
    return [common + 0.01 * torch.randn(shape, generator=generator) for _ in range(count)]


def expected(
    method: str, own: list[dict[str, Any]], task_vectors: list[Matrix], name: str, seed: int
) -> Matrix:
    """The update by the book; `own` are the parameters that each expert has."""
    kind = METHODS[method].parameters_type
    experts = [kind(**each) for each in own]
    first = experts[0]
    if method == "slerp":
        mllm, expert = task_vectors
        return oracle.slerp(mllm, expert, first.t) - mllm
    weights = [first.mllm_weight, *(each.weight for each in experts)]
    if method == "linear":
        if not first.normalize:
            weights[0] = 1 - sum(weights[1:])
        parts = [weight * each for weight, each in zip(weights, task_vectors, strict=True)]
        return sum(parts) / sum(weights) - task_vectors[0]
    sparse = []
    for role, each in enumerate(task_vectors):
        expert = experts[max(0, role - 1)]
        density = (first.mllm_density or first.density) if role == 0 else expert.density
        if method == "ties":
            least = oracle.magnitude_kept([each], density)
            sparse.append(np.where(np.abs(each) >= least, each, 0.0))
        elif method.startswith("breadcrumbs"):
            sparse.append(oracle.in_band(each, density, expert.gamma))
        else:
            chance = oracle.uniform(each.shape, seed=seed, name=name, purpose=f"drop {role}")
            probabilities: Matrix | float = density
            if method.startswith("della"):
                probabilities = oracle.della_probabilities(each, density, expert.epsilon)
            sparse.append(oracle.dropped(each, probabilities, chance, first.rescale))
    whole = oracle.merged(
        sparse,
        weights=weights,
        elects=method in ELECTIONS,
        normalize=first.normalize,
        scale=first.scale,
    )
    return whole - task_vectors[0]


def update_of(method: str, own: list[dict[str, Any]], task_vectors: list[Tensor]) -> Tensor:
    """The update by the method itself, whole and row by row."""
    kind = METHODS[method]
    made = kind([kind.parameters_type(**each) for each in own])
    decision, passes = drive(made, task_vectors, dtype=torch.float32, name=NAME, seed=SEED)
    assert passes <= made.cost(tuple(task_vectors[0].shape), item=4).passes
    assert decision.update is not None
    whole = rows_of(decision.update, task_vectors)
    rows = [slice(row, row + 1) for row in range(len(whole))]
    parts = [rows_of(decision.update, task_vectors, each) for each in rows]
    assert torch.equal(torch.cat(parts), whole)
    return whole


OPTIONS: dict[str, list[dict[str, Any]]] = {
    "linear": [{}, {"weight": 0.4}, {"weight": 0.4, "normalize": True, "mllm_weight": 2.0}],
    "slerp": [{}, {"t": 0.5}, {"t": 1.0}],
    "ties": [{}, {"normalize": False, "mllm_density": 0.5, "scale": 0.4}],
    **{
        name: [
            {},
            {"density": 0.6, "gamma": 0.1, "scale": -0.5, "mllm_weight": 2.5},
            {"density": 0.95, "gamma": 0.1, "normalize": True},
            {"density": 0.5, "gamma": 0.0, "mllm_density": 0.1, "normalize": False},
        ]
        for name in ("breadcrumbs", "breadcrumbs_ties")
    },
    **{
        name: [
            {},
            {"density": 0.5, "scale": 0.7, "mllm_density": 0.4, "rescale": "l1"},
            {"density": 0.7, "mllm_weight": 0.0, "rescale": "none", "normalize": True},
            {"density": 1.0, "normalize": False},
        ]
        for name in ("dare_linear", "dare_ties", "della", "della_linear")
    },
}


@pytest.mark.parametrize("about", [0.0, 1.0])
@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize(
    ("method", "options"),
    [(name, each) for name, listed in OPTIONS.items() for each in listed],
    ids=str,
)
def test_the_update_is_that_of_the_formula(
    method: str, options: dict[str, Any], experts: int, about: float
):
    """With parameters that differ between experts."""
    experts = 1 if method == "slerp" else experts
    task_vectors = vectors(experts + 1, about=about)
    own = [dict(options) for _ in range(experts)]
    if method != "slerp":
        for number, each in enumerate(own):
            each["weight"] = each.get("weight", 0.2) * (number + 1)
    for name in ("density", "gamma", "epsilon"):
        if experts > 1 and name in METHODS[method].parameters_type.__dataclass_fields__:
            own[1][name] = {"density": 0.3, "gamma": 0.05, "epsilon": 0.1}[name]
    wanted = expected(method, own, [each.double().numpy() for each in task_vectors], NAME, SEED)
    update = update_of(method, own, task_vectors).double().numpy()
    size = max(np.abs(wanted).max(), np.abs(wanted - task_vectors[0].numpy()).max())
    assert np.abs(update - wanted).max() <= 1e-6 * (size if about else np.abs(wanted).max())


def test_slerp_takes_the_line_where_weights_are_nearly_parallel():
    first = torch.tensor([[1.0, 0.0]])
    for angle, is_line in ((0.03, True), (0.04, False), (3.14, True)):
        second = torch.tensor([[np.cos(angle), np.sin(angle)]])
        update = update_of("slerp", [{"t": 0.5}], [first, second])
        middle = (first + update).double()
        assert (abs(float(middle.norm()) - 1) > 1e-5) is is_line
    zero = torch.zeros(1, 2)
    torch.testing.assert_close(
        update_of("slerp", [{"t": 0.25}], [zero, first]).norm(),
        torch.tensor(np.sin(0.125 * np.pi), dtype=torch.float32),
    )


@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
def test_dropping_keeps_the_share_the_mean_and_the_variance(method: str):
    """Of entries that are 1 or -1, whose merge at weight 1 tells the probabilities."""
    signs = torch.ones(200, 500)
    signs[::2] = -1.0
    signs *= torch.linspace(1.0, 1.0 + 1e-3, 500)
    own = [{"mllm_weight": 0.0, "density": 0.2}]
    zero = torch.zeros_like(signs)
    merged = update_of(method, own, [zero, signs]).double() / signs.double()
    kept = merged != 0
    count = kept.numel()
    probabilities = torch.full((500,), 0.2, dtype=torch.float64)
    if method == "della_linear":
        probabilities = 0.05 + 0.3 * torch.arange(500, dtype=torch.float64) / 499
    spread = (probabilities * (1 - probabilities)).mean() / count
    assert abs(float(kept.double().mean()) - 0.2) < 5 * float(spread) ** 0.5
    spread = (1 / probabilities - 1).mean() / count
    assert abs(float(merged.mean()) - 1.0) < 5 * float(spread) ** 0.5
    by_column = kept.double().mean(dim=0)
    assert float((by_column - probabilities).abs().max()) < 5 * (0.25 / 200) ** 0.5


# --- chance and ranks ---------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 2**64 - 1), st.data())
def test_random_numbers_depend_on_the_row_alone(
    rows: int, columns: int, seed: int, data: st.DataObject
):
    key = {"seed": seed, "name": "layers.1.w", "purpose": "p"}
    whole = fill_uniform(torch.empty(rows, columns), 0, **key)
    assert np.array_equal(whole.numpy(), oracle.uniform((rows, columns), **key))
    assert 0 <= float(whole.min()) and float(whole.max()) <= 1
    first = data.draw(st.integers(0, rows - 1))
    part = fill_uniform(torch.empty(rows - first, columns), first, **key)
    assert torch.equal(part, whole[first:])


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.lists(st.sampled_from([0.0, -0.0, 1.5, -1.5, 1e-40, 3.0, -7.0]), min_size=5, max_size=5),
        min_size=1,
        max_size=4,
    )
)
def test_ranks_of_magnitudes_are_those_of_a_stable_sort(rows: list[list[float]]):
    values = torch.tensor(rows)
    found = fill_row_ranks(values, torch.empty_like(values))
    order = np.argsort(np.abs(values.numpy()), axis=1, kind="stable")
    assert np.array_equal(found.numpy(), np.argsort(order, axis=1, kind="stable"))


# --- whole merges -------------------------------------------------------------------------

SHAPES = {"layers.0.self_attn.q_proj": (24, 16), "layers.1.mlp.down_proj": (16, 40)}


@pytest.mark.parametrize("method", [*BETWEEN, *SPARSE])
def test_a_merge_gives_the_formula_whatever_its_tiles_and_goes_on_after_a_cut(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
):
    """With an expert that is an adapter, whole or cut into many tiles and shards."""
    triple = write_triple(tmp_path / "in", SHAPES, dtype=torch.bfloat16)
    adapter, changes = by_hand(triple, tmp_path / "adapter", rank=4)
    changed = replace(triple, experts=(adapter,))
    options: dict[str, Any] = {"merge_method": method, "seed": 3, "out_dtype": "float32"}
    if "rescale" in METHODS[method].parameters_type.__dataclass_fields__:
        options["rescale"] = "l1"
    whole = changed.merge(tmp_path / "whole", shard_size=3000, **options)
    assert verify(whole.path).differences == ()
    own = [{name: value for name, value in options.items() if name == "rescale"}]
    for case in cases(replace(triple, experts=()), whole):
        roles = [case.mllm - case.base, changes[case.slot.base]]
        if method in BETWEEN:
            roles = [each + case.base for each in roles]
        update = expected(method, own, roles, case.slot.canonical, 3)
        np.testing.assert_allclose(case.stored.numpy(), case.mllm + update, rtol=0, atol=3e-8)
    cut_tiles(monkeypatch, tile=700, strip=100)
    tiled = changed.merge(tmp_path / "tiled", threads=3, shard_size=3000, **options)
    if method != "slerp" and "rescale" not in options:
        assert identity(tiled)["weights"] == identity(whole)["weights"]
        weights = [name for name in contents(whole.path) if name.endswith(".safetensors")]
        assert weights
        for name in weights:
            assert contents(tiled.path)[name] == contents(whole.path)[name]

    def stop(event: Event) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        changed.merge(tmp_path / "cut", shard_size=3000, on_event=stop, **options)
    resumed = changed.merge(tmp_path / "cut", shard_size=3000, **options)
    assert resumed.reused > 0
    assert identity(resumed)["weights"] == identity(tiled)["weights"]


# --- what is refused ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("linear", {"weight": 101.0}, "weight must lie in -100 .. 100"),
        ("linear", {"mllm_weight": 2.0}, "mllm_weight counts only with normalize"),
        ("linear", {"normalize": True, "weight": -1.0}, "may not sum to zero"),
        ("slerp", {"t": 1.5}, "t must lie in 0 .. 1"),
        ("slerp", {"t": -0.1}, "t must lie in 0 .. 1"),
        *((name, {"density": 0.0}, "density must lie above 0 and up to 1") for name in SPARSE),
        *((name, {"mllm_density": 1.1}, "mllm_density must lie above 0") for name in SPARSE),
        *((name, {"scale": 101.0}, "scale must lie in -100 .. 100") for name in SPARSE),
        *((name, {"weight": -1.0}, "weight must lie in 0 .. 100") for name in ELECTIONS),
        *((name, {"weight": -101.0}, "weight must lie in -100 .. 100") for name in SUMS),
        *(
            (name, {"normalize": True, "weight": 0.0, "mllm_weight": 0.0}, "may not sum to zero")
            for name in SPARSE
        ),
        ("breadcrumbs", {"gamma": -0.1}, "gamma must lie in 0 .. 1"),
        ("breadcrumbs_ties", {"gamma": float("nan")}, "gamma must lie in 0 .. 1"),
        ("dare_linear", {"rescale": "l2"}, "rescale must be one of density, l1, none"),
        ("dare_ties", {"rescale": ""}, "rescale must be one of density, l1, none"),
        ("della", {"epsilon": -0.1}, "epsilon must lie in 0 .. 0.5"),
        ("della", {"epsilon": 0.2}, "epsilon must be smaller than density and 1 - density"),
        ("della_linear", {"density": 0.9}, "epsilon must be smaller than density and 1 - density"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(method: str, options: dict[str, Any], words: str):
    recipe = MergeRecipe("b", "m", (Expert("e"),), method, tuple(options.items()))
    with pytest.raises(RecipeError, match=re.escape(words)):
        build_method(recipe)


def test_slerp_takes_one_expert():
    recipe = MergeRecipe("b", "m", (Expert("e"), Expert("f")), "slerp")
    with pytest.raises(RecipeError, match="there are 2; give one, or use linear"):
        build_method(recipe)


def test_where_linear_has_no_share_the_bytes_of_the_mllm_stay(tmp_path: Path):
    """A layer swap: values that differ between layers."""
    triple = write_triple(tmp_path / "in", SHAPES, dtype=torch.bfloat16)
    weight = [{"filter": "layers: 0", "value": 0.0}, {"value": 1.0}]
    result = triple.merge(tmp_path / "out", merge_method="linear", weight=weight)
    first, second = cases(triple, result)
    assert np.array_equal(first.stored.double().numpy(), first.mllm)
    assert np.array_equal(second.stored.double().numpy(), second.experts[0])


@pytest.mark.parametrize("exact", [False, True])
def test_task_arithmetic_forms_task_vectors_in_float32_if_asked(tmp_path: Path, exact: bool):
    triple = write_triple(tmp_path / "in", SHAPES, dtype=torch.bfloat16)
    options = {"scale": 0.5, "exact": exact, "out_dtype": "float32"}
    result = triple.merge(tmp_path / "out", merge_method="task_arithmetic", **options)
    for case in cases(triple, result):
        wanted = case.mllm + 0.5 * (case.experts[0] - case.base)
        apart = np.abs(case.stored.double().numpy() - wanted).max()
        assert bool(apart <= 2e-8) == exact
