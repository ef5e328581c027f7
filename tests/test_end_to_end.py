"""Real triples in, a merged model out: it loads, and every weight is what the oracle says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.agreement import EXACT, MEDIAN, WORST, compare
from support.families import (
    INDEX,
    SMALL,
    Triple,
    as_matrix,
    cases,
    contents,
    load,
    relative_error,
    rows_of,
    shard_names,
    tune,
    write_triple,
)
from support.family_table import family as entry

from lean_merge import MergeResult, Resources, open_checkpoint
from lean_merge import plan as make_plan

Merged = Callable[..., tuple[Triple, MergeResult]]
LAYOUTS: list[tuple[str, dict[str, Any]]] = [
    ("llava", {"dtype": torch.bfloat16}),
    ("llava", {"dtype": torch.float32, "max_shard_size": "60KB"}),
    ("llava-old", {"dtype": torch.float16, "max_shard_size": "60KB"}),
    ("qwen2.5-vl", {"dtype": torch.bfloat16, "max_shard_size": "60KB"}),
    ("qwen2-vl", {"dtype": torch.float32}),
    ("llama", {"dtype": torch.float32}),
    ("phi3", {"dtype": torch.bfloat16}),
]
each_layout = pytest.mark.parametrize(
    ("name", "options"),
    LAYOUTS,
    ids=[f"{name}-{str(o['dtype'])[6:]}-{len(o)}" for name, o in LAYOUTS],
)
FIELDS = {
    "name",
    "expert",
    "selected",
    "reason",
    "similarity_first",
    "similarity_max",
    "lambda",
    "lambda_top_q",
    "rank",
    "gap",
    "update_norm",
    "update_kept",
    "mllm_task_vector_norm",
    "expert_task_vector_norm",
}


def tolerances(triple: Triple) -> tuple[float, float]:
    """Median and worst relative error allowed where whole spectra are computed."""
    dtypes = {t.dtype for n, t in load(triple.mllm).items() if n == triple.slots[0].mllm}
    return (EXACT, EXACT) if dtypes == {torch.float32} else (MEDIAN / 3, WORST / 5)


# --- what is written ----------------------------------------------------------------------


@each_layout
def test_the_output_has_the_mllms_tensors_and_only_weights_in_scope_change(
    merged: Merged, name: str, options: Any
):
    triple, result = merged(name, **options)
    before, after = load(triple.mllm), load(result.path)
    assert after.keys() == before.keys()
    in_scope = {slot.mllm for slot in triple.slots}
    changed = set()
    for key, tensor in before.items():
        assert (after[key].dtype, after[key].shape) == (tensor.dtype, tensor.shape)
        if not torch.equal(after[key].view(torch.uint8), tensor.view(torch.uint8)):
            changed.add(key)
    assert changed <= in_scope
    selected = {row["name"] for row in result.report["weights"] if row["selected"]}
    assert changed == selected
    counts = result.report["counts"]
    assert counts["copied"] == len(before) - len(in_scope)
    assert counts["merged"] + counts["unchanged"] == len(in_scope)
    assert counts["logical_weights"] == len(triple.slots)
    assert (counts["tensors"], counts["skipped"]) == (len(before), 0)


@each_layout
def test_transformers_loads_the_output_and_its_numbers(merged: Merged, name: str, options: Any):
    triple, result = merged(name, **options)
    model, info = type(entry(name).model()).from_pretrained(result.path, output_loading_info=True)
    assert not any(info.values()), info
    layers = model.model.language_model.layers if entry(name).make else model.model.layers
    stored = load(result.path)
    for slot in triple.slots:
        loaded = layers.get_parameter(slot.base.removeprefix("model.layers."))
        assert loaded.dtype == options["dtype"]
        assert torch.equal(loaded, stored[slot.mllm])


@each_layout
def test_inputs_are_not_touched_and_side_files_come_along(
    merged: Merged, name: str, options: Any, tmp_path: Path
):
    triple, _ = merged(name, **options)
    inputs = [contents(path) for path in (triple.base, triple.mllm, *triple.experts)]
    again = triple.merge(tmp_path / "out")
    assert [contents(path) for path in (triple.base, triple.mllm, *triple.experts)] == inputs
    ours = contents(again.path)
    for file, data in inputs[1].items():
        if not file.endswith(".safetensors") and file not in (INDEX, "README.md"):
            assert ours[file] == data
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= ours.keys()
    assert {"README.md", "lean_merge_recipe.yml", "lean_merge_report.json"} <= ours.keys()
    assert not [file for file in ours if file.endswith(".partial")]


@each_layout
def test_every_weight_in_scope_agrees_with_the_oracle(merged: Merged, name: str, options: Any):
    triple, result = merged(name, out_dtype="float32", **options)
    found = list(cases(triple, result))
    median, worst = tolerances(triple)
    rows = rows_of(result)
    assert rows.keys() == {slot.canonical for slot in triple.slots}
    compare(found, rows, median=median, worst=worst)
    for case in found:
        canonical = case.slot.canonical
        assert rows[canonical]["selected"] is triple.is_aligned(canonical)
        assert rows[canonical]["name"] == case.slot.mllm


@each_layout
def test_what_is_stored_is_the_sum_rounded_once(merged: Merged, name: str, options: Any):
    triple, result = merged(name, **options)
    exact = load(merged(name, out_dtype="float32", **options)[1].path)
    stored, before = load(result.path), load(triple.mllm)
    for slot in triple.slots:
        assert exact[slot.mllm].dtype == torch.float32
        assert torch.equal(stored[slot.mllm], exact[slot.mllm].to(before[slot.mllm].dtype))


def test_fused_weights_are_merged_by_their_logical_slices(merged: Merged):
    triple, result = merged("phi3", dtype=torch.bfloat16)
    assert {slot.mllm.split(".")[-2] for slot in triple.slots} == {
        "qkv_proj",
        "o_proj",
        "gate_up_proj",
        "down_proj",
    }
    rows = rows_of(result)
    for tensor in ("qkv_proj", "gate_up_proj"):
        chosen = {rows[slot.canonical]["selected"] for slot in triple.slots if tensor in slot.mllm}
        assert chosen == {True, False}


# --- options of the method ----------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"stages": ("select",)},
        {"stages": ("select", "rescale")},
        {"stages": ("select", "project")},
        {"stages": ("select", "rescale", "project"), "scale": -0.5},
        {"importance": "relative"},
        {"nuclear": "top_q"},
        {"similarity_weight": "sigma"},
        {"select_by": "max", "threshold": 0.3},
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 300.0},
        {"threshold": 0.0},
    ],
    ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()),
)
def test_every_option_agrees_with_the_oracle(merged: Merged, tmp_path: Path, options: Any):
    triple, _ = merged("llama", dtype=torch.float32)
    result = triple.merge(tmp_path / "out", **options)
    # Where tau is small the update is so small that float32 rounding of W + update shows; where
    # s_1 is small, errors of 1e-6 in many s_i weigh.
    loose = 20 if options.get("temperature", 32) < 2 else 5 if "threshold" in options else 1
    found = list(cases(triple, result))
    compare(found, rows_of(result), median=EXACT * loose, worst=EXACT * loose, **options)


def test_select_by_max_sees_beyond_the_first_direction(tmp_path: Path):
    def edit(role: str, tensors: dict[str, torch.Tensor]) -> None:
        """Make the second directions of the task vectors equal, the first orthogonal."""
        generator = torch.Generator().manual_seed(5)
        left, right = (torch.linalg.qr(torch.randn(64, 4, generator=generator))[0] for _ in "lr")
        weight = tensors["model.layers.0.self_attn.q_proj.weight"]
        if role == "base":
            weight.zero_()
            return
        own = 0 if role == "mllm" else 2
        weight.copy_(4 * torch.outer(left[:, own], right[:, own]))
        weight += 2 * torch.outer(left[:, own + 1 if own else 1], right[:, 1])

    triple = write_triple(tmp_path / "in", {"layers.0.self_attn.q_proj": (64, 64)}, edit=edit)
    first = triple.merge(tmp_path / "first")
    assert [row["selected"] for row in first.report["weights"]] == [False]
    assert first.report["weights"][0]["similarity_max"] == pytest.approx(1.0, abs=1e-5)
    best = triple.merge(tmp_path / "max", select_by="max")
    assert [row["selected"] for row in best.report["weights"]] == [True]
    compare(list(cases(triple, best)), rows_of(best), median=1e-4, worst=1e-4, select_by="max")


def test_experts_are_judged_apart_and_their_updates_summed(two_experts: Triple, tmp_path: Path):
    """Expert 2 is not aligned on gate_proj; each has its threshold and scale."""
    own = [{"threshold": 0.3, "scale": 0.5}, {"threshold": 0.6, "scale": 2.0}]
    result = two_experts.merge(tmp_path / "out", own=own)
    per_expert = [rows_of(result, path) for path in two_experts.experts]
    decided = set()
    for case in cases(two_experts, result):
        oracles = [case.oracle(k, **own[k]) for k in range(2)]
        rows = [each[case.slot.canonical] for each in per_expert]
        assert [row["selected"] for row in rows] == [each.selected for each in oracles]
        for row, oracle in zip(rows, oracles, strict=True):
            assert row["update_norm"] == pytest.approx(np.linalg.norm(oracle.update), rel=EXACT)
        assert relative_error(case.update, oracles[0].update + oracles[1].update) <= EXACT
        decided.add(tuple(row["selected"] for row in rows))
    assert decided == {(True, True), (True, False)}


def test_a_threshold_of_one_expert_leaves_the_other_alone(two_experts: Triple, tmp_path: Path):
    own = [{"threshold": 1.0}, {"threshold": 0.0}]
    result = two_experts.merge(tmp_path / "out", own=own)
    chosen = [
        {row["selected"] for row in rows_of(result, path).values()} for path in two_experts.experts
    ]
    assert chosen == [{False}, {True}]


def test_experts_without_projection_are_added_whole(two_experts: Triple, tmp_path: Path):
    own = [{"scale": 0.5, "threshold": 0.0}, {"scale": -1.0, "threshold": 0.0}]
    result = two_experts.merge(tmp_path / "out", own=own, stages=("select",))
    for case in cases(two_experts, result):
        first, second = (expert - case.base for expert in case.experts)
        assert relative_error(case.update, 0.5 * first - second) <= EXACT


def test_the_order_of_experts_does_not_matter(two_experts: Triple, tmp_path: Path):
    swapped = Triple(
        two_experts.base, two_experts.mllm, two_experts.experts[::-1], two_experts.slots
    )
    first = load(two_experts.merge(tmp_path / "a").path)
    second = load(swapped.merge(tmp_path / "b").path)
    for name, tensor in first.items():
        assert torch.allclose(tensor, second[name], rtol=0, atol=1e-7)


# --- randomized against exact -------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_sketched_path_agrees_with_the_oracle(
    sketched: Callable[..., Triple], tmp_path: Path, dtype: torch.dtype
):
    triple = sketched(dtype)
    result = triple.merge(tmp_path / "out", out_dtype="float32")
    rows = rows_of(result)
    compare(list(cases(triple, result)), rows, median=MEDIAN, worst=WORST)
    assert {canonical for canonical, row in rows.items() if row["selected"]} == {
        slot.canonical for slot in triple.slots if triple.is_aligned(slot.canonical)
    }
    assert all(row["computed_rank"] < 528 for row in rows.values())


def test_exact_and_randomized_agree_on_large_weights(
    sketched: Callable[..., Triple], tmp_path: Path
):
    triple = sketched(torch.float32)
    exact, fast = triple.merge(tmp_path / "exact", svd="exact"), triple.merge(tmp_path / "fast")
    for one, other in zip(cases(triple, exact), cases(triple, fast), strict=True):
        row, sketch = (rows_of(each)[one.slot.canonical] for each in (exact, fast))
        assert row["computed_rank"] == row["rank"] > sketch["computed_rank"]
        assert sketch["selected"] is row["selected"]
        assert sketch["similarity_first"] == pytest.approx(row["similarity_first"], abs=0.02)
        if row["selected"]:
            assert sketch["lambda"] == pytest.approx(row["lambda"], rel=0.015)
            assert relative_error(other.update, one.update) <= WORST


def test_a_forced_rank_is_what_is_computed(sketched: Callable[..., Triple], tmp_path: Path):
    result = sketched(torch.float32).merge(tmp_path / "out", rank=24)
    assert {row["computed_rank"] for row in result.report["weights"]} == {24}


# --- task arithmetic ----------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [False, True])
def test_task_arithmetic_adds_task_vectors(two_experts: Triple, tmp_path: Path, symmetric: bool):
    result = two_experts.merge(
        tmp_path / "out", merge_method="task_arithmetic", scale=0.3, symmetric=symmetric
    )
    for case in cases(two_experts, result):
        tasks = sum(expert - case.base for expert in case.experts)
        wanted = case.mllm + 0.3 * tasks
        if symmetric:
            wanted = case.base + 0.3 * (case.mllm - case.base + tasks)
        assert relative_error(as_matrix(case.stored), wanted) < 1e-6
    assert result.report["counts"]["merged"] == len(SMALL)
    assert all(row["selected"] for row in result.report["weights"])


def test_task_arithmetic_with_scales_of_each_expert(two_experts: Triple, tmp_path: Path):
    own = [{"scale": 0.25}, {"scale": 0.0}]
    result = two_experts.merge(tmp_path / "out", merge_method="task-arithmetic", own=own)
    for case in cases(two_experts, result):
        wanted = case.mllm + 0.25 * (case.experts[0] - case.base)
        assert relative_error(as_matrix(case.stored), wanted) < 1e-6


def test_task_arithmetic_of_nothing_leaves_the_mllm(small: Triple, tmp_path: Path):
    result = small.merge(tmp_path / "out", merge_method="task_arithmetic", scale=0.0)
    assert contents(result.path)["model.safetensors"] == contents(small.mllm)["model.safetensors"]


# --- dtype, shards, rounding --------------------------------------------------------------


@pytest.mark.parametrize("out_dtype", ["float32", "float16"])
def test_an_out_dtype_is_written_and_stated(merged: Merged, out_dtype: str):
    import transformers

    triple, result = merged("llava", out_dtype=out_dtype, dtype=torch.bfloat16)
    config = json.loads((result.path / "config.json").read_text())
    assert config["dtype"] == out_dtype
    assert config["text_config"].get("dtype", out_dtype) == out_dtype
    in_scope = {slot.mllm for slot in triple.slots}
    for name, tensor in load(result.path).items():
        wanted = getattr(torch, out_dtype) if name in in_scope else torch.bfloat16
        assert tensor.dtype == wanted
    _, info = transformers.LlavaForConditionalGeneration.from_pretrained(
        result.path, output_loading_info=True
    )
    assert not any(info.values()), info


def test_roles_of_different_dtypes_are_merged_in_float32(tmp_path: Path):
    def edit(role: str, tensors: dict[str, torch.Tensor]) -> None:
        dtype = {"base": torch.float16, "mllm": torch.bfloat16}.get(role, torch.float32)
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})

    triple = write_triple(tmp_path / "in", SMALL, edit=edit)
    result = triple.merge(tmp_path / "out", out_dtype="float32")
    compare(list(cases(triple, result)), rows_of(result), median=EXACT, worst=EXACT)


@pytest.mark.parametrize("shard_size", [20_000, 60_000])
def test_shards_and_their_index_agree(merged: Merged, tmp_path: Path, shard_size: int):
    triple, single = merged("llava", dtype=torch.bfloat16)
    result = triple.merge(tmp_path / "out", shard_size=shard_size)
    index = json.loads((result.path / INDEX).read_text())
    held = shard_names(result.path)
    assert len(held) > 3
    assert index["weight_map"] == {name: file for file, names in held.items() for name in names}
    tensors = load(result.path)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    for names in held.values():
        assert sum(tensors[name].nbytes for name in names) <= shard_size or len(names) == 1
    for name, tensor in load(single.path).items():
        assert torch.equal(tensor, tensors[name])
    assert set(open_checkpoint(result.path).tensors) == tensors.keys()


def test_stochastic_rounding_is_right_in_the_mean(tmp_path: Path):
    """An update far below the spacing of bfloat16: nearest loses it, the mean of draws does not."""
    triple = write_triple(tmp_path / "in", SMALL, dtype=torch.bfloat16)
    options: dict[str, Any] = {"scale": 0.002}
    exact = list(cases(triple, triple.merge(tmp_path / "exact", out_dtype="float32", **options)))
    nearest = cases(triple, triple.merge(tmp_path / "nearest", **options))
    options["rounding"] = "stochastic"
    drawn = [
        list(cases(triple, triple.merge(tmp_path / str(n), seed=n, **options))) for n in range(16)
    ]
    for place, (wanted, lost) in enumerate(zip(exact, nearest, strict=True)):
        update = wanted.update
        kept = [(each[place].update * update).sum() / (update**2).sum() for each in drawn]
        assert np.mean(kept) == pytest.approx(1.0, abs=0.15)
        assert (lost.update * update).sum() / (update**2).sum() < 0.6
        spacing = torch.finfo(torch.bfloat16).eps * wanted.stored.abs()
        for each in drawn:
            # One of the two neighbours of the exact sum.
            error = (each[place].stored.float() - wanted.stored).abs()
            assert bool((error <= spacing).all())


def test_stochastic_rounding_follows_the_seed_alone(merged: Merged, tmp_path: Path):
    triple, _ = merged("llama", dtype=torch.bfloat16)
    files = [
        contents(triple.merge(tmp_path / str(n), rounding="stochastic", seed=seed).path)
        for n, seed in enumerate((1, 1, 2))
    ]
    weights = [each["model.safetensors"] for each in files]
    assert weights[0] == weights[1] != weights[2]


# --- the report ---------------------------------------------------------------------------


@each_layout
def test_the_report_names_every_fact(merged: Merged, name: str, options: Any):
    triple, result = merged(name, **options)
    report = result.report
    assert json.loads((result.path / "lean_merge_report.json").read_text()) == report
    assert len(report["weights"]) == len(triple.slots) * len(triple.experts)
    for row in report["weights"]:
        assert FIELDS <= row.keys()
        assert row["expert"] == str(triple.experts[0])
        assert row["reason"]
        assert 0 <= row["similarity_first"] <= row["similarity_max"] <= 1 + 1e-6
        assert (row["update_kept"] is None) is not row["selected"]
        assert isinstance(row["gap"], bool)
    assert {"analyze", "write", "copy"} <= report["seconds"].keys()
    assert all(seconds >= 0 for seconds in report["seconds"].values())
    memory = report["memory"]
    assert 0 < memory["start_anonymous"] <= memory["peak_anonymous"] <= memory["limit"]
    assert memory["predicted_anonymous"] <= memory["limit"]
    assert memory["peak_file_backed"] > 0
    assert report["recipe"] == triple.recipe().to_dict()


@each_layout
def test_bytes_read_and_written_are_those_predicted(merged: Merged, name: str, options: Any):
    triple, result = merged(name, **options)
    counted = result.report["bytes"]
    assert counted["read"] == counted["read_predicted"] == counted["read_most"]
    files = sum(file.stat().st_size for file in result.path.glob("*.safetensors"))
    assert counted["written"] == counted["written_predicted"] == files
    base, mllm = load(triple.base), load(triple.mllm)
    roles = 2 + len(triple.experts)
    scope = sum(base[n].nbytes for n in {slot.base for slot in triple.slots})
    # Each role once, and the MLLM's rows again where they are written.
    assert counted["read"] == (roles + 1) * scope + sum(
        t.nbytes for n, t in mllm.items() if n not in {slot.mllm for slot in triple.slots}
    )


@pytest.mark.parametrize("experts", [1, 2])
def test_norms_in_the_report_are_those_of_the_task_vectors(
    small: Triple, two_experts: Triple, tmp_path: Path, experts: int
):
    triple = small if experts == 1 else two_experts
    result = triple.merge(tmp_path / "out")
    for case in cases(triple, result):
        for path, expert in zip(triple.experts, case.experts, strict=True):
            row = rows_of(result, path)[case.slot.canonical]
            assert row["mllm_task_vector_norm"] == pytest.approx(
                np.linalg.norm(case.mllm - case.base), rel=1e-5
            )
            assert row["expert_task_vector_norm"] == pytest.approx(
                np.linalg.norm(expert - case.base), rel=1e-5
            )


@pytest.mark.parametrize(
    ("scale", "warning"),
    [(1.0, None), (0.01, "keeps less than 90%"), (1e-6, "nothing of any update survives")],
)
def test_what_rounding_keeps_is_reported_and_warned_of(
    merged: Merged, tmp_path: Path, scale: float, warning: str | None
):
    triple, _ = merged("llama", dtype=torch.bfloat16)
    stored = triple.merge(tmp_path / "stored", scale=scale)
    exact = triple.merge(tmp_path / "exact", scale=scale, out_dtype="float32")
    rows = rows_of(stored)
    sums = {case.slot.canonical: case.update for case in cases(triple, exact)}
    for case in cases(triple, stored):
        kept = rows[case.slot.canonical]["update_kept"]
        if kept is None:
            assert not triple.is_aligned(case.slot.canonical)
        elif scale > 1e-3:  # below, float32 sums do not show the update
            update = sums[case.slot.canonical]
            assert kept == pytest.approx((case.update * update).sum() / (update**2).sum(), abs=2e-3)
        else:
            assert kept == pytest.approx(0.0, abs=0.01)
    found = stored.report["warnings"]
    if warning is None:
        assert all(kept is None or kept > 0.9 for kept in (r["update_kept"] for r in rows.values()))
        assert found == []
    else:
        assert len(found) == 1
        assert warning in found[0]
        assert "--rounding stochastic" in found[0]
        assert "--out-dtype float32" in found[0]
    if scale > 1e-3:
        assert exact.report["warnings"] == []


def test_an_ill_defined_first_direction_is_flagged(tmp_path: Path):
    def edit(role: str, tensors: dict[str, torch.Tensor]) -> None:
        """Give the expert two equal leading singular values on q_proj."""
        if role == "expert1":
            generator = torch.Generator().manual_seed(1)
            left = torch.linalg.qr(torch.randn(96, 2, generator=generator))[0]
            right = torch.linalg.qr(torch.randn(64, 2, generator=generator))[0]
            name = "model.layers.0.self_attn.q_proj.weight"
            tensors[name] = tensors[name] + 5 * left @ right.T

    triple = write_triple(tmp_path / "in", SMALL, edit=edit)
    result = triple.merge(tmp_path / "out", threshold=0.0, force=True)
    for case in cases(triple, result):
        row = rows_of(result)[case.slot.canonical]
        assert row["gap"] is case.oracle(threshold=0.0).gap
        assert row["gap"] is case.slot.canonical.endswith("q_proj")


@pytest.mark.parametrize("role", ["mllm", "expert1"])
@pytest.mark.parametrize("shape", [(96, 64), (576, 576)])
def test_a_task_vector_of_zero_is_not_selected_with_that_reason(
    tmp_path: Path, role: str, shape: tuple[int, int]
):
    name = "layers.0.self_attn.q_proj"

    def edit(of: str, tensors: dict[str, torch.Tensor]) -> None:
        if of in ("base", role):
            tensors[f"model.{name}.weight"] = torch.ones(shape)

    triple = write_triple(tmp_path / "in", {name: shape}, edit=edit)
    result = triple.merge(tmp_path / "out", threshold=0.0, force=True)
    (row,) = result.report["weights"]
    word = "MLLM" if role == "mllm" else "expert"
    assert (row["selected"], row["rank"]) == (False, 0)
    assert row["reason"] == f"the {word}'s task vector is zero"
    assert contents(result.path)["model.safetensors"] == contents(triple.mllm)["model.safetensors"]


def test_a_low_rank_task_vector_bounds_the_subspace(tmp_path: Path):
    """As LoRA tuning leaves it: beyond the rank, singular vectors are arbitrary."""

    def edit(role: str, tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if role == "base":
                tensor.zero_()
            elif "proj" in name:
                generator = torch.Generator().manual_seed(3 if role == "mllm" else 4)
                factors = [torch.randn(s, 3, generator=generator) for s in tensor.shape]
                tensors[name] = factors[0] @ factors[1].T

    triple = write_triple(tmp_path / "in", SMALL, edit=edit)
    result = triple.merge(tmp_path / "out", threshold=0.0)
    assert {row["rank"] for row in result.report["weights"]} == {3}
    compare(list(cases(triple, result)), rows_of(result), median=EXACT, worst=EXACT, threshold=0.0)


def test_a_plan_can_be_merged_as_it_is(small: Triple, tmp_path: Path):
    from lean_merge import merge

    work = make_plan(small.recipe(), Resources(device="cpu", threads=1))
    seen = []
    result = merge(work, tmp_path / "out", on_event=seen.append)
    assert [event.name for event in seen] == [task.tensor.name for task in work.tasks]
    assert sum(event.nbytes for event in seen) == sum(t.tensor.nbytes for t in work.tasks)
    assert {event.name for event in seen if event.merged} == {slot.mllm for slot in small.slots}
    assert result.path == (tmp_path / "out").resolve()


def test_the_helper_plants_what_it_says():
    """The fixtures' own promise, so that the selection above is not right by accident."""
    weight = 0.02 * torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
    for name, aligned in (
        ("layers.0.self_attn.q_proj", True),
        ("layers.0.self_attn.v_proj", False),
    ):
        first = [
            torch.linalg.svd(tune(weight, name, role) - weight, full_matrices=False)[2][0]
            for role in (0, 1)
        ]
        assert (abs(float(first[0] @ first[1])) > 0.7) is aligned
