"""TIES against its definition in float64, on the update before it is rounded."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support import oracle
from support.drive import drive, rows_of
from support.families import Case, Triple, cases, contents, load, write_triple
from support.family_table import build
from support.form_table import FORMS, as_form, entries
from torch import Tensor

from lean_merge import Event, Grid, MergeResult, Resources, stream, sweep, verify
from lean_merge.errors import RecipeError
from lean_merge.methods.ties import Ties, TiesParameters
from lean_merge.tasks import tiles

CPU = Resources(device="cpu", threads=2)


def update_of(parameters: list[TiesParameters], task_vectors: list[Tensor]) -> Tensor:
    decision, passes = drive(Ties(parameters), task_vectors, dtype=torch.float32)
    assert passes == 2 and decision.update is not None
    whole = rows_of(decision.update, task_vectors)
    parts = [
        rows_of(decision.update, task_vectors, slice(row, row + 1)) for row in range(len(whole))
    ]
    assert torch.equal(torch.cat(parts), whole)
    return whole


def expected_of(parameters: list[TiesParameters], task_vectors: list[Tensor]) -> np.ndarray:
    common = parameters[0]
    return oracle.ties(
        [each.double().numpy() for each in task_vectors],
        weights=[common.mllm_weight, *(own.weight for own in parameters)],
        density=common.density,
        scale=common.scale,
    )


@pytest.mark.parametrize("experts", [1, 2, 3])
@pytest.mark.parametrize(
    "options", [{}, {"density": 0.7, "scale": 0.6, "mllm_weight": 2.5}], ids=str
)
def test_the_update_is_that_of_the_definition(options: dict[str, Any], experts: int):
    generator = torch.Generator().manual_seed(experts)
    task_vectors = [0.01 * torch.randn(37, 53, generator=generator) for _ in range(experts + 1)]
    parameters = [TiesParameters(weight=1.0 + k, **options) for k in range(experts)]
    expected = expected_of(parameters, task_vectors)
    update = update_of(parameters, task_vectors).double().numpy()
    assert np.abs(update - expected).max() <= 1e-6 * np.abs(expected).max()


numbers = st.integers(-6, 6).map(lambda number: number / 64)
"""Few magnitudes, so that many are equal; their weighted sums are exact, and often zero."""


@settings(deadline=None)
@given(
    st.integers(1, 3),
    st.tuples(st.integers(1, 4), st.integers(1, 5)),
    st.floats(0.0, 1.0, exclude_min=True),
    st.data(),
)
def test_any_density_ties_zeros_and_signs(
    experts: int, shape: tuple[int, int], density: float, data: st.DataObject
):
    size = shape[0] * shape[1]
    matrix = st.lists(numbers, min_size=size, max_size=size)
    task_vectors = [torch.tensor(data.draw(matrix)).view(shape) for _ in range(experts + 1)]
    weights = data.draw(
        st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=experts + 1, max_size=experts + 1)
    )
    assume(any(weights))
    scale = data.draw(st.sampled_from([-1.0, 0.25, 1.0]))
    parameters = [
        TiesParameters(density=density, mllm_weight=weights[0], weight=own, scale=scale)
        for own in weights[1:]
    ]
    expected = expected_of(parameters, task_vectors)
    update = update_of(parameters, task_vectors).double().numpy()
    # What is left of two numbers that nearly cancel is as accurate as they were.
    largest = max(float(each.abs().max()) for each in task_vectors)
    np.testing.assert_allclose(update, expected, rtol=0, atol=1e-6 * largest)


def test_of_equal_task_vectors_the_large_entries_stay():
    task_vector = torch.tensor([[1.0, -2.0, 0.0, 4.0]])
    update = update_of([TiesParameters(density=0.5)], [task_vector, task_vector.clone()])
    assert (task_vector + update).tolist() == [[0.0, -2.0, 0.0, 4.0]]


SHAPES = {
    "layers.0.self_attn.q_proj": (24, 16),
    "layers.0.mlp.down_proj": (16, 40),
    "layers.1.self_attn.q_proj": (24, 16),
}
OF_MODEL: dict[str, Any] = {"merge_method": "ties", "trim_over": "model", "density": 0.3}


def differences(case: Case) -> list[np.ndarray]:
    """The task vectors as they are defined: in float32."""
    base, *others = (each.astype(np.float32) for each in (case.base, case.mllm, *case.experts))
    return [(other - base).astype(np.float64) for other in others]


def check(triple: Triple, result: MergeResult, weights: list[float], trim_over: str) -> None:
    """Every number of a merge in float32 at density 0.3 is that of the definition."""
    found = [(case, differences(case)) for case in cases(triple, result)]
    thresholds = None
    if trim_over == "model":
        models = zip(*(task_vectors for _, task_vectors in found), strict=True)
        thresholds = [oracle.magnitude_kept(each, 0.3) for each in models]
    for case, task_vectors in found:
        update = oracle.ties(task_vectors, weights=weights, density=0.3, thresholds=thresholds)
        wanted = case.mllm + update
        np.testing.assert_allclose(case.stored.numpy(), wanted, rtol=3e-7, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trim_over", ["weight", "model"])
def test_a_merge_gives_the_definition(tmp_path: Path, trim_over: str, dtype: torch.dtype):
    triple = write_triple(tmp_path / "in", SHAPES, dtype=dtype, experts=2)
    options = {**OF_MODEL, "trim_over": trim_over, "out_dtype": "float32"}
    result = triple.merge(tmp_path / "out", own=({"weight": 2.0}, {}), **options)
    check(triple, result, [1.0, 2.0, 1.0], trim_over)
    assert verify(result.path).differences == ()


@pytest.mark.parametrize("name", ["safetensors in shards", "fp8 with scales of blocks"])
@pytest.mark.parametrize("family", ["Phi-4-multimodal", "Qwen3-VL-MoE"])
def test_it_is_the_same_however_weights_are_stored(
    family: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Fused and stacked, sharded and with scales; in many tiles, by one thread and by several."""
    form = next(each for each in FORMS if each.name == name)
    entry = next(each for each in entries() if each.name == family)
    triple = build(entry, tmp_path / "in", **form.options)
    stored, twin = as_form(form, triple, tmp_path / "twins")
    options = {**OF_MODEL, "out_dtype": "float32"}
    results = [stored.merge(tmp_path / "out", **options)]
    monkeypatch.setattr(tiles, "TILE_ROWS", 16)
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", 1)
    results.append(stored.merge(tmp_path / "tiles", threads=3, **options))
    check(twin, results[0], [1.0, 1.0], "model")
    first, second = (load(result.path) for result in results)
    assert all(torch.equal(first[each], second[each]) for each in first)


@pytest.mark.parametrize("trim_over", ["weight", "model"])
def test_a_merge_that_is_cut_goes_on_to_the_same_bytes(tmp_path: Path, trim_over: str):
    """The survey is made anew."""
    triple = write_triple(tmp_path / "in", SHAPES, dtype=torch.bfloat16)
    options = {**OF_MODEL, "trim_over": trim_over, "shard_size": 1000}
    whole = triple.merge(tmp_path / "whole", **options)
    events = []

    def cut(event: Event) -> None:
        events.append(event)
        if len(events) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        triple.merge(tmp_path / "cut", on_event=cut, **options)
    resumed = triple.merge(tmp_path / "cut", **options)
    assert resumed.reused > 0
    weights = ("model-", "model.")
    expected = {n: b for n, b in contents(whole.path).items() if n.startswith(weights)}
    found = {n: b for n, b in contents(resumed.path).items() if n.startswith(weights)}
    assert found == expected
    assert resumed.report["weights"] == whole.report["weights"]


def test_other_outputs_and_a_sweep_survey_too(tmp_path: Path):
    triple = write_triple(tmp_path / "in", SHAPES)
    whole = load(triple.merge(tmp_path / "whole", **OF_MODEL).path)
    streamed = dict(stream(triple.recipe(**OF_MODEL), resources=CPU))
    assert all(torch.equal(streamed[name], tensor) for name, tensor in whole.items())
    none = triple.merge(tmp_path / "none", output="none", **OF_MODEL)
    assert [row["selected"] for row in none.report["weights"]] == [True] * len(SHAPES)
    swept = sweep(
        triple.recipe(**OF_MODEL), Grid(scales=[1, 0.5]), tmp_path / "sweep", resources=CPU
    )
    assert len(swept.table["points"]) == 2
    same = load(tmp_path / "sweep" / "scale-1")
    assert all(torch.equal(same[name], tensor) for name, tensor in whole.items())


def test_what_the_survey_reads_is_planned_and_counted(tmp_path: Path):
    triple = write_triple(tmp_path / "in", SHAPES)
    by_model, by_weight = (
        triple.merge(tmp_path / trim, **{**OF_MODEL, "trim_over": trim}).report["bytes"]
        for trim in ("model", "weight")
    )
    assert by_model["read"] == by_model["read_predicted"] == by_model["read_most"]
    roles = 3 * sum(4 * math.prod(shape) for shape in SHAPES.values())
    assert by_model["read"] == by_weight["read"] + 2 * roles


@pytest.mark.parametrize(
    ("options", "range_of"),
    [
        ({"density": 0.0}, "above 0 and up to 1"),
        ({"density": 1.5}, "above 0 and up to 1"),
        ({"density": float("nan")}, "above 0 and up to 1"),
        ({"weight": -1.0}, "0 .. 100"),
        ({"mllm_weight": 101.0}, "0 .. 100"),
        ({"scale": 1000.0}, "-100 .. 100"),
        ({"trim_over": "layer"}, "weight, model"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused_with_its_range(options: dict[str, Any], range_of: str):
    with pytest.raises(RecipeError, match=f"{next(iter(options))} must .*{re.escape(range_of)}"):
        TiesParameters(**options)


def test_no_adapter_holds_it(tmp_path: Path):
    triple = write_triple(tmp_path / "in", SHAPES)
    with pytest.raises(RecipeError, match="full rank, which no adapter holds: ties does not"):
        triple.merge(tmp_path / "out", merge_method="ties", output="lora")
