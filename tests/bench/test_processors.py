"""The accuracy bars under the smaller instruction sets of this processor, in part."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.mark.parametrize(
    "sets", [1, pytest.param(None, marks=pytest.mark.durability)], ids=["smallest", "all"]
)
def test_bars_hold_under_smaller_instruction_sets(
    monkeypatch: pytest.MonkeyPatch, sets: int | None
) -> None:
    monkeypatch.setattr(sys, "path", [str(BENCH), *sys.path])
    import processors

    every = processors.smaller()[:sets]
    runs = {one.name: processors.run(one, processors.QUICK, 1) for one in every}
    assert runs and all(each.passed for each in runs.values())
    rows = processors.margins(runs).splitlines()[2:]
    (row,) = [row for row in rows if "nuclear norm after six blocks" in row]
    assert float(row.strip("| ").rpartition("|")[2]) >= 1


def test_instruction_sets_that_a_processor_lacks_are_named_and_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", [str(BENCH), *sys.path])
    import processors
    import torch

    for each in ("avx2", "avx512", "avx512_bf16", "amx_tile"):
        monkeypatch.setattr(torch.cpu, f"_is_{each}_supported", lambda each=each: each == "avx2")
    assert [one.name for one in processors.smaller()] == ["default"]
    errors = {"default": 0.002, "AVX2": 0.004}
    monkeypatch.setattr(
        processors,
        "run",
        lambda one, tests, workers: processors.Run(True, 1.0, {("s_1", 0.01): errors[one.name]}),
    )
    monkeypatch.setattr(sys, "argv", ["processors.py", "linalg"])
    with pytest.raises(SystemExit) as ended:
        processors.main()
    assert ended.value.code == 0
    printed = capsys.readouterr()
    assert "| s_1 | 0.01 | 0.002 | 0.004 | 2.5 |" in printed.out
    assert "AVX512_CORE_AMX: left out" in printed.err
