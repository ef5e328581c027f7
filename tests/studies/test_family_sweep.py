"""A sweep of the embedded family, measured by a command that really measures."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lean_merge import Grid, Resources, sweep
from lean_merge.demo.evaluate import evaluate
from lean_merge.demo.run import FAMILY, family_recipe

ROOT = Path(__file__).parents[2]
PROBLEMS = 20


def test_a_sweep_measures_what_the_models_can_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Where nothing is selected, the MLLM's own skills; where all is, more sums in text."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = f"'{sys.executable}' '{ROOT / 'bench' / 'skills.py'}' {{path}} --problems {PROBLEMS}"
    result = sweep(
        family_recipe(parameters={"scale": 0.5}),
        Grid(thresholds=[0, 0.9, 0.95], stages="select"),
        tmp_path / "out",
        evaluate=command,
        resources=Resources(device="cpu", threads=1),
    )
    assert result.ok, result.table["points"]
    everything, nothing, same = result.table["points"]
    assert (everything["selected"], nothing["selected"]) == (28, 0)
    assert same["same_as"] == nothing["name"] and same["result"] == nothing["result"]
    own = evaluate(FAMILY / "mllm", problems=PROBLEMS)
    assert nothing["result"] == {task: accuracy.share for task, accuracy in own.items()}
    assert everything["result"]["text_sums"] > nothing["result"]["text_sums"] + 0.05
    assert everything["result"]["read"] > 0.9
