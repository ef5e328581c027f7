"""The pieces of the reproduction in miniature, on a few problems, and the page that it writes."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lean_merge.demo.evaluate import Accuracy, answer, load
from lean_merge.methods import all_methods
from lean_merge.plan.parameters import build_method

ROOT = Path(__file__).parents[2]
FEW = 24


@pytest.fixture(scope="module", autouse=True)
def scripts() -> Iterator[None]:
    """The pieces stand beside the script that uses them."""
    sys.path.insert(0, str(ROOT / "bench"))
    yield
    sys.path.remove(str(ROOT / "bench"))


@pytest.fixture(scope="module")
def family(scripts: None) -> Any:
    """The embedded family with a few problems; tests give weights to its exams, never to it."""
    from reproduction.family import Family

    return Family(0, problems=FEW)


@pytest.fixture(scope="module")
def results(scripts: None) -> Any:
    """The committed figures."""
    from reproduction import results

    return results.read()


@pytest.fixture(scope="module")
def both(results: Any) -> Any:
    """The committed figures with those of the family grown from a real model."""
    from reproduction import results as module

    return module.Both(results, module.read(module.REAL))


# --- intervals ----------------------------------------------------------------------------


@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_that_of_scipy(counts: tuple[int, int]) -> None:
    correct, total = counts
    wanted = stats.binomtest(correct, total).proportion_ci(0.95, method="wilson")
    found = Accuracy.of(correct, total)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), abs=1e-9)


counts = st.tuples(st.integers(0, 60), st.integers(0, 60), st.integers(0, 500))


@given(counts)
def test_a_paired_interval_is_the_textbooks(cells: tuple[int, int, int]) -> None:
    """Wald's interval of the 2 x 2 table with half a problem added to every cell."""
    from reproduction.intervals import paired

    gained, lost, same = cells
    asked = gained + lost + same
    if asked == 0:
        with pytest.raises(ValueError, match="make no sense"):
            paired(gained, lost, asked)
        return
    total = asked + 2
    up, down = (gained + 0.5) / total, (lost + 0.5) / total
    half = stats.norm.ppf(0.975) * math.sqrt((up + down - (up - down) ** 2) / total)
    low, high = paired(gained, lost, asked)
    assert (low, high) == pytest.approx((up - down - half, up - down + half))
    assert low < high and (low, high) == pytest.approx(
        tuple(-e for e in paired(lost, gained, asked)[::-1])
    )


def test_paired_intervals_agree_with_a_t_test_and_cover() -> None:
    from reproduction.intervals import paired

    rows = np.repeat([1.0, -1.0, 0.0], [90, 40, 1870])
    wanted = stats.ttest_1samp(rows, 0).confidence_interval(0.95)
    assert paired(90, 40, 2000) == pytest.approx((wanted.low, wanted.high), abs=5e-4)
    draws = np.random.default_rng(0).multinomial(1000, [0.02, 0.01, 0.97], size=2000)
    inside = [
        low <= 0.01 <= high for low, high in (paired(int(u), int(d), 1000) for u, d, _ in draws)
    ]
    assert 0.93 <= np.mean(inside) <= 0.98


def test_intervals_over_problems_and_seeds_are_those_of_scipy() -> None:
    from reproduction.intervals import over_problems, over_seeds

    entries = np.random.default_rng(1).integers(-1, 2, size=(3, 200)).astype(float)
    wanted = stats.ttest_1samp(entries.mean(0), 0).confidence_interval(0.95)
    assert over_problems(entries) == pytest.approx((wanted.low, wanted.high))
    wanted = stats.ttest_1samp([1.0, 2.0, 4.0], 0).confidence_interval(0.95)
    assert over_seeds([1.0, 2.0, 4.0]) == pytest.approx((wanted.low, wanted.high))
    assert over_seeds([1.0]) == (-math.inf, math.inf)
    assert over_seeds([0.5, 0.5]) == (0.5, 0.5)


# --- exams --------------------------------------------------------------------------------


def test_marks_are_those_of_generation(family: Any) -> None:
    """Also for weights that answer about half of the questions."""
    from reproduction.exam import questions

    model, reader = load(family.folder / "mllm")
    generator = torch.Generator().manual_seed(0)
    noisy = {
        n: w + 0.02 * torch.randn(w.shape, generator=generator) for n, w in family.mllm.items()
    }
    for weights in (family.mllm, noisy):
        marks = family.exams["mllm"].take(weights)
        model.model.language_model.load_state_dict(weights, strict=False)
        shares = []
        for task, mark in marks.items():
            asked = questions(task, FEW)
            given_answers = answer(model, reader, asked)
            right = [text == each.answer for text, each in zip(given_answers, asked, strict=True)]
            assert mark.right.tolist() == right, task
            shares.append(np.mean(right))
    assert 0 < np.mean(shares) < 1, "the noisy model was to answer some"


def test_text_models_are_asked_text_sums_alone(family: Any) -> None:
    marks = family.exams["expert"].take(family.expert, ("read", "text_sums"), limit=10)
    assert list(marks) == ["text_sums"] and len(marks["text_sums"].right) == 10
    assert marks["text_sums"].right.mean() > 0.8
    assert (marks["text_sums"].loss > 0).all()


# --- how candidates are made --------------------------------------------------------------


def test_a_cut_is_the_best_of_its_rank(family: Any) -> None:
    from reproduction import oracles

    for name, svd in list(family.svd_of_expert.items())[:4]:
        matrix = family.of_expert[name].double()
        wanted = torch.linalg.svdvals(matrix)
        cut = oracles.truncated(svd, 3)
        assert torch.linalg.matrix_rank(cut) == 3
        assert float((matrix - cut).norm()) == pytest.approx(float(wanted[3:].norm()), rel=1e-9)
        both = oracles.leading(family, 3)[name] + oracles.trailing(family, 3)[name]
        torch.testing.assert_close(both, matrix)


def test_projections_keep_what_lies_inside(family: Any) -> None:
    from reproduction import oracles

    for name, matrix in list(family.of_expert.items())[:4]:
        random = oracles.random_directions(name, matrix.shape[1], 8)
        torch.testing.assert_close(random.T @ random, torch.eye(8, dtype=torch.float64))
        for basis in (random, family.svd_of_mllm[name].right[:, :8]):
            once = oracles.projected(matrix, basis)
            torch.testing.assert_close(oracles.projected(once, basis), once)
            share = float((once.norm() / matrix.double().norm()) ** 2)
            energy = oracles.energy_inside(matrix, basis)
            assert float(energy[-1]) == pytest.approx(share)
            assert (energy.diff() >= 0).all()


def test_the_method_keeps_the_energy_that_the_facts_say(family: Any) -> None:
    """lean-merge's own update against the float64 formulas of the page.

    Task vectors are differences in bfloat16 there. Where gamma sits on close neighbours far down
    the spectrum, that turns them: such weights are compared in the sum alone.
    """
    from reproduction.measuring import energy_kept

    found, wanted = 0.0, 0.0
    for name, update in family.update.items():
        whole = float(family.of_expert[name].double().norm())
        made = (float(update.double().norm()) / family.ratio[name]) ** 2
        said = energy_kept(family, name) * whole**2
        found, wanted = found + made, wanted + said
        if float(family.similarity[name][0]) >= 0.4:
            assert made == pytest.approx(said, rel=5e-3), name
    assert found == pytest.approx(wanted, rel=5e-3)


def test_every_method_is_measured_by_the_program_itself(family: Any) -> None:
    """Each has a grid, with the default that it has; both ends of every grid are valid recipes."""
    from reproduction.grids import GRIDS

    known = all_methods()
    assert known.keys() <= {grid.method for grid in GRIDS}
    assert len({grid.group for grid in GRIDS}) == len(GRIDS)
    for grid in GRIDS:
        if grid.method not in known:
            continue
        parameters = known[grid.method].parameters_type()
        assert getattr(parameters, grid.axis) == grid.default, grid.group
        assert list(grid.values) == sorted(grid.values)
        for value in (grid.values[0], grid.values[-1]):
            made = build_method(family.recipe(grid.method, **grid.parameters(value)))
            assert getattr(made.parameters[0], grid.axis) == value


def test_a_method_says_that_it_was_measured_here_where_it_was(results: Any) -> None:
    from reproduction.scales import measured_grids

    found = {grid.method for grid in measured_grids(results)}
    said = {name for name, method in all_methods().items() if method.evidence.endswith("here")}
    assert said == found


def test_stretched_updates_have_the_length_they_say(family: Any) -> None:
    from reproduction import oracles
    from reproduction.candidates import stretched

    for whole in (False, True):
        merged = stretched(whole, family, threshold=0.4)
        change = {n: u for n, u in oracles.difference(merged, family.mllm).items() if u.any()}
        chosen = {n for n, s in family.similarity.items() if float(s[0]) >= 0.4}
        assert set(change) == chosen
        wanted = oracles.norm(oracles.rescaled(family, chosen))
        assert oracles.norm(change) == pytest.approx(wanted, rel=1e-5)


def test_measuring_counts_against_the_mllm_and_marks_equal_weights_once(family: Any) -> None:
    from reproduction.candidates import candidates
    from reproduction.measuring import measure, summary

    listed = {(c.group, c.name): c for c in candidates(len(family.base))}
    assert len(listed) == len(candidates(len(family.base))), "two candidates share a name"
    known: dict[str, Any] = {}
    mllm = measure(family, listed["models", "mllm"], known)
    nothing = measure(family, listed["threshold", "0.9"], known)
    assert len(known) == 1 and nothing.norm == nothing.changed == 0
    whole = measure(family, listed["task arithmetic", "1"], known)
    assert whole.norm == pytest.approx(1, rel=1e-3) and whole.changed == len(family.base)
    found = summary(listed["task arithmetic", "1"], [whole], [mllm])["tasks"]["text_sums"]
    gain = int(whole.marks["text_sums"].right.sum()) - int(mllm.marks["text_sums"].right.sum())
    assert found["gained"][0] - found["lost"][0] == gain and found["asked"] == FEW
    assert found["over_seeds"] is None


def test_marks_that_are_kept_are_those_that_were_made(tmp_path: Path) -> None:
    from reproduction.exam import Marks
    from reproduction.kept import KeptMarks

    made = Marks(np.array([True, False]), np.array([0.5, 2.0]))
    first = KeptMarks(tmp_path, "0 1000 abc")
    assert "weights" not in first
    first["weights"] = {"read": made, "text_sums": made}
    again = KeptMarks(tmp_path, "0 1000 abc")
    assert "weights" in again and list(again["weights"]) == ["read", "text_sums"]
    for mark in again["weights"].values():
        assert mark.right.tolist() == [True, False] and mark.loss.tolist() == [0.5, 2.0]
    assert again.seconds >= 0 and "others" not in again
    assert "weights" not in KeptMarks(tmp_path, "1 1000 abc"), "of another family"


# --- the page -----------------------------------------------------------------------------


def test_the_page_is_what_the_results_say(both: Any) -> None:
    from reproduction import page

    text = page.PAGE.read_text(encoding="utf-8")
    assert page.filled(text, both) == text, "run: python bench/reproduce.py --render"


def test_text_by_hand_stays_and_parts_must_be_whole(both: Any) -> None:
    from reproduction import page

    parts = [f"<!-- measured: {name} -->\nstale words\n<!-- end -->" for name in page.PARTS]
    text = page.filled("\nby hand\n".join(parts), both)
    assert text.count("by hand") == len(parts) - 1 and "stale words" not in text
    for wrong in (parts[1:], [*parts, parts[0]]):
        with pytest.raises(ValueError, match="each of"):
            page.filled("\n".join(wrong), both)


def test_every_claim_stands_on_the_page_with_its_verdicts(both: Any) -> None:
    from reproduction import claims, page

    text = page.PAGE.read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    found = {row[0].removeprefix("| "): (row[2], row[4]) for row in rows if len(row) == 6}
    pairs = zip(claims.judged(both.seeds), claims.judged(both.real), strict=True)
    judged = {here[0].says: (f"**{here[1]}**", f"**{there[1]}**") for here, there in pairs}
    assert {says: found.get(says) for says in judged} == judged
    assert len({claim.key for claim in claims.CLAIMS}) == len(claims.CLAIMS)


def made_up(**of_groups: dict[str, tuple[int, int, int]]) -> Any:
    """One seed's results: by group and name, right answers to 100 problems of each task."""
    from reproduction.results import TASKS, Results

    start = of_groups["models"]["mllm"]

    def task(right: int, before: int) -> dict[str, Any]:
        return {
            "asked": 100,
            "right": [right],
            "gained": [max(0, right - before)],
            "lost": [max(0, before - right)],
            "loss_change": [(before - right) / 10],
            "over_problems": [-9.0, 9.0],
            "over_seeds": None,
        }

    candidates = [
        {
            "group": group.replace("_", " "),
            "name": name,
            "norm": [0.5],
            "changed": [3],
            "tasks": {t: task(n, was) for t, n, was in zip(TASKS, right, start, strict=True)},
        }
        for group, named in of_groups.items()
        for name, right in named.items()
    ]
    weight = {"base": 4.0, "mllm": 0.08, "expert": 0.04, "energy_kept": 0.1}
    facts = {
        "spectra": {"mllm": [1.0, 0.4, 0.3, 0.2], "expert": [1.0, 0.3, 0.2, 0.1]},
        "energy": {kind: [0.1] * 8 for kind in ("its own", "the MLLM's", "random")},
        "weights": [{**weight, "s_1": s} for s in (0.2, 0.5, 0.7)],
        "auto": {"threshold": 0.5, "chance": 0.1, "bearable": 0.2, "p_value": 0.01, "gap": False},
    }
    run = {"command": "compare", "minutes": 3.0, "machine": "m", "commit": "c", "date": "d"}
    data = {"seeds": [0], "run": run, "problems": 100, "facts": [facts], "candidates": candidates}
    return Results(data)


MODELS = {"base": (0, 10, 0), "mllm": (90, 20, 0), "expert": (0, 99, 0)}


def test_a_method_helps_and_harms_by_picture_sums_and_reading(results: Any) -> None:
    from reproduction import methodtables
    from reproduction.grids import BY_GROUP
    from reproduction.results import Both
    from reproduction.scales import RULES, best, cost, cost_of_chance, harms, helps

    grid = BY_GROUP["ties"]
    found = made_up(
        models={**MODELS, "mllm": (90, 20, 40)},
        ties={"0.3": (90, 20, 60), "0.7": (40, 20, 90), "1": (90, 20, 80), "1.5": (90, 20, 10)},
    )
    assert best(found, grid, [0]) == "0.7"
    assert helps(found, grid) == ["0.3", "1"] and harms(found, grid) == ["0.7", "1.5"]
    costs = [cost(found, rule, grid, 0) for rule in RULES.values()]
    # The default is 1; the task vectors' ratio is 2, and 0.9 of dM lies outside; all are as long.
    assert costs[:4] == [pytest.approx(10), pytest.approx(80), None, pytest.approx(10)]
    assert costs[4] == costs[5] == pytest.approx(30)
    assert cost_of_chance(found, grid, 0) == pytest.approx(30)
    both = Both(results, found)
    assert "0.7: +50.0 (of 0.3, 0.7, 1, 1.5)" in methodtables.scales(both)
    assert "| 2.00 | not recorded | 10 % | 0.50 |" in methodtables.numbers(both)


def test_a_rule_of_the_others_looks_at_no_other_family_than_them(results: Any) -> None:
    from reproduction.grids import BY_GROUP
    from reproduction.scales import MEASURED_RULES, best, cost

    (rule,) = MEASURED_RULES.values()
    grid = BY_GROUP["task arithmetic"]
    for index in range(3):
        name = rule(results, grid, index)
        assert name == best(results, grid, [other for other in range(3) if other != index])
        lost = cost(results, rule, grid, index)
        assert lost is not None and lost >= 0


def test_rows_of_the_second_family_stand_beside_those_of_the_seeds(results: Any) -> None:
    from reproduction import tables
    from reproduction.results import Both

    real = made_up(
        models=MODELS,
        threshold={"0.4": (90, 50, 30), "0.9": (90, 20, 0)},
        task_arithmetic={"1": (10, 95, 60)},
    )
    both = Both(results, real)
    rows = [line.strip("| ").split(" | ") for line in tables.models(both).splitlines()[2:]]
    titles = [(row[0], row[1]) for row in rows]
    assert len(set(titles)) == len(titles)
    for title in ("MLLM", "IP-Merging, threshold 0.4", "Task Arithmetic, scale 1"):
        place = titles.index((title, "embedded"))
        assert titles[place + 1] == (title, "SmolLM2"), title
    assert ("IP-Merging, threshold 0.5", "SmolLM2") not in titles
    row = rows[titles.index(("Task Arithmetic, scale 1", "SmolLM2"))]
    assert row[2:4] == ["0.500", "3"] and [cell.split(":")[0] for cell in row[4:]] == [
        "10.0",
        "95.0",
        "60.0",
    ]
    # Of one seed the interval is that of its own problems, whatever the t over them would be.
    change = real.change("task arithmetic", "1", "read")
    assert change.over_problems == change.of_seeds[0][1] and "[" not in row[4]
    assert (
        row[4] == f"10.0: -80.0 ({change.over_problems[0]:+.1f} to {change.over_problems[1]:+.1f})"
    )


def test_a_verdict_on_the_second_family_follows_its_figures(results: Any) -> None:
    """Also where rows are missing, and where nothing can fall."""
    from reproduction import claims, page
    from reproduction.results import Both

    def verdicts(real: Any) -> dict[str, str]:
        return {claim.key: verdict for claim, verdict, _ in claims.judged(real)}

    rises = {
        "threshold": {"0.3": (90, 50, 30), "0.4": (90, 50, 40), "0.5": (90, 20, 0)},
        "ties": {"0.5": (90, 50, 30), "1": (10, 95, 30)},
        "task_arithmetic": {"0.5": (90, 50, 30), "1": (10, 95, 20)},
    }
    found = verdicts(made_up(models=MODELS, **rises))
    held = ("gains", "ties falls", "beats", "threshold", "spectra")
    assert {found[key] for key in held} == {claims.REPRODUCED}
    assert found["absent"] == found["gap"] == claims.NOT_REPRODUCED
    assert found["task arithmetic falls"] == claims.NOT_TESTABLE, "there is nothing to lose"
    assert found["stages"] == found["projection"] == claims.NOT_MEASURED
    sees = {**MODELS, "mllm": (90, 20, 50)}
    lower = verdicts(made_up(models=sees, **rises))
    assert lower["task arithmetic falls"] == claims.REPRODUCED
    assert lower["gains"] == claims.NOT_REPRODUCED
    nothing = verdicts(made_up(models=MODELS))
    assert nothing["gains"] == nothing["beats"] == claims.NOT_MEASURED

    text = page.agreement(Both(results, made_up(models=MODELS, **rises)))
    apart = text.split("Told differently")[1]
    assert apart.count("SmolLM2: reproduced") + apart.count("SmolLM2: not reproduced") == int(
        apart.split("(")[1].split(")")[0]
    )
    assert "SmolLM2: reproduced" in apart and "Table 5" not in text, "not measured is not told"


def test_a_verdict_follows_the_figures(results: Any) -> None:
    """The rules can be met and missed: the same claims on figures that were turned round."""
    from reproduction import claims
    from reproduction.results import Results

    data = json.loads(json.dumps(results.data))
    for entry in data["candidates"]:
        if entry["group"] == "threshold" and entry["name"] in ("0.3", "0.4"):
            sums = entry["tasks"]["picture_sums"]
            asked = sums["asked"]
            sums["gained"], sums["lost"] = (
                [asked // 2] * len(results.seeds),
                [0] * len(results.seeds),
            )
    raised = {claim.key: verdict for claim, verdict, _ in claims.judged(Results(data))}
    assert {raised[key] for key in ("gains", "beats", "threshold", "stages")} != {
        claims.NOT_REPRODUCED
    }
    assert raised["gains"] == raised["threshold"] == claims.REPRODUCED
    assert raised["absent"] == claims.NOT_REPRODUCED


def test_all_committed_seeds_were_measured_as_their_logs_say(results: Any) -> None:
    """The logs' figures come from generation, on the same problems."""
    from reproduction import family, measuring, page

    assert results.seeds == family.seeds() and len(results.seeds) >= 3
    assert results.data["problems"] == measuring.PROBLEMS
    for index, seed in enumerate(results.seeds):
        log = page.training_log(seed)
        assert log["seed"] == seed
        for role, scores in log["abilities"].items():
            tasks = results.entry("models", role)["tasks"]
            right = {task: found["right"][index] for task, found in tasks.items()}
            assert right == {task: score["correct"] for task, score in scores.items()}


def test_results_are_read_as_written(results: Any, tmp_path: Path) -> None:
    from reproduction import results as module

    module.write(results.data, tmp_path / "results.json")
    assert module.read(tmp_path / "results.json").data == results.data
    assert module.FILE.read_bytes() == (tmp_path / "results.json").read_bytes()


def test_later_figures_are_put_among_the_others(results: Any) -> None:
    from reproduction.results import Results, joined

    run = {name: fact for name, fact in results.data["run"].items() if name != "added"}
    old = {**results.data, "run": run}
    first = old["candidates"][0]
    new = {**old, "candidates": [first, {**old["candidates"][5], "norm": [9.0]}]}
    new["cpu_minutes"] = 0.5
    both = joined(old, new)
    assert len(both["candidates"]) == len(old["candidates"])
    key = old["candidates"][5]["group"], old["candidates"][5]["name"]
    assert Results(both).entry(*key)["norm"] == [9.0]
    assert both["run"]["added"] == [{**old["run"], "cpu_minutes": 0.5}]
    for wrong in ({"seeds": [0]}, {"candidates": [{**first, "norm": [1.0]}]}):
        with pytest.raises(ValueError, match="differ"):
            joined(old, {**new, **wrong})


def test_figures_are_the_same_bytes_each_time(
    both: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="an extra of the benchmarks")
    from reproduction import figures

    drawn = {name: figures.FIGURES[name] for name in ("spectra", "rank")}
    monkeypatch.setattr(figures, "FIGURES", drawn)
    first = [file.read_bytes() for file in figures.write(both, tmp_path / "one")]
    second = [file.read_bytes() for file in figures.write(both, tmp_path / "two")]
    assert first == second and all(b"<svg" in text for text in first)
    assert len(first) == 3, "the spectra of both kinds of families"


def test_figures_of_a_family_with_few_rows(
    results: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="an extra of the benchmarks")
    from reproduction import figures
    from reproduction.results import Both

    real = made_up(models=MODELS, threshold={"0.4": (90, 50, 30)})
    monkeypatch.setattr(figures, "FIGURES", {"merges": figures.merges})
    names = [file.name for file in figures.write(Both(results, real), tmp_path)]
    assert names == ["merges.svg", "smollm2-merges.svg"]
