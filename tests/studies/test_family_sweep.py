"""A sweep of the embedded family, measured by a command that really measures."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lean_merge import Grid, Resources, merge, sweep
from lean_merge.demo.evaluate import evaluate
from lean_merge.demo.run import FAMILY, family_recipe

ROOT = Path(__file__).parents[2]
PROBLEMS = 20


@pytest.mark.long
def test_a_sweep_measures_what_the_models_can_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Where nothing is selected, the MLLM's own skills; where all is, more sums in text."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = f"'{sys.executable}' '{ROOT / 'bench' / 'skills.py'}' {{path}} --problems {PROBLEMS}"
    chosen, resources = {"scale": 0.5, "stages": ["select"]}, Resources(device="cpu", threads=1)
    result = sweep(
        family_recipe(parameters=chosen),
        Grid(thresholds=[0.9, 0.95]),
        tmp_path / "out",
        evaluate=command,
        resources=resources,
    )
    assert result.ok, result.table["points"]
    nothing, same = result.table["points"]
    assert nothing["selected"] == 0
    assert same["same_as"] == nothing["name"] and same["result"] == nothing["result"]
    own = evaluate(FAMILY / "mllm", problems=PROBLEMS)
    assert nothing["result"] == {task: accuracy.share for task, accuracy in own.items()}
    recipe = family_recipe(parameters={**chosen, "threshold": 0.0})
    everything = merge(recipe, tmp_path / "all", resources=resources)
    assert [row["selected"] for row in everything.report["weights"]] == [True] * 28
    found = evaluate(everything.path, problems=PROBLEMS)
    assert found["text_sums"].share > nothing["result"]["text_sums"] + 0.05
    assert found["read"].share > 0.9
