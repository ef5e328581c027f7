"""Merging all of a language model, and text models without an MLLM, against plain arithmetic."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from support.families import Triple, contents, load, write_triple
from support.oracle import magnitude_kept, ties
from support.scenes import Stop, stopping
from torch import Tensor

from lean_merge import (
    Expert,
    MergeRecipe,
    MergeResult,
    RecipeError,
    Resources,
    analyze,
    merge,
    plan,
    stream,
    verify,
)

CPU = Resources(device="cpu", threads=2)
ADD: dict[str, Any] = {"merge_method": "task_arithmetic", "scale": 0.5}
WIDTH = 16
Models = Mapping[str, Mapping[str, Tensor]]


def numbers(*words: object, shape: Sequence[int]) -> Tensor:
    """Random numbers that depend on the words alone."""
    seed = torch.Generator().manual_seed(sum(repr(words).encode()) * 7919 % 2**31)
    return torch.randn(tuple(shape), generator=seed)


def tuned(role: str, *words: object, shape: Sequence[int]) -> Tensor:
    """The numbers of the base, to which every other role adds some of its own."""
    base = numbers("base", *words, shape=shape)
    return base if role == "base" else base + 0.3 * numbers(role, *words, shape=shape)


def language_model(
    role: str, *, rows: int = 20, tied: bool = False, fused: bool = False, prefix: str = "model."
) -> dict[str, Tensor]:
    """One layer with norms and biases, a final norm, a router, embeddings and a head."""
    at = f"{prefix}layers.0."
    shapes: dict[str, tuple[int, ...]] = {
        f"{at}self_attn.o_proj.weight": (WIDTH, WIDTH),
        f"{at}mlp.gate.weight": (3, WIDTH),
        f"{at}input_layernorm.weight": (WIDTH,),
        f"{prefix}norm.weight": (WIDTH,),
    }
    made = {name: tuned(role, name[len(prefix) :], shape=shape) for name, shape in shapes.items()}
    for kind, shape in (("weight", (8, WIDTH)), ("bias", (8,))):
        parts = [tuned(role, leaf, kind, shape=shape) for leaf in "qkv"]
        if fused:
            made[f"{at}self_attn.qkv_proj.{kind}"] = torch.cat(parts)
        else:
            for leaf, part in zip("qkv", parts, strict=True):
                made[f"{at}self_attn.{leaf}_proj.{kind}"] = part
    made[f"{prefix}embed_tokens.weight"] = tuned(role, "embed", shape=(rows, WIDTH))
    if not tied:
        head = "lm_head.weight" if prefix == "model." else "language_model.lm_head.weight"
        made[head] = tuned(role, "head", shape=(rows, WIDTH))
    return made


def save(folder: Path, models: Models, *, tied: Sequence[str] = ()) -> Triple:
    """Checkpoints of these tensors, each in a folder named after its role."""
    for role, tensors in models.items():
        (folder / role).mkdir(parents=True)
        config = {
            "model_type": "llama",
            "tie_word_embeddings": role in tied,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "hidden_size": 8,
        }
        (folder / role / "config.json").write_text(json.dumps(config))
        save_file(dict(tensors), folder / role / "model.safetensors", metadata={"format": "pt"})
    experts = tuple(folder / role for role in models if role.startswith("expert"))
    return Triple(folder / "base", folder / "mllm", experts, ())


def text_recipe(triple: Triple, **options: Any) -> MergeRecipe:
    """The recipe of a merge of the base and the experts alone."""
    recipe = triple.recipe(**options)
    return MergeRecipe(**{**_fields(recipe), "mllm_model": None})


def _fields(recipe: MergeRecipe) -> dict[str, Any]:
    return {name: getattr(recipe, name) for name in MergeRecipe.__dataclass_fields__}


def sum_of(mllm: Tensor, base: Tensor, *experts: Tensor) -> Tensor:
    """W_mllm + 0.5 * the sum of the task vectors, in float64."""
    return mllm.double() + 0.5 * sum(expert.double() - base.double() for expert in experts)


def warnings_of(result: MergeResult) -> str:
    """All warnings of the report."""
    return "\n".join(result.report["warnings"])


# --- everything that a language model has -----------------------------------------------------

NAMES = {
    "llava": ("model.language_model.", "lm_head.weight"),
    "llava-old": ("language_model.model.", "language_model.lm_head.weight"),
    "qwen2-vl": ("model.", "lm_head.weight"),
    "phi3": ("model.", "lm_head.weight"),
}


@pytest.mark.parametrize("name", NAMES)
def test_all_of_a_language_model_is_merged_and_nothing_else(
    tmp_path: Path, family: Callable[..., Triple], name: str
):
    """In real classes, whose vocabularies differ by the tokens that the MLLM has added."""
    triple, (prefix, head) = family(name), NAMES[name]
    result = triple.merge(tmp_path / "out", scope="language", **ADD)
    base, mllm, out = load(triple.base), load(triple.mllm), load(result.path)
    expert = load(triple.experts[0])
    merged = set()
    for text, ours in base.items():
        own = head if text == "lm_head.weight" else prefix + text.removeprefix("model.")
        rows = min(len(ours), len(mllm[own]))
        wanted = sum_of(mllm[own][:rows], ours[:rows], expert[text][:rows])
        torch.testing.assert_close(out[own][:rows].double(), wanted, rtol=0, atol=1e-6)
        assert torch.equal(out[own][rows:], mllm[own][rows:]), own
        assert not torch.equal(out[own], mllm[own])
        merged.add(own)
    for own in mllm.keys() - merged:
        assert torch.equal(out[own], mllm[own]), own
    assert result.report["counts"]["merged"] == len(merged)
    assert verify(result.path, full=True, resources=CPU).ok


@settings(
    deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.tuples(*[st.integers(17, 24)] * 3),
    tied=st.sets(st.sampled_from(["base", "mllm", "expert1"])),
    fused=st.sets(st.sampled_from(["base", "mllm", "expert1"])),
)
def test_vocabularies_of_any_size_tied_or_not(
    tmp_path_factory: pytest.TempPathFactory,
    rows: tuple[int, int, int],
    tied: set[str],
    fused: set[str],
):
    folder = tmp_path_factory.mktemp("vocabulary")
    models = {
        role: language_model(
            role,
            rows=count,
            tied=role in tied,
            fused=role in fused,
            prefix="language_model.model." if role == "mllm" else "model.",
        )
        for role, count in zip(("base", "mllm", "expert1"), rows, strict=True)
    }
    triple = save(folder, models, tied=sorted(tied))
    result = triple.merge(folder / "out", scope="language", **ADD)
    out, least = load(result.path), min(rows)
    text = {role: models[role] for role in ("base", "expert1")}
    for own, before in models["mllm"].items():
        vocabulary = own.endswith(("embed_tokens.weight", "lm_head.weight"))
        count = least if vocabulary else len(before)
        given_by = [_of_text(each, own, role in fused) for role, each in text.items()]
        if "qkv_proj" in own or "_proj.bias" in own or "_proj.weight" in own:
            count = len(before)
        wanted = sum_of(before[:count], *(each[:count] for each in given_by))
        torch.testing.assert_close(out[own][:count].double(), wanted, rtol=0, atol=1e-6)
        assert torch.equal(out[own][count:], before[count:])
    heads = [role for role in ("base", "expert1") if role not in tied]
    assert ("the MLLM's head is its embedding" in warnings_of(result)) is bool(
        "mllm" in tied and heads
    )
    added = [row for row in result.report["weights"] if row["weight"].endswith(".added")]
    assert {row["reason"] for row in added} <= {"rows of tokens that not all models have"}
    assert bool(added) is (rows[1] > least)


def _of_text(tensors: Mapping[str, Tensor], own: str, fused: bool) -> Tensor:
    """What a text model has in the place of the MLLM's tensor, fused or tied as it may be."""
    name = own.replace("language_model.model.", "model.").removeprefix("language_model.")
    if name == "lm_head.weight" and name not in tensors:
        return tensors["model.embed_tokens.weight"]
    if name in tensors:
        return tensors[name]
    stem, _, kind = name.rpartition(".")
    parent, _, leaf = stem.rpartition(".")
    if leaf == "qkv_proj":
        return torch.cat([tensors[f"{parent}.{each}_proj.{kind}"] for each in "qkv"])
    assert fused
    place = 8 * "qkv".index(leaf[0])
    return tensors[f"{parent}.qkv_proj.{kind}"][place : place + 8]


def test_what_does_not_agree_stays_and_is_told(tmp_path: Path):
    models = {role: language_model(role) for role in ("base", "mllm", "expert1")}
    del models["expert1"]["model.norm.weight"]
    models["base"]["model.layers.0.input_layernorm.weight"] = torch.ones(4)
    models["mllm"]["model.layers.0.self_attn.q_norm.weight"] = torch.ones(4)
    models["mllm"]["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    models["mllm"]["model.mm_projector.weight"] = torch.ones(4, 4)
    models["base"]["model.layers.0.counts"] = torch.ones(3, dtype=torch.int64)
    models["mllm"]["model.layers.0.counts"] = torch.ones(3, dtype=torch.int64)
    result = save(tmp_path, models).merge(tmp_path / "out", scope="language", **ADD)
    told = warnings_of(result)
    assert "such as norm, stay as the MLLM has them: the expert 1 lacks them." in told
    assert "such as layers.0.input_layernorm, stay as the MLLM has them: their shapes" in told
    assert "such as layers.0.self_attn.q_norm, stay" in told and "the base lacks them" in told
    assert "has the dtype I64, which cannot be merged" in told
    assert "mm_projector" not in told and "inv_freq" not in told
    out = load(result.path)
    for name in ("norm.weight", "layers.0.input_layernorm.weight", "mm_projector.weight"):
        assert torch.equal(out[f"model.{name}"], models["mllm"][f"model.{name}"])


def _tokenizer(folder: Path, ids: Mapping[str, int]) -> None:
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": dict(ids)}}))


@pytest.mark.parametrize("moved", [False, True])
def test_rows_of_the_mllms_own_tokens_stay_even_where_the_base_pads(tmp_path: Path, moved: bool):
    """The base has 20 rows for 18 tokens, and the MLLM's own token is the 19th."""
    models = {role: language_model(role) for role in ("base", "mllm", "expert1")}
    triple = save(tmp_path, models)
    words = {f"t{number}": number for number in range(18)}
    own = {**words, "<image>": 18}
    if moved:
        own |= {"t0": 1, "t1": 0}
    for role, ids in (("base", words), ("mllm", own), ("expert1", words)):
        _tokenizer(tmp_path / role, ids)
    result = triple.merge(tmp_path / "out", scope="language", **ADD)
    out, name = load(result.path)["model.embed_tokens.weight"], "model.embed_tokens.weight"
    before = models["mllm"][name]
    rows = 0 if moved else 18
    assert torch.equal(out[rows:], before[rows:])
    assert not any(torch.equal(out[row], before[row]) for row in range(rows))
    told = "the tokenizer of the MLLM gives tokens other ids"
    assert (told in warnings_of(result)) is moved
    assert ("2 rows of embed_tokens stay" in warnings_of(result)) is not moved


def test_an_adapter_as_expert_changes_matrices_alone(tmp_path: Path):
    models = {role: language_model(role) for role in ("base", "mllm")}
    triple = save(tmp_path, models)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    at = "base_model.model.model.layers.0.self_attn.o_proj"
    a, b = numbers("a", shape=(2, WIDTH)), numbers("b", shape=(WIDTH, 2))
    save_file(
        {f"{at}.lora_A.weight": a, f"{at}.lora_B.weight": b}, adapter / "adapter_model.safetensors"
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["o_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    recipe = MergeRecipe(
        str(triple.base),
        str(triple.mllm),
        (str(adapter),),  # type: ignore[arg-type]
        merge_method="task_arithmetic",
        scope="language",
    )
    result = merge(recipe, tmp_path / "out", resources=CPU)
    out, changed = load(result.path), "model.layers.0.self_attn.o_proj.weight"
    torch.testing.assert_close(out[changed], models["mllm"][changed] + b @ a, rtol=0, atol=1e-5)
    for name in models["mllm"].keys() - {changed}:
        assert torch.equal(out[name], models["mllm"][name]), name


def test_ties_over_the_model_counts_every_tensor_in_scope(tmp_path: Path):
    models = {role: language_model(role) for role in ("base", "mllm", "expert1")}
    result = save(tmp_path, models).merge(
        tmp_path / "out", scope="language", merge_method="ties", trim_over="model"
    )
    names = [name for name in models["mllm"]]
    vectors = [
        [(models[role][n].double() - models["base"][n].double()).numpy() for n in names]
        for role in ("mllm", "expert1")
    ]
    thresholds = [magnitude_kept(of_role, 0.2) for of_role in vectors]
    out = load(result.path)
    for place, name in enumerate(names):
        update = ties(
            [of_role[place] for of_role in vectors], weights=(1.0, 1.0), thresholds=thresholds
        )
        wanted = models["mllm"][name].double() + torch.from_numpy(update)
        torch.testing.assert_close(out[name].double(), wanted, rtol=0, atol=1e-5)


# --- methods that are made for matrices -------------------------------------------------------


def test_ip_merging_adds_linearly_what_is_no_matrix_and_says_so(tmp_path: Path):
    models = {role: language_model(role) for role in ("base", "mllm", "expert1")}
    triple = save(tmp_path, models)
    options: dict[str, Any] = {"scope": "language", "threshold": 0.0, "scale": 0.5}
    work = plan(triple.recipe(**options), CPU)
    told = "weights are no matrices of layers: the experts' task vectors are added, times scale"
    assert any(told in note for note in work.notes)
    result = triple.merge(tmp_path / "out", **options)
    assert told in warnings_of(result)
    plain = triple.merge(tmp_path / "plain", threshold=0.0, scale=0.5)
    out, matrices = load(result.path), load(plain.path)
    for name, before in models["mllm"].items():
        if name.endswith("_proj.weight"):
            assert torch.equal(out[name], matrices[name]), name
            continue
        wanted = sum_of(before, models["base"][name], models["expert1"][name])
        torch.testing.assert_close(out[name].double(), wanted, rtol=0, atol=1e-6)
    reasons = {row["weight"]: row["reason"] for row in result.report["weights"]}
    assert reasons["norm"] == "it is no matrix of a layer, so it is merged linearly"


def test_a_threshold_is_found_from_matrices_and_holds_for_them(tmp_path: Path):
    triple = save(tmp_path, {r: language_model(r) for r in ("base", "mllm", "expert1")})
    recipe = triple.recipe(scope="language", threshold="auto")
    result = merge(recipe, tmp_path / "out", resources=CPU)
    assert len(result.report["weights"]) > 8
    assert verify(result.path, full=True, resources=CPU).ok
    analysis = analyze(recipe, tmp_path / "analysis", resources=CPU, page=False).analysis
    looked_at = {row["weight"] for row in analysis.document["weights"]}
    assert all(name.startswith("layers.0.") and name.endswith("_proj") for name in looked_at)
    again = merge(recipe, tmp_path / "again", analysis=analysis, resources=CPU)
    assert load(again.path).keys() == load(result.path).keys()


# --- filters, memory, resuming, adapters ------------------------------------------------------


def test_filters_and_values_reach_what_is_in_no_layer(tmp_path: Path):
    models = {role: language_model(role) for role in ("base", "mllm", "expert1")}
    triple = save(tmp_path, models)
    layers = triple.merge(tmp_path / "layers", scope="language", include=["layers: 0-"], **ADD)
    assert set(layers.report["filtered"]) == {"embed_tokens", "norm", "lm_head"}
    options = {**ADD, "scale": [0.0, 0.5], "include": ["embed", "norm", "lm_head"]}
    out = load(triple.merge(tmp_path / "values", scope="language", **options).path)
    for name, scale in (("model.embed_tokens", 0.0), ("model.norm", 0.5), ("lm_head", 0.5)):
        key = f"{name}.weight"
        update = scale * (models["expert1"][key].double() - models["base"][key].double())
        wanted = models["mllm"][key].double() + update
        torch.testing.assert_close(out[key].double(), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_memory_threads_and_interruptions_change_no_byte(
    tmp_path: Path, small_tiles: None, method: str
):
    models = {role: language_model(role, rows=90) for role in ("base", "mllm", "expert1")}
    triple = save(tmp_path, models)
    options: dict[str, Any] = {"scope": "language", "merge_method": method, "shard_size": 2000}
    options["out_dtype"] = "bfloat16"
    whole = triple.merge(tmp_path / "1" / "out", **options)
    with pytest.raises(Stop):
        triple.merge(tmp_path / "2" / "out", on_event=stopping(5), threads=3, **options)
    resumed = triple.merge(tmp_path / "2" / "out", **options)
    assert resumed.reused == 5
    for name, data in contents(whole.path).items():
        if name.endswith(".safetensors"):
            assert data == contents(resumed.path)[name]


def test_an_adapter_is_refused_where_the_scope_has_more_than_matrices(tmp_path: Path):
    triple = save(tmp_path, {r: language_model(r) for r in ("base", "mllm", "expert1")})
    with pytest.raises(RecipeError, match=r"An adapter cannot hold .*--scope matrices"):
        plan(triple.recipe(scope="language", output="lora"), CPU)
    with pytest.raises(RecipeError, match="scope must be one of matrices, language"):
        triple.recipe(scope="all")


# --- text models alone ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Triple:
    """A base and two experts; the MLLM beside them is not to be looked at."""
    folder = tmp_path_factory.mktemp("texts")
    models = {role: language_model(role) for role in ("base", "mllm", "expert1", "expert2")}
    triple = save(folder, models)
    _tokenizer(triple.base, {"a": 0})
    shutil.rmtree(triple.mllm)
    return triple


@pytest.mark.parametrize("scope", ["matrices", "language"])
def test_without_an_mllm_the_base_receives(tmp_path: Path, texts: Triple, scope: str):
    recipe = text_recipe(texts, scope=scope, **ADD)
    assert "mllm_model" not in recipe.to_yaml()
    assert MergeRecipe.from_yaml(recipe.to_yaml()) == recipe
    result = merge(recipe, tmp_path / "out", resources=CPU)
    base, out = load(texts.base), load(result.path)
    experts = [load(path) for path in texts.experts]
    for name, before in base.items():
        is_matrix = name.endswith("_proj.weight")
        if scope == "matrices" and not is_matrix:
            assert torch.equal(out[name], before), name
            continue
        wanted = sum_of(before, before, *(each[name] for each in experts))
        torch.testing.assert_close(out[name].double(), wanted, rtol=0, atol=1e-6)
    for file in ("config.json", "tokenizer.json"):
        assert (result.path / file).read_bytes() == (texts.base / file).read_bytes()
    card = (result.path / "README.md").read_text()
    assert "vision" not in card and "base was merged with expert1, expert2" in card
    assert verify(result.path, full=True, resources=CPU).ok
    assert dict(stream(recipe, resources=CPU)).keys() == out.keys()


def test_text_models_by_ties_are_the_experts_alone(tmp_path: Path, texts: Triple):
    result = merge(text_recipe(texts, merge_method="ties"), tmp_path / "out", resources=CPU)
    base, out = load(texts.base), load(result.path)
    experts = [load(path) for path in texts.experts]
    name = "model.layers.0.self_attn.q_proj.weight"
    vectors = [(each[name].double() - base[name].double()).numpy() for each in experts]
    nothing = torch.zeros_like(base[name]).double().numpy()
    update = ties([nothing, *vectors], weights=(0.0, 1.0, 1.0))
    wanted = base[name].double() + torch.from_numpy(update)
    torch.testing.assert_close(out[name].double(), wanted, rtol=0, atol=1e-5)


def test_the_base_is_read_once_in_a_pass(tmp_path: Path):
    """TIES makes two passes and writes; the base's rows are read with them, and once to receive."""
    shapes = {"layers.0.self_attn.q_proj": (96, 64)}
    triple = write_triple(tmp_path / "in", shapes)
    recipe = text_recipe(triple, merge_method="ties", include=["q_proj"])
    result = merge(recipe, tmp_path / "out", resources=CPU)
    weight, other = 96 * 64 * 4, 8 * 4
    # Rows stay in memory after the first pass.
    assert result.report["bytes"]["read"] == 3 * weight + other
    assert [each["role"] for each in _inputs(result)] == ["base", "expert 1"]


def _inputs(result: MergeResult) -> list[dict[str, Any]]:
    with open(result.path / "lean_merge_journal.jsonl") as journal:
        text = journal.readline()
    found: list[dict[str, Any]] = json.loads(text[text.index("{") :])["run"]["inputs"]
    return found


def test_methods_and_names_that_need_an_mllm_are_refused(texts: Triple):
    with pytest.raises(RecipeError, match=r"ip_merging .* needs an MLLM; name it with --mllm"):
        plan(text_recipe(texts), CPU)
    with pytest.raises(RecipeError, match="names are for the MLLM, and there is none"):
        MergeRecipe("base", None, (Expert("e"),), names=(("a", "b"),))
