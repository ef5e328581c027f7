"""The demo: its merges, its table, and what the README shows of it."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from lean_merge import cli
from lean_merge.demo import run
from lean_merge.demo.evaluate import Accuracy
from lean_merge.recipe import MergeRecipe
from lean_merge.studies.sweep.evaluation import read_result

ROOT = Path(__file__).parents[1]
RECORDED = ROOT / "bench" / "demo.json"


@pytest.fixture(scope="module")
def recorded() -> Any:
    """What `lean-merge demo --json` printed."""
    return json.loads(RECORDED.read_text(encoding="utf-8"))


def test_the_readme_shows_the_table_that_was_measured(recorded: Any) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"^```text\n(model .*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert shown.rstrip("\n") == run.table(recorded), "write what lean-merge demo prints"


def test_the_demo_merges_as_recorded_and_measures_every_model(
    recorded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The merges are made; only the measurement, which takes a minute, is exchanged."""
    asked = []

    def evaluate(folder: Path, *, problems: int) -> dict[str, Accuracy]:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tasks = run.TASKS if config["model_type"] == "llava" else ("text_sums",)
        assert list(folder.glob("*.safetensors"))
        asked.append(folder.name)
        return {task: Accuracy.of(1, problems) for task in tasks}

    monkeypatch.setattr(run, "evaluate", evaluate)
    said: list[str] = []
    results = run.run_demo(tmp_path, problems=2, say=said.append)
    assert list(results["accuracy"]) == list(recorded["accuracy"]) and len(asked) == 7
    assert results["merges"] == recorded["merges"] and set(run.MERGES) == set(results["merges"])
    assert results["conditions"] == recorded["conditions"]
    rows = run.table(results).splitlines()
    assert [row.split("  ")[0] for row in rows[1:8]] == list(results["accuracy"])
    assert len(said) == len(run.MERGES) + 8 and "lean-merge plan" in said[-1]
    recipe = MergeRecipe.from_yaml((tmp_path / run.DEMO_RECIPE).read_text(encoding="utf-8"))
    assert recipe == run.family_recipe()


def test_one_model_is_measured_in_counts_that_a_sweep_reads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def evaluate(folder: Path, *, problems: int) -> dict[str, Accuracy]:
        assert folder == Path("merged")
        return {"read": Accuracy.of(3, problems)}

    monkeypatch.setattr(run, "evaluate", evaluate)
    cli.main(["demo", "--measure", "merged", "--problems", "12"])
    assert read_result(capsys.readouterr().out) == ({"read.correct": 3.0, "read.total": 12.0}, None)


def test_the_figure_of_the_readme_is_drawn_from_what_was_measured(
    recorded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    drawn = importlib.import_module("figure").figure(recorded)
    shown = (ROOT / "docs" / "assets" / "demo.svg").read_text(encoding="utf-8")
    assert shown == drawn, "write it with python bench/figure.py"
    for tasks in recorded["accuracy"].values():
        for score in tasks.values():
            assert f">{100 * score['correct'] / score['total']:.1f}</text>" in drawn
