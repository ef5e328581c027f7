"""`names` of a recipe: what structure does not tell, rules do, and wrong rules are refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoint_files import decoder_shapes, save_checkpoint
from support.families import LEAVES, load, write_triple

from lean_merge import CoverageError, MergeRecipe, RecipeError, open_checkpoint, plan
from lean_merge.checkpoints import Checkpoint
from lean_merge.mapping import map_roles
from lean_merge.mapping.structure import split_name

FORMATS = Path(__file__).parents[2] / "docs" / "formats.md"
SHAPES = {f"layers.{layer}.{leaf}": (48, 48) for layer in range(2) for leaf in LEAVES}
TRUNK = (
    (r"^lm\.trunk\.(\d+)\.attn\.(.)\.weight$", r"model.layers.\1.self_attn.\2_proj.weight"),
    (r"^lm\.trunk\.(\d+)\.ffn\.(.*)$", r"model.layers.\1.mlp.\2"),
)


def odd(role: str, tensors: dict[str, torch.Tensor]) -> None:
    """The MLLM's names as nobody would guess them, and a twin of its language model."""
    if role != "mllm":
        return
    for name in list(tensors):
        new = re.sub(r"^model\.layers\.(\d+)\.self_attn\.(.)_proj", r"lm.trunk.\1.attn.\2", name)
        new = re.sub(r"^model\.layers\.(\d+)\.mlp", r"lm.trunk.\1.ffn", new)
        tensors[new] = tensors.pop(name)


def documented() -> list[dict[str, Any]]:
    """The `names` of the page's examples."""
    text = FORMATS.read_text(encoding="utf-8")
    recipes = map(yaml.safe_load, re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL))
    return [recipe["names"] for recipe in recipes if "names" in recipe]


def test_the_documented_rules_merge_an_odd_model_as_its_plain_twin(tmp_path: Path):
    rules = documented()[0]
    assert tuple(rules.items()) == TRUNK
    plain = write_triple(tmp_path / "plain", SHAPES)
    triple = write_triple(tmp_path / "odd", SHAPES, edit=odd)
    with pytest.raises(CoverageError, match="say which tensors are the base's with names: in the"):
        triple.merge(tmp_path / "no")
    wanted = load(plain.merge(tmp_path / "wanted").path)
    found = load(triple.merge(tmp_path / "found", names=rules).path)
    assert found.keys() == load(triple.mllm).keys()
    odd("mllm", wanted)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def test_rules_of_every_role(tmp_path: Path):
    def other(role: str, tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[f"{role}.{name.replace('q_proj', 'query')}"] = tensors.pop(name)

    shapes = {name: (48, 48) for name in SHAPES if name.startswith("layers.0.")}
    triple = write_triple(tmp_path / "in", shapes, experts=2, edit=other)
    names = {
        role: {
            rf"^{role.replace(' ', '')}\.(.*)query(.*)": r"\1q_proj\2",
            rf"^{role.replace(' ', '')}\.": "",
        }
        for role in ("base", "mllm", "expert 1", "expert 2")
    }
    work = plan(triple.recipe(names=names))
    assert len(work.weights) == len(shapes)
    assert {task.tensor.name.split(".")[0] for task in work.weights} == {"mllm"}


# --- the recipe ---------------------------------------------------------------------------


def recipe(names: Any, experts: int = 1) -> MergeRecipe:
    return MergeRecipe("b", "m", tuple(f"e{n}" for n in range(experts)), names=names)


@pytest.mark.parametrize(
    "names", [{}, dict(TRUNK), {"mllm": dict(TRUNK)}, {"base": dict(TRUNK), "expert 2": {"a": "b"}}]
)
def test_rules_survive_yaml_and_can_be_hashed(names: dict[str, Any]):
    made = recipe(names, experts=2)
    assert MergeRecipe.from_yaml(made.to_yaml()) == made
    assert hash(made) == hash(recipe(names, experts=2))
    assert made.to_dict().get("names", {}) == names
    by_role = made.name_rules()
    nested = any(isinstance(each, dict) for each in names.values())
    wanted = names if nested else {"mllm": names} if names else {}
    assert {role: dict(rules) for role, rules in by_role.items()} == wanted


def test_the_documented_recipes_are_valid():
    assert len(documented()) == 2
    for names in documented():
        assert recipe(names, experts=2).name_rules()


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["a"], "names must be a mapping"),
        ({"a(": "b"}, "is not a regular expression"),
        ({"a": r"\1"}, "invalid group reference"),
        ({"(?P<n>a)": r"\g<m>"}, "unknown group name"),
        ({"a": r"\q"}, "bad escape"),
        ({"a": 5}, "names"),
        ({"mllm": {"a": 5}}, "must lead to a name"),
        ({"mllm": ["a"]}, r"names\.mllm must be a mapping"),
        ({"mlm": {"a": "b"}}, "nearest known one is 'mllm'"),
        ({"expert 2": {"a": "b"}}, "nearest known one is 'expert 1'"),
        ({"a": "b", "mllm": {"a": "b"}}, "Unknown key 'a'"),
    ],
)
def test_rules_that_make_no_sense_are_refused(names: Any, words: str):
    with pytest.raises(RecipeError, match=words):
        recipe(names)


# --- against checkpoints ------------------------------------------------------------------

Build = Callable[..., Checkpoint]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    def make(name: str, shapes: dict[str, tuple[int, ...]]) -> Checkpoint:
        return open_checkpoint(save_checkpoint(tmp_path / name, shapes))

    return make


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ((("^nothing", "x"),), r"pattern '\^nothing' is the first to fit for no tensor of .*/m"),
        (((r"^text\.", "model."), (r"^text\.layers", "x")), r"'\^text.*layers' is the first"),
        (((r"\.\d+\.", ".0."),), r"both become 'text\.layers\.0\."),
        (((r"[qk]_proj\.weight", r"x"),), r"become 'text\.layers\.0\.self_attn\.x'; make the pat"),
    ],
)
def test_rules_that_do_not_fit_the_checkpoint_are_refused(build: Build, rules: Any, words: str):
    base, mllm = build("b", decoder_shapes()), build("m", decoder_shapes("text."))
    with pytest.raises(RecipeError, match=words):
        map_roles(base, mllm, [base], names={"mllm": rules})


def test_a_rule_may_not_join_a_tensor_with_one_it_leaves_alone(build: Build):
    base = build("b", decoder_shapes())
    mllm = build("m", decoder_shapes("model.") | decoder_shapes("text."))
    with pytest.raises(RecipeError, match="both become 'model"):
        map_roles(base, mllm, [base], names={"mllm": ((r"^text\.", "model."),)})


def test_a_weight_of_another_shape_is_named_in_spite_of_rules(build: Build):
    base = build("b", decoder_shapes())
    mllm = build("m", decoder_shapes("text.", inner=40))
    with pytest.raises(CoverageError, match=r"mlp\.gate_proj: the MLLM has the shape \[40, 16\]"):
        map_roles(base, mllm, [base], names={"mllm": ((r"^text\.", "model."),)})


def test_rules_choose_between_language_models_that_are_equally_likely(build: Build):
    base = build("b", decoder_shapes())
    mllm = build("m", decoder_shapes("first.") | decoder_shapes("second."))
    with pytest.raises(CoverageError) as caught:
        map_roles(base, mllm, [base])
    assert "'first.layers.', 'second.layers.'" in str(caught.value)
    for one in ("first", "second"):
        coverage = map_roles(base, mllm, [base], names={"mllm": ((rf"^{one}\.", "model."),)})
        assert len(coverage.weights) == 14
        assert all(weight.mllm.name.startswith(one) for weight in coverage.weights)


# --- other words for layers ---------------------------------------------------------------


@pytest.mark.parametrize("container", ["layers", "blocks", "h", "decoder.block"])
def test_layers_may_be_called_anything(build: Build, container: str):
    base = build("b", decoder_shapes())
    renamed = {
        name.replace("model.layers", f"lm.{container}"): shape
        for name, shape in decoder_shapes().items()
    }
    tower = {f"tower.{n}.proj.weight": (16, 16) for n in range(3)}
    coverage = map_roles(base, build("m", renamed | tower), [base])
    assert coverage.prefixes["mllm"] == f"lm.{container}."
    assert len(coverage.weights) == 14


@given(
    st.lists(st.sampled_from(["a", "layers", "experts", "7", "12", "x1"]), min_size=1, max_size=8)
)
def test_a_name_is_split_at_the_layers_number(parts: list[str]):
    name = ".".join(parts)
    found = split_name(name)
    numbered = [at for at in range(len(parts) - 2) if parts[at + 1].isdigit()]
    if found is None:
        assert not numbered
        return
    prefix, layer, rest = found
    assert f"{prefix}{layer}.{rest}" == name
    at = prefix.count(".") - 1
    layered = [each for each in numbered if parts[each] == "layers"]
    assert at == (layered or numbered)[0]
