"""Which weights are merged, and values that differ between them: each as if given to all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from support.families import Triple, load, rows_of, write_triple
from torch import Tensor

from lean_merge import MergeRecipe, RecipeError, Resources, merge, plan
from lean_merge.cli import main
from lean_merge.plan.parameters import MethodTable
from lean_merge.plan.scope import Position, filter_weights

CPU = Resources(device="cpu", threads=1)
LAYERS = 5
LEAVES = ("self_attn.q_proj", "mlp.up_proj")
SHAPES = {f"layers.{n}.{leaf}": (48, 32) for n in range(LAYERS) for leaf in LEAVES}
DEFAULT = {"threshold": 0.0}
"""Every weight is selected, so that every value is seen in the output."""


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Triple:
    """Five layers of two weights, and two experts."""
    return write_triple(tmp_path_factory.mktemp("deep"), SHAPES, experts=2)


@pytest.fixture(scope="module")
def merged_with(
    deep: Triple, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict[str, Tensor]]:
    """The tensors of a merge, made once for each set of options."""
    made: dict[str, dict[str, Tensor]] = {}

    def get(own: Any = ({}, {}), **options: Any) -> dict[str, Tensor]:
        key = repr((own, options))
        if key not in made:
            out = tmp_path_factory.mktemp("filtered") / "out"
            made[key] = load(deep.merge(out, own=own, **DEFAULT | options).path)
        return made[key]

    return get


def tensor_of(canonical: str) -> str:
    return f"model.{canonical}.weight"


def place(layer: int, leaf: str = LEAVES[0], layers: int = LAYERS) -> Position:
    name = f"layers.{layer}.{leaf}"
    return Position(name, tensor_of(name), layers)


# --- values that differ -------------------------------------------------------------------

VARYING: list[tuple[str, Any, Callable[[int, str], Any]]] = [
    ("scale", [0.2, 1.0], lambda layer, leaf: 0.2 + 0.8 * layer / 4),
    ("scale", [0.0, 1.0, 0.5], lambda layer, leaf: [0.0, 0.5, 1.0, 0.75, 0.5][layer]),
    ("threshold", [0.0, 1.0], lambda layer, leaf: layer / 4),
    (
        "scale",
        [{"filter": "mlp", "value": 0.5}, 2.0],
        lambda layer, leaf: 0.5 if "mlp" in leaf else 2.0,
    ),
    (
        "scale",
        [
            {"filter": "layers: 1-2,4-", "value": 0.25},
            {"filter": "q_proj$", "value": [1.0, 2.0]},
            {"value": -1.0},
        ],
        lambda layer, leaf: (
            0.25 if layer in (1, 2, 4) else 1 + layer / 4 if leaf.endswith("q_proj") else -1.0
        ),
    ),
    (
        "temperature",
        [{"filter": "model.layers.3.", "value": 2}],
        lambda layer, leaf: 2.0 if layer == 3 else 32.0,
    ),
    (
        "stages",
        [{"filter": "*", "value": ["select"]}],
        lambda layer, leaf: ("select",),
    ),
    (
        "importance",
        [{"filter": "up_proj", "value": "relative"}, "softmax"],
        lambda layer, leaf: "relative" if leaf.endswith("up_proj") else "softmax",
    ),
]


@pytest.mark.parametrize(("name", "value", "wanted"), VARYING)
def test_each_weight_is_merged_as_with_its_value_everywhere(
    merged_with: Callable[..., dict[str, Tensor]],
    name: str,
    value: Any,
    wanted: Callable[[int, str], Any],
):
    found = merged_with(**{name: value})
    for layer in range(LAYERS):
        for leaf in LEAVES:
            alone = merged_with(**{name: wanted(layer, leaf)})
            tensor = tensor_of(f"layers.{layer}.{leaf}")
            assert torch.equal(found[tensor], alone[tensor]), (layer, leaf)


def test_the_values_of_each_expert_are_its_own(merged_with: Callable[..., dict[str, Tensor]]):
    found = merged_with(
        own=({"scale": [0.0, 1.0]}, {"scale": [{"filter": "mlp", "value": 2.0}, 0.5]}),
        threshold=[{"filter": "layers: 0", "value": 0.3}, 0.0],
    )
    for layer in range(LAYERS):
        for leaf in LEAVES:
            second = 2.0 if "mlp" in leaf else 0.5
            alone = merged_with(
                own=({"scale": layer / 4}, {"scale": second}), threshold=0.0 if layer else 0.3
            )
            tensor = tensor_of(f"layers.{layer}.{leaf}")
            assert torch.equal(found[tensor], alone[tensor]), (layer, leaf)


def test_other_methods_take_such_values_too(deep: Triple, tmp_path: Path):
    method = {"merge_method": "task_arithmetic"}
    found = load(deep.merge(tmp_path / "out", scale=[0, 1], **method).path)
    for layer in (0, 3):
        alone = load(deep.merge(tmp_path / f"{layer}", scale=layer / 4, **method).path)
        for leaf in LEAVES:
            tensor = tensor_of(f"layers.{layer}.{leaf}")
            assert torch.equal(found[tensor], alone[tensor])


@settings(deadline=None)
@given(
    points=st.lists(st.floats(0, 1), min_size=2, max_size=6),
    layers=st.integers(1, 12),
    data=st.data(),
)
def test_a_list_is_interpolated_from_the_first_layer_to_the_last(
    points: list[float], layers: int, data: st.DataObject
):
    layer = data.draw(st.integers(0, layers - 1))
    table = MethodTable(MergeRecipe("b", "m", ("e",), parameters={"threshold": points}))
    depth = layer / (layers - 1) if layers > 1 else 0.0
    wanted = np.interp(depth, np.linspace(0, 1, len(points)), points)
    found = table.at(place(layer, layers=layers)).common.threshold
    assert found == pytest.approx(wanted, abs=1e-12)


def test_weights_with_equal_values_share_a_method():
    recipe = MergeRecipe("b", "m", ("e",), parameters={"scale": [{"filter": "mlp", "value": 2}]})
    table = MethodTable(recipe)
    assert table.at(place(0)) is table.at(place(4))
    assert table.at(place(0)) is not table.at(place(0, LEAVES[1]))


VALUES = st.one_of(
    st.floats(0, 1),
    st.lists(st.floats(0, 1), min_size=2, max_size=4),
    st.lists(
        st.one_of(
            st.floats(0, 1),
            st.fixed_dictionaries(
                {"filter": st.sampled_from(["mlp", "layers: 0-3", "*"]), "value": st.floats(0, 1)}
            ),
            st.fixed_dictionaries({"value": st.lists(st.floats(0, 1), min_size=2, max_size=3)}),
        ),
        min_size=1,
        max_size=4,
    ).filter(lambda entries: any(isinstance(each, dict) for each in entries)),
)


@settings(deadline=None, max_examples=60)
@given(
    common=VALUES,
    own=VALUES,
    include=st.lists(st.sampled_from(["mlp", "layers: 0-3", r"q_proj$"]), max_size=3),
)
def test_such_recipes_survive_yaml_and_can_be_hashed(common: Any, own: Any, include: list[str]):
    recipe = MergeRecipe(
        "b",
        "m",
        ({"model": "e", "parameters": {"scale": own}},),
        parameters={"threshold": common},
        include=include,
        exclude=include[1:],
    )
    again = MergeRecipe.from_yaml(recipe.to_yaml())
    assert again == recipe and hash(again) == hash(recipe)


# --- include and exclude ------------------------------------------------------------------

FILTERS: list[tuple[dict[str, Any], Callable[[int, str], bool]]] = [
    ({"include": ["mlp"]}, lambda layer, leaf: "mlp" in leaf),
    ({"exclude": ["mlp"]}, lambda layer, leaf: "mlp" not in leaf),
    ({"include": ["layers: 0-2"]}, lambda layer, leaf: layer <= 2),
    ({"include": [{"layers": "1-2,4"}]}, lambda layer, leaf: layer in (1, 2, 4)),
    ({"include": [{"layers": 3}]}, lambda layer, leaf: layer == 3),
    ({"exclude": ["layers: 2-"]}, lambda layer, leaf: layer < 2),
    (
        {"include": ["layers: 1-", "q_proj"], "exclude": [r"layers\.4\."]},
        lambda layer, leaf: (layer >= 1 or "q_proj" in leaf) and layer != 4,
    ),
    ({"include": [r"^model\.layers\.[01]\.self_attn"]}, lambda n, leaf: n < 2 and "attn" in leaf),
]


@pytest.mark.parametrize(("options", "wanted"), FILTERS, ids=[str(f[0]) for f in FILTERS])
def test_filters_leave_the_others_as_the_mllm_has_them(
    deep: Triple,
    tmp_path: Path,
    merged_with: Callable[..., dict[str, Tensor]],
    options: dict[str, Any],
    wanted: Callable[[int, str], bool],
):
    result = deep.merge(tmp_path / "out", **DEFAULT | options)
    found, whole, mllm = load(result.path), merged_with(), load(deep.mllm)
    kept = {f"layers.{n}.{leaf}" for n in range(LAYERS) for leaf in LEAVES if wanted(n, leaf)}
    for canonical in SHAPES:
        tensor = tensor_of(canonical)
        source = whole if canonical in kept else mllm
        assert torch.equal(found[tensor], source[tensor]), canonical
        assert not torch.equal(whole[tensor], mllm[tensor])
    report = result.report
    assert report["filtered"].keys() == SHAPES.keys() - kept
    assert all(reason for reason in report["filtered"].values())
    counts = report["counts"]
    assert counts["filtered"] == len(SHAPES) - len(kept)
    assert (counts["merged"], counts["copied"]) == (len(kept), len(SHAPES) - len(kept) + 1)
    assert {row["weight"] for row in report["weights"]} == kept
    read = report["bytes"]
    assert read["read"] == read["read_predicted"]


def test_one_projection_of_a_fused_weight_is_filtered_out(
    family: Callable[..., Triple], tmp_path: Path
):
    triple = family("phi3")
    whole = load(triple.merge(tmp_path / "whole", threshold=0.0).path)
    result = triple.merge(tmp_path / "out", threshold=0.0, exclude=("k_proj", "up_proj"))
    found, mllm = load(result.path), load(triple.mllm)
    for slot in triple.slots:
        source = mllm if slot.canonical.endswith(("k_proj", "up_proj")) else whole
        assert torch.equal(slot.in_mllm.get(found), slot.in_mllm.get(source))
    rows = rows_of(result)
    for canonical, row in rows.items():
        out = canonical.endswith(("k_proj", "up_proj"))
        assert row["selected"] is not out
        assert ("excluded by" in row["reason"]) is out
        assert (row["passes"] == 0) is out
    read = result.report["bytes"]
    assert read["read"] == read["read_predicted"]
    assert result.report["counts"]["merged"] == len({slot.mllm for slot in triple.slots})


def test_what_is_filtered_out_is_not_read_for_an_adapter(deep: Triple, tmp_path: Path):
    some = deep.merge(tmp_path / "a", output="lora", **DEFAULT | {"include": ["layers: 0"]})
    numbers = sum(48 * 32 for name in SHAPES if name.startswith("layers.0."))
    assert some.report["bytes"]["read"] == 4 * 4 * numbers


def test_an_analysis_alone_decides_the_same_and_writes_nothing(deep: Triple, tmp_path: Path):
    wanted = deep.merge(tmp_path / "out", threshold=0.4)
    recipe = deep.recipe(threshold=0.4, output="none")
    found = merge(recipe, resources=CPU)
    assert found.path is None
    assert found.report["bytes"]["written"] == 0
    assert found.report["bytes"]["read"] == found.report["bytes"]["read_predicted"]
    for row, other in zip(found.report["weights"], wanted.report["weights"], strict=True):
        assert row | {"update_kept": None} == other | {"update_kept": None}
    kept = merge(recipe, tmp_path / "report", resources=CPU)
    assert sorted(each.name for each in kept.path.iterdir()) == [
        "lean_merge_journal.jsonl",
        "lean_merge_recipe.yml",
        "lean_merge_report.json",
        "lean_merge_summary.txt",
    ]
    merge(recipe, tmp_path / "report", resources=CPU, overwrite=True)


# --- what makes no sense ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"include": ["mpl"]}, "include: 'mpl' matches no weight.*'mlp'"),
        ({"exclude": ["k_proj"]}, "exclude: 'k_proj' matches no weight.*'(q|up)_proj'"),
        ({"include": ["layers: 5-9"]}, "the layers are 0-4"),
        ({"include": ["layers: 3-1"]}, "no range of layers"),
        ({"include": ["layers: three"]}, "no range of layers"),
        ({"include": ["("]}, "not a regular expression"),
        ({"include": [7]}, "include: a filter must be"),
        ({"include": [""]}, "include: a filter must be"),
        ({"include": 7}, "include must be a list"),
        ({"include": ["mlp"], "exclude": ["mlp"]}, "leave no weight"),
        ({"threshold": [{"filter": "mpl", "value": 0.5}]}, "'mpl' of threshold.*'mlp'"),
        ({"threshold": [{"filtre": "mlp", "value": 0.5}]}, "filtre.*'filter'"),
        ({"threshold": [{"filter": "mlp"}]}, "lacks its value"),
        ({"threshold": [{"filter": 3, "value": 0.5}]}, "a filter must be"),
        ({"threshold": [0.5, 1.5]}, "threshold must lie in 0 .. 1"),
        ({"threshold": [{"filter": "mlp", "value": 7}]}, "threshold must lie in 0 .. 1"),
        ({"threshold": [0.5]}, "threshold must be a float"),
        ({"threshold": ["a", "b"]}, "threshold must be a float"),
        ({"threshold": [True, False]}, "threshold must be a float"),
        ({"rank": [4, 8]}, "rank cannot be interpolated"),
        ({"rank": [{"filter": "mlp", "value": [4, 8]}]}, "rank cannot be interpolated"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused_naming_the_nearest(
    deep: Triple, tmp_path: Path, options: dict[str, Any], words: str
):
    with pytest.raises(RecipeError, match=f"(?s){words}"):
        deep.merge(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@settings(deadline=None)
@given(
    ranges=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=3),
    exclude=st.booleans(),
)
def test_ranges_of_layers_are_inclusive(ranges: list[tuple[int, int]], exclude: bool):
    ranges = [(min(pair), max(pair)) for pair in ranges]
    entry = "layers: " + ", ".join(f"{a}-{b}" if a != b else str(a) for a, b in ranges)
    places = [place(n, layers=11) for n in range(11)]
    inside = {n for n in range(11) if any(a <= n <= b for a, b in ranges)}
    include, left_out = ([], inside) if exclude else ([entry], set(range(11)) - inside)
    scope = filter_weights(places, include=include, exclude=[entry] if exclude else [])
    assert scope.filtered.keys() == {f"layers.{n}.{LEAVES[0]}" for n in left_out}


# --- the command line ---------------------------------------------------------------------


def test_flags_and_yaml_reach_the_plan(deep: Triple, tmp_path: Path):
    text = yaml.safe_dump(
        {
            "base_model": str(deep.base),
            "mllm_model": str(deep.mllm),
            "experts": [str(path) for path in deep.experts],
            "parameters": {"scale": [{"filter": "mlp", "value": 0.5}, [1, 2]]},
        }
    )
    text += "include:\n  - layers: 0-2\n  - up_proj\n"
    work = plan(MergeRecipe.from_yaml(text), CPU)
    named = text.replace("  - - 1\n    - 2\n", "  - value: [1, 2]\n")
    assert named != text and MergeRecipe.from_yaml(named) == work.recipe
    assert work.recipe.include == ("layers: 0-2", "up_proj")
    assert len(work.weights) == 8
    scales = [task.methods[0].common.scale for task in work.weights if "q_proj" in task.tensor.name]
    assert scales == [1.0, 1.25, 1.5]


def test_the_commands_flags(deep: Triple, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    roles = ["--base", str(deep.base), "--mllm", str(deep.mllm), "--expert", str(deep.experts[0])]
    filters = ["--include", "layers: 0-1", "--include", "up_proj", "--exclude", r"layers\.1\."]
    main(["plan", *roles, *filters, "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["counts"]["filtered"] == 5 and len(shown["weights"]) == 5
    varying = ["--set", "threshold=[{filter: mlp, value: 1}, 0]", "--set", "scale=[1, 2]"]
    main(["merge", *roles, *varying, "--output", "none", "--json"])
    rows = json.loads(capsys.readouterr().out)["weights"]
    assert {row["weight"]: row["selected"] for row in rows} == {n: "mlp" not in n for n in SHAPES}
    main(["plan", *roles, *filters])
    assert "filtered  " in capsys.readouterr().out
    main(["merge", *roles, *filters, "--output", "none", "--json"])
    assert json.loads(capsys.readouterr().out)["counts"]["filtered"] == 5
    main(["merge", *roles, "--output", "lora", "--lora-rank", "2", "--out", str(tmp_path / "a")])
    assert "in scope were changed" in capsys.readouterr().out
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["r"] <= 2
    main(["plan", *roles, "--output", "lora"])
    assert "adapter, at most" in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        main(["merge", *roles])
    assert left.value.code == 2 and "--out" in capsys.readouterr().err
