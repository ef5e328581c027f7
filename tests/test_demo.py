"""The demo: its merges, its table, and what the README shows of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lean_merge.demo import run
from lean_merge.demo.evaluate import Accuracy

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
    assert len(said) == len(run.MERGES) + 7
