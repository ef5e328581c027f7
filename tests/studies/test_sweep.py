"""Sweeps: every point is the merge it says, equal files are one, and nothing is made twice."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import SMALL, Triple, contents, load, write_triple

from lean_merge import (
    CheckpointError,
    Evaluation,
    Event,
    Grid,
    OutputError,
    PointEvent,
    RecipeError,
    Resources,
    SweepResult,
    analyze,
    cli,
    merge,
    open_analysis,
    sweep,
    verify,
)
from lean_merge.store import JOURNAL, OutputFolder
from lean_merge.studies import pages
from lean_merge.studies.sweep import run as run_module
from lean_merge.studies.sweep.table import read_table

CPU = Resources(device="cpu", threads=1)
SHAPES = {
    "layers.0.self_attn.q_proj": (96, 64),
    "layers.0.mlp.gate_proj": (64, 80),
    "layers.1.self_attn.q_proj": (96, 64),
    "layers.1.mlp.gate_proj": (64, 80),
}
"""Four shards: expert 1 is aligned, s_1 about 0.8, on layer 0 and on layer 1's q_proj."""
SHARD = 26_000


@pytest.fixture(scope="module")
def triple(tmp_path_factory: pytest.TempPathFactory) -> Triple:
    return write_triple(tmp_path_factory.mktemp("sweep"), SHAPES)


@pytest.fixture(autouse=True)
def _without_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would hold all of plotly; one test looks at one."""
    monkeypatch.setattr(pages, "plotly_installed", lambda: False)


def run(triple: Triple, out: Path, grid: Grid, *, evaluate: Any = None, **options: Any) -> Any:
    options = {"shard_size": SHARD} | options
    mine = {key: options.pop(key) for key in ("overwrite", "on_event") if key in options}
    return sweep(
        triple.recipe(**options), grid, out, evaluate=evaluate, resources=CPU, **mine
    ).table


def by_name(table: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {point["name"]: point for point in table["points"]}


def weights_of(folder: Path) -> dict[str, bytes]:
    return {n: data for n, data in contents(folder).items() if n.endswith(".safetensors")}


# --- what the points are ----------------------------------------------------------------------


def test_every_point_is_the_merge_that_it_says(triple: Triple, tmp_path: Path):
    grid = Grid(thresholds=[0.3, 0.99], stages="select;select,rescale,project", scales=[0.5, 1])
    table = run(triple, tmp_path / "out", grid)
    assert [point["error"] for point in table["points"]] == [None] * 8
    made = [point for point in table["points"] if point["same_as"] is None]
    assert len(made) == 5
    for point in made:
        alone = merge(
            triple.recipe(shard_size=SHARD, **point["parameters"]),
            tmp_path / "alone" / point["name"],
            analysis=tmp_path / "out" / str(table["analysis"]),
            resources=CPU,
        )
        found = contents(tmp_path / "out" / point["path"])
        wanted = contents(alone.path)
        for name in (JOURNAL, "lean_merge_report.json"):
            found.pop(name), wanted.pop(name)
        assert found == wanted
        assert verify(tmp_path / "out" / point["path"], full=True, resources=CPU).ok
        report = json.loads(
            (tmp_path / "out" / point["path"] / "lean_merge_report.json").read_text()
        )
        assert report["weights"] == alone.report["weights"]
        assert report["counts"] == alone.report["counts"]
        norms = [row["update_norm"] for row in report["weights"] if row["selected"]]
        assert point["update_norm"] == pytest.approx(sum(n**2 for n in norms) ** 0.5)
        assert point["selected"] == len(norms)
    nothing = [p["name"] for p in table["points"] if p["selected"] == 0]
    assert len(nothing) == 4
    assert [by_name(table)[name]["same_as"] for name in nothing] == [None, *[nothing[0]] * 3]


def test_equal_files_are_one_and_are_counted_once(triple: Triple, tmp_path: Path):
    grid = Grid(thresholds=[0.99, 0.4], stages=["select"])
    table = by_name(run(triple, tmp_path / "out", grid, include=["layers.0"]))
    one, other = (tmp_path / "out" / name for name in table)
    shared = [
        name
        for name in weights_of(one)
        if (one / name).stat().st_ino == (other / name).stat().st_ino
    ]
    changed = [name for name in weights_of(one) if name not in shared]
    assert len(changed) == 2 and len(shared) >= 2
    for name in changed:
        assert weights_of(one)[name] != weights_of(other)[name]
    sizes = [sum(map(len, contents(folder).values())) for folder in (one, other)]
    points = list(table.values())
    assert [p["bytes_own"] + p["bytes_shared"] for p in points] == sizes
    assert [p["bytes_shared"] for p in points] == [
        0,
        sum((one / name).stat().st_size for name in shared),
    ]


def test_one_point_can_be_replaced_and_the_others_stay(triple: Triple, tmp_path: Path):
    """By another merge into its folder, and by removing it altogether."""
    table = run(triple, tmp_path / "out", Grid(thresholds=[0.99, 0.4], scales=[1, 2]))
    folders = [tmp_path / "out" / p["path"] for p in table["points"] if p["same_as"] is None]
    before = [weights_of(folder) for folder in folders]
    assert len(folders) == 3
    triple.merge(folders[0], overwrite=True, shard_size=SHARD, scale=-1.0, threshold=0.0)
    assert weights_of(folders[0]) != before[0]
    shutil.rmtree(folders[1])
    assert weights_of(folders[2]) == before[2]
    assert verify(folders[2], full=True, resources=CPU).ok


def test_where_links_are_refused_every_point_has_its_own_files(
    triple: Triple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*args: Any, **options: Any) -> None:
        raise OSError(1, "Operation not permitted")

    wanted = run(triple, tmp_path / "linked", Grid(thresholds=[0.99, 0.4]))
    monkeypatch.setattr(os, "link", refuse)
    found = run(triple, tmp_path / "apart", Grid(thresholds=[0.99, 0.4]))
    assert [p["bytes_shared"] for p in found["points"]] == [0, 0]
    assert found["points"][1]["bytes_own"] > wanted["points"][1]["bytes_own"]
    last = tmp_path / "apart" / found["points"][1]["path"]
    assert weights_of(last) == weights_of(tmp_path / "linked" / last.name)
    assert verify(last, full=True, resources=CPU).ok


def test_outputs_may_be_adapters_or_none(triple: Triple, tmp_path: Path):
    grid = Grid(thresholds=[0.3, 0.99])
    table = by_name(run(triple, tmp_path / "lora", grid, output="lora"))
    first, last = table.values()
    assert (tmp_path / "lora" / first["path"] / "adapter_model.safetensors").exists()
    assert first["bytes_own"] > 1000 and first["bytes_shared"] == 0
    assert (last["path"], last["error"], last["selected"], last["bytes_own"]) == (None, None, 0, 0)
    table = by_name(run(triple, tmp_path / "none", grid, output="none"))
    assert [p["selected"] for p in table.values()] == [first["selected"], 0]
    found = {each.parent.name for each in (tmp_path / "none").rglob("*.safetensors")}
    assert found == {"analysis"}


def test_a_method_that_looks_at_nothing_can_be_swept_too(triple: Triple, tmp_path: Path):
    grid = Grid(scales="0:1:0.5")
    table = run(triple, tmp_path / "out", grid, merge_method="task_arithmetic")
    assert [p["name"] for p in table["points"]] == ["scale-0", "scale-0.5", "scale-1"]
    assert (
        weights_of(tmp_path / "out" / "scale-1").keys()
        == weights_of(tmp_path / "out" / "scale-0").keys()
    )
    mllm, merged = load(triple.mllm), load(tmp_path / "out" / "scale-0")
    assert all(torch.equal(mllm[name], merged[name]) for name in mllm)


def test_a_page_shows_norms_that_are_not_known(
    triple: Triple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The update of Task Arithmetic is written without its norm being computed first."""
    pytest.importorskip("plotly")
    monkeypatch.setattr(pages, "plotly_installed", lambda: True)
    recipe = triple.recipe(merge_method="task_arithmetic")
    result = sweep(recipe, Grid(scales="0.5"), tmp_path / "out", resources=CPU)
    assert result.page is not None and result.page.exists()
    assert json.loads((tmp_path / "out" / "sweep.json").read_text())["points"][0]["error"] is None


def test_several_experts_are_swept_together(two_experts: Triple, tmp_path: Path):
    grid = Grid(thresholds=[0.4])
    recipe = two_experts.recipe(own=({"threshold": 0.99}, {}))
    table = sweep(recipe, grid, tmp_path / "out", resources=CPU).table
    assert table["points"][0]["selected"] == 2
    report = json.loads((tmp_path / "out" / "threshold-0.4" / "lean_merge_report.json").read_text())
    assert [row["selected"] for row in report["weights"]] == [True, False, True, True]


# --- one analysis ------------------------------------------------------------------------------


def test_all_points_come_from_one_analysis(triple: Triple, tmp_path: Path):
    """No point reads a row to decide, and none is far from the merge without an analysis."""
    events: list[Any] = []
    grid = Grid(thresholds=[0.3], temperatures=[64, 8])
    table = run(triple, tmp_path / "out", grid, on_event=events.append, out_dtype="float32")
    assert table["analysis"] == "analysis"
    gathered = open_analysis(tmp_path / "out" / "analysis").gathered.to_dict()
    assert gathered["temperature"] == 8.0
    assert [type(event) for event in events] == [Event] * len(SHAPES) + [PointEvent] * 2
    for point in table["points"]:
        folder = tmp_path / "out" / point["path"]
        report = json.loads((folder / "lean_merge_report.json").read_text())
        assert {row["passes"] for row in report["weights"]} == {0}
        plain = triple.merge(
            tmp_path / "plain" / point["name"], out_dtype="float32", **point["parameters"]
        )
        found, wanted, mllm = load(folder), load(plain.path), load(triple.mllm)
        for name in mllm:
            change = wanted[name].double() - mllm[name].double()
            error = (found[name].double() - wanted[name].double()).norm()
            assert error <= 1e-4 * change.norm() + 1e-12


def test_auto_is_a_threshold_among_others(triple: Triple, tmp_path: Path):
    table = by_name(run(triple, tmp_path / "out", Grid(thresholds="0,auto,1"), output="none"))
    document = open_analysis(tmp_path / "out" / "analysis").document
    found = document["thresholds"][0]["auto"]
    similar = [row["experts"][0]["similarity_first"] for row in document["weights"]]
    assert table["threshold-auto"]["selected"] == sum(s >= found for s in similar)
    assert table["threshold-auto"]["parameters"] == {"threshold": "auto"}
    assert [point["error"] for point in table.values()] == [None] * 3


def test_an_analysis_may_be_given_and_must_be_of_these_models(triple: Triple, tmp_path: Path):
    analyze(triple.recipe(), tmp_path / "analysis", resources=CPU)
    recipe, grid = triple.recipe(shard_size=SHARD), Grid(thresholds=[0.3])
    table = sweep(
        recipe, grid, tmp_path / "out", analysis=tmp_path / "analysis", resources=CPU
    ).table
    assert table["analysis"] == "../analysis"
    assert not (tmp_path / "out" / "analysis").exists()
    other = write_triple(tmp_path / "other", SMALL)
    with pytest.raises(CheckpointError, match="analysis of other models"):
        sweep(other.recipe(), grid, tmp_path / "b", analysis=tmp_path / "analysis", resources=CPU)
    with pytest.raises(CheckpointError, match="no-such"):
        sweep(recipe, grid, tmp_path / "c", analysis=tmp_path / "no-such", resources=CPU)
    with pytest.raises(RecipeError, match="nothing to analyse"):
        sweep(
            triple.recipe(merge_method="task_arithmetic"),
            Grid(scales=[1]),
            tmp_path / "d",
            analysis=tmp_path / "analysis",
            resources=CPU,
        )


@pytest.mark.parametrize("harm", ["unfinished", "damaged"])
def test_an_analysis_that_is_not_whole_is_made_anew(triple: Triple, tmp_path: Path, harm: str):
    def stop(event: Any) -> None:
        raise Stop

    grid = Grid(thresholds=[0.3])
    if harm == "unfinished":
        with pytest.raises(Stop):
            run(triple, tmp_path / "out", Grid(temperatures=[16]), on_event=stop)
    else:
        run(triple, tmp_path / "out", Grid(thresholds=[0.99]))
        (tmp_path / "out" / "analysis" / "analysis.json").write_text("{")
    table = run(triple, tmp_path / "out", grid)
    assert table["points"][0]["error"] is None and table["points"][0]["selected"] == 3


# --- resuming ---------------------------------------------------------------------------------


class Stop(BaseException):
    """As Ctrl-C is: no Exception."""


def times(folder: Path) -> dict[str, int]:
    return {f.name: f.stat().st_mtime_ns for f in folder.rglob("*") if f.is_file()}


def test_a_sweep_goes_on_where_it_stopped(triple: Triple, tmp_path: Path):
    grid = Grid(thresholds=[0.3, 0.99], scales=[1, 2])
    whole = run(triple, tmp_path / "whole", grid)

    def stop(event: PointEvent | Event) -> None:
        if isinstance(event, PointEvent) and event.number == 2:
            raise Stop

    with pytest.raises(Stop):
        run(triple, tmp_path / "out", grid, on_event=stop)
    done = by_name(json.loads((tmp_path / "out" / "sweep.json").read_text()))
    assert [point["digest"] is None for point in done.values()] == [False, False, True, True]
    first = tmp_path / "out" / done["threshold-0.3_scale-1"]["path"]
    before = times(first)
    table = run(triple, tmp_path / "out", grid)
    assert times(first) == before
    assert by_name(table)[first.name]["seconds"] == done[first.name]["seconds"]
    for one, other in zip(table["points"], whole["points"], strict=True):
        # A report's length varies with the digits of its times.
        assert one["bytes_own"] == pytest.approx(other["bytes_own"], abs=100)
        varying = {"seconds": 0, "bytes_own": 0}
        assert {**one, **varying} == {**other, **varying}
    again = run(triple, tmp_path / "out", grid)
    assert again == table


def test_an_unfinished_point_is_ended(
    triple: Triple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def stop(folder: OutputFolder) -> None:
        raise Stop

    grid = Grid(thresholds=[0.99, 0.3])
    run(triple, tmp_path / "whole", grid)
    run(triple, tmp_path / "out", Grid(thresholds=[0.99]))
    with monkeypatch.context() as patch:
        patch.setattr(OutputFolder, "seal", stop)
        with pytest.raises(Stop):
            run(triple, tmp_path / "out", grid)
    last = tmp_path / "out" / "threshold-0.3"
    assert not (last / "model.safetensors.index.json").exists()
    table = run(triple, tmp_path / "out", grid)
    assert [p["error"] for p in table["points"]] == [None, None]
    assert weights_of(last) == weights_of(tmp_path / "whole" / last.name)
    assert verify(tmp_path / "out" / "threshold-0.99", full=True, resources=CPU).ok


def test_another_grid_adds_its_points(triple: Triple, tmp_path: Path):
    run(triple, tmp_path / "out", Grid(thresholds=[0.3]), evaluate=f"{sys.executable} -c print(7)")
    table = run(triple, tmp_path / "out", Grid(thresholds=[0.99]))
    assert [(p["name"], p["result"]) for p in table["points"]] == [
        ("threshold-0.99", None),
        ("threshold-0.3", 7),
    ]
    assert table["axes"]["threshold"] == [0.99, 0.3]


def test_a_sweep_of_another_recipe_is_refused(triple: Triple, tmp_path: Path):
    run(triple, tmp_path / "out", Grid(thresholds=[0.3]))
    before = contents(tmp_path / "out")
    with pytest.raises(OutputError, match=r"another recipe \(out_dtype was 'auto'"):
        run(triple, tmp_path / "out", Grid(thresholds=[0.3]), out_dtype="float16")
    # What the grid decides is no other recipe.
    run(triple, tmp_path / "out", Grid(thresholds=[0.3]), threshold=0.8, scale=1.0)
    del before["sweep.json"], before["sweep.csv"]
    assert before.items() <= contents(tmp_path / "out").items()


def test_a_point_of_other_inputs_needs_overwrite(tmp_path: Path):
    triple = write_triple(tmp_path / "in", SMALL)
    grid = Grid(thresholds=[0.3])
    run(triple, tmp_path / "out", grid)
    before = contents(tmp_path / "out" / "threshold-0.3")
    config = triple.base / "config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(CheckpointError, match=r"config\.json of the base .*--overwrite"):
        run(triple, tmp_path / "out", grid)
    assert contents(tmp_path / "out" / "threshold-0.3") == before
    table = run(triple, tmp_path / "out", grid, overwrite=True)
    assert table["points"][0]["error"] is None
    again = contents(tmp_path / "out" / "threshold-0.3")
    assert again[JOURNAL] != before[JOURNAL] and weights_of(tmp_path / "out" / "threshold-0.3") == {
        name: data for name, data in before.items() if name.endswith(".safetensors")
    }


def test_inputs_that_change_amid_a_sweep_fail_the_points_that_follow(tmp_path: Path):
    triple = write_triple(tmp_path / "in", SMALL)

    def change(event: Any) -> None:
        if isinstance(event, PointEvent) and event.number == 1:
            config = triple.base / "config.json"
            config.write_text(config.read_text() + " ")

    table = run(triple, tmp_path / "out", Grid(thresholds=[0.3, 0.99]), on_event=change)
    first, second = table["points"]
    assert first["error"] is None
    assert "config.json: this file of the base has changed" in second["error"]


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[]",
        b"{}",
        b'{"version": 2, "points": []}',
        b'{"version": 1, "points": [1]}',
        b'{"version": 1, "points": [{"name": "x"}]}',
    ],
)
def test_a_damaged_table_is_refused_and_stays(triple: Triple, tmp_path: Path, content: bytes):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sweep.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"sweep\.json"):
        run(triple, tmp_path / "out", Grid(thresholds=[0.3]))
    assert contents(tmp_path / "out") == {"sweep.json": content}


@pytest.mark.parametrize(
    "change",
    [
        {"result": "x"},
        {"result": {"a": []}},
        {"path": 3},
        {"evaluation": 1},
        {"parameters": {"a": [1]}},
    ],
)
def test_a_table_with_odd_points_is_refused(triple: Triple, tmp_path: Path, change: dict[str, Any]):
    run(triple, tmp_path / "out", Grid(thresholds=[0.99]), output="none")
    file = tmp_path / "out" / "sweep.json"
    table = json.loads(file.read_text())
    assert read_table(tmp_path / "out") == table
    table["points"][0] |= change
    file.write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match="a point that lacks something"):
        run(triple, tmp_path / "out", Grid(thresholds=[0.99]), output="none")


@pytest.mark.parametrize("drawn", [True, False])
def test_where_plotly_is_installed_there_is_a_page(
    triple: Triple, tmp_path: Path, drawn: bool, monkeypatch: pytest.MonkeyPatch
):
    if drawn:
        pytest.importorskip("plotly")
        monkeypatch.setattr(pages, "plotly_installed", lambda: True)
    run(triple, tmp_path / "out", Grid(thresholds=[0.99]), output="none")
    page = tmp_path / "out" / "sweep.html"
    assert page.exists() is drawn
    assert not drawn or "threshold-0.99" in page.read_text(encoding="utf-8")


# --- what goes wrong --------------------------------------------------------------------------


def test_a_point_that_fails_does_not_lose_the_others(triple: Triple, tmp_path: Path):
    (tmp_path / "out").mkdir()
    run(triple, tmp_path / "out", Grid(thresholds=[0.99]))
    taken = tmp_path / "out" / "threshold-0.3"
    taken.mkdir()
    (taken / "thesis.txt").write_text("precious")
    for overwrite in (False, True):
        table = run(triple, tmp_path / "out", Grid(thresholds=[0.3, 0.99]), overwrite=overwrite)
        failed, made = table["points"]
        assert "is not empty" in failed["error"] and failed["path"] is None
        assert made["error"] is None and made["path"] == "threshold-0.99"
    assert (taken / "thesis.txt").read_text() == "precious"
    assert not SweepResult(tmp_path, table).ok


def test_what_nobody_foresaw_at_one_point_is_noted_there(
    triple: Triple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(plan: Any, folder: Path, **options: Any) -> Any:
        if folder.name == "threshold-0.3":
            raise ZeroDivisionError("oh")
        return merge(plan, folder, **options)

    monkeypatch.setattr(run_module, "merge", fail)
    table = run(triple, tmp_path / "out", Grid(thresholds=[0.3, 0.99]))
    assert [p["error"] for p in table["points"]] == ["ZeroDivisionError: oh", None]


@pytest.mark.parametrize(
    ("grid", "options", "message"),
    [
        ({"thresholds": [0.3, 1.5]}, {}, "threshold must lie in 0 .. 1"),
        ({"stages": "select;rescale"}, {}, "is not defined"),
        ({"temperatures": "8"}, {"merge_method": "task_arithmetic"}, "temperature"),
        ({"stages": "select"}, {"output": "lora"}, "full rank"),
        ({"thresholds": "0.3"}, {"output": "none", "evaluate": "true"}, "nothing to evaluate"),
        ({"thresholds": "0.3"}, {"evaluate": "true {scale}"}, "not swept"),
    ],
)
def test_what_would_fail_everywhere_is_refused_before_anything_is_written(
    triple: Triple, tmp_path: Path, grid: dict[str, Any], options: dict[str, Any], message: str
):
    with pytest.raises(RecipeError, match=message):
        run(triple, tmp_path / "out", Grid(**grid), **options)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_others_an_input_or_a_second_sweep_are_refused(triple: Triple, tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("precious")
    grid = Grid(thresholds=[0.3])
    with pytest.raises(OutputError, match="holds no sweep"):
        run(triple, tmp_path, grid)
    with pytest.raises(OutputError, match="must not change"):
        run(triple, triple.mllm / "sweep", grid)

    def second(event: Any) -> None:
        with pytest.raises(OutputError, match="another lean-merge"):
            run(triple, tmp_path / "out", grid)

    run(triple, tmp_path / "out", grid, on_event=second)


# --- evaluation -------------------------------------------------------------------------------


def counting(tmp_path: Path, body: str = "print(json.dumps({'n': n, 't': threshold}))") -> str:
    """A command that counts its runs in a file and prints something."""
    (tmp_path / "evaluate.py").write_text(
        "import json, os, pathlib, sys\n"
        f"file = pathlib.Path({str(tmp_path / 'count')!r})\n"
        "n = int(file.read_text()) + 1 if file.exists() else 1\n"
        "file.write_text(str(n))\n"
        "threshold = float(os.environ['LEAN_MERGE_THRESHOLD'])\n"
        "assert pathlib.Path(sys.argv[1], 'lean_merge_journal.jsonl').exists()\n"
        f"{body}\n"
    )
    return f"{sys.executable} -S '{tmp_path / 'evaluate.py'}' {{path}}"


def test_results_are_collected_and_not_measured_again(triple: Triple, tmp_path: Path):
    grid, command = Grid(thresholds=[0.3, 0.9, 0.99]), counting(tmp_path)
    out = tmp_path / "out with spaces"
    table = run(triple, out, grid, evaluate=command)
    first, nothing, same = table["points"]
    assert first["result"] == {"n": 1, "t": 0.3} and nothing["result"] == {"n": 2, "t": 0.9}
    assert same["same_as"] == nothing["name"] and same["result"] == nothing["result"]
    assert first["evaluation"]["command"] == command and first["evaluation"]["seconds"] > 0
    assert run(triple, out, grid, evaluate=command) == table
    assert (tmp_path / "count").read_text() == "2"
    other = run(triple, out, grid, evaluate=Evaluation(command + " again"))
    assert other["points"][0]["result"] == {"n": 3, "t": 0.3}
    rows = list(csv.DictReader((out / "sweep.csv").read_text().splitlines()))
    assert [(row["threshold"], row["result.n"], row["same_as"]) for row in rows] == [
        ("0.3", "3", ""),
        ("0.9", "4", ""),
        ("0.99", "4", nothing["name"]),
    ]
    assert (out / "evaluations" / "threshold-0.3.stdout.txt").exists()


def test_a_measurement_that_fails_is_noted_and_tried_again(triple: Triple, tmp_path: Path):
    grid = Grid(thresholds=[0.3, 0.9, 0.99])
    command = counting(tmp_path, "assert n != 1, 'no luck'\nprint(n)")
    table = run(triple, tmp_path / "out", grid, evaluate=command)
    assert [p["result"] for p in table["points"]] == [None, 2, 2]
    assert "no luck" in table["points"][0]["error"]
    assert table["points"][0]["error"].startswith("evaluation: the command ended with exit code 1")
    table = run(triple, tmp_path / "out", grid, evaluate=command)
    assert [(p["result"], p["error"]) for p in table["points"]] == [(3, None), (2, None), (2, None)]


def test_adapters_are_measured_too(triple: Triple, tmp_path: Path):
    command = counting(tmp_path)
    table = run(
        triple, tmp_path / "out", Grid(thresholds=[0.3, 0.99]), evaluate=command, output="lora"
    )
    assert [p["result"] and p["result"]["n"] for p in table["points"]] == [1, None]


# --- the command ------------------------------------------------------------------------------

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run `lean-merge sweep`; its exit code, standard output and error."""
    before = signal.getsignal(signal.SIGTERM)

    def run_command(*words: object) -> tuple[int, str, str]:
        code = 0
        try:
            cli.main(["sweep", *map(str, words)])
        except SystemExit as left:
            code = int(left.code or 0)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    yield run_command
    signal.signal(signal.SIGTERM, before)


def words(triple: Triple, out: Path) -> list[object]:
    roles = ["--base", triple.base, "--mllm", triple.mllm, "--expert", triple.experts[0]]
    return [*roles, "--device", "cpu", "--out", out, "--shard-size", SHARD]


def test_the_command_prints_a_table(call: Call, triple: Triple, tmp_path: Path):
    more = ("--thresholds", "0.3,0.9:0.95:0.05", "--stages", "select;select,rescale")
    evaluate = f"{sys.executable} -c 'print(0.25)'"
    code, out, err = call(*words(triple, tmp_path / "out"), *more, "--evaluate", evaluate)
    assert code == 0, (out, err)
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == [
        *("threshold", "stages", "selected", "update", "own", "shared", "seconds", "result")
    ]
    assert len(lines) == 7 and lines[1][:3] == ["0.3", "select", "3"]
    assert lines[3][-2:] == ["as", "threshold-0.9_stages-select"]
    assert "6 of 6: threshold-0.95_stages-select-rescale" in err
    code, out, _ = call(*words(triple, tmp_path / "out"), *more, "--json")
    assert code == 0 and json.loads(out) == json.loads(
        (tmp_path / "out" / "sweep.json").read_text()
    )


def test_the_exit_code_says_that_something_failed(call: Call, triple: Triple, tmp_path: Path):
    code, out, _ = call(
        *words(triple, tmp_path / "out"), "--thresholds", "0.3", "--evaluate", "false", "--quiet"
    )
    assert code == 1
    assert "failed: evaluation: the command ended with exit code 1" in out
    assert (tmp_path / "out" / "threshold-0.3" / "model.safetensors.index.json").exists()
    code, out, _ = call(*words(triple, tmp_path / "out"), "--thresholds", "0.3", "--quiet")
    assert (code, out) == (0, "")
    assert call(*words(triple, tmp_path / "b"), "--thresholds", "0.3:0.9")[0] == 2
    assert call(*words(triple, tmp_path / "b"))[0] == 2


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at /proc")
@pytest.mark.long
def test_a_signal_ends_the_command_that_measures_and_leaves_with_5(triple: Triple, tmp_path: Path):
    """The point before it is kept with its result; the same command goes on."""
    pid = tmp_path / "pid"
    (tmp_path / "evaluate.py").write_text(
        "import os, pathlib, sys, time\n"
        "if os.environ['LEAN_MERGE_THRESHOLD'] == '0.99' and len(sys.argv) == 1:\n"
        f"    pathlib.Path({str(pid)!r}).write_text(str(os.getpid()))\n"
        "    time.sleep(60)\n"
        "print(1)\n"
    )
    evaluate = f"{sys.executable} -S '{tmp_path / 'evaluate.py'}'"
    command = [
        sys.executable,
        "-m",
        "lean_merge",
        "sweep",
        *map(str, words(triple, tmp_path / "o")),
    ]
    with subprocess.Popen(
        [*command, "--thresholds", "0.3,0.99", "--evaluate", evaluate, "--quiet"],
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.monotonic() + 120
        while not (pid.exists() and pid.read_text()):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, message = process.communicate(timeout=60)
    assert process.returncode == 5, message
    assert "the same command goes on" in message
    assert not Path(f"/proc/{pid.read_text()}").exists()
    done = by_name(json.loads((tmp_path / "o" / "sweep.json").read_text()))
    assert done["threshold-0.3"]["result"] == 1 and done["threshold-0.99"]["result"] is None
    again = run(triple, tmp_path / "o", Grid(thresholds=[0.3, 0.99]), evaluate=evaluate + " go on")
    assert [p["result"] for p in again["points"]] == [1, 1]
