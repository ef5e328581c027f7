"""LoRA adapters as experts: written by PEFT, merged from their factors."""

from __future__ import annotations

import json
import math
import re
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.adapters import ALL, by_hand, factors
from support.families import (
    SKETCHED,
    SMALL,
    Triple,
    as_matrix,
    load,
    relative_error,
    rows_of,
    write_triple,
)
from support.oracle import Matrix, ip_merging
from torch import Tensor

from lean_merge import Expert, MergeRecipe, Resources, merge, open_checkpoint
from lean_merge import plan as make_plan
from lean_merge.checkpoints import open_expert
from lean_merge.checkpoints.forms.lora import Alphas, module_pattern
from lean_merge.errors import CheckpointError, CoverageError, LeanMergeError

Family = Callable[..., Triple]


def train(triple: Triple, out: Path, *, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """An adapter of the base that PEFT saves, tuned towards the triple's expert."""
    import peft
    import transformers as tf

    options = {"r": 6, "lora_alpha": 12, "target_modules": ALL} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = tf.LlamaForCausalLM.from_pretrained(triple.base, dtype=torch.float32)
        tuned = peft.get_peft_model(model, peft.LoraConfig(**options))
        base, expert = load(triple.base), load(triple.experts[0])
        for name, module in tuned.named_modules():
            if not hasattr(module, "lora_A") or "default" not in module.lora_A:
                continue
            key = name.removeprefix("base_model.model.") + ".weight"
            delta = expert[key].float() - base[key].float()
            rank, scaling = module.r["default"], module.scaling["default"]
            b, a = factors(delta + 1e-3 * torch.randn_like(delta), rank, scaling)
            module.lora_B["default"].weight.data.copy_(b)
            module.lora_A["default"].weight.data.copy_(a)
        tuned.to(dtype).save_pretrained(out)
    return out


def materialised(triple: Triple, adapter: Path) -> dict[str, Matrix]:
    """The change of every weight that PEFT says the adapter makes, by the base's names."""
    import peft
    import transformers as tf

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = tf.LlamaForCausalLM.from_pretrained(triple.base, dtype=torch.float64)
        tuned = peft.PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False)
        tuned = tuned.to(torch.float64)
        changes = {}
        for name, module in tuned.named_modules():
            if hasattr(module, "get_delta_weight") and "default" in module.lora_A:
                key = name.removeprefix("base_model.model.") + ".weight"
                changes[key] = module.get_delta_weight("default").detach().numpy()
    return changes


def merge_with(triple: Triple, adapter: Path, out: Path, **options: Any) -> Any:
    return replace(triple, experts=(adapter,)).merge(out, **options)


def agrees(
    triple: Triple, changes: dict[str, Matrix], result: Any, *, worst: float, **options: Any
) -> int:
    """Compare every weight with the oracle on base + change; how many were merged."""
    base, mllm, out = load(triple.base), load(triple.mllm), load(result.path)
    rows, merged = rows_of(result), 0
    for slot in triple.slots:
        row = rows[slot.canonical]
        before, stored = as_matrix(slot.in_mllm.get(mllm)), slot.in_mllm.get(out)
        if slot.base not in changes:
            assert (row["selected"], row["rank"], row["passes"]) == (False, 0, 0)
            assert row["reason"] == "the adapter does not target this weight"
            assert torch.equal(stored, slot.in_mllm.get(mllm))
            continue
        start = as_matrix(slot.in_base.get(base))
        change = as_matrix(slot.in_base.get({slot.base: torch.from_numpy(changes[slot.base])}))
        oracle = ip_merging(start, before, start + change, **options)
        assert row["similarity_first"] == pytest.approx(float(oracle.similarity[0]), abs=0.02)
        assert abs(row["rank"] - oracle.subspace) <= 1
        assert row["expert_task_vector_norm"] == pytest.approx(np.linalg.norm(change), rel=1e-4)
        if abs(float(oracle.similarity[0]) - options.get("threshold", 0.4)) < 0.02:
            continue
        assert row["selected"] is oracle.selected
        if oracle.selected:
            merged += 1
            assert row["lambda"] == pytest.approx(oracle.ratio, rel=worst)
            assert relative_error(as_matrix(stored) - before, oracle.update) <= worst
    return merged


# --- what is understood ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "lora_alpha": 5},
        {
            "rank_pattern": {"q_proj": 3, r"layers\.1\..*gate_proj": 9},
            "alpha_pattern": {"model.layers.0.mlp.up_proj": 7, "v_proj": 1},
        },
        {
            "target_modules": r".*layers\.1\.(self_attn\.[qv]|mlp\.up)_proj",
            "use_rslora": True,
            "rank_pattern": {"up_proj": 2},
            "alpha_pattern": {"up_proj": 9},
        },
        {"target_modules": "all-linear", "dtype": torch.bfloat16},
    ],
    ids=["plain", "rslora", "patterns", "regex", "bfloat16"],
)
def test_an_adapter_merges_as_the_expert_that_it_stands_for(
    family: Family, tmp_path: Path, options: dict[str, Any]
):
    triple = family("llava", dtype=torch.float32)
    adapter = train(triple, tmp_path / "adapter", **options)
    changes = materialised(triple, adapter)
    result = merge_with(triple, adapter, tmp_path / "out")
    assert agrees(triple, changes, result, worst=1e-3)
    read = result.report["bytes"]
    assert read["read"] == read["read_predicted"] == read["read_most"]
    # Neither the base nor a copy of it stands in for the expert.
    folder = {file.name for file in adapter.iterdir()}
    assert "adapter_model.safetensors" in folder and "model.safetensors" not in folder


def test_a_merge_equals_that_of_the_whole_expert(family: Family, tmp_path: Path):
    triple = family("llava", dtype=torch.float32)
    adapter = train(triple, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    changes = materialised(triple, adapter)
    whole = tmp_path / "whole"
    whole.mkdir()
    tensors = load(triple.base)
    for name, change in changes.items():
        tensors[name] = (tensors[name].double() + torch.from_numpy(change)).float()
    save_file(tensors, whole / "model.safetensors")
    (whole / "config.json").write_bytes((triple.base / "config.json").read_bytes())
    found = load(merge_with(triple, adapter, tmp_path / "out").path)
    wanted = load(merge_with(triple, whole, tmp_path / "expected").path)
    before = load(triple.mllm)
    changed = 0
    for name, tensor in wanted.items():
        update = as_matrix(tensor) - as_matrix(before[name])
        if update.any():
            changed += 1
            assert relative_error(as_matrix(found[name]) - as_matrix(before[name]), update) <= 1e-3
        else:
            assert torch.equal(found[name], tensor)
    assert changed >= 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_model_takes_an_adapter(family: Family, tmp_path: Path, dtype: torch.dtype):
    triple = family("llava", dtype=dtype)
    adapter = train(triple, tmp_path / "adapter")
    result = merge_with(triple, adapter, tmp_path / "out", out_dtype="float32")
    assert agrees(triple, materialised(triple, adapter), result, worst=2e-3)
    memory = result.report["memory"]
    assert memory["peak_anonymous"] <= memory["predicted_anonymous"]


def test_wide_weights_are_sketched_from_the_factors(tmp_path: Path):
    triple = write_triple(tmp_path / "in", SKETCHED)
    adapter, changes = by_hand(triple, tmp_path / "adapter", rank=12)
    result = merge_with(triple, adapter, tmp_path / "out", threshold=0.1)
    assert agrees(triple, changes, result, worst=0.03, threshold=0.1) == 1
    ranks = {row["rank"] for row in rows_of(result).values()}
    assert ranks == {12}


def test_rows_that_are_read_again_give_the_same(tmp_path: Path):
    triple = write_triple(tmp_path / "in", SKETCHED)
    adapter, _ = by_hand(triple, tmp_path / "adapter", rank=12)
    work = replace(triple, experts=(adapter,))
    least = make_plan(work.recipe(), Resources(device="cpu", threads=1, memory=1 << 40)).prediction
    free = work.merge(tmp_path / "free", memory=1 << 40)
    tight = work.merge(tmp_path / "tight", memory=least.peak_memory + (8 << 20))
    first, second = load(free.path), load(tight.path)
    assert all(torch.equal(first[name], second[name]) for name in first)
    read = tight.report["bytes"]
    assert read["read"] <= read["read_most"]


def test_an_adapter_and_a_whole_expert_merge_together(family: Family, tmp_path: Path):
    triple = family("llava", dtype=torch.float32)
    adapter = train(triple, tmp_path / "adapter", target_modules=["q_proj"])
    both = replace(triple, experts=(triple.experts[0], adapter))
    result = both.merge(tmp_path / "out")
    alone = triple.merge(tmp_path / "alone")
    whole, lora = (rows_of(result, path) for path in both.experts)
    first, second = load(alone.path), load(result.path)
    for slot in triple.slots:
        assert whole[slot.canonical]["selected"] is rows_of(alone)[slot.canonical]["selected"]
        if not slot.canonical.endswith("q_proj"):
            assert lora[slot.canonical]["reason"] == "the adapter does not target this weight"
            assert torch.allclose(first[slot.mllm], second[slot.mllm], atol=1e-6)
    assert any(row["selected"] for row in lora.values())
    assert result.report["bytes"]["read"] == result.report["bytes"]["read_predicted"]


@pytest.mark.parametrize("symmetric", [False, True])
def test_task_arithmetic_takes_an_adapter(family: Family, tmp_path: Path, symmetric: bool):
    triple = family("llava", dtype=torch.float32)
    adapter = train(triple, tmp_path / "adapter", target_modules=["q_proj", "up_proj"])
    changes = materialised(triple, adapter)
    result = merge_with(
        triple,
        adapter,
        tmp_path / "out",
        merge_method="task_arithmetic",
        symmetric=symmetric,
        scale=0.5,
    )
    base, mllm, out = load(triple.base), load(triple.mllm), load(result.path)
    for slot in triple.slots:
        start, before = as_matrix(base[slot.base]), as_matrix(mllm[slot.mllm])
        change = changes.get(slot.base, np.zeros_like(start))
        wanted = before + 0.5 * change
        if symmetric:
            wanted = start + 0.5 * (before - start + change)
        assert np.abs(as_matrix(out[slot.mllm]) - wanted).max() <= 1e-6
    assert result.report["bytes"]["read"] == result.report["bytes"]["read_predicted"]


def test_a_weight_that_no_adapter_targets_is_not_analysed(family: Family, tmp_path: Path):
    triple = family("llava", dtype=torch.float32)
    adapter = train(triple, tmp_path / "adapter", target_modules=["q_proj"])
    work = replace(triple, experts=(adapter,))
    predicted = make_plan(work.recipe()).prediction
    result = work.merge(tmp_path / "out")
    targeted = [slot for slot in triple.slots if slot.canonical.endswith("q_proj")]
    base = sum(load(triple.base)[slot.base].nbytes for slot in targeted)
    mllm = sum(tensor.nbytes for tensor in load(triple.mllm).values())
    again = sum(load(triple.mllm)[slot.mllm].nbytes for slot in targeted)
    adapters = sum(
        tensor.nbytes for tensor in load_file(adapter / "adapter_model.safetensors").values()
    )
    assert result.report["bytes"]["read"] == predicted.bytes_read == base + mllm + again + adapters


# --- by hand --------------------------------------------------------------------------------


@pytest.fixture
def small_triple(tmp_path: Path) -> Triple:
    return write_triple(tmp_path / "in", SMALL)


@pytest.mark.parametrize("prefix", ["base_model.model.", "", "base_model.model.language_model."])
def test_names_are_found_by_structure(small_triple: Triple, tmp_path: Path, prefix: str):
    adapter, changes = by_hand(small_triple, tmp_path / "adapter", prefix=prefix)
    result = merge_with(small_triple, adapter, tmp_path / "out")
    assert agrees(small_triple, changes, result, worst=1e-3) == 2


def test_an_adapter_in_a_pickle_is_read_too(small_triple: Triple, tmp_path: Path):
    adapter, changes = by_hand(small_triple, tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(tensors, adapter / "adapter_model.bin")
    result = merge_with(small_triple, adapter, tmp_path / "out")
    assert agrees(small_triple, changes, result, worst=1e-3) == 2


def test_names_with_the_adapters_own_are_read(small_triple: Triple, tmp_path: Path):
    adapter, changes = by_hand(small_triple, tmp_path / "adapter", fan_in_fan_out=True)
    file = adapter / "adapter_model.safetensors"
    tensors = {re.sub(r"(lora_.)", r"\1.default", n): t for n, t in load_file(file).items()}
    save_file(tensors, file)
    result = merge_with(small_triple, adapter, tmp_path / "out")
    assert agrees(small_triple, changes, result, worst=1e-3) == 2


def test_fp8_models_take_an_adapter(small_triple: Triple, tmp_path: Path):
    from support.fp8 import to_fp8

    adapter, changes = by_hand(small_triple, tmp_path / "adapter")
    twins = {}
    for role, folder in (("base", small_triple.base), ("mllm", small_triple.mllm)):
        twins[role] = tmp_path / f"{role}-twin"
        to_fp8(folder, twins[role], "block", dtype=torch.float8_e4m3fn)
    result = merge_with(small_triple, adapter, tmp_path / "out", out_dtype="float32")
    twin = replace(small_triple, base=twins["base"], mllm=twins["mllm"])
    assert agrees(twin, changes, result, worst=1e-3)
    assert result.report["bytes"]["read"] == result.report["bytes"]["read_predicted"]


def test_fused_weights_take_an_adapter(family: Family, tmp_path: Path):
    triple = family("phi3", dtype=torch.float32)
    base, expert = load(triple.base), load(triple.experts[0])
    tensors, changes = {}, {}
    for name in dict.fromkeys(slot.base for slot in triple.slots):
        b, a = factors(expert[name] - base[name], 8, 2.0)
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        tensors |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
        changes[name] = 2.0 * (b.double() @ a.double()).numpy()
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    result = merge_with(triple, adapter, tmp_path / "out")
    assert agrees(triple, changes, result, worst=1e-3)


# --- what is said ---------------------------------------------------------------------------


def test_what_is_out_of_scope_is_left_out_and_said(family: Family, tmp_path: Path):
    triple = family("llava", dtype=torch.float32)
    adapter = train(
        triple,
        tmp_path / "adapter",
        target_modules=["q_proj", "embed_tokens", "lm_head"],
        modules_to_save=["norm"],
    )
    names = set(load_file(adapter / "adapter_model.safetensors"))
    assert any("lora_embedding_A" in name for name in names)
    assert any("lm_head.lora_A" in name for name in names)
    assert any(name.endswith("norm.weight") for name in names)
    work = replace(triple, experts=(adapter,))
    (warning,) = [w for w in make_plan(work.recipe()).coverage.warnings if "out of scope" in w]
    parts = {re.sub(r"\.lora_[AB]\.weight$", "", name) for name in names if "q_proj" not in name}
    assert warning.startswith(f"{len(parts)} parts of the adapter (expert 1)")
    changes = {n: c for n, c in materialised(triple, adapter).items() if "q_proj" in n}
    result = work.merge(tmp_path / "out")
    assert agrees(triple, changes, result, worst=1e-3)
    before, after = load(triple.mllm), load(result.path)
    in_scope = {slot.mllm for slot in triple.slots}
    assert all(torch.equal(after[n], t) for n, t in before.items() if n not in in_scope)


def test_biases_are_left_out_and_said(small_triple: Triple, tmp_path: Path):
    adapter, changes = by_hand(small_triple, tmp_path / "adapter", bias="all")
    file = adapter / "adapter_model.safetensors"
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file(load_file(file) | {f"{stem}.base_layer.bias": torch.ones(96)}, file)
    work = replace(small_triple, experts=(adapter,))
    warnings_ = make_plan(work.recipe()).coverage.warnings
    assert any("1 parts of the adapter" in w and "biases" in w for w in warnings_)
    assert agrees(small_triple, changes, work.merge(tmp_path / "out"), worst=1e-3) == 2


@pytest.mark.parametrize(
    ("named", "warned"),
    [
        ("meta-llama/Llama-2-7b-hf", True),
        ("somewhere/base", False),
        ("/elsewhere/base/", False),
        (None, False),
    ],
)
def test_another_base_is_warned_of(
    small_triple: Triple, tmp_path: Path, named: str | None, warned: bool
):
    adapter, _ = by_hand(small_triple, tmp_path / "adapter", base_model_name_or_path=named)
    work = replace(small_triple, experts=(adapter,))
    found = [w for w in make_plan(work.recipe()).coverage.warnings if "was trained on" in w]
    assert bool(found) is warned
    assert not warned or str(named) in found[0]


# --- what is refused ------------------------------------------------------------------------


def refused(triple: Triple, adapter: Path, *words: str) -> str:
    with pytest.raises(LeanMergeError) as caught:
        make_plan(replace(triple, experts=(adapter,)).recipe())
    message = str(caught.value)
    for word in words:
        assert word in message, message
    return message


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"peft_type": "LOHA"}, "'LOHA'"),
        ({"peft_type": None}, "only LORA is understood"),
        ({"init_lora_weights": "pissa"}, "'pissa'"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "'olora'"),
        ({"init_lora_weights": "loftq"}, "'loftq'"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1]}, "activated LoRA"),
        ({"target_parameters": ["mlp.experts.up_proj"]}, "target_parameters"),
        ({"r": 0}, "r 0"),
        ({"r": "x"}, "'x'"),
        ({"lora_alpha": None}, "lora_alpha None"),
        ({"lora_alpha": float("nan")}, "lora_alpha nan"),
        ({"r": 10**400}, "r a number of 1329 bits"),
        ({"lora_alpha": 10**400}, "lora_alpha a number of 1329 bits"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
        ({"rank_pattern": {"q_proj": 0.5}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 10**400}}, "alpha_pattern"),
        ({"alpha_pattern": {r"(a)\1": 1}}, r"alpha_pattern '(a)\\1', which is more"),
        ({"alpha_pattern": {"(?i:a)": 1}}, "more of a regular expression than"),
        ({"alpha_pattern": {"(?=a)": 1}}, "more of a regular expression than"),
        ({"alpha_pattern": {"a{,2}": 1}}, "more of a regular expression than"),
        ({"alpha_pattern": {"((a{999}){999}){999}": 1}}, "matched in linear time"),
        ({"alpha_pattern": {"(": 1}}, "matched in linear time"),
        ({"alpha_pattern": {"(" * 1025: 1}}, "1025 characters, more than 1024"),
        ({"alpha_pattern": {f"m{n}": 1 for n in range(10_001)}}, "10001 keys"),
        ({"alpha_pattern": []}, None),
        ({"r": 3}, "have rank 4, which the config does not state"),
    ],
)
def test_adapters_that_are_no_plain_lora_are_refused_by_name(
    small_triple: Triple, tmp_path: Path, config: dict[str, Any], words: str | None
):
    adapter, _ = by_hand(small_triple, tmp_path / "adapter")
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    if words is None:
        make_plan(replace(small_triple, experts=(adapter,)).recipe())
        return
    message = refused(small_triple, adapter, words)
    assert str(adapter) in message and len(message) < 600


PATTERNS = st.text("ab.0_^$|()[]*+?{}1,\\dwSn-:#P<>x", max_size=9)


def matched_by_peft(pattern: str, module: str) -> bool:
    from peft.utils.other import get_pattern_key

    # Where no key matches, PEFT gives back the module's name.
    return bool(get_pattern_key([pattern], module) == pattern != module)


@settings(max_examples=400, deadline=None)
@given(PATTERNS, st.lists(st.text("ab.0_-", max_size=8), max_size=8))
@example(")*|a_1(", ["a-.a"])
@example("a.b", ["x.a_b", "xa.b", "a.b"])
@example(r"layers\.\d+\.(?:[ab]|b0){1,3}?", ["a.layers.10.ab0", "layers.1.", "layers.a.b"])
@example(r"(a+)+b|[^.]*\b0", ["aab", "x.aa0", "a.0", "_-0"])
@example("?", [""])
@example("^?", [""])
@example(r"(?:(?:a|)*)*b{0,2}?", ["aa", "x.b", "bbb", ""])
def test_keys_match_as_in_peft(pattern: str, modules: list[str]):
    """Those that are let through at all, which every plain name is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            read = module_pattern(pattern)
        except ValueError:
            assert not re.fullmatch(r"[\w.-]*", pattern)
            return
        for module in modules:
            if module != pattern:
                assert bool(read.match(module)) is matched_by_peft(pattern, module), module


@settings(deadline=None, max_examples=150)
@given(
    keys=st.lists(st.text("ab._", max_size=5), max_size=6, unique=True),
    modules=st.lists(st.text("ab._", max_size=8), min_size=1, max_size=6),
)
def test_the_first_key_that_fits_counts_however_it_is_looked_up(
    keys: list[str], modules: list[str]
):
    alphas = Alphas({key: float(number) for number, key in enumerate(keys)})
    for module in modules:
        fitting = [n for n, key in enumerate(keys) if re.match(rf"(.*\.)?({key})$", module)]
        assert alphas.of(module) == (float(fitting[0]) if fitting else None)


def test_thousands_of_keys_take_as_many_steps_as_they_have_kinds():
    names = [f"model.layers.{n:04}.self_attn.q_proj" for n in range(5000)]
    alphas = Alphas(dict.fromkeys(names, 4.0))
    assert alphas.steps == 1
    assert {alphas.of(name) for name in names} == {4.0}


@pytest.mark.parametrize("pattern", [".*.*.*.*.*.*.*.*x", "(?:a|a|a.)*x", "[^b]{3,999}x", "x"])
def test_no_pattern_takes_for_ever(pattern: str):
    """The first takes Python's own years."""
    began = time.thread_time()
    assert not module_pattern(pattern).match("a." * 512)
    assert time.thread_time() - began < 2


@pytest.mark.parametrize("text", ["?" * 1000 + "[", "[" + "a-" * 500, "(?" * 500, "[a" * 500])
def test_no_key_takes_for_ever_to_look_through(text: str):
    began = time.thread_time()
    with pytest.raises(ValueError):
        module_pattern(text)
    assert time.thread_time() - began < 2


def test_without_re2_a_regular_expression_is_refused_with_the_mend(
    small_triple: Triple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "re2", None)
    plain, _ = by_hand(small_triple, tmp_path / "plain", alpha_pattern={"layers.0.mlp.up_proj": 2})
    # Ranks are those of the factors, so their patterns need not be understood.
    ranked, _ = by_hand(small_triple, tmp_path / "ranked", rank_pattern={r"up_.+|(?=x)": 2})
    for adapter in (plain, ranked):
        make_plan(replace(small_triple, experts=(adapter,)).recipe())
    adapter, _ = by_hand(small_triple, tmp_path / "adapter", alpha_pattern={r"0\.mlp\..*_proj": 2})
    refused(small_triple, adapter, "pip install 'lean-merge[patterns]'", str(adapter))


def test_patterns_of_names_beyond_ascii_are_refused(small_triple: Triple, tmp_path: Path):
    """Python knows more digits and letters than RE2."""
    prefix = "base_model.model.é."
    plain, _ = by_hand(small_triple, tmp_path / "plain", prefix=prefix)
    make_plan(replace(small_triple, experts=(plain,)).recipe())
    other, _ = by_hand(small_triple, tmp_path / "a", prefix=prefix, alpha_pattern={r"\w+.+": 2})
    refused(small_triple, other, "is not ASCII")


def edited(adapter: Path, edit: Callable[[dict[str, Tensor]], None]) -> Path:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    file.unlink()
    save_file(tensors, file)
    return adapter


STEM = "base_model.model.model.layers.0.self_attn.q_proj"


def _magnitude(tensors: dict[str, Tensor]) -> None:
    tensors[f"{STEM}.lora_magnitude_vector.weight"] = torch.ones(96)


def _whole(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.model.layers.0.mlp.gate_proj.weight"] = torch.ones(64, 80)


def _half(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{STEM}.lora_A.weight"]


def _shape(tensors: dict[str, Tensor]) -> None:
    tensors[f"{STEM}.lora_B.weight"] = torch.ones(90, 4)


def _no_product(tensors: dict[str, Tensor]) -> None:
    tensors[f"{STEM}.lora_B.weight"] = torch.ones(96, 5)


def _integers(tensors: dict[str, Tensor]) -> None:
    tensors[f"{STEM}.lora_B.weight"] = torch.ones(96, 4, dtype=torch.int8)


def _unknown_layer(tensors: dict[str, Tensor]) -> None:
    for factor, shape in (("A", (4, 64)), ("B", (96, 4))):
        tensors[f"{STEM.replace('0', '7')}.lora_{factor}.weight"] = torch.ones(shape)


def _several(tensors: dict[str, Tensor]) -> None:
    for factor in "AB":
        tensors[f"{STEM}.lora_{factor}.other.weight"] = tensors[
            f"{STEM}.lora_{factor}.weight"
        ].clone()


def _two_towers(tensors: dict[str, Tensor]) -> None:
    for name, tensor in list(tensors.items()):
        tensors[name.replace("model.layers", "twin.layers")] = tensor.clone()


def _elsewhere(tensors: dict[str, Tensor]) -> None:
    for name in list(tensors):
        tensors[name.replace("layers.0", "first")] = tensors.pop(name)


@pytest.mark.parametrize(
    ("edit", "kind", "words"),
    [
        (_magnitude, CheckpointError, "DoRA"),
        (_whole, CheckpointError, "modules_to_save"),
        (_half, CheckpointError, "lacks its other factor"),
        (_shape, CoverageError, "changes a weight of shape [90, 64], the base has [96, 64]"),
        (_no_product, CheckpointError, "have no product"),
        (_integers, CheckpointError, "dtype I8"),
        (_unknown_layer, CoverageError, "layers.7.self_attn.q_proj"),
        (_several, CheckpointError, "several adapters"),
        (_two_towers, CoverageError, "equally like the base"),
        (_elsewhere, CoverageError, "changes no weight that the base has in scope"),
    ],
)
def test_factors_that_fit_nothing_are_refused(
    small_triple: Triple, tmp_path: Path, edit: Any, kind: type[Exception], words: str
):
    adapter = edited(by_hand(small_triple, tmp_path / "adapter")[0], edit)
    refused(small_triple, adapter, words)
    with pytest.raises(kind):
        make_plan(replace(small_triple, experts=(adapter,)).recipe())


@pytest.mark.parametrize("factor", ["A", "B"])
def test_a_factor_that_is_no_number_is_refused(small_triple: Triple, tmp_path: Path, factor: str):
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[f"{STEM}.lora_{factor}.weight"][1, 2] = math.nan

    adapter = edited(by_hand(small_triple, tmp_path / "adapter")[0], edit)
    with pytest.raises(LeanMergeError, match=r"q_proj\.lora_B\.weight holds NaN or Inf"):
        merge_with(small_triple, adapter, tmp_path / "out")


@pytest.mark.parametrize("role", ["base", "mllm"])
def test_only_an_expert_may_be_an_adapter(small_triple: Triple, tmp_path: Path, role: str):
    adapter, _ = by_hand(small_triple, tmp_path / "adapter")
    roles = {"base": str(small_triple.base), "mllm": str(small_triple.mllm)} | {role: str(adapter)}
    recipe = MergeRecipe(roles["base"], roles["mllm"], (Expert(str(small_triple.experts[0])),))
    with pytest.raises(CheckpointError, match=r"holds an adapter, .* which only an expert may be"):
        merge(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_without_its_tensors_is_refused(small_triple: Triple, tmp_path: Path):
    adapter, _ = by_hand(small_triple, tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").unlink()
    refused(small_triple, adapter, "neither adapter_model.safetensors nor adapter_model.bin")


def test_a_whole_model_that_keeps_an_old_adapter_config_is_a_model(small_triple: Triple):
    (small_triple.experts[0] / "adapter_config.json").write_text("{}")
    assert open_expert(small_triple.experts[0]).adapter is None
    assert open_checkpoint(small_triple.experts[0]).tensors
