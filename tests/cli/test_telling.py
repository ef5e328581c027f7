"""Commands tell how far they are, what rounding will keep, every warning once, and what is next."""

from __future__ import annotations

import io
import json
import re
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.families import Triple, load, write_triple

from lean_merge import cli, merge, plan
from lean_merge.cli import progress
from lean_merge.cli.rounding import predicted_share
from lean_merge.engine import early_look

SHAPES = {"layers.0.self_attn.q_proj": (64, 96), "layers.0.mlp.gate_proj": (96, 64)}
MIB = 1 << 20


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Triple:
    """A triple in bfloat16, whose updates rounding makes coarse."""
    return write_triple(tmp_path_factory.mktemp("half"), SHAPES, dtype=torch.bfloat16)


def words(triple: Triple, *more: object) -> list[str]:
    roles = ["--base", triple.base, "--mllm", triple.mllm, "--expert", triple.experts[0]]
    return [str(each) for each in [*roles, "--device", "cpu", "--memory", "1GiB", *more]]


# --- progress -----------------------------------------------------------------------------


@pytest.mark.parametrize("width", [0, 4, 5, 9, 10, 24, 80])
def test_a_name_is_cut_in_its_middle(width: int):
    name = "model.language_model.layers.17.self_attn.q_proj.weight"
    shown = progress.cut_in_the_middle(name, width)
    assert len(shown) <= width
    if 5 <= width < len(name):
        first, last = shown.split("…")
        assert name.startswith(first) and name.endswith(last) and len(shown) == width
    assert progress.cut_in_the_middle(name, len(name)) == name


def test_the_line_tells_the_time_that_passed_and_the_time_left():
    first, second = progress.status_line(
        "merging", "layers.1.q_proj", done=MIB, total=4 * MIB, elapsed=30.0, width=80
    )
    assert first == "merging  25%  1.0 MiB of 4.0 MiB  0:30 elapsed, 1:30 left"
    assert second == "  layers.1.q_proj"
    for width in range(10, 100):
        line = progress.status_line("merging", "n" * 99, done=1, total=9, elapsed=1, width=width)
        assert len("".join(line)) <= width
    assert progress.status_line("looking", "", done=0, total=0, elapsed=65, width=80)[0] == (
        "looking  1:05"
    )
    assert progress.clock(3 * 3600 + 62) == "3:01:02"


class Terminal(io.StringIO):
    """A standard error that is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("colours", [True, False])
def test_a_terminal_shows_every_phase_by_its_name(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    half: Triple,
    tmp_path: Path,
    colours: bool,
):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    (monkeypatch.delenv if colours else monkeypatch.setenv)(
        "NO_COLOR", *(() if colours else ("1",)), **({"raising": False} if colours else {})
    )
    cli.main(["merge", *words(half, "--threshold", "auto", "--out", tmp_path / "out")])
    drawn = terminal.getvalue()
    phases = ["starting", "reading the headers", "looking at a few", "analysing", "merging"]
    places = [drawn.index(phase) for phase in [*phases, "finishing"]]
    assert places == sorted(places) and places[0] < 20
    assert ("\x1b[1m" in drawn) is colours
    # Nothing of it stays on the terminal.
    last = drawn.rsplit("\x1b[2K", 1)[1]
    assert "elapsed" not in last and "finishing" not in last
    assert "found by auto" in capsys.readouterr().out


def test_an_analysis_within_a_merge_sends_its_news_too(half: Triple, tmp_path: Path):
    events = []
    recipe = half.recipe(threshold="auto")
    merge(recipe, tmp_path / "out", on_event=events.append)
    kinds = [event.output for event in events]
    assert kinds == sorted(kinds) and set(kinds) == {"analysis", "checkpoint"}
    names = {event.name for event in events if event.output == "checkpoint"}
    assert names == load(half.mllm).keys()


# --- rounding -----------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 7), (torch.float16, 10)])
@pytest.mark.parametrize("ratio", [3e-4, 2e-3, 0.01])
def test_the_share_that_rounding_keeps_is_predicted(dtype: torch.dtype, bits: int, ratio: float):
    generator = torch.Generator().manual_seed(1)
    weight = (0.03 * torch.randn(400, 500, generator=generator)).to(dtype).float()
    update = 0.03 * ratio * torch.randn(400, 500, generator=generator)
    change = ((weight + update).to(dtype).float() - weight).double()
    kept = float((change * update).sum() / (update.double() ** 2).sum())
    assert predicted_share(0.03 * ratio, 0.03, bits) == pytest.approx(kept, abs=0.02)


def test_an_early_look_foresees_what_rounding_keeps(half: Triple, tmp_path: Path):
    """Of task arithmetic the update is known before it is made."""
    recipe = half.recipe(merge_method="task_arithmetic", scale=0.005)
    look = early_look(plan(recipe))
    report = merge(recipe, tmp_path / "out").report
    assert 0.05 < report["changed"]["kept"] < 0.9
    assert look.kept == pytest.approx(report["changed"]["kept"], abs=0.02)


@pytest.mark.parametrize("command", ["plan", "merge"])
def test_what_rounding_will_lose_is_told_once_and_before_it_is_lost(
    capsys: pytest.CaptureFixture[str], half: Triple, tmp_path: Path, command: str
):
    more = ["--method", "task-arithmetic", "--scale", "0.005", "--out", tmp_path / "out"]
    cli.main([command, *words(half, *more), *(["--look"] if command == "plan" else [])])
    printed = capsys.readouterr()
    told = printed.out if command == "plan" else printed.err
    assert len(re.findall("rounding to the output's dtype will keep at most", told)) == 1
    assert "--output lora" in told and "--out-dtype float32" in told
    assert "survives rounding" not in printed.err and "keeps less than" not in printed.err
    assert (tmp_path / "out").exists() is (command == "merge")


def test_a_plan_with_a_look_tells_scripts_what_is_kept(
    capsys: pytest.CaptureFixture[str], half: Triple
):
    more = ["--method", "task-arithmetic", "--look", "--json"]
    for flags, kept in (([], pytest.approx(1.0, abs=0.2)), (["--rounding", "stochastic"], None)):
        cli.main(["plan", *words(half, *more, *flags)])
        assert json.loads(capsys.readouterr().out)["look"] == {"warnings": [], "kept": kept}


# --- what is next -------------------------------------------------------------------------


def test_the_command_after_an_analysis_merges_at_its_threshold(
    capsys: pytest.CaptureFixture[str], half: Triple, tmp_path: Path
):
    cli.main(["analyze", *words(half, "--out", tmp_path / "analysis")])
    (line,) = re.findall(r"lean-merge (merge .* --out) DIR", capsys.readouterr().out)
    cli.main([*shlex.split(line), str(tmp_path / "out"), "--device", "cpu"])
    assert "weights were decided by it" in capsys.readouterr().out


def test_the_command_after_a_plan_is_the_merge(capsys: pytest.CaptureFixture[str], half: Triple):
    given = words(half)
    cli.main(["plan", *given, "--look"])
    assert f"{shlex.join(['lean-merge', 'merge', *given])} --out DIR" in capsys.readouterr().out


@pytest.mark.parametrize(("given", "place"), [("{}", 0), ("1={}", 0), ("2={}", 1)])
def test_the_command_line_names_the_parent_of_an_expert(
    capsys: pytest.CaptureFixture[str], half: Triple, given: str, place: int
):
    more = ["--expert", half.experts[0]] if place else []
    parent = given.format(half.base)
    cli.main(["plan", *words(half, *more, "--parent", parent, "--json")])
    experts = json.loads(capsys.readouterr().out)["recipe"]["experts"]
    assert [each.get("parent") for each in experts] == [
        str(half.base) if number == place else None for number in range(len(experts))
    ]
