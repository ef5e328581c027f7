"""mergekit's recipes in our words: every value at every tensor, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracle
from support.families import Triple, as_matrix, load, write_triple
from support.oracle import Matrix
from typer.testing import CliRunner

from lean_merge import Resources, merge
from lean_merge.cli.app import app
from lean_merge.errors import RecipeError
from lean_merge.plan.parameters import MethodTable
from lean_merge.plan.scope import Position
from lean_merge.recipe import MergeRecipe
from lean_merge.recipe.mergekit import translated

LAYERS = 5
LEAVES = ("self_attn.q_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm")
TENSORS = [
    *((f"layers.{n}.{leaf}", n) for n in range(LAYERS) for leaf in LEAVES),
    *((name, None) for name in ("embed_tokens", "norm", "lm_head")),
]


def table_of(config: dict[str, Any], **options: Any) -> MethodTable:
    return MethodTable(MergeRecipe.from_dict(translated(config, **options).recipe))


def their_name(canonical: str) -> str:
    return f"{'' if canonical == 'lm_head' else 'model.'}{canonical}.weight"


def ours_at(table: MethodTable, canonical: str) -> Any:
    """Our method at one tensor."""
    return table.at(Position(canonical, their_name(canonical), LAYERS, "_proj" in canonical))


# --- what mergekit says, by its own rules ---------------------------------------------------


def theirs(scopes: list[dict[str, Any]], parameter: str, name: str, place: float) -> Any:
    """The value of a parameter: the first scope that has one for this tensor."""
    for scope in scopes:
        if parameter in scope:
            found = evaluated(scope[parameter], name, place)
            if found is not None:
                return found
    return None


def evaluated(setting: Any, name: str, place: float) -> Any:
    if isinstance(setting, dict):
        setting = [setting]
    if not isinstance(setting, list):
        return setting
    if setting and isinstance(setting[0], dict):
        for entry in setting:
            words = entry.get("filter")
            if words in (None, "*") or words in name:
                return evaluated(entry["value"], name, place)
        return None
    position = place * (len(setting) - 1)
    before = int(position)
    after = min(before + 1, len(setting) - 1)
    return (1 - (position - before)) * setting[before] + (position - before) * setting[after]


number = st.integers(1, 99).map(lambda each: each / 100)
value = st.one_of(number, st.lists(number, min_size=1, max_size=4))
words = st.sampled_from(
    "* self_attn mlp norm layernorm q_proj.weight model.norm lm_head embed_tokens layers.1. "
    "model.layers.0. model .mlp.".split()
)
conditions = st.lists(st.fixed_dictionaries({"filter": words, "value": value}), max_size=3)
setting = st.one_of(value, conditions.filter(bool))


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """A recipe of two models whose parameters stand at several places."""
    ends = draw(st.sampled_from([[], [LAYERS], [2, LAYERS], [1, 4, LAYERS]]))
    whole = {name: draw(setting) for name in ("weight", "density", "lambda") if draw(st.booleans())}
    rest = draw(value)
    whole["weight"] = [
        *([] if "weight" not in whole or not conditional(whole["weight"]) else whole["weight"]),
        {"value": rest},
    ]
    config: dict[str, Any] = {"merge_method": "ties", "base_model": "b", "parameters": whole}

    def of_model() -> dict[str, Any]:
        names = ("weight", "density")
        return {name: draw(setting) for name in names if draw(st.booleans())}

    if not ends:
        config["models"] = [{"model": each, "parameters": of_model()} for each in ("x", "y")]
        return config
    config["slices"] = []
    for start, end in zip([0, *ends], ends, strict=False):
        sources = [
            {"model": each, "layer_range": [start, end], "parameters": of_model()}
            for each in ("b", "x", "y")
        ]
        own = {"lambda": draw(setting)} if draw(st.booleans()) else {}
        config["slices"].append({"sources": sources, "parameters": own})
    return config


def conditional(given_setting: Any) -> bool:
    return isinstance(given_setting, list) and isinstance(given_setting[0], dict)


@settings(deadline=None, max_examples=60)
@given(configs())
def test_every_value_at_every_tensor_is_mergekits(config: dict[str, Any]):
    table = table_of(config, mllm="m")
    for canonical, layer in TENSORS:
        method, name = ours_at(table, canonical), their_name(canonical)
        slices = config.get("slices") or [{"sources": config["models"]}]
        first, last, own, place = 0, LAYERS, slices[0], 0.0
        if canonical in ("norm", "lm_head"):
            own = slices[-1]
        for each in slices if layer is not None else ():
            first, last = each["sources"][0].get("layer_range", [0, LAYERS])
            if first <= layer < last:
                own, length = each, last - first
                place = (layer - first) / (length - 1) if length > 1 else 1.0
        outer = [own.get("parameters", {}), config["parameters"]]
        by_model = {each["model"]: each["parameters"] for each in own["sources"]}
        scale = theirs(outer, "lambda", name, place)
        assert method.common.scale == pytest.approx(1.0 if scale is None else scale)
        for model, ours in zip(("x", "y"), method.parameters, strict=True):
            scopes = [by_model[model], *outer]
            density = theirs(scopes, "density", name, place)
            assert ours.weight == pytest.approx(theirs(scopes, "weight", name, place))
            assert ours.density == pytest.approx(1.0 if density is None else density)


# --- examples -------------------------------------------------------------------------------

ALIKE = {
    "ties": {"normalize": True, "density": 1.0},
    "breadcrumbs": {"normalize": False, "density": 1.0, "gamma": 0.01},
    "breadcrumbs_ties": {"normalize": False, "density": 1.0, "gamma": 0.01},
    "dare_linear": {"normalize": False, "density": 1.0, "rescale": "l1"},
    "dare_ties": {"normalize": False, "density": 1.0, "rescale": "l1"},
    "della": {"normalize": True, "density": 1.0, "rescale": "l1", "epsilon": 0.15},
    "della_linear": {"normalize": False, "density": 1.0, "rescale": "l1", "epsilon": 0.15},
    "task_arithmetic": {"normalize": False, "weight": 0.5, "exact": True},
}


@pytest.mark.parametrize("method", ALIKE)
def test_defaults_are_mergekits(method: str):
    config = {
        "merge_method": method,
        "base_model": "b",
        "models": [{"model": "b"}, {"model": "x", "parameters": {"weight": 0.5}}],
        "parameters": {"int8_mask": True, "lambda": "1e-1"},
        "dtype": "bfloat16",
        "tokenizer_source": "base",
    }
    recipe = MergeRecipe.from_dict(translated(config, mllm="m").recipe)
    own = ours_at(MethodTable(recipe), "norm").parameters
    assert len(own) == 1 and own[0].scale == 0.1
    for name, wanted in {"weight": 0.5, **ALIKE[method]}.items():
        assert getattr(own[0], name) == wanted
    assert (recipe.scope, recipe.out_dtype, recipe.mllm_model) == ("language", "bfloat16", "m")


def linear(*models: tuple[str, float], **more: Any) -> dict[str, Any]:
    listed = [{"model": name, "parameters": {"weight": weight}} for name, weight in models]
    return {"merge_method": "linear", "models": listed, **more}


def test_linear_makes_the_first_model_the_receiver_or_lets_the_mllm_join():
    config = linear(("x", 1.0), ("y", 3.0))
    alone = translated(config).recipe
    assert (alone["base_model"], alone["parameters"]) == (
        "x",
        {"normalize": True, "mllm_weight": 1.0},
    )
    assert alone["experts"] == [{"model": "y", "parameters": {"weight": 3.0}}]
    beside = translated(config, mllm="m").recipe
    assert beside["base_model"] == "x" and beside["parameters"] == {"normalize": True}
    assert [each["model"] for each in beside["experts"]] == ["x", "y"]
    whole = linear(("x", 0.25), ("y", 0.75), parameters={"normalize": False})
    assert translated(whole).recipe["parameters"] == {"normalize": False}
    with pytest.raises(RecipeError, match=r"normalize: false .* these sum to 1\.5"):
        translated(linear(("x", 0.75), ("y", 0.75), parameters={"normalize": False}))


def test_an_adapter_of_the_base_is_an_expert():
    config = {"merge_method": "ties", "base_model": "b", "parameters": {"weight": 1}}
    found = translated({**config, "models": [{"model": "b"}, {"model": "b+lora"}]}).recipe
    assert [each["model"] for each in found["experts"]] == ["lora"]
    with pytest.raises(RecipeError, match="adapter of a model other than the base_model"):
        translated({**config, "models": [{"model": "x+lora"}]})


TIES: dict[str, Any] = {
    "merge_method": "ties",
    "base_model": "b",
    "models": [{"model": "x", "parameters": {"weight": 1.0}}],
}


def sliced(*ranges: tuple[int, int], other: tuple[int, int] | None = None) -> dict[str, Any]:
    """A recipe of two models by slices."""
    slices = [
        {"sources": [{"model": "b", "layer_range": [*own]}, {"model": "x", "layer_range": [*own]}]}
        for own in ranges
    ]
    if other is not None:
        slices[-1]["sources"][-1]["layer_range"] = [*other]
    rest = {"merge_method": "ties", "base_model": "b", "parameters": {"weight": 1}}
    return {**rest, "slices": slices}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({**TIES, "merge_method": "nuslerp"}, "merge_method: .* has linear, slerp"),
        ({**TIES, "merge_method": "passthrough"}, "merge_method"),
        ({**TIES, "tokenizer_source": "union"}, "tokenizer_source: 'union' would change"),
        ({**TIES, "tokenizer": {"source": "union"}}, "tokenizer: changing a tokenizer"),
        ({**TIES, "chat_template": "auto"}, "chat_template"),
        ({**TIES, "modules": {}}, "modules"),
        ({**TIES, "gate_mode": "hidden"}, "gate_mode: building a mixture of experts"),
        ({**TIES, "dtype": "float64"}, "dtype must be one of"),
        ({**TIES, "out_dtype": "int8"}, "out_dtype must be one of"),
        ({**TIES, "parameter": {}}, "'parameter' .* 'parameters'"),
        ({**TIES, "parameters": {"densty": 1}}, "'densty' .* 'density'"),
        ({**TIES, "parameters": {"gamma": 1}}, "'gamma' in parameters of mergekit's ties"),
        ({**TIES, "parameters": {"rescale": True}}, "rescale: .* not for ties"),
        ({**TIES, "parameters": {"density": {"filter": "mlp"}}}, "density must be a number"),
        ({**TIES, "parameters": {"density": [True, 0.5]}}, "density: .* no list of numbers"),
        ({**TIES, "models": [{"model": "x", "parameters": {"lambda": 1}}]}, "'lambda'"),
        ({**TIES, "models": [{"model": "x", "weight": 1}]}, "'weight' in models"),
        ({**TIES, "models": [{"model": "x"}]}, "weight of 'x': .* a value for every tensor"),
        ({**TIES, "models": [{"model": "x"}, {"model": "x"}]}, "'x' stands there twice"),
        ({**TIES, "models": [{"model": "b"}]}, "models: there is none beside"),
        ({**TIES, "models": []}, "either models or slices"),
        ({**TIES, **sliced((0, 4))}, "either models or slices"),
        ({n: v for n, v in TIES.items() if n != "base_model"}, "base_model: ties needs"),
        (sliced((1, 4)), r"slices\[0\]: layer_range must go on where the slice before ends"),
        (sliced((0, 2), (1, 4)), r"slices\[1\]: layer_range must go on"),
        (sliced((0, 2), (2, 4), other=(4, 6)), r"slices\[1\]: .*be the same for all models"),
        (sliced((0, 0)), "layer_range must be two layers"),
    ],
    ids=str,
)
def test_what_lean_merge_cannot_do_is_refused_by_its_key(config: dict[str, Any], words: str):
    with pytest.raises(RecipeError, match=words):
        translated(config)


# --- through the command line ---------------------------------------------------------------

SHAPES = {f"layers.{n}.self_attn.q_proj": (24, 16) for n in range(3)}


@pytest.fixture(scope="module")
def triple(tmp_path_factory: pytest.TempPathFactory) -> Triple:
    return write_triple(tmp_path_factory.mktemp("mergekit") / "in", SHAPES)


def planned(triple: Triple, folder: Path, config: dict[str, Any], *flags: str) -> str:
    """What `lean-merge plan` says, or the error that it ends with."""
    file = folder / "config.yml"
    text = yaml.safe_dump(config).replace("model: x", f"model: {triple.experts[0]}")
    file.write_text(re.sub("(model|base_model): b\n", rf"\1: {triple.base}\n", text))
    command = ["plan", str(file), "--mllm", str(triple.mllm), "--device", "cpu", *flags]
    done = CliRunner().invoke(app, command)
    return str(done.exception) if done.exception else done.output


def test_the_command_line_reads_it_and_knows_the_layers(triple: Triple, tmp_path: Path):
    config = {**TIES, "parameters": {"density": [0.2, 0.4]}}
    assert "ties" in planned(triple, tmp_path, config)
    assert "ties" in planned(triple, tmp_path, sliced((0, 1), (1, 3)))
    said = planned(triple, tmp_path, sliced((0, 2)))
    assert "layer_range ends at layer 2, and the models have 3 layers" in said
    said = planned(triple, tmp_path, config, "--set", "mllm_weight=-1")
    assert "mllm_weight must lie in 0 .. 100" in said


# --- merges of text models ------------------------------------------------------------------

WHOLE: dict[str, dict[str, Any]] = {
    "linear": {},
    "slerp": {"t": 0.3},
    "task_arithmetic": {"lambda": 0.5},
    "ties": {"density": 0.5},
    "breadcrumbs": {"density": 0.5, "gamma": 0.1},
    "dare_linear": {"density": 0.5},
    "della": {"density": 0.5},
}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Triple:
    return write_triple(tmp_path_factory.mktemp("family") / "in", SHAPES, experts=2)


@pytest.mark.parametrize("method", WHOLE)
def test_text_models_merge_to_the_formula(family: Triple, tmp_path: Path, method: str):
    """Without an MLLM, norms included, as mergekit defines it."""
    weights = {str(family.experts[0]): 0.5, str(family.experts[1]): 0.25}
    models = [{"model": each, "parameters": {"weight": own}} for each, own in weights.items()]
    if method == "linear":
        models.append({"model": str(family.base), "parameters": {"weight": 1.0}})
    if method == "slerp":
        models = [{"model": each} for each in (str(family.base), str(family.experts[0]))]
    config = {"merge_method": method, "base_model": str(family.base), "models": models}
    config["parameters"] = WHOLE[method]
    recipe = MergeRecipe.from_dict(translated(config).recipe)
    found = load(merge(recipe, tmp_path / "out", resources=Resources(device="cpu")).path)
    base, *experts = (load(folder) for folder in (family.base, *family.experts))
    for name, tensor in found.items():
        ours = name.removeprefix("model.").removesuffix(".weight")
        roles = [as_matrix(each[name]) for each in (base, *experts)]
        wanted = by_the_book(method, ours, [each.reshape(-1, each.shape[-1]) for each in roles])
        stored = as_matrix(tensor).reshape(wanted.shape)
        np.testing.assert_allclose(stored, wanted, rtol=3e-7, atol=3e-8)


def by_the_book(method: str, ours: str, roles: list[Matrix]) -> Matrix:
    """The merged weight; the experts have the weights 0.5 and 0.25."""
    base, *experts = roles
    if method == "linear":
        return (base + 0.5 * experts[0] + 0.25 * experts[1]) / 1.75
    if method == "slerp":
        return oracle.slerp(base, experts[0], 0.3)
    task_vectors = [each - base for each in experts]
    if method == "task_arithmetic":
        return base + 0.5 * (0.5 * task_vectors[0] + 0.25 * task_vectors[1])
    sparse = []
    for role, each in enumerate(task_vectors, start=1):
        chance = oracle.uniform(each.shape, seed=0, name=ours, purpose=f"drop {role}")
        probabilities: Any = 0.5
        if method == "della":
            probabilities = oracle.della_probabilities(each, 0.5, 0.15)
        if method == "ties":
            sparse.append(np.where(np.abs(each) >= oracle.magnitude_kept([each], 0.5), each, 0))
        elif method == "breadcrumbs":
            sparse.append(oracle.in_band(each, 0.5, 0.1))
        else:
            sparse.append(oracle.dropped(each, probabilities, chance, "l1"))
    is_sum = method in ("breadcrumbs", "dare_linear")
    return base + oracle.merged(
        sparse, weights=[0.5, 0.25], elects=not is_sum, normalize=not is_sum
    )
