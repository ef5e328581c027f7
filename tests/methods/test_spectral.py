"""Methods that decompose task vectors, against naive float64 twins before any rounding."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
from support.drive import drive, rows_of
from support.families import Triple, cases, load, relative_error, write_triple
from support.family_table import FAMILIES, build
from support.form_table import FORMS, as_form
from support.invariance import exact_smallest_memory
from support.spectra import NOISE
from support.spectra import triple as weights_of
from support.spectral import SPECTRAL
from torch import Tensor

from lean_merge import BudgetError, RecipeError, Resources, cli, merge
from lean_merge import plan as make_plan
from lean_merge.methods import Method, all_methods, leading
from lean_merge.plan import fitting
from lean_merge.tasks import tiles

SHAPES = {"tall": (60, 40), "square": (48, 48), "wide": (30, 110)}
"""The rows of two task vectors are fewer than the columns of the wide one."""
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "rank_one": [{}, {"rank": 3, "scale": 0.7}, {"rank": 4, "stretch": False}],
    "star": [{}, {"eta": 0.75, "scale": 0.3}, {"eta": 1.0}],
    "tsv_m": [{}, {"rank": 5, "scale": 0.8}],
    "iso_c": [{}, {"scale": 0.5}],
    "wudi": [{}, {"keep": 1.0, "start": "mean", "scale": 0.7}, {"keep": 0.3, "steps": 40.0}],
    "optmerge": [{}, {"rank": 6, "start": "sum", "steps": 1000.0}],
    "svc": [{}, {"alpha": 0.8, "scale": 0.9}, {"rank": 4}],
}
CASES = [(name, options) for name, each in OPTIONS.items() for options in each]


def method_of(name: str, options: dict[str, Any], experts: int = 1) -> Method[Any]:
    kind = all_methods()[name]
    return kind([kind.parameters_type(**options)] * experts)


def random_task_vectors(shape: tuple[int, int], count: int, *, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [0.01 * torch.randn(shape, generator=generator) for _ in range(count)]


def check(
    name: str, options: dict[str, Any], task_vectors: list[Tensor], *, within: float = 1e-5
) -> None:
    """The whole update is that of the twin, and its rows are the same by themselves."""
    method = method_of(name, options, len(task_vectors) - 1)
    decision, passes = drive(method, task_vectors, dtype=torch.float32)
    expected = SPECTRAL[name]([each.double().numpy() for each in task_vectors], **options)
    rows, columns = task_vectors[0].shape
    cost = method.cost((rows, columns), item=4)
    assert passes <= cost.passes
    if decision.update is None:
        assert not expected.any()
        return
    found = rows_of(decision.update, task_vectors)
    # An update that cancels out is as good as the task vectors that cancel.
    size = max(float(np.linalg.norm(expected)), 1e-3 * float(task_vectors[0].norm()))
    assert float(np.linalg.norm(found.double().numpy() - expected)) <= within * size
    part = rows_of(decision.update, task_vectors, slice(3, 5))
    torch.testing.assert_close(part, found[3:5], rtol=1e-4, atol=1e-7)
    assert decision.update.scratch <= cost.scratch
    reads = decision.update.reads or (False,) * len(task_vectors)
    assert all(may for may, does in zip(method.reads_task_vectors(), reads, strict=True) if does)
    factors = decision.update.factors()
    assert factors is None or factors[0].shape[1] <= (method.largest_rank((rows, columns)) or 0)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_the_update_is_that_of_the_formula(
    name: str, options: dict[str, Any], shape: tuple[int, int]
):
    for experts in (1, 3):
        check(name, options, random_task_vectors(shape, experts + 1))


@pytest.mark.parametrize("name", OPTIONS)
def test_task_vectors_of_low_rank_and_zero_ones(name: str):
    """As an adapter leaves them. Beyond their rank there are no directions to speak of."""
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(size, generator=generator) for size in ((40, 4), (4, 30)))
    low, zero = 0.01 * left @ right, torch.zeros(40, 30)
    full = random_task_vectors((40, 30), 1)[0]
    for task_vectors in ([full, low], [full, zero], [zero, full], [full, low, zero]):
        check(name, {}, task_vectors)
    decision, _ = drive(method_of(name, {}), [full, zero], dtype=torch.float32)
    assert name not in ("rank_one", "star") or decision.update is None
    decision, _ = drive(method_of(name, {}), [zero, zero], dtype=torch.float32)
    assert decision.update is None or not rows_of(decision.update, [zero, zero]).any()


def test_equal_task_vectors_merge_into_themselves():
    """What TSV-Merge, WUDI and SVC exist for: nothing is counted twice."""
    (one,) = random_task_vectors((40, 24), 1)
    for name, options in (("tsv_m", {}), ("wudi", {"start": "mean"}), ("svc", {"alpha": 0.01})):
        task_vectors = [one, one.clone()]
        decision, _ = drive(method_of(name, options), task_vectors, dtype=torch.float32)
        assert decision.update is not None
        merged = (one + rows_of(decision.update, task_vectors)).double().numpy()
        left, sigma, right = np.linalg.svd(one.double().numpy(), full_matrices=False)
        kept = 12 if name == "tsv_m" else 24
        expected = (left[:, :kept] * sigma[:kept]) @ right[:kept]
        assert relative_error(merged, expected) < 1e-5


SKETCHED: list[tuple[str, dict[str, Any]]] = [
    ("rank_one", {}),
    ("rank_one", {"rank": 4}),
    ("star", {"eta": 0.2}),
    ("star", {"eta": 0.4}),
    ("tsv_m", {"rank": 12}),
    ("optmerge", {"rank": 12}),
    ("svc", {"rank": 12}),
    ("wudi", {"keep": 1.0}),
]


@pytest.mark.parametrize(("name", "options"), SKETCHED, ids=str)
def test_what_is_sketched_is_near(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    """Within 1 % in the median and 3 % at worst, of tall and wide weights and several spectra."""
    monkeypatch.setattr(leading, "WHOLE_BELOW", 64)
    errors = []
    for number, kind in enumerate(NOISE):
        shape = ((330, 290), (280, 350))[number % 2]
        base, *others = weights_of(shape, kind, seed=number, dtype=torch.bfloat16)
        task_vectors = [other - base for other in others]
        method = method_of(name, options)
        decision, passes = drive(method, task_vectors, dtype=torch.float32)
        assert passes <= method.cost(shape, item=4).passes
        assert decision.update is not None
        found = rows_of(decision.update, task_vectors).double().numpy()
        expected = SPECTRAL[name]([each.double().numpy() for each in task_vectors], **options)
        errors.append(relative_error(found, expected))
    assert median(errors) <= 0.01 and max(errors) <= 0.03, errors


# --- whole merges -------------------------------------------------------------------------------

STORED = {
    "fused, in fp8": ("Phi-4-multimodal", "fp8 with scales of blocks"),
    "stacked": ("Qwen3-VL-MoE", "safetensors in one file"),
    "interleaved, in shards": ("InternVL (original)", "safetensors in shards"),
}
"""Families and forms whose weights are stored in other ways than they are merged."""


@pytest.fixture(scope="module")
def stored(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str, str], tuple[Triple, Triple]]:
    """A family in a form, and its twin in plain numbers."""
    made: dict[tuple[str, str], tuple[Triple, Triple]] = {}

    def get(layout: str, name: str) -> tuple[Triple, Triple]:
        if (layout, name) not in made:
            folder = tmp_path_factory.mktemp("stored")
            form = next(each for each in FORMS if each.name == name)
            entry = next(each for each in FAMILIES if each.name == layout)
            triple = build(entry, folder / "in", **form.options)
            made[layout, name] = as_form(form, triple, folder / "twins")
        return made[layout, name]

    return get


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("how", STORED)
def test_the_command_line_merges_whatever_the_storage(
    how: str,
    name: str,
    stored: Callable[[str, str], tuple[Triple, Triple]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(tiles, "TILE_ROWS", 16)
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", 1)
    triple, twin = stored(*STORED[how])
    words = ["merge", "--base", triple.base, "--mllm", triple.mllm, "--expert", triple.experts[0]]
    words += ["--method", name, "--out-dtype", "float32", "--device", "cpu", "--threads", "2"]
    words += ["--set", "scale=0.5", "--out", tmp_path / "out", "--json"]
    words += ["--include", "layers: 0"]
    cli.main([str(word) for word in words])
    report = json.loads(capsys.readouterr().out)
    assert all(row["selected"] for row in report["weights"])
    base, mllm, expert = (load(path) for path in (twin.base, twin.mllm, twin.experts[0]))
    out = load(tmp_path / "out")
    for slot in triple.slots:
        if not slot.canonical.startswith("layers.0."):
            continue
        before = slot.in_mllm.get(mllm).double()
        weights = [slot.in_base.get(each).double() for each in (base, expert)]
        task_vectors = [(before - weights[0]).numpy(), (weights[1] - weights[0]).numpy()]
        expected = SPECTRAL[name](task_vectors, scale=0.5)
        found = slot.in_mllm.get(out).double() - before
        # What subtraction in float32 rounds turns the smallest singular directions a little.
        assert relative_error(found.numpy(), expected) < 1e-3, slot.canonical


def test_adapters_hold_the_updates_of_low_rank(tmp_path: Path):
    triple = write_triple(tmp_path / "in", {"layers.0.self_attn.q_proj": (48, 40)}, experts=2)
    for name, options in (("rank_one", {"rank": 2}), ("star", {})):
        whole = triple.merge(tmp_path / name, merge_method=name, **options)
        adapter = triple.merge(
            tmp_path / f"{name} lora", merge_method=name, output="lora", **options
        )
        factors = load(adapter.path)
        b, a = (next(t for n, t in factors.items() if f"lora_{k}" in n) for k in "BA")
        config = json.loads((adapter.path / "adapter_config.json").read_text())
        scaling = config["lora_alpha"] / config["r"]
        (case,) = cases(triple, whole)
        found = scaling * (b.double() @ a.double()).numpy()
        assert relative_error(found, case.update) < 1e-5
        for row in adapter.report["weights"]:
            assert row["lora_error"] < 1e-6


@pytest.mark.parametrize("name", OPTIONS)
def test_a_budget_that_is_too_small_is_refused_with_one_that_works(tmp_path: Path, name: str):
    triple = write_triple(tmp_path / "in", {"layers.0.mlp.up_proj": (72, 40)})
    least = exact_smallest_memory(triple, merge_method=name)
    with pytest.raises(BudgetError, match=r"the smallest that works is --memory \d+MiB"):
        make_plan(
            triple.recipe(merge_method=name), Resources(device="cpu", threads=2, memory=least // 2)
        )


@pytest.mark.parametrize("name", OPTIONS)
def test_without_an_mllm_only_the_experts_count(tmp_path: Path, name: str):
    """The base receives, and N is the number of experts."""
    triple = write_triple(tmp_path / "in", {"layers.0.self_attn.q_proj": (40, 36)}, experts=2)
    recipe = replace(triple.recipe(merge_method=name), mllm_model=None)
    out = merge(recipe, tmp_path / "out", resources=Resources(device="cpu", threads=1)).path
    weights = [load(path) for path in (triple.base, *triple.experts, out)]
    base, *experts, merged = (each[triple.slots[0].base].double().numpy() for each in weights)
    task_vectors = [expert - base for expert in experts]
    if name in ("rank_one", "star"):
        expected = SPECTRAL[name]([np.zeros_like(base), *task_vectors])
    else:
        expected = SPECTRAL[name](task_vectors) + task_vectors[0]
    assert relative_error(merged - base, expected) < 1e-3


def test_the_hours_of_decompositions_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    triple = write_triple(tmp_path / "in", {"layers.0.mlp.up_proj": (72, 40)})
    recipe, machine = triple.recipe(merge_method="wudi"), Resources(device="cpu", threads=1)
    assert not any("hours" in note for note in make_plan(recipe, machine).notes)
    monkeypatch.setattr(fitting, "_OPERATIONS", 1.0)
    assert any("hours on one core" in note for note in make_plan(recipe, machine).notes)


def test_the_report_tells_what_was_kept(tmp_path: Path):
    triple = write_triple(tmp_path / "in", {"layers.0.self_attn.q_proj": (48, 40)})
    report = triple.merge(tmp_path / "out", merge_method="rank_one").report
    (row,) = report["weights"]
    (case,) = cases(triple, triple.merge(tmp_path / "star", merge_method="star"))
    task_vector = case.experts[0] - case.base
    sigma = np.linalg.svd(task_vector, compute_uv=False)
    assert row["directions"] == 1 and row["rank"] == 40
    assert row["energy_kept"] == pytest.approx(sigma[0] ** 2 / np.sum(sigma**2), rel=1e-4)
    stretch = np.linalg.norm(task_vector) / sigma[0]
    assert row["factor"] == pytest.approx(0.05 * stretch, rel=1e-4)
    assert row["update_norm"] == pytest.approx(0.05 * np.linalg.norm(task_vector), rel=1e-4)
    assert row["reason"].startswith("1 singular direction holds ")


def test_a_short_spectrum_is_warned_of(tmp_path: Path):
    def edit(role: str, tensors: dict[str, Tensor]) -> None:
        name = "model.layers.0.self_attn.q_proj.weight"
        tensors[name] = torch.full((40, 40), {"base": 0.5, "mllm": 0.51}.get(role, 0.52))

    triple = write_triple(tmp_path / "in", {"layers.0.self_attn.q_proj": (40, 40)}, edit=edit)
    report = triple.merge(tmp_path / "out", merge_method="iso_c").report
    assert any("short in 1 of 1" in warning for warning in report["warnings"])


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("rank_one", {"rank": 0}, "rank must be a whole number from 1"),
        ("rank_one", {"rank": 1.5}, "rank must be a whole number from 1"),
        ("rank_one", {"scale": 1e6}, "scale must lie in -100 .. 100"),
        ("star", {"eta": 0.0}, "eta must lie above 0 and up to 1"),
        ("star", {"eta": float("nan")}, "eta must lie above 0 and up to 1"),
        ("tsv_m", {"rank": -1}, "rank must be 'auto' or a whole number"),
        ("iso_c", {"scale": float("inf")}, "scale must lie in"),
        ("iso_c", {"mllm_weight": -1.0}, "mllm_weight must lie in 0 .. 100"),
        ("wudi", {"keep": 1.01}, "keep must lie in 0 .. 1"),
        ("wudi", {"steps": -1.0}, "steps must lie in 0"),
        ("wudi", {"start": "median"}, "start must be one of sum, mean"),
        ("optmerge", {"rank": "some"}, "rank must be 'auto' or a whole number"),
        ("svc", {"alpha": 0.0}, "alpha must be 'auto', or lie above 0"),
        ("svc", {"eta": 0.1}, "Unknown key 'eta' in parameters of svc; known are scale"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused_before_anything_is_read(
    name: str, options: dict[str, Any], told: str
):
    from lean_merge.plan.parameters import build_method

    triple = Triple(Path("b"), Path("m"), (Path("e"),), ())
    with pytest.raises(RecipeError, match=told):
        build_method(triple.recipe(merge_method=name, **options))
