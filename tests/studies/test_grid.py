"""Grids: exact decimals, clear errors, and names that any file system keeps apart."""

from __future__ import annotations

import itertools
import re
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lean_merge import Expert, MergeRecipe, RecipeError
from lean_merge.plan.parameters import build_method
from lean_merge.studies.sweep.grid import MAX_POINTS, Grid, Point


def recipe(**options: Any) -> MergeRecipe:
    return MergeRecipe("base", "mllm", options.pop("experts", ("expert",)), **options)


def test_a_range_has_both_ends_and_no_binary_dust():
    grid = Grid(thresholds="0.1:0.9:0.1")
    assert grid.thresholds == (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    assert [point.name for point in grid.points()][2] == "threshold-0.3"


decimals = st.decimals(min_value=-100, max_value=100, places=3)


@given(decimals, st.integers(0, 40), st.decimals(min_value="0.001", max_value=5, places=3))
def test_a_range_is_what_decimals_say(start: Decimal, steps: int, step: Decimal):
    """Whatever binary fractions would make of it; a stop between two values is not reached."""
    for stop in (start + steps * step, start + steps * step + step / 2):
        values = Grid(scales=f"{start}:{stop:f}:{step}").scales
        assert [Decimal(repr(value)) for value in values] == [
            start + n * step for n in range(steps + 1)
        ]


@given(st.lists(decimals, min_size=1, max_size=8))
def test_text_and_numbers_say_the_same(values: list[Decimal]):
    grid = Grid(scales=",".join(map(str, values)))
    assert grid == Grid(scales=[float(value) for value in values])
    assert grid.scales == tuple(dict.fromkeys(float(value) for value in values))
    assert "-0.0" not in map(repr, grid.scales)


def test_lists_ranges_and_auto_mix():
    grid = Grid(thresholds=" 0.3, 0.5:0.7:0.1 ,auto, .3, 1")
    assert grid.thresholds == (0.3, 0.5, 0.6, 0.7, "auto", 1.0)
    assert list(grid.points())[-2].name == "threshold-auto"


def test_stages_come_by_semicolon_or_by_and_by():
    wanted = ("select", "select,rescale", "select,rescale,project")
    assert Grid(stages="select; select, rescale;select,rescale,project").stages == wanted
    assert Grid(stages=["select", "select,rescale;select", wanted[2]]).stages == wanted
    assert Grid(stages=[("select",), ["select", "rescale"], wanted[2]]).stages == wanted


def test_points_are_every_combination_thresholds_fastest():
    grid = Grid(thresholds="0.2,0.4", stages="select;select,rescale", scales=[-0.5, 1])
    assert [point.name for point in grid.points()] == [
        f"threshold-{t}_stages-{s}_scale-{c}"
        for s, c, t in itertools.product(
            ("select", "select-rescale"), ("minus-0.5", "1"), ("0.2", "0.4")
        )
    ]
    assert grid.size == 8
    first = next(iter(grid.points()))
    assert first.parameters == {"threshold": 0.2, "stages": "select", "scale": -0.5}


axis = st.lists(
    st.floats(-1e6, 1e6, allow_nan=False).map(lambda x: round(x, 6)), min_size=1, max_size=5
)


@given(axis, axis)
def test_names_are_plain_apart_and_of_the_values_alone(scales: list[float], others: list[float]):
    """Also where capitals are not told from small letters, and with other values beside them."""
    points = list(Grid(scales=scales, temperatures=others).points())
    names = [point.name for point in points]
    assert len({name.lower() for name in names}) == len(names) == len({*scales}) * len({*others})
    for point in points:
        assert re.fullmatch(r"[a-z0-9][a-z0-9._-]*[a-z0-9]", point.name)
        assert len(point.name) < 100 and ".." not in point.name
        (alone,) = Grid(
            scales=[point.parameters["scale"]], temperatures=[point.parameters["temperature"]]
        ).points()
        assert alone == point


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "at least one"),
        ({"thresholds": ""}, "cannot be read"),
        ({"thresholds": "0.1,,0.2"}, "cannot be read"),
        ({"thresholds": "0.1:0.9"}, "start:stop:step"),
        ({"thresholds": "0.1:0.9:0.1:2"}, "start:stop:step"),
        ({"thresholds": "0.9:0.1:0.1"}, "leads nowhere"),
        ({"thresholds": "0.1:0.9:0"}, "leads nowhere"),
        ({"thresholds": "0.1:0.9:-0.1"}, "leads nowhere"),
        ({"thresholds": "0:1:0.0001"}, "has 10001 values"),
        ({"thresholds": "nan"}, "cannot be read"),
        ({"thresholds": "1e3"}, "cannot be read"),
        ({"thresholds": "٣"}, "cannot be read"),
        ({"thresholds": "0." + "1" * 40}, "cannot be read"),
        ({"thresholds": [True]}, "cannot be a value of a grid"),
        ({"thresholds": [None]}, "cannot be a value of a grid"),
        ({"thresholds": [float("nan")]}, "cannot be a value of a grid"),
        ({"thresholds": [1e300]}, "cannot be a value of a grid"),
        ({"thresholds": {0.1: 1}}, "cannot be a value of a grid"),
        ({"scales": "auto"}, "only a threshold"),
        ({"stages": "select;;select"}, "not a set of stages"),
        ({"stages": "../select"}, "not a set of stages"),
        ({"stages": [3]}, "not a set of stages"),
        ({"thresholds": "0:0.99:0.01", "scales": "1:11:1"}, "has 1100 points"),
    ],
)
def test_what_makes_no_grid_is_refused(options: dict[str, Any], message: str):
    with pytest.raises(RecipeError, match=message):
        Grid(**options)
    assert MAX_POINTS == 1000


@given(st.text(max_size=30))
def test_any_text_is_a_grid_or_an_error(text: str):
    for field in ("thresholds", "stages", "scales"):
        try:
            grid = Grid(**{field: text})
        except RecipeError as error:
            assert len(str(error)) < 500
        else:
            assert 1 <= grid.size <= MAX_POINTS


def test_a_points_recipe_holds_for_every_expert():
    """As flags do: what an expert has of its own gives way, all else stays."""
    given = recipe(
        experts=(
            Expert("one", (("threshold", 0.7), ("scale", 0.5))),
            {"model": "two", "parameters": {"threshold": [{"filter": "mlp", "value": 0.1}]}},
        ),
        parameters={"threshold": [0.1, 0.9], "temperature": 8.0},
        seed=3,
    )
    (point,) = Grid(thresholds="0.3").points()
    method = build_method(point.recipe(given))
    assert [each.threshold for each in method.parameters] == [0.3, 0.3]
    assert [each.scale for each in method.parameters] == [0.5, 1.0]
    assert method.common.temperature == 8.0 and point.recipe(given).seed == 3


def test_a_points_recipe_is_that_of_the_same_flags():
    point = Point("x", (("threshold", 0.3), ("stages", "select,rescale")))
    wanted = recipe(parameters={"stages": "select,rescale", "threshold": 0.3})
    assert point.recipe(recipe()).to_dict() == wanted.to_dict()
