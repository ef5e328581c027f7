"""Pages of real folders by the commands: written, written again, and left out in so many words."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.families import Triple, contents, write_triple
from support.pages import Page, sweep

from lean_merge import cli
from lean_merge.errors import CheckpointError
from lean_merge.studies import pages
from lean_merge.studies.pages import render

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Runs a command; its exit code, standard output and error."""
    before = signal.getsignal(signal.SIGTERM)

    def command(*words: object) -> tuple[int, str, str]:
        code = 0
        try:
            cli.main([str(word) for word in words])
        except SystemExit as left:
            code = int(left.code or 0)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    yield command
    signal.signal(signal.SIGTERM, before)


def roles(triple: Triple) -> list[object]:
    """The options that name a triple's models."""
    words: list[object] = ["--base", triple.base, "--mllm", triple.mllm, "--device", "cpu"]
    for expert in triple.experts:
        words += ["--expert", expert]
    return words


@pytest.fixture
def foreign(tmp_path: Path) -> Triple:
    """A triple whose expert has another feed-forward width and one layer more."""
    ours = {"layers.0.self_attn.q_proj": (32, 16), "layers.0.mlp.gate_proj": (24, 16)}
    theirs = {**ours, "layers.0.mlp.gate_proj": (40, 16), "layers.1.self_attn.q_proj": (32, 16)}
    theirs["layers.1.mlp.gate_proj"] = (40, 16)
    own = write_triple(tmp_path / "own", ours)
    other = write_triple(tmp_path / "other", theirs)
    return Triple(own.base, own.mllm, other.experts, own.slots)


def test_an_analysis_brings_its_report_and_report_makes_it_again(
    run: Run, two_experts: Triple, tmp_path: Path
):
    out = tmp_path / "out"
    code, printed, _ = run("analyze", *roles(two_experts), "--out", out)
    page = out / "report.html"
    assert code == 0 and f"report: {page}" in printed
    document = json.loads((out / "analysis.json").read_text())
    data = Page(page.read_text()).data
    assert data["weights"]["name"] == [row["weight"] for row in document["weights"]]
    for number, columns in enumerate(data["columns"]):
        rows = [row["experts"][number] for row in document["weights"]]
        assert columns["first"] == [row["similarity_first"] for row in rows]
        assert columns["selected"] == [row["selected"] for row in rows]
        # What the page would select at a threshold is what the analysis counted.
        for step, count in columns["threshold"]["counts"]:
            assert sum(s is not None and s >= step for s in columns["first"]) == count
    before = contents(out)
    page.write_text("damaged")
    assert run("report", out) == (0, f"{page}\n", "")
    assert contents(out) == before
    assert run("report", out, "--out", tmp_path / "again.html")[0] == 0
    assert (tmp_path / "again.html").read_bytes() == page.read_bytes()


def test_a_complete_analysis_gets_the_report_that_it_lacks(
    run: Run, small: Triple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "out"
    monkeypatch.setattr(pages, "plotly_installed", lambda: False)
    code, printed, _ = run("analyze", *roles(small), "--out", out)
    assert code == 0 and "pip install 'lean-merge[report]'" in printed
    assert not (out / "report.html").exists()
    monkeypatch.undo()
    code, printed, err = run("analyze", *roles(small), "--out", out)
    assert code == 0 and "complete already" in err and (out / "report.html").exists()


def test_models_of_different_foundations_are_compared_and_not_analysed(
    run: Run, foreign: Triple, tmp_path: Path
):
    out = tmp_path / "out"
    code, printed, err = run("analyze", *roles(foreign), "--out", out)
    assert code == 1
    assert "intermediate size: 24 in the base, 24 in the MLLM, 40 in the expert 1" in printed
    assert "number of layers: 1 in the base, 1 in the MLLM, 2 in the expert 1" in printed
    assert f"comparison: {out / 'comparison.html'}" in printed
    assert "The models do not map onto each other" in err
    assert {each.name for each in out.iterdir()} == {
        "comparison.html",
        "comparison.json",
        "lean_merge_journal.jsonl",
    }
    stored = json.loads((out / "comparison.json").read_text())
    assert "do not map" in stored["reason"]
    code, printed, _ = run("analyze", *roles(foreign), "--out", out, "--json", "--quiet")
    again = json.loads(printed)
    assert code == 1 and again["differences"] == stored["differences"]
    page = (out / "comparison.html").read_bytes()
    assert run("report", out)[0] == 0
    assert (out / "comparison.html").read_bytes() == page


def test_a_comparison_that_cannot_be_kept_is_said_all_the_same(
    run: Run, foreign: Triple, small: Triple, tmp_path: Path
):
    out = tmp_path / "out"
    assert run("analyze", *roles(small), "--out", out)[0] == 0
    before = contents(out)
    for more in ((), ("--overwrite",)):
        code, printed, err = run("analyze", *roles(foreign), "--out", out, *more)
        assert code == 1 and "is not kept" in err and "do not map onto each other" in err
        assert "intermediate size: 24 in the base" in printed and "comparison:" not in printed
        assert contents(out) == before


def test_models_that_cannot_be_compared_fail_with_the_first_reason(
    run: Run, foreign: Triple, tmp_path: Path
):
    words = roles(foreign)
    code, printed, err = run("analyze", *words, "--out", tmp_path / "out", "--memory", "1MiB")
    assert code == 1 and printed == ""
    assert "could not be compared" in err and "do not map onto each other" in err
    assert not (tmp_path / "out").exists()


def test_the_page_of_a_sweep_is_made_from_its_document(run: Run, tmp_path: Path):
    (tmp_path / "sweep.json").write_text(json.dumps(sweep()))
    assert run("report", tmp_path, "--quiet") == (0, "", "")
    assert len(Page((tmp_path / "sweep.html").read_text()).data["points"]) == 18


@pytest.mark.parametrize(
    ("content", "fault"),
    [(None, "holds no analysis.json"), ("{", "is not JSON"), ('{"version": 9}', "of version 9")],
)
def test_what_cannot_be_shown_is_an_error(
    run: Run, tmp_path: Path, content: str | None, fault: str
):
    if content is not None:
        (tmp_path / "analysis.json").write_text(content)
    code, _, err = run("report", tmp_path)
    assert code == 1 and fault in err
    assert not (tmp_path / "report.html").exists()


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path):
    with pytest.raises(CheckpointError, match="holds no analysis"):
        render(tmp_path / "absent")
