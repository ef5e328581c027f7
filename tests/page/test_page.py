"""Pages from dictionaries: whole in themselves, the same each time, and deaf to hostile names."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import beta
from support.analyses import analysis, dense, mixture
from support.pages import HOSTILE, Page, comparison, sweep

from lean_merge.errors import OutputError, plain
from lean_merge.page import frame, make_page, plotly_installed
from lean_merge.page.analysis import BINS, expected_counts

DOCUMENTS: dict[str, Callable[[], dict[str, Any]]] = {
    "analysis": lambda: analysis(dense(2), experts=["a/one", "b/two"]),
    "sweep": sweep,
    "comparison": lambda: comparison(2),
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the 5 MB of the library, for tests that read many pages."""
    monkeypatch.setattr(frame, "_plotly", lambda: "/* plotly */")


def page_of(kind: str, document: dict[str, Any]) -> Page:
    """The elements of the page of a document."""
    return Page(make_page(kind, document).decode())


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_a_page_is_whole_in_itself_and_may_ask_nobody(kind: str):
    page = page_of(kind, DOCUMENTS[kind]())
    assert page.addresses() == [] and page.style_addresses() == []
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


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_the_same_input_gives_the_same_bytes(kind: str):
    before = DOCUMENTS[kind]()
    given_ = copy.deepcopy(before)
    made = make_page(kind, given_)
    assert given_ == before
    assert make_page(kind, DOCUMENTS[kind]()) == made


def replaced(value: Any, text: str) -> Any:
    """`value` with every text replaced; keys stay."""
    if isinstance(value, str):
        return text
    if isinstance(value, list):
        return [replaced(each, text) for each in value]
    if isinstance(value, dict):
        return {name: replaced(each, text) for name, each in value.items()}
    return value


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("kind", DOCUMENTS)
def test_a_hostile_name_is_shown_and_not_obeyed(kind: str, name: str):
    usual = page_of(kind, DOCUMENTS[kind]())
    hostile = page_of(kind, replaced(DOCUMENTS[kind](), name))
    assert {tag for tag, _ in hostile.elements} <= {tag for tag, _ in usual.elements}
    assert len(hostile.scripts) == 3
    assert hostile.scripts[2] == usual.scripts[2] and hostile.policy == usual.policy
    stored = json.dumps(hostile.data, ensure_ascii=False)
    assert json.dumps(plain(name), ensure_ascii=False)[1:-1] in stored
    for steering in ("\u202e", "\u2028", "\u0000"):
        assert steering not in stored and steering not in hostile.text


@pytest.mark.usefixtures("small")
def test_the_figures_of_the_head_are_those_of_the_analysis():
    given_ = analysis(dense(32), experts=["meta/one"])
    given_["warnings"] = ["rope_theta differs", "the pair looks unrelated"]
    text = page_of("analysis", given_).text
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
def test_the_scripts_get_what_decides_with_all_its_digits():
    given_ = analysis(dense(3), experts=["one", "two"])
    given_["weights"][4].update(skipped="no counterpart", shape=None, experts=[{}, {}])
    none = dict.fromkeys(given_["weights"][5]["experts"][1])
    none |= {"reason": "the task vector is zero", "selected": False, "sigma": [], "gap": False}
    given_["weights"][5]["experts"][1] = none
    data = page_of("analysis", given_).data
    for number, columns in enumerate(data["columns"]):
        rows = [row["experts"][number] for row in given_["weights"]]
        assert columns["first"] == [row.get("similarity_first") for row in rows]
        assert columns["max"] == [row.get("similarity_max") for row in rows]
        assert columns["selected"] == [bool(row.get("selected")) for row in rows]
        assert columns["threshold"]["in_force"] == 0.4
        counts = given_["thresholds"][number]["counts"]
        assert columns["threshold"]["counts"] == [[c["threshold"], c["selected"]] for c in counts]
    first = data["columns"][1]["first"]
    assert [value is None for value in first] == [n in (4, 5) for n in range(21)]
    assert data["columns"][1]["reason"][4:6] == ["no counterpart", "the task vector is zero"]


@pytest.mark.usefixtures("small")
def test_spectra_are_the_weights_own_or_the_median_of_a_group():
    given_ = analysis(mixture(2, 5), hidden=64, sigmas=6)
    data = page_of("analysis", given_).data
    assert data["modules"][-3:] == ["experts.gate_proj", "experts.up_proj", "experts.down_proj"]
    groups = {(data["modules"][g["module"]], g["layer"]): g for g in data["spectra"]}
    rows = {row["weight"]: row for row in given_["weights"]}
    one = groups["q_proj", 1]
    own = rows["layers.1.self_attn.q_proj"]
    assert one["weights"] == 1
    assert one["curves"][0]["mid"] == pytest.approx(own["mllm"]["sigma"], rel=1e-3)
    assert one["curves"][1]["mid"] == pytest.approx(own["experts"][0]["sigma"], rel=1e-3)
    group = groups["experts.up_proj", 0]
    names = [f"layers.0.mlp.experts.{n}.up_proj" for n in range(5)]
    first = sorted(rows[name]["experts"][0]["sigma"][0] for name in names)
    curve = group["curves"][1]
    assert group["weights"] == 5 and curve["mid"][0] == pytest.approx(first[2], rel=1e-3)
    assert curve["low"][0] == pytest.approx(first[0], rel=1e-3)
    assert groups["experts.up_proj", None]["weights"] == 10


@pytest.mark.parametrize("width", [2, 3, 4, 7, 64, 128, 4096, 30000])
def test_the_expected_counts_are_those_of_the_law_of_unrelated_directions(width: int):
    edges = [n / BINS for n in range(BINS + 1)]
    wanted = np.diff(beta(0.5, (width - 1) / 2).cdf([edge**2 for edge in edges]))
    assert expected_counts([width]) == pytest.approx(list(wanted), abs=1e-5)
    assert sum(filter(None, expected_counts([width] * 3))) == pytest.approx(3, abs=1e-3)


ODD: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no weights": lambda a: a.update(weights=[]),
    "no layers": lambda a: [w.update(layer=None) for w in a["weights"]],
    "odd modules": lambda a: [
        w.update(module=f"blk{n}", weight=f"blk.{n}") for n, w in enumerate(a["weights"])
    ],
    "no numbers": lambda a: [
        w["experts"][0].update(
            {k: None for k in w["experts"][0] if k.startswith(("sim", "upd", "eff", "ene", "nu"))},
            selected=False,
            sigma=[],
        )
        for w in a["weights"]
    ],
    "nothing analysed": lambda a: [
        (w.update(skipped="no room", shape=None), w.pop("experts"), w.pop("mllm"))
        for w in a["weights"]
    ],
    "no threshold of all": lambda a: a["thresholds"][0].update(in_force=None),
}
DAMAGED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "nothing but a version": lambda a: [a.pop(key) for key in list(a) if key != "version"],
    "lists for objects": lambda a: a.update(recipe=[1], bytes=[2]),
    "no object for a weight": lambda a: a.update(weights=[4, None]),
    "a number that is not finite": lambda a: a["weights"][0]["experts"][0].update(
        similarity_first=float("nan")
    ),
    "a number that is a text": lambda a: a["weights"][0].update(layer="<b>"),
    "a number beyond all bounds": lambda a: a["weights"][0]["experts"][0].update(sigma=[10**400]),
    "names without names": lambda a: a.update(experts=[None]),
}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("case", ODD)
def test_an_odd_analysis_is_still_a_page(case: str):
    given_ = analysis(dense(1))
    ODD[case](given_)
    page = page_of("analysis", given_)
    assert "How it was made" in page.text
    assert len(page.data["weights"]["name"]) == len(given_["weights"])


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_analysis_is_refused(case: str):
    given_ = analysis(dense(1))
    DAMAGED[case](given_)
    with pytest.raises(OutputError, match="cannot be shown, for it is damaged"):
        make_page("analysis", given_)


@pytest.mark.usefixtures("small")
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_anything_that_json_holds_is_a_page_or_refused(data: st.DataObject):
    anything = st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
        max_leaves=6,
    )
    kind = data.draw(st.sampled_from(sorted(DOCUMENTS)))
    given_ = DOCUMENTS[kind]()
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
    try:
        page = page_of(kind, given_)
    except OutputError as error:
        assert "is damaged" in str(error)
    else:
        assert len(page.scripts) == 3


@pytest.mark.parametrize("version", [None, 2, "1", True])
@pytest.mark.parametrize("kind", DOCUMENTS)
def test_another_version_is_refused(kind: str, version: Any):
    with pytest.raises(OutputError, match=f"{kind} is of version"):
        make_page(kind, {**DOCUMENTS[kind](), "version": version})


def test_without_plotly_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    assert plotly_installed()
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(OutputError, match=r"pip install 'lean-merge\[report\]'"):
        make_page("analysis", analysis(dense(1)))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not plotly_installed()


@pytest.mark.usefixtures("small")
def test_a_sweep_keeps_its_points_results_and_failures():
    given_ = sweep()
    given_["points"][3]["result"] = 0.5
    page = page_of("sweep", given_)
    assert page.data["results"] == ["read", "result", "sums"]
    assert page.data["points"][3]["results"] == {"result": 0.5}
    assert [point["selected"] for point in page.data["points"]] == [
        point["selected"] for point in given_["points"]
    ]
    assert list(page.data["axes"]) == ["threshold", "stages"]
    assert "There are 18 merges from the analysis in analysis." in page.text
    assert "2 of them are equal to another. 1 failed." in page.text


@pytest.mark.usefixtures("small")
def test_an_analysis_opens_with_what_it_means_and_a_command():
    given_ = analysis(dense(32), experts=["meta/one"])
    values = [row["experts"][0]["similarity_first"] for row in given_["weights"]]
    chance = given_["thresholds"][0]["null"]["quantile_99"]
    text = page_of("analysis", given_).text
    beyond = sum(value > chance for value in values)
    assert f"The two agree in {beyond} of 224 weights more than 99 % of unrelated" in text
    assert "merge lean_merge_recipe.yml --analysis . --threshold auto --out ../merged" in text
    given_["thresholds"][0]["auto"] = None
    text = page_of("analysis", given_).text
    assert "No threshold can be recommended." in text and "--threshold auto --out" not in text


@pytest.mark.usefixtures("small")
def test_a_sweep_tells_its_models_its_best_points_and_intervals_of_counts():
    given_ = sweep()
    given_["recipe"] = {
        "base_model": "org/base",
        "mllm_model": "org/eye",
        "experts": [{"model": "a/b"}],
    }
    given_["receiver"] = {"result": {"sums.correct": 70, "sums.total": 100}}
    for n, point in enumerate(given_["points"]):
        point["result"] = {"sums.correct": 70 + (n == 4) * 25, "sums.total": 100, "read": 0.9}
    page = page_of("sweep", given_)
    assert "eye ← b" in page.text and "org/eye" in page.text
    best = given_["points"][4]["name"]
    assert (
        f"sums is highest for {best}, 95.0% [88.8%, 97.8%]; the receiving model itself" in page.text
    )
    assert "may be chance" not in page.text
    assert page.data["results"] == ["read", "sums"] and page.data["receiver"] == {"sums": 0.7}
    low, high = page.data["points"][4]["bounds"]["sums"]
    assert [low, high] == pytest.approx(proportion(95, 100), abs=1e-4)
    given_["points"][4]["result"]["sums.correct"] = 72
    assert "the intervals overlap, so that this may be chance" in page_of("sweep", given_).text


def proportion(right: int, total: int) -> list[float]:
    """Wilson's interval, as the solutions of (right / total - p)^2 = z^2 p (1 - p) / total."""
    z2 = 1.959963984540054**2 / total
    share = right / total
    return sorted(np.roots([1 + z2, -(2 * share + z2), share**2]).real)


@pytest.mark.usefixtures("small")
def test_a_comparison_says_what_to_do():
    text = page_of("comparison", comparison(2)).text
    assert "The expert 1: it was not tuned from this base. Exchange one of the two." in text
    assert "The MLLM: it was tuned from this base." in text
