"""Pages from dictionaries: whole in themselves, the same each time, and deaf to hostile names."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import beta
from support.analyses import analysis, dense, mixture
from support.pages import HOSTILE, Page, comparison, style_addresses, sweep

from lean_merge.errors import OutputError, plain
from lean_merge.page import (
    document,
    report_available,
    write_comparison_page,
    write_report,
    write_sweep_page,
)
from lean_merge.page.nulllaw import cumulative, expected

WRITERS: dict[str, tuple[Callable[[dict[str, Any], Path], None], Callable[[], dict[str, Any]]]] = {
    "analysis": (write_report, lambda: analysis(dense(2), experts=["a/one", "b/two"])),
    "sweep": (write_sweep_page, sweep),
    "comparison": (write_comparison_page, lambda: comparison(2)),
}
Small = Callable[..., Path]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the 5 MB of the library, for tests that read many pages."""
    monkeypatch.setattr(document, "_plotly", lambda: "/* plotly */")


@pytest.mark.parametrize("kind", WRITERS)
def test_a_page_is_whole_in_itself_and_may_ask_nobody(kind: str, tmp_path: Path):
    write, make = WRITERS[kind]
    file = tmp_path / "page.html"
    write(make(), file)
    page = Page(file)
    assert page.addresses() == [] and style_addresses(file) == []
    assert page.policy["default-src"] == ["'none'"]
    assert set(page.policy) == {
        "default-src",
        "script-src",
        "style-src",
        "img-src",
        "base-uri",
        "form-action",
    }
    assert page.policy["script-src"] == page.digests()
    assert page.policy["img-src"] == ["data:", "blob:"]
    assert len(page.scripts) == 3 and "plotly.js" in page.scripts[1][:200]
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert [each.name for each in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize("kind", WRITERS)
def test_the_same_input_gives_the_same_bytes(kind: str, tmp_path: Path):
    write, make = WRITERS[kind]
    before = make()
    given_ = copy.deepcopy(before)
    write(given_, tmp_path / "one.html")
    assert given_ == before
    write(make(), tmp_path / "two.html")
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


def replaced(value: Any, text: str) -> Any:
    """`value` with every text, but for words that decide, replaced; keys stay."""
    if isinstance(value, str):
        return text
    if isinstance(value, list):
        return [replaced(each, text) for each in value]
    if isinstance(value, dict):
        return {name: replaced(each, text) for name, each in value.items()}
    return value


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("kind", WRITERS)
def test_a_hostile_name_is_shown_and_not_obeyed(kind: str, name: str, tmp_path: Path):
    write, make = WRITERS[kind]
    write(make(), tmp_path / "plain.html")
    write(replaced(make(), name), tmp_path / "hostile.html")
    usual, hostile = Page(tmp_path / "plain.html"), Page(tmp_path / "hostile.html")
    assert {tag for tag, _ in hostile.elements} <= {tag for tag, _ in usual.elements}
    assert len(hostile.scripts) == 3
    assert hostile.scripts[2] == usual.scripts[2] and hostile.policy == usual.policy
    stored = json.dumps(hostile.data, ensure_ascii=False)
    assert json.dumps(plain(name), ensure_ascii=False)[1:-1] in stored
    for steering in ("\u202e", "\u2028", "\u0000"):
        assert steering not in stored and steering not in hostile.text


@pytest.mark.usefixtures("small")
def test_the_figures_of_the_head_are_those_of_the_analysis(tmp_path: Path):
    given_ = analysis(dense(32), experts=["meta/one"])
    given_["warnings"] = ["rope_theta differs", "the pair looks unrelated"]
    write_report(given_, tmp_path / "page.html")
    text = Page(tmp_path / "page.html").text
    chosen = sum(row["experts"][0]["selected"] for row in given_["weights"])
    assert 0 < chosen < 224
    assert f"Selected {chosen} of 224" in text
    assert "2 warnings rope_theta differs the pair looks unrelated" in text
    assert "llava-hf/llava-1.5-7b-hf" in text and "meta/one" in text
    norms = [
        r["experts"][0]["update_norm"] for r in given_["weights"] if r["experts"][0]["selected"]
    ]
    assert f"Norm of the update {math.hypot(*norms):.3g}" in text
    assert given_["thresholds"][0]["explanation"] in text


@pytest.mark.usefixtures("small")
def test_the_scripts_get_what_decides_with_all_its_digits(tmp_path: Path):
    given_ = analysis(dense(3), experts=["one", "two"])
    given_["weights"][4]["skipped"] = "no counterpart"
    given_["weights"][5]["experts"][1] = {"reason": "the task vector is zero", "selected": False}
    write_report(given_, tmp_path / "page.html")
    data = Page(tmp_path / "page.html").data
    for number, columns in enumerate(data["columns"]):
        rows = [row["experts"][number] for row in given_["weights"]]
        assert columns["first"] == [row.get("similarity_first") for row in rows]
        assert columns["max"] == [row.get("similarity_max") for row in rows]
        assert columns["selected"] == [row["selected"] for row in rows]
        assert columns["threshold"]["in_force"] == 0.4
        counts = given_["thresholds"][number]["counts"]
        assert columns["threshold"]["counts"] == [[c["threshold"], c["selected"]] for c in counts]
    assert data["columns"][1]["able"] == [n not in (4, 5) for n in range(21)]
    assert (
        data["columns"][1]["reasons"][data["columns"][1]["reason"][5]] == "the task vector is zero"
    )


@pytest.mark.usefixtures("small")
def test_spectra_are_the_weights_own_or_the_median_of_a_group(tmp_path: Path):
    given_ = analysis(mixture(2, 5), hidden=64, sigmas=6)
    write_report(given_, tmp_path / "page.html")
    data = Page(tmp_path / "page.html").data
    assert data["modules"][-3:] == ["experts.gate_proj", "experts.up_proj", "experts.down_proj"]
    curves = {(data["modules"][g[0]], g[1]): g for g in data["spectra"]["groups"]}
    rows = {row["weight"]: row for row in given_["weights"]}
    one = curves["q_proj", 1]
    own = rows["layers.1.self_attn.q_proj"]
    assert one[2] == 1 and one[3]["mid"] == pytest.approx(own["mllm"]["sigma"], rel=1e-3)
    assert one[4]["mid"] == pytest.approx(own["experts"][0]["sigma"], rel=1e-3)
    group = curves["experts.up_proj", 0]
    names = [f"layers.0.mlp.experts.{n}.up_proj" for n in range(5)]
    first = sorted(rows[name]["experts"][0]["sigma"][0] for name in names)
    assert group[2] == 5 and group[4]["mid"][0] == pytest.approx(first[2], rel=1e-3)
    assert group[4]["low"][0] == pytest.approx(first[0], rel=1e-3)
    assert curves["experts.up_proj", None][2] == 10


@pytest.mark.parametrize("width", [2, 3, 4, 7, 64, 128, 4096, 30000])
def test_the_null_law_is_that_of_scipy(width: int):
    edges = [n / 50 for n in range(51)]
    wanted = beta(0.5, (width - 1) / 2).cdf([edge**2 for edge in edges])
    assert cumulative(edges, width) == pytest.approx(list(wanted), abs=2e-4)
    assert sum(expected(edges, [width] * 3)) == pytest.approx(3, abs=2e-3)


def test_in_one_dimension_unrelated_directions_are_equal():
    assert cumulative([0.0, 0.5, 1.0], 1) == [0.0, 0.0, 1.0]


ODD: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no weights": lambda a: a.update(weights=[]),
    "no experts": lambda a: (
        a.update(experts=[], thresholds=[]),
        [w.update(experts=[]) for w in a["weights"]],
    ),
    "nothing but a version": lambda a: [a.pop(key) for key in list(a) if key != "version"],
    "no layers": lambda a: [w.update(layer=None) for w in a["weights"]],
    "odd modules": lambda a: [
        w.update(module=None, weight=f"blk.{n}") for n, w in enumerate(a["weights"])
    ],
    "no numbers": lambda a: [
        w["experts"][0].update(dict.fromkeys(w["experts"][0])) for w in a["weights"]
    ],
    "no spectra": lambda a: [w.update(mllm=None) for w in a["weights"]],
    "lists for objects": lambda a: a.update(
        recipe=[1], bytes=[2], thresholds=[3], weights=[4, None]
    ),
    "endless numbers": lambda a: a["weights"][0]["experts"][0].update(
        similarity_first=float("nan"), update_norm=float("inf"), sigma=[10**400, -1.0, "x"]
    ),
    "names without names": lambda a: a.update(experts=[None, 3]),
}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("case", ODD)
def test_an_odd_analysis_is_still_a_page(case: str, tmp_path: Path):
    given_ = analysis(dense(1))
    ODD[case](given_)
    write_report(given_, tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert "How it was made" in page.text
    assert len(page.data["weights"]["name"]) == len(given_.get("weights", []))


@pytest.mark.usefixtures("small")
@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_page_of_anything_that_json_holds_is_no_crash(data: st.DataObject, tmp_path: Path):
    anything = st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
        max_leaves=6,
    )
    kind = data.draw(st.sampled_from(sorted(WRITERS)))
    write, make = WRITERS[kind]
    given_ = make()
    for _ in range(data.draw(st.integers(1, 4))):
        at: Any = given_
        while True:
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            key = data.draw(st.sampled_from([k for k in keys if k != "version"] or keys))
            inner = at[key]
            if not isinstance(inner, dict | list) or not inner or data.draw(st.booleans()):
                break
            at = inner
        if key != "version":
            at[key] = data.draw(anything)
    write(given_, tmp_path / "page.html")
    assert len(Page(tmp_path / "page.html").scripts) == 3


@pytest.mark.parametrize("version", [None, 2, "1", True])
@pytest.mark.parametrize("kind", WRITERS)
def test_another_version_is_refused(kind: str, version: Any, tmp_path: Path):
    write, make = WRITERS[kind]
    with pytest.raises(OutputError, match=f"{kind} is of version"):
        write({**make(), "version": version}, tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []


def test_without_plotly_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert report_available()
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(OutputError, match=r"pip install 'lean-merge\[report\]'"):
        write_report(analysis(dense(1)), tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not report_available()


def test_a_file_that_cannot_be_written_is_an_error(tmp_path: Path):
    with pytest.raises(OutputError, match="cannot be written"):
        write_report(analysis(dense(1)), tmp_path / "absent" / "page.html")


@pytest.mark.usefixtures("small")
def test_a_sweep_keeps_its_points_results_and_failures(tmp_path: Path):
    given_ = sweep()
    given_["points"][3]["result"] = 0.5
    write_sweep_page(given_, tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert page.data["results"] == ["read", "result", "sums"]
    assert page.data["points"][3]["results"] == {"result": 0.5}
    assert [point["selected"] for point in page.data["points"]] == [
        point["selected"] for point in given_["points"]
    ]
    assert list(page.data["axes"]) == ["threshold", "stages", "scale", "temperature"]
    assert "18 merges from the analysis in analysis; 2 of them equal to another" in page.text
    assert "; 1 failed" in page.text
