"""TIES against its definition in float64, on the update before it is rounded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracle
from support.drive import drive, rows_of
from support.families import Triple, load, write_triple
from torch import Tensor

from lean_merge import verify
from lean_merge.errors import RecipeError
from lean_merge.methods.ties import Ties, TiesParameters


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


entries = st.integers(-6, 6).map(lambda number: number / 64)
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
    numbers = st.lists(entries, min_size=size, max_size=size)
    task_vectors = [torch.tensor(data.draw(numbers)).view(shape) for _ in range(experts + 1)]
    weights = data.draw(
        st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=experts + 1, max_size=experts + 1)
    )
    scale = data.draw(st.sampled_from([-1.0, 0.25, 1.0]))
    parameters = [
        TiesParameters(density=density, mllm_weight=weights[0], weight=own, scale=scale)
        for own in weights[1:]
    ]
    expected = expected_of(parameters, task_vectors)
    update = update_of(parameters, task_vectors).double().numpy()
    np.testing.assert_allclose(update, expected, rtol=1e-6, atol=1e-9)


def test_of_equal_task_vectors_the_large_entries_stay():
    task_vector = torch.tensor([[1.0, -2.0, 0.0, 4.0]])
    update = update_of([TiesParameters(density=0.5)], [task_vector, task_vector.clone()])
    assert (task_vector + update).tolist() == [[0.0, -2.0, 0.0, 4.0]]


SHAPES = {
    "layers.0.self_attn.q_proj": (24, 16),
    "layers.0.mlp.down_proj": (16, 40),
    "layers.1.self_attn.q_proj": (24, 16),
}


def task_vectors_of(triple: Triple) -> dict[str, list[np.ndarray]]:
    """For each weight, the differences from the base in float32."""
    base, *others = (load(path) for path in (triple.base, triple.mllm, *triple.experts))
    return {
        slot.canonical: [
            (other[slot.base].float() - base[slot.base].float()).double().numpy()
            for other in others
        ]
        for slot in triple.slots
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trim_over", ["weight", "model"])
def test_a_merge_gives_the_definition(tmp_path: Path, trim_over: str, dtype: torch.dtype):
    triple = write_triple(tmp_path / "in", SHAPES, dtype=dtype, experts=2)
    result = triple.merge(
        tmp_path / "out",
        merge_method="ties",
        trim_over=trim_over,
        own=({"weight": 2.0}, {}),
        density=0.3,
        out_dtype="float32",
    )
    found, mllm, by_weight = load(result.path), load(triple.mllm), task_vectors_of(triple)
    thresholds = None
    if trim_over == "model":
        models = zip(*by_weight.values(), strict=True)
        thresholds = [oracle.magnitude_kept(each, 0.3) for each in models]
    for slot in triple.slots:
        update = oracle.ties(
            by_weight[slot.canonical], weights=[1.0, 2.0, 1.0], density=0.3, thresholds=thresholds
        )
        expected = mllm[slot.mllm].double().numpy() + update
        np.testing.assert_allclose(found[slot.mllm].numpy(), expected, rtol=1e-6, atol=1e-9)
    assert verify(result.path).differences == ()


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
