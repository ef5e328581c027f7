"""Recipes to and from YAML, sizes, and what is refused."""

from __future__ import annotations

import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lean_merge.errors import RecipeError
from lean_merge.plan.parameters import build_method
from lean_merge.recipe import Expert, MergeRecipe
from lean_merge.sizes import format_size, parse_size

names = st.text(string.ascii_letters + "/-._@ é:#", min_size=1, max_size=20)
values = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False), st.integers(-9, 9), st.booleans(), names
)
parameters = st.dictionaries(names, values, max_size=3).map(lambda d: tuple(d.items()))


@given(
    base=names,
    mllm=names,
    experts=st.lists(st.builds(Expert, names, parameters), min_size=1, max_size=3),
    given_parameters=parameters,
    out_dtype=st.sampled_from(["auto", "float32", "bfloat16", "float16"]),
    seed=st.integers(0, 2**40),
    shard_size=st.integers(1, 10**12),
    partial=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_a_recipe_survives_yaml(
    base, mllm, experts, given_parameters, out_dtype, seed, shard_size, partial
) -> None:
    recipe = MergeRecipe(
        base_model=base,
        mllm_model=mllm,
        experts=tuple(experts),
        parameters=given_parameters,
        out_dtype=out_dtype,
        seed=seed,
        shard_size=shard_size,
        allow_partial=partial,
    )
    assert MergeRecipe.from_yaml(recipe.to_yaml()) == recipe
    assert hash(MergeRecipe.from_yaml(recipe.to_yaml())) == hash(recipe)


def test_python_users_may_write_lists_mappings_and_sizes_in_words() -> None:
    loose = MergeRecipe(
        base_model="b",
        mllm_model="m",
        experts=["e", {"model": "f", "parameters": {"threshold": 0.3}}],  # type: ignore[arg-type]
        parameters={"stages": ["select", "project"]},  # type: ignore[arg-type]
        shard_size="2GB",  # type: ignore[arg-type]
    )
    strict = MergeRecipe(
        base_model="b",
        mllm_model="m",
        experts=(Expert("e"), Expert("f", (("threshold", 0.3),))),
        parameters=(("stages", ("select", "project")),),
        shard_size=2 * 10**9,
    )
    assert loose == strict and hash(loose) == hash(strict)


RECIPE = """
merge_method: ip_merging
base_model: meta-llama/Llama-2-7b-hf
mllm_model: llava-hf/llava-1.5-7b-hf
experts:
  - model: meta-math/MetaMath-7B-V1.0
    parameters: {threshold: 0.3, scale: 2}
  - model: other/expert
parameters: {temperature: 16, nuclear: full, stages: [select, rescale, project]}
shard_size: 2GB
"""


def test_the_readmes_recipe_gives_each_expert_its_parameters() -> None:
    recipe = MergeRecipe.from_yaml(RECIPE)
    first, second = build_method(recipe).parameters
    assert (first.threshold, first.scale, first.temperature) == (0.3, 2.0, 16.0)
    assert (second.threshold, second.scale, second.temperature) == (0.4, 1.0, 16.0)
    assert recipe.shard_size == 2 * 10**9


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("base_model", "base_modle"), "base_model"),
        (("temperature", "temprature"), "temperature"),
        (("scale: 2", "scales: 2"), "scale"),
        (("threshold: 0.3", "temperature: 3"), "threshold|scale"),
        (("ip_merging", "ip_mergin"), "ip_merging"),
        (("nuclear: full", "nuclear: 3"), "nuclear"),
        (("temperature: 16", "temperature: [1]"), "temperature"),
        (("threshold: 0.3", "threshold: 3.0"), "threshold"),
        (("2GB", "2 parsecs"), "size"),
        (("2GB", "-1"), "size"),
        (("experts:", "experts: 5\nx:"), "."),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else "",
)
def test_what_makes_no_sense_is_refused_naming_the_nearest(
    change: tuple[str, str], words: str
) -> None:
    text = RECIPE.replace(*change)
    assert text != RECIPE
    with pytest.raises(RecipeError, match=words):
        build_method(MergeRecipe.from_yaml(text))


@pytest.mark.parametrize("text", ["", "- a", "a: [", "!!python/object/apply:os.system [ls]", "5"])
def test_yaml_that_is_no_recipe_is_refused(text: str) -> None:
    with pytest.raises(RecipeError):
        MergeRecipe.from_yaml(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("5GiB", 5 * 2**30),
        ("500MB", 5 * 10**8),
        ("1.5 kib", 1536),
        ("1024", 1024),
        (7, 7),
    ],
)
def test_sizes_as_people_write_them(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5XB", "0", "-5GB", "1e9", True, 0])
def test_sizes_that_make_no_sense(text: str | int) -> None:
    with pytest.raises(RecipeError):
        parse_size(text)


def test_sizes_for_people() -> None:
    assert [format_size(n) for n in (5, 2048, 3 << 20, 5 << 40)] == [
        "5 B",
        "2.0 KiB",
        "3.0 MiB",
        "5.0 TiB",
    ]
