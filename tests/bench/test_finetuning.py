"""The bench of fine-tunings: which runs there are, what they leave, and how they are judged."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "bench"))

import numpy as np
import pytest
from finetuning import grid, page
from finetuning.training import BATCH, STEPS, Pull, batches, schedule
from reproduction.exam import Marks


def marks(right: np.ndarray) -> dict[str, Marks]:
    return {task: Marks(right, np.zeros(len(right))) for task in page.TASKS}


def shares(seed: int, share: float) -> np.ndarray:
    return np.random.default_rng(seed).random(grid.ASKED) < share


def test_runs_differ_and_are_as_many_as_their_factors_say():
    keys = [run.key for run in grid.first_runs()]
    cells = len(grid.FAMILIES) * len(grid.SEEDS)
    modes = len(grid.MODES) * len(grid.ALPHAS)
    gentle = 1 + len(grid.MODES)
    assert len({*keys}) == len(keys) == cells * (len(grid.COUNTS) * (modes + 2) + gentle)
    more = [run.key for run in grid.ablations(Pull("adaptive", 1.0))]
    assert len({*more, *keys}) == len(more) + len(keys)


def test_what_was_measured_is_read_back_and_compared_by_problem(tmp_path: Path):
    results = grid.Results(tmp_path / "drift.json")
    for seed in grid.SEEDS:
        first, second = shares(seed, 0.6), shares(seed + 10, 0.7)
        results.add(f"0/{seed}/300/SFT", marks(first), loss=0.1)
        results.add(f"0/{seed}/300/DRIFT adaptive 1", marks(second))
    again = grid.Results(tmp_path / "drift.json")
    assert np.array_equal(again.right("0/1/300/SFT", "read"), shares(1, 0.6))
    found = page.change(again, "DRIFT adaptive 1", "SFT", 300)
    wanted = [shares(s + 10, 0.7).mean() - shares(s, 0.6).mean() for s in grid.SEEDS]
    assert found is not None and found.runs == 3
    assert found.mean == pytest.approx(100 * np.mean(wanted))
    assert found.low < found.mean < found.high and found.is_rise
    assert page.change(again, "DRIFT adaptive 1", "SFT", 100) is None
    assert again.best() is None


def test_the_best_mode_is_known_once_all_were_measured(tmp_path: Path):
    results = grid.Results(tmp_path / "drift.json")
    for run in grid.first_runs():
        if run.count == grid.ABLATION:
            good = run.pull == Pull("grad-norm", 3.0)
            results.runs[run.key] = {"right": {}}
            packed = grid._packed(shares(1, 0.9 if good else 0.5))
            results.runs[run.key]["right"] = dict.fromkeys(page.TASKS, packed)
    assert results.best() == Pull("grad-norm", 3.0)


def test_a_claim_is_open_until_it_was_measured(tmp_path: Path):
    results = grid.Results(tmp_path / "drift.json")
    assert {claim[2] for claim in page.claims(results)} == {"not measured yet"}
    for count in grid.COUNTS:
        results.add(f"0/0/{count}/SFT", marks(shares(1, 0.5)))
        results.add(f"0/0/{count}/DRIFT adaptive 1", marks(shares(1, 0.5) | shares(2, 0.4)))
    assert next(page.claims(results))[2] == "**reproduced** so far"


def test_every_epoch_shows_each_problem_once():
    rows = [*batches(2 * BATCH, 0)]
    assert len(rows) == STEPS and all(len(each) == BATCH for each in rows)
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert sorted([*first.tolist(), *second.tolist()]) == [*range(2 * BATCH)]
    assert 0 < schedule(STEPS - 1) < 0.01 < schedule(0) < schedule(3) < 1
