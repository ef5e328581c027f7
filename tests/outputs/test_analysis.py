"""Analyses: what they keep, merges from them, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import oracle
from support.families import (
    SKETCHED,
    SMALL,
    Triple,
    as_matrix,
    cases,
    check_reads,
    contents,
    load,
    relative_error,
    rows_of,
    write_triple,
)
from support.scenes import Stop, stopping

from lean_merge import (
    Analysis,
    CheckpointError,
    MergeRecipe,
    MergeResult,
    OutputError,
    RecipeError,
    Resources,
    analyze,
    merge,
    open_analysis,
    plan,
    stream,
    verify,
)
from lean_merge.methods.plainfacts import from_plain, to_plain
from lean_merge.plan import formulas
from lean_merge.store.state import OWN_ANALYSIS

CPU = Resources(device="cpu", threads=1)
SHAPES = {
    **SMALL,
    **SKETCHED,
    "layers.1.mlp.down_proj": (64, 96),
}
"""Both paths, and names that filters tell apart."""


def analysed(recipe: MergeRecipe, out: Path, **options: Any) -> Analysis:
    found = analyze(recipe, out, resources=CPU, **options).analysis
    check_reads(found.document["bytes"])
    return found


def merged(recipe: MergeRecipe, out: Path, analysis: Any = None, **options: Any) -> MergeResult:
    result = merge(recipe, out, analysis=analysis, resources=CPU, **options)
    check_reads(result.report["bytes"])
    return result


@pytest.fixture(scope="module")
def triple(tmp_path_factory: pytest.TempPathFactory) -> Triple:
    return write_triple(tmp_path_factory.mktemp("triple") / "in", SHAPES, experts=2)


@pytest.fixture(scope="module")
def analysis(triple: Triple, tmp_path_factory: pytest.TempPathFactory) -> Analysis:
    return analysed(triple.recipe(), tmp_path_factory.mktemp("analysis") / "out")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Triple:
    """One that is analysed in no time."""
    shapes = {**SMALL, "layers.1.mlp.gate_proj": (64, 80), "layers.1.mlp.down_proj": (80, 64)}
    return write_triple(tmp_path_factory.mktemp("small") / "in", shapes)


# --- what is kept --------------------------------------------------------------------------


def test_numbers_are_those_of_the_whole_matrices(triple: Triple, analysis: Analysis):
    """Spectra, similarities, nuclear norms, shares and updates, against numpy's full SVD."""
    roles = [load(path) for path in (triple.base, triple.mllm, *triple.experts)]
    rows = {row["weight"]: row for row in analysis.document["weights"]}
    assert rows.keys() == SHAPES.keys()
    for slot in triple.slots:
        base, mllm, *experts = (as_matrix(tensors[slot.base]) for tensors in roles)
        row = rows[slot.canonical]
        assert row["skipped"] is None and row["shape"] == list(base.shape)
        assert row["base_norm"] == pytest.approx(np.linalg.norm(base), rel=0.1)
        _, sigma, right = np.linalg.svd(mllm - base, full_matrices=False)
        np.testing.assert_allclose(row["mllm"]["sigma"][:8], sigma[:8], rtol=0.01)
        assert row["mllm"]["nuclear"] == pytest.approx(sigma.sum(), rel=0.01)
        for expert, found in zip(experts, row["experts"], strict=True):
            wanted = oracle.ip_merging(base, mllm, expert, threshold=0.0)
            task = expert - base
            assert found["norm"] == pytest.approx(np.linalg.norm(task), rel=1e-5)
            assert found["similarity"][0] == pytest.approx(wanted.similarity[0], abs=5e-3)
            assert found["lambda"] == pytest.approx(wanted.ratio, rel=0.015)
            inside = np.linalg.norm(task @ right[: row["stored"]].T) / np.linalg.norm(task)
            # Noise is spread over directions that no sketch tells apart.
            assert found["energy_inside"] == pytest.approx(inside**2, rel=0.05)
            if wanted.similarity[0] < 0.3:
                continue  # an update of all that aligns by chance, beyond the stored directions too
            update = np.linalg.norm(wanted.update)
            assert found["update_norm"] == pytest.approx(update, rel=0.03)
            relative = update / (wanted.ratio * np.linalg.norm(task))
            assert found["update_relative"] == pytest.approx(relative, rel=0.03)
            assert found["energy_kept"] == pytest.approx(relative**2, rel=0.06)
            squares = np.linalg.svd(wanted.update, compute_uv=False) ** 2
            rank = squares.sum() ** 2 / (squares**2).sum()
            assert found["effective_rank"] == pytest.approx(rank, rel=0.05)


def test_factors_are_the_directions_and_their_images(triple: Triple, analysis: Analysis):
    tensors = load_file(analysis.path / "analysis.safetensors")
    roles = [load(path) for path in (triple.base, triple.mllm, *triple.experts)]
    for slot in triple.slots:
        base, mllm, *experts = (tensors[slot.base].double() for tensors in roles)
        vectors = tensors[f"{slot.canonical}.mllm.vectors"].double()
        count = analysis.facts(slot.canonical).stored
        assert vectors.shape == (count, base.shape[1])
        gram = vectors @ vectors.T
        torch.testing.assert_close(gram, torch.eye(count).double(), rtol=0, atol=5e-4)
        sigma = torch.linalg.svdvals(mllm - base)[:4]
        lengths = ((mllm - base) @ vectors[:4].T).norm(dim=0)
        torch.testing.assert_close(lengths, sigma, rtol=1e-2, atol=0)
        for number, expert in enumerate(experts, 1):
            images = tensors[f"{slot.canonical}.expert{number}.images"].double()
            wanted = ((expert - base) @ vectors.T).T
            assert float((images - wanted).norm() / wanted.norm()) < 1e-5


def test_facts_survive_json_bit_for_bit(analysis: Analysis):
    for row in analysis.document["weights"]:
        facts = analysis.facts(row["weight"])
        plain = json.loads(json.dumps(to_plain(facts)))
        again = from_plain(plain)
        assert to_plain(again) == plain and plain["shape"] == row["shape"]
        assert plain["mllm"] == row["mllm"]
        for one, other in zip(again.similarity, facts.similarity, strict=True):
            assert torch.equal(one, other)


def test_counts_are_the_selections_of_merges(triple: Triple, analysis: Analysis):
    for k, entry in enumerate(analysis.document["thresholds"]):
        counts = {each["threshold"]: each["selected"] for each in entry["counts"]}
        assert len(counts) == 101 and counts[0.0] == len(SHAPES)
        assert sorted(counts.values(), reverse=True) == list(counts.values())
        for threshold in (0.2, 0.4, 0.75, 0.9):
            recipe = triple.recipe(threshold=threshold, output="none")
            report = merged(recipe, None, analysis).report
            rows = [r for r in report["weights"] if r["expert"] == str(triple.experts[k])]
            assert sum(row["selected"] for row in rows) == counts[threshold]


def test_one_pass_over_the_disk_as_predicted_and_no_weight_written(small: Triple, tmp_path: Path):
    result = analyze(small.recipe(), tmp_path / "out", resources=CPU)
    count = result.analysis.document["bytes"]
    assert count["read"] == count["read_predicted"] == count["read_most"]
    numbers = sum(math.prod(slot.in_base.get(load(small.base)).shape) for slot in small.slots)
    # Every role once, and the base's first rows for its norm: all of them in weights as small.
    assert count["read"] == (3 + 1) * 4 * numbers
    assert 0.9 * count["written_predicted"] <= count["written"] <= count["written_predicted"] + 4096
    names = set(contents(tmp_path / "out"))
    kept = {"analysis.json", "analysis.safetensors", "lean_merge_recipe.yml"}
    assert kept <= names <= kept | {"lean_merge_journal.jsonl", "report.html"}


def test_task_vectors_of_zero_are_said(tmp_path: Path):
    """On both paths: the MLLM's, one expert's, and everything's."""

    def edit(role: str, tensors: dict[str, torch.Tensor]) -> None:
        zero = {"mllm": "v_proj", "expert1": "q_proj"}.get(role)
        for name in tensors:
            if zero and zero in name:
                shape = tensors[name].shape
                tensors[name] = torch.zeros(shape)
            elif role == "base" and "proj" in name and "gate" not in name:
                tensors[name] = torch.zeros(tensors[name].shape)

    shapes = {**SKETCHED, "layers.0.mlp.gate_proj": (64, 80), "layers.1.self_attn.q_proj": (64, 80)}
    triple = write_triple(tmp_path / "in", shapes, edit=edit)
    found = analysed(triple.recipe(), tmp_path / "analysis")
    rows = {row["weight"]: row["experts"][0] for row in found.document["weights"]}
    assert rows["layers.0.self_attn.v_proj"]["reason"] == "the MLLM's task vector is zero"
    for name in ("layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"):
        assert rows[name]["reason"] == "the expert's task vector is zero"
        assert rows[name]["update_norm"] is None and not rows[name]["selected"]
    report = merged(triple.recipe(), tmp_path / "out", found).report
    reasons = {row["weight"]: row["reason"] for row in report["weights"]}
    assert reasons == {name: row["reason"] for name, row in rows.items()}


# --- merges from it ------------------------------------------------------------------------

GRID: list[dict[str, Any]] = [
    {},
    {"threshold": 0.6, "scale": 0.5},
    {"threshold": 0.75, "temperature": 100.0},
    {"stages": ("select",)},
    {"stages": ("select", "rescale"), "scale": -1.0},
    {"stages": ("select", "project"), "importance": "relative"},
    {"similarity_weight": "sigma"},
]


@pytest.mark.parametrize("options", GRID, ids=lambda each: ",".join(each) or "its own")
def test_a_merge_from_it_agrees_with_the_oracle(
    triple: Triple, analysis: Analysis, tmp_path: Path, options: dict[str, Any]
):
    """Within the bars of direct merges: 3 % of any update, and the same selection."""
    result = merged(triple.recipe(**options), tmp_path / "out", analysis)
    report = result.report
    assert report["analysis"]["recalled"] == len(SHAPES) and not report["analysis"]["anew"]
    assert all(row["passes"] == 0 for row in report["weights"])
    updated = 0
    for case in cases(triple, result):
        wanted = [case.oracle(k, **options) for k in range(2)]
        for k, path in enumerate(triple.experts):
            row = rows_of(result, path)[case.slot.canonical]
            assert row["selected"] == wanted[k].selected
        if any(each.selected for each in wanted):
            updated += 1
            update = sum(each.update for each in wanted)
            assert relative_error(case.update, update) < 0.03
        else:
            assert not case.update.any()
    assert updated >= 4


def test_it_reads_the_mllm_and_factors_and_the_experts_where_updates_are_whole(
    triple: Triple, analysis: Analysis, tmp_path: Path
):
    """As predicted, and no more than that: none of the base, and of few directions the factors."""
    mllm = sum(tensor.nbytes for tensor in load(triple.mllm).values())
    count = merged(triple.recipe(), tmp_path / "projected", analysis).report["bytes"]
    assert count["read"] == count["read_predicted"] == count["read_most"]
    factors = merged(triple.recipe(output="none"), None, analysis).report["bytes"]["read"]
    assert count["read"] == mllm + factors
    assert 0 < factors < 0.2 * (analysis.path / "analysis.safetensors").stat().st_size
    recipe = triple.recipe(stages=("select", "rescale"))
    count = merged(recipe, tmp_path / "whole", analysis).report["bytes"]
    assert count["read"] == count["read_predicted"] == count["read_most"]
    assert 1.5 * mllm < count["read"] < 4 * mllm
    recipe = triple.recipe(output="none", threshold=1.0)
    assert merged(recipe, None, analysis).report["bytes"]["read"] == 0


def test_values_and_filters_that_differ_between_weights(
    triple: Triple, analysis: Analysis, tmp_path: Path
):
    """Per layer, per expert, and weights left out: as the direct merge has it."""
    options: dict[str, Any] = {
        "scale": [0.5, 2.0],
        "exclude": ["down_proj"],
        "own": [{"threshold": [{"filter": "q_proj", "value": 0.5}, 0.9]}, {"scale": 0.25}],
    }
    direct = merged(triple.recipe(**options), tmp_path / "direct")
    found = merged(triple.recipe(**options), tmp_path / "found", analysis)
    one, other, mllm = (load(path) for path in (direct.path, found.path, triple.mllm))
    changed = 0
    for name, tensor in one.items():
        update = as_matrix(tensor) - as_matrix(mllm[name])
        if not update.any():
            assert torch.equal(other[name], mllm[name])
            continue
        changed += 1
        assert relative_error(as_matrix(other[name]) - as_matrix(mllm[name]), update) < 0.01
    assert changed == 2
    for path in triple.experts:
        assert {n: r["selected"] for n, r in rows_of(direct, path).items()} == {
            n: r["selected"] for n, r in rows_of(found, path).items()
        }


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"svd": "exact"}, "whole spectra"),
        ({"nuclear": "top_q"}, "whole spectra"),
        ({"select_by": "max"}, "any direction"),
        ({"temperature": 4.0}, "beyond the stored"),
        ({"rank": 128}, "a rank of 128"),
    ],
    ids=str,
)
def test_what_the_evidence_lacks_is_looked_at_again(
    triple: Triple,
    analysis: Analysis,
    tmp_path: Path,
    options: dict[str, Any],
    reason: str,
):
    """Sketched weights alone; said with the reason; and right."""
    result = merged(triple.recipe(**options), tmp_path / "out", analysis)
    anew = result.report["analysis"]["anew"]
    assert anew and set(anew) <= {n for n in SHAPES if min(SHAPES[n]) > 512}
    assert all(reason in each for each in anew.values())
    assert any("analysed anew" in line for line in result.report["warnings"])
    rows = rows_of(result, triple.experts[0])
    assert all((rows[name]["passes"] > 0) == (name in anew) for name in SHAPES)
    wanted = {k: v for k, v in options.items() if k not in ("svd", "rank")}
    for case in cases(triple, result):
        oracles = [case.oracle(k, **wanted) for k in range(2)]
        if any(each.selected for each in oracles):
            assert relative_error(case.update, sum(each.update for each in oracles)) < 0.03


def test_weights_that_the_analysis_left_out_are_gathered(
    triple: Triple, analysis: Analysis, tmp_path: Path
):
    partial = analysed(triple.recipe(include=["q_proj", "down_proj"]), tmp_path / "analysis")
    result = merged(triple.recipe(), tmp_path / "out", partial)
    assert set(result.report["analysis"]["anew"]) == {
        "layers.0.mlp.gate_proj",
        "layers.0.self_attn.v_proj",
    }
    whole = merged(triple.recipe(), tmp_path / "whole", analysis)
    one, other = load(result.path), load(whole.path)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("output", ["checkpoint", "lora"])
def test_verify_gathers_again_and_finds_the_same_bytes(
    triple: Triple, analysis: Analysis, tmp_path: Path, output: str
):
    recipe = triple.recipe(threshold=0.5, seed=3, output=output)
    result = merged(recipe, tmp_path / "out", analysis)
    found = verify(result.path, full=True, resources=CPU)
    assert found.ok and found.exact
    if output == "checkpoint":
        assert len(found.recomputed) == len(SHAPES)


# --- again, interrupted, refused -------------------------------------------------------------


def test_an_analysis_is_the_same_whatever_memory_and_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    triple = write_triple(tmp_path / "in", SKETCHED)
    first = analyze(triple.recipe(), tmp_path / "one", resources=CPU).path
    monkeypatch.setattr(formulas, "resident_tiles", lambda shape, free: 0)
    other = Resources(device="cpu", threads=2)
    second = analyze(triple.recipe(), tmp_path / "two", resources=other).path
    name = "analysis.safetensors"
    assert (first / name).read_bytes() == (second / name).read_bytes()
    one, two = (json.loads((p / "analysis.json").read_bytes()) for p in (first, second))
    assert one["weights"] == two["weights"] and one["thresholds"] == two["thresholds"]


def test_an_interrupted_analysis_is_unfinished_and_goes_on(small: Triple, tmp_path: Path):
    wanted = contents(analyze(small.recipe(), tmp_path / "whole", resources=CPU).path)
    out = tmp_path / "out"
    with pytest.raises(Stop):
        analyze(small.recipe(), out, resources=CPU, on_event=stopping(3))
    with pytest.raises(CheckpointError):
        open_analysis(out)
    result = analyze(small.recipe(), out, resources=CPU)
    assert result.reused >= 3 and not result.was_complete
    found = contents(out)
    assert found.keys() == wanted.keys()
    assert found["analysis.safetensors"] == wanted["analysis.safetensors"]
    one, two = json.loads(found["analysis.json"]), json.loads(wanted["analysis.json"])
    assert one["weights"] == two["weights"] and one["thresholds"] == two["thresholds"]
    assert analyze(small.recipe(), out, resources=CPU).was_complete


def test_an_interrupted_merge_from_it_goes_on_but_not_from_another(small: Triple, tmp_path: Path):
    analysis = analysed(small.recipe(), tmp_path / "analysis")
    out, recipe = tmp_path / "out", small.recipe(shard_size="30KB")
    wanted = merged(recipe, tmp_path / "whole", analysis)
    with pytest.raises(Stop):
        merged(recipe, out, analysis, on_event=stopping(3))
    other = analysed(small.recipe(seed=1), tmp_path / "other")
    with pytest.raises(OutputError, match="decided from another analysis"):
        merged(recipe, out, other)
    with pytest.raises(OutputError, match="decided from another analysis"):
        merged(recipe, out)
    result = merged(recipe, out, analysis)
    assert result.reused > 0
    one, two = load(result.path), load(wanted.path)
    assert all(torch.equal(one[name], two[name]) for name in two)


def test_other_inputs_are_refused_with_what_changed(tmp_path: Path):
    triple = write_triple(tmp_path / "in", SMALL)
    analysis = analysed(triple.recipe(), tmp_path / "analysis")
    moved = shutil.copytree(triple.experts[0], tmp_path / "in" / "copy")
    file = moved / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors of the expert 1 is not the same"
    ):
        merged(replace(triple, experts=(moved,)).recipe(), tmp_path / "out", analysis)
    two = replace(triple, experts=(*triple.experts, *triple.experts))
    with pytest.raises(CheckpointError, match="the roles were 3, are 4"):
        merged(two.recipe(), tmp_path / "out", analysis)
    assert not (tmp_path / "out").exists()


def test_it_is_found_from_another_folder(triple: Triple, analysis: Analysis, tmp_path: Path):
    """Paths in it are relative; what counts are the files."""
    moved = shutil.copytree(analysis.path, tmp_path / "deep" / "er" / "analysis")
    result = merged(triple.recipe(), tmp_path / "out", moved)
    assert result.report["analysis"]["recalled"] == len(SHAPES)


def test_a_method_that_looks_at_nothing_is_refused(triple: Triple, tmp_path: Path):
    recipe = replace(triple.recipe(), merge_method="task_arithmetic")
    with pytest.raises(RecipeError, match="nothing to analyse; analysis is for ip_merging"):
        analyze(recipe, tmp_path / "out", resources=CPU)
    assert not (tmp_path / "out").exists()


def test_a_plan_tells_of_the_analysis(triple: Triple, analysis: Analysis, tmp_path: Path):
    made = plan(triple.recipe(), CPU, analysis=analysis)
    assert merge(made, tmp_path / "out").report["analysis"]["sha256"] == analysis.sha256
    with pytest.raises(RecipeError, match="its resources and analysis"):
        merge(made, tmp_path / "other", analysis=analysis)


DAMAGES = {
    "no number": (lambda d: d["weights"][0]["mllm"]["sigma"].__setitem__(0, "x"), "sigma"),
    "negative": (lambda d: d["weights"][0]["mllm"].update(nuclear=-1.0), "nuclear"),
    "similarity": (lambda d: d["weights"][0]["experts"][0]["similarity"].append(2.0), "similarity"),
    "too many": (
        lambda d: d["weights"][0]["experts"][0]["similarity"].extend([0.1] * 2000),
        "similarities",
    ),
    "an expert less": (lambda d: d["weights"][0]["experts"].pop(), "experts are not 2"),
    "shape": (lambda d: d["weights"][0].update(shape=[3]), "shape"),
    "stored": (lambda d: d["weights"][0].update(stored=10**6), "stored"),
    "version": (lambda d: d.update(version=99), "version"),
    "gathered": (lambda d: d["gathered"].update(rank=-3), "rank"),
    "other factors": (lambda d: d["weights"][0].update(stored=1), "is not F32"),
    "no list": (lambda d: d.update(weights={}), "no list"),
    "inputs": (lambda d: d.update(inputs=[{"files": 3}]), "no files"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(analysis: Analysis, tmp_path: Path, damage: str):
    folder = shutil.copytree(analysis.path, tmp_path / "analysis")
    change, word = DAMAGES[damage]
    document = json.loads((folder / "analysis.json").read_bytes())
    change(document)
    (folder / "analysis.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=word) as caught:
        open_analysis(folder)
    assert str(folder) in str(caught.value)


def test_missing_files_are_named(analysis: Analysis, tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"analysis\.json: cannot be read"):
        open_analysis(tmp_path)
    folder = shutil.copytree(analysis.path, tmp_path / "analysis")
    (folder / "analysis.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"analysis\.safetensors: is missing"):
        open_analysis(folder)


# --- thresholds that are found ---------------------------------------------------------------


def test_auto_is_the_threshold_that_the_analysis_explains(
    triple: Triple, analysis: Analysis, tmp_path: Path
):
    """The planted weights are above it, the others below, and verify knows it again."""
    result = merged(triple.recipe(threshold="auto"), tmp_path / "out", analysis)
    about = result.report["analysis"]
    for k, path in enumerate(triple.experts):
        entry = analysis.document["thresholds"][k]
        assert about["thresholds"][k] == entry["auto"]
        assert about["explanations"][k] == entry["explanation"]
        assert f"{entry['auto']:.2f}" in entry["explanation"]
        for name, row in rows_of(result, path).items():
            assert row["selected"] == triple.is_aligned(name, k)
    assert verify(result.path, full=True, resources=CPU).ok


def test_auto_without_an_analysis_makes_one_and_leaves_nothing(small: Triple, tmp_path: Path):
    """The same bytes as from an analysis; interrupted, it goes on; complete, it is left alone."""
    recipe = small.recipe(threshold="auto", shard_size="30KB")
    wanted = merged(recipe, tmp_path / "a" / "wanted", analysed(recipe, tmp_path / "analysis"))
    out = tmp_path / "b" / "out"
    stop = stopping(2, of="checkpoint")
    with pytest.raises(Stop):
        # The analysis is done when the first tensor of the output is.
        merged(recipe, out, on_event=stop)
    assert [each.name for each in out.parent.iterdir()] == ["out"]
    assert open_analysis(out / OWN_ANALYSIS).document["weights"]
    with pytest.raises(OutputError, match="cannot be resumed, because the recipe has changed"):
        merged(small.recipe(threshold=0.4, shard_size="30KB"), out)
    found = merged(recipe, out)
    assert found.reused > 0
    assert not (out / OWN_ANALYSIS).exists()
    assert [each.name for each in out.parent.iterdir()] == ["out"]
    one, two = load(found.path), load(wanted.path)
    assert all(torch.equal(one[name], two[name]) for name in two)
    assert verify(out, full=True, resources=CPU).ok
    assert merged(recipe, out).was_complete
    with pytest.raises(OutputError, match="not empty"):
        merged(small.recipe(threshold="auto", scale=2.0), out)


def test_auto_of_one_expert_alone(triple: Triple, analysis: Analysis, tmp_path: Path):
    recipe = triple.recipe(own=[{"threshold": "auto"}, {"threshold": 0.95}], output="none")
    report = merged(recipe, None, analysis).report
    chosen = [r["expert"] for r in report["weights"] if r["selected"]]
    assert set(chosen) == {str(triple.experts[0])}


def test_auto_needs_a_folder_or_an_analysis(triple: Triple):
    with pytest.raises(RecipeError, match="give a folder with --out, or an analysis"):
        merged(triple.recipe(threshold="auto", output="none"), None)
    with pytest.raises(RecipeError, match="A stream finds no threshold"):
        next(stream(triple.recipe(threshold="auto"), resources=CPU))
    with pytest.raises(RecipeError, match="threshold must be a float or auto"):
        merged(triple.recipe(threshold="high", output="none"), None)
