"""The benchmarks' own machinery at a tiny size, so that the scripts stay fit to run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "bench"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the page cache is Linux's")


@pytest.fixture(scope="module", autouse=True)
def scripts() -> Iterator[None]:
    """The benchmarks import each other as modules beside them."""
    sys.path.insert(0, str(BENCH))
    yield
    sys.path.remove(str(BENCH))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A triple of one layer with the MLLM's language model beside it."""
    import synthetic

    folder = tmp_path_factory.mktemp("tiny")
    synthetic.write_triple(folder, tiny_shapes(), text=True, classes=False)
    return folder


def tiny_shapes() -> Any:
    """The sizes of `tiny`."""
    import synthetic

    return replace(synthetic.SIZES["tiny"], layers=1)


@pytest.mark.long
def test_speed_measures_floors_and_checks_the_outputs(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import speed

    before = sorted(tiny.iterdir())
    options = ["--size", "tiny", "--layers", "1", "--rounds", "1", "--triple", str(tiny)]
    monkeypatch.setattr(sys, "argv", ["speed.py", *options, "--no-targets"])
    with pytest.raises(SystemExit) as ended:
        speed.main()
    assert not ended.value.code
    text = capsys.readouterr().out
    assert "| tiny, 1 layers | checkpoint |" in text
    assert "Against the float64 oracle" in text and "not selected, by both" in text
    assert sorted(tiny.iterdir()) == before, "it was to clean up"


def test_the_floor_reads_and_writes_every_byte(tmp_path: Path) -> None:
    import measure

    file = tmp_path / "model.safetensors"
    file.write_bytes(os.urandom(measure.CHUNK + 5000))
    found = measure.floor([file], measure.CHUNK + 123, direct=False)
    assert found.read > 0 and found.write > 0 and found.total == found.read + found.write
    assert list(tmp_path.iterdir()) == [file]
    assert measure.total_bytes([file]) == measure.CHUNK + 5000


def test_a_process_is_watched_with_its_memory_and_failure() -> None:
    import measure

    # It stays for as long as several samples take.
    code = "import time; b = bytearray(64 << 20); print(len(b)); time.sleep(0.5)"
    done = measure.watch([sys.executable, "-c", code])
    assert done.output.strip() == str(64 << 20)
    assert done.peak_rss >= done.peak_anonymous > 64 << 20
    assert 0 <= done.others <= 1
    with pytest.raises(RuntimeError, match="no such"):
        measure.watch([sys.executable, "-c", "raise SystemExit('no such thing')"])


def test_what_is_planted_is_in_the_files_and_the_roles_share_their_base(tiny: Path) -> None:
    import synthetic
    import truth

    shapes, recipe = tiny_shapes(), synthetic.Recipe()
    planted = {name: synthetic.is_planted(name, recipe) for name in shapes.weights}
    assert len(planted) == 7 and 0 < sum(planted.values()) < 7
    for name, is_planted in list(planted.items())[:4]:
        found = truth.expected(tiny, name)
        assert found.selected == is_planted
        assert found.ratio == pytest.approx(1, abs=truth.RATIO)
        text, mllm = (
            truth.tensor(tiny / role, stored)
            for role, stored in (("text", name), ("mllm", f"language_model.{name}"))
        )
        assert torch.equal(text, mllm)


def test_a_wrong_output_fails_the_checks(tiny: Path) -> None:
    """The checks can fail: a merge that changed nothing, and a lambda that is off."""
    import synthetic
    import truth

    shapes = tiny_shapes()
    name = next(n for n in shapes.weights if synthetic.is_planted(n, synthetic.Recipe()))
    found = truth.expected(tiny, name)
    update = torch.from_numpy(found.update)
    row = {"weight": truth.canonical(name), "selected": True, "lambda": found.ratio, "reason": ""}
    assert truth.compare(found, row, update).update < 1e-9
    with pytest.raises(AssertionError):
        truth.compare(found, row, update * 1.04)
    with pytest.raises(AssertionError):
        truth.compare(found, {**row, "lambda": found.ratio * 1.02}, update)
    with pytest.raises(AssertionError):
        truth.compare(found, {**row, "selected": False}, None)
    with pytest.raises(AssertionError):
        truth.check_stored(tiny, tiny / "mllm", name, update)


def test_the_profile_names_what_takes_the_time(tiny: Path, tmp_path: Path) -> None:
    import profile_merge

    profile = profile_merge.profiled(tiny, tmp_path / "out")
    assert profile.clock.cpu["whole spectra of small weights"] > 0.2 * profile.cpu
    assert sum(profile.clock.cpu.values()) <= profile.cpu
    text = profile_merge.report_of(profile)
    assert "| reading rows |" in text and "| writing |" in text


def test_all_runs_a_benchmark_and_notes_it_above_the_older_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import all as every

    results = tmp_path / "RESULTS.md"
    results.write_text(f"# Results\n\n{every.MARK}\n## Before\n")
    monkeypatch.setattr(every, "RESULTS", results)
    fails = every.Benchmark("memory", ("--layers", "none"), "No number")
    text, ended_well = every.run(fails, [])
    assert not ended_well and "It ended with code 2." in text
    every.put(every.section([text], 60.0))
    lines = results.read_text()
    assert lines.index(every.MARK) < lines.index("### No number") < lines.index("## Before")


def test_results_have_their_mark_and_every_script_its_command() -> None:
    import all as every

    text = every.RESULTS.read_text(encoding="utf-8")
    assert text.count(every.MARK) == 1
    for benchmark in every.ALL:
        assert (BENCH / f"{benchmark.script}.py").exists()
        assert f"`python bench/{benchmark.script}.py" in text
