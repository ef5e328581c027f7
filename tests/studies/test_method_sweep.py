"""Sweeps over methods: each point is the merge it says, beside the model that receives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.families import SMALL, Triple, load, write_triple

from lean_merge import MergeRecipe, MethodGrid, RecipeError, Resources, cli, merge, sweep
from lean_merge.cli.describe import sweep_text
from lean_merge.page.sweep import sweep_content
from lean_merge.studies import pages
from lean_merge.studies.sweep.table import read_table, to_csv

CPU = Resources(device="cpu", threads=1)
METHODS: dict[str, dict[str, Any]] = {
    "ip_merging": {"threshold": [0.3, 0.99], "stages": "select;select,rescale,project"},
    "task_arithmetic": {"scale": "0.5,1"},
    "ties": {"density": [0.2], "trim_over": ["weight", "model"]},
}
NAMES = [
    "ip_merging_threshold-0.3_stages-select",
    "ip_merging_threshold-0.3_stages-select-rescale-project",
    "ip_merging_threshold-0.99_stages-select",
    "ip_merging_threshold-0.99_stages-select-rescale-project",
    "task_arithmetic_scale-0.5",
    "task_arithmetic_scale-1",
    "ties_density-0.2_trim_over-weight",
    "ties_density-0.2_trim_over-model",
]


@pytest.fixture(scope="module")
def triple(tmp_path_factory: pytest.TempPathFactory) -> Triple:
    return write_triple(tmp_path_factory.mktemp("methods"), SMALL)


@pytest.fixture(autouse=True)
def _without_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "plotly_installed", lambda: False)


def test_every_point_is_the_merge_of_its_method_and_the_receiver_is_measured(
    triple: Triple, tmp_path: Path
):
    """A second run finds everything, and measures nothing again."""
    recipe = triple.recipe(scale=0.25)
    grid, out = MethodGrid(METHODS), tmp_path / "out"
    command = "echo '{\"size\": 1.5}'"
    table = sweep(recipe, grid, out, evaluate=command, resources=CPU).table
    assert [point["name"] for point in table["points"]] == NAMES
    assert [point["error"] for point in table["points"]] == [None] * 8
    assert table["axes"]["method"] == list(METHODS)
    assert table["axes"]["trim_over"] == ["weight", "model"]
    assert table["analysis"] == "analysis"
    for point in table["points"]:
        parameters = dict(point["parameters"])
        method = parameters.pop("method")
        if method == "ip_merging":
            # The recipe's own parameters hold for its own method.
            parameters["scale"] = 0.25
        if point["same_as"] is None:
            alone = merge(
                triple.recipe(merge_method=method, **parameters),
                tmp_path / "alone" / point["name"],
                analysis=out / "analysis" if method == "ip_merging" else None,
                resources=CPU,
            )
            found, wanted = load(out / point["path"]), load(alone.path)
            assert all(found[name].equal(wanted[name]) for name in wanted)
    receiver = table["receiver"]
    assert receiver["result"] == {"size": 1.5} and receiver["error"] is None
    log = out / "evaluations" / "receiver.stdout.txt"
    log.unlink()
    assert "the model that receives, as it is" in sweep_text(table)
    assert "trim_over" in to_csv(table).decode().splitlines()[0]
    assert sweep_content(read_table(out) or {}).data["receiver"] == {"size": 1.5}
    before = read_table(out)
    sweep(recipe, grid, out, evaluate=command, resources=CPU)
    assert read_table(out) == before and not log.exists()


def test_the_receiver_of_an_adapter_is_not_measured(triple: Triple, tmp_path: Path):
    recipe = triple.recipe(output="lora", lora_rank=2)
    grid = MethodGrid({"task_arithmetic": {}, "ip_merging": {"threshold": 0.3}})
    table = sweep(recipe, grid, tmp_path / "out", evaluate="echo 1", resources=CPU).table
    assert [point["name"] for point in table["points"]] == [
        "task_arithmetic",
        "ip_merging_threshold-0.3",
    ]
    assert all(point["result"] == 1 for point in table["points"])
    assert table["receiver"] is None


def test_the_command_line_reads_methods_and_their_values(
    triple: Triple, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["sweep", "--base", triple.base, "--mllm", triple.mllm, "--expert", triple.experts[0]]
    words += ["--out", tmp_path / "out", "--output", "none", "--json", "--device", "cpu"]
    words += ["--try", "ties scale=0.5:1:0.5 density=0.1", "--try", "task-arithmetic"]
    cli.main([str(word) for word in words])
    table = json.loads(capsys.readouterr().out)
    assert [point["name"] for point in table["points"]] == [
        "ties_scale-0.5_density-0.1",
        "ties_scale-1_density-0.1",
        "task_arithmetic",
    ]


@pytest.mark.parametrize(
    ("texts", "fault"),
    [
        ([""], "cannot be read; write a method"),
        (["ties scale"], "cannot be read"),
        (["ties scale=1 scale=2"], "each once"),
        (["ties", "Ties scale=1"], "cannot be read"),
        (["ties", "ties scale=1"], "given twice"),
        (["ties scale=1:2"], "ties scale: '1:2' cannot be read"),
        (["ties scale=0:1:0.0001"], "10001 values"),
        (["ties scale=1:40:1 density=0.01:0.4:0.01"], "1600 points"),
    ],
)
def test_what_is_no_list_of_methods_is_refused(texts: list[str], fault: str):
    with pytest.raises(RecipeError, match=fault):
        MethodGrid.parse(texts)
    with pytest.raises(RecipeError, match="one at least"):
        MethodGrid({})


@pytest.mark.parametrize(
    ("methods", "fault"),
    [
        ({"tie": {}}, "the nearest known one is 'ties'"),
        ({"ties": {"densty": 1}}, "the nearest known one is 'density'"),
        ({"ties": {"density": 2}}, "density must lie"),
        ({"ties": {}, "ip_merging": {"threshold": 1.5}}, "threshold must lie"),
    ],
)
def test_a_point_that_cannot_be_is_refused_before_anything_is_made(
    triple: Triple, tmp_path: Path, methods: dict[str, Any], fault: str
):
    with pytest.raises(RecipeError, match=fault):
        sweep(triple.recipe(), MethodGrid(methods), tmp_path / "out", resources=CPU)
    assert not (tmp_path / "out").exists()


values = st.one_of(st.integers(-50, 50), st.booleans(), st.sampled_from(["model", "auto"]))


@given(
    st.dictionaries(
        st.sampled_from(["ties", "star", "wudi"]),
        st.dictionaries(
            st.sampled_from(["scale", "rank", "trim_over"]),
            st.lists(values, min_size=1, max_size=3),
        ),
        min_size=1,
    )
)
def test_text_and_values_say_the_same_and_names_tell_points_apart(
    methods: dict[str, dict[str, list[Any]]],
):
    grid = MethodGrid(methods)
    texts = [
        " ".join([method, *(f"{n}={','.join(map(str, v)).lower()}" for n, v in given_.items())])
        for method, given_ in methods.items()
    ]
    assert MethodGrid.parse(texts) == grid
    points = list(grid.points())
    assert len({point.name for point in points}) == len(points)
    recipe = MergeRecipe("base", "mllm", ("expert",), parameters=(("threshold", 0.1),))  # type: ignore[arg-type]
    for point in points:
        made = point.recipe(recipe)
        wanted = {name: value for name, value in point.values if name != "method"}
        assert dict(made.parameters) == wanted and made.merge_method == dict(point.values)["method"]
