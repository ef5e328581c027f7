"""An expert that names its parent: its task vector is the difference from that, for any method."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.adapters import by_hand
from support.families import Triple, load, write_triple
from support.fp8 import to_fp8
from support.spectral import rank_one

from lean_merge import CoverageError, DataError, Expert, RecipeError, Resources, merge, verify
from lean_merge import plan as make_plan

CPU = Resources(device="cpu", threads=2)
SHAPES = {"layers.0.self_attn.q_proj": (48, 40), "layers.0.mlp.up_proj": (56, 40)}


@pytest.fixture
def triple(tmp_path: Path) -> Triple:
    """The second expert serves as the first one's parent."""
    return write_triple(tmp_path / "in", SHAPES, experts=2)


def recipe_of(triple: Triple, **options: Any) -> Any:
    expert, parent = triple.experts
    found = replace(triple, experts=(expert,)).recipe(merge_method="rank_one", scale=0.5, **options)
    return replace(found, experts=(Expert(str(expert), parent=str(parent)),))


def check(triple: Triple, out: Path, twin: Path | None = None) -> None:
    base, mllm, expert = (load(path) for path in (triple.base, triple.mllm, triple.experts[0]))
    parent, merged = load(twin or triple.experts[1]), load(out)
    for slot in triple.slots:
        before, own, reference = (
            tensors[slot.base].double().numpy() for tensors in (mllm, expert, parent)
        )
        dv = before - base[slot.base].double().numpy()
        expected = before + rank_one([dv, own - reference], scale=0.5)
        np.testing.assert_allclose(merged[slot.base].double().numpy(), expected, rtol=0, atol=1e-6)


def test_the_task_vector_is_taken_from_the_parent(triple: Triple, tmp_path: Path):
    result = merge(recipe_of(triple), tmp_path / "out", resources=CPU)
    check(triple, result.path)
    recipe = (result.path / "lean_merge_recipe.yml").read_text()
    assert f"parent: {triple.experts[1]}" in recipe
    assert verify(result.path).differences == ()
    read = result.report["bytes"]
    assert read["read"] == read["read_predicted"]
    # The parent is an input as any: where it has changed, nothing is compared.
    tensors = load(triple.experts[1])
    tensors["model.more.weight"] = torch.zeros(3)
    save_file(tensors, triple.experts[1] / "model.safetensors")
    with pytest.raises(Exception, match="is not the parent of expert 1 that was merged"):
        verify(result.path)


def test_a_parent_may_be_stored_in_another_form(triple: Triple, tmp_path: Path):
    stored, twin = tmp_path / "stored", tmp_path / "twin"
    shutil.copytree(triple.experts[1], stored)
    to_fp8(stored, twin, "block", dtype=torch.float8_e4m3fn)
    recipe = recipe_of(replace(triple, experts=(triple.experts[0], stored)))
    least = merge(recipe, tmp_path / "out", resources=CPU)
    check(triple, least.path, twin)


def test_a_parent_that_does_not_match_is_refused_from_headers(triple: Triple, tmp_path: Path):
    other = write_triple(tmp_path / "other", {"layers.0.self_attn.q_proj": (48, 32)})
    wrong = replace(triple, experts=(triple.experts[0], other.base))
    with pytest.raises(
        CoverageError, match=r"(?s)the parent of expert 1 .*lack|parent of expert 1"
    ):
        merge(recipe_of(wrong), tmp_path / "out", resources=CPU)
    assert not (tmp_path / "out").exists()
    smaller = write_triple(tmp_path / "small", {**SHAPES, "layers.0.mlp.up_proj": (24, 40)})
    wrong = replace(triple, experts=(triple.experts[0], smaller.base))
    with pytest.raises(CoverageError, match=r"the parent of expert 1 has the shape \[24, 40\]"):
        make_plan(recipe_of(wrong), CPU)


def test_an_adapter_has_no_parent_but_its_own(triple: Triple, tmp_path: Path):
    adapter, _ = by_hand(triple, tmp_path / "adapter", rank=4)
    wrong = replace(triple, experts=(adapter, triple.experts[1]))
    with pytest.raises(CoverageError, match="is an adapter, which is the difference"):
        make_plan(recipe_of(wrong), CPU)


def test_what_is_no_number_in_a_parent_is_named(triple: Triple, tmp_path: Path):
    tensors = load(triple.experts[1])
    tensors["model.layers.0.mlp.up_proj.weight"][2, 3] = float("inf")
    save_file(tensors, triple.experts[1] / "model.safetensors")
    with pytest.raises(DataError, match=r"expert2.*up_proj\.weight holds NaN or Inf"):
        merge(recipe_of(triple), tmp_path / "out", resources=CPU)


def test_a_parent_is_a_name():
    with pytest.raises(RecipeError, match=r"experts\[\]\.parent must name a folder"):
        replace(
            Triple(Path("b"), Path("m"), (Path("e"),), ()).recipe(),
            experts=({"model": "e", "parent": 3},),
        )
