"""Every method alike: as an adapter, without an MLLM, and beside matrices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.families import Triple, load, write_triple
from torch import Tensor

from lean_merge import MergeRecipe, RecipeError, Resources, merge
from lean_merge.methods import all_methods

CPU = Resources(device="cpu", threads=1)
NAME = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.norm.weight"
OPTIONS: dict[str, dict[str, Any]] = {"ip_merging": {"stages": ("select", "rescale")}}
METHODS = sorted(all_methods())


@pytest.fixture(scope="module")
def triple(tmp_path_factory: pytest.TempPathFactory) -> Triple:
    return write_triple(
        tmp_path_factory.mktemp("every"), {"layers.0.self_attn.q_proj": (24, 16)}, size=1.0
    )


def recipe(triple: Triple, method: str, **options: Any) -> MergeRecipe:
    return triple.recipe(merge_method=method, force=True, **OPTIONS.get(method, {}), **options)


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_of_whole_rank_is_what_a_checkpoint_gets(
    tmp_path: Path, triple: Triple, method: str
):
    """Its error is what a smaller rank cuts off."""
    whole = merge(recipe(triple, method), tmp_path / "whole", resources=CPU)
    change = (load(whole.path)[NAME] - load(triple.mllm)[NAME]).double()
    for rank in (16, 3):
        options: dict[str, Any] = {"output": "lora", "lora_rank": rank}
        result = merge(recipe(triple, method, **options), tmp_path / str(rank), resources=CPU)
        tensors = load_file(result.path / "adapter_model.safetensors")
        b, a = (_factor(tensors, which) for which in "BA")
        apart = float((b @ a - change).norm() / change.norm())
        (row,) = result.report["weights"]
        # What is stored of a checkpoint in float32 is rounded once.
        assert abs(apart - row["lora_error"]) <= 1e-5
        assert apart <= (1e-5 if rank == 16 else 1.0)


def _factor(tensors: dict[str, Tensor], which: str) -> Tensor:
    (found,) = (tensor for name, tensor in tensors.items() if f"lora_{which}." in name)
    return found.double()


@pytest.mark.parametrize("method", METHODS)
def test_without_an_mllm_the_base_receives_or_the_method_is_refused(
    tmp_path: Path, triple: Triple, method: str
):
    """All of the language model; the MLLM's own tuning plays no part."""
    given = recipe(triple, method, scope="language").to_dict()
    del given["mllm_model"]
    text = MergeRecipe.from_dict(given)
    if all_methods()[method].needs_mllm:
        with pytest.raises(RecipeError, match="needs an MLLM"):
            merge(text, tmp_path / "out", resources=CPU)
        return
    base, expert = load(triple.base), load(triple.experts[0])
    out = load(merge(text, tmp_path / "out", resources=CPU).path)
    for name in (NAME, NORM):
        change, task_vector = (out[name] - base[name]).double(), expert[name] - base[name]
        assert bool(torch.isfinite(change).all()) and float(change.norm()) > 0
        along = float((change * task_vector).sum())
        assert along > 0, name
