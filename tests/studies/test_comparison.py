"""Models of different foundations: what differs is named, and distances are what they are."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.families import contents

from lean_merge import BudgetError, CoverageError, MergeRecipe, OutputError, Resources, memory
from lean_merge.plan import formulas, plan
from lean_merge.store import JOURNAL
from lean_merge.studies import pages
from lean_merge.studies.compare import compare, differing, write_comparison
from lean_merge.tasks import tiles

WORDS = ("one", "plus", "two", "is", "three", "minus")
Make = Callable[..., Path]
CPU = Resources(device="cpu", threads=1)


def tokenizer(folder: Path, words: tuple[str, ...]) -> None:
    """A word-level tokenizer.json, as much of it as matters here."""
    vocabulary = {word: n for n, word in enumerate(words)}
    content = {"model": {"type": "WordLevel", "vocab": vocabulary}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(content))


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Saves a tiny Llama under a name; options are those of its configuration."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def saved(
        name: str,
        *,
        seed: int = 0,
        words: tuple[str, ...] = WORDS,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> Path:
        sizes = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 40,
        }
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = LlamaForCausalLM(LlamaConfig(**{**sizes, **options})).to(dtype)
        model.save_pretrained(tmp_path / name)
        tokenizer(tmp_path / name, words)
        return tmp_path / name

    return saved


def recipe(base: Path, mllm: Path, *experts: Path) -> MergeRecipe:
    """A recipe of these models."""
    return MergeRecipe(str(base), str(mllm), tuple(map(str, experts)))


def compared(base: Path, mllm: Path, *experts: Path, threads: int = 1) -> dict[str, Any]:
    """The comparison, which JSON can hold."""
    found = compare(recipe(base, mllm, *experts), Resources(device="cpu", threads=threads))
    return json.loads(json.dumps(found, allow_nan=False))


def values(found: dict[str, Any], what: str) -> dict[str, Any]:
    """What the roles say of one fact that differs."""
    return next(each["values"] for each in found["differences"] if each["what"] == what)


def pair_of(found: dict[str, Any], one: str, other: str) -> dict[str, Any]:
    """The summary of two roles."""
    return next(p for p in found["pairs"] if (p["one"], p["other"]) == (one, other))


def tuned(source: Path, target: Path, size: float) -> Path:
    """The same model with noise of a share of each weight's norm."""
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    for name, tensor in tensors.items():
        noise = torch.randn(tensor.shape, generator=generator)
        tensors[name] = tensor + size * tensor.norm() * noise / noise.norm()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_all_that_differs_is_named(make: Make):
    base = make("base")
    expert = make(
        "expert",
        words=("zero", *WORDS),
        hidden_size=40,
        intermediate_size=64,
        num_hidden_layers=3,
        num_key_value_heads=4,
        vocab_size=50,
        rope_theta=1e6,
        max_position_embeddings=4096,
        dtype=torch.bfloat16,
    )
    with pytest.raises(CoverageError):
        plan(recipe(base, base, expert))
    found = compared(base, base, expert)
    assert values(found, "hidden size") == {"base": 32, "mllm": 32, "expert 1": 40}
    assert values(found, "intermediate size")["expert 1"] == 64
    assert values(found, "number of layers") == {"base": 2, "mllm": 2, "expert 1": 3}
    assert values(found, "key/value heads") == {"base": 2, "mllm": 2, "expert 1": 4}
    assert values(found, "vocabulary rows") == {"base": 40, "mllm": 40, "expert 1": 50}
    assert values(found, "rope_theta") == {"base": "10000", "mllm": "10000", "expert 1": "1e+06"}
    assert values(found, "longest context")["expert 1"] == 4096
    assert values(found, "dtype") == {"base": "F32", "mllm": "F32", "expert 1": "BF16"}
    said = values(found, "tokens of the expert 1")["expert 1"]
    assert said == "7, 6 shared, 6 of them with another id"
    kinds = [each["kind"] for each in found["differences"]]
    assert kinds == sorted(kinds, key=["sizes", "positions", "tokenizer", "format"].index)
    text = "\n".join(differing(found))
    assert "hidden size: 32 in the base, 32 in the MLLM, 40 in the expert 1" in text
    assert "no weight of equal shape" in text


def test_equal_models_differ_in_nothing_and_lie_on_each_other(make: Make):
    base = make("base")
    found = compared(base, base, base)
    assert found["differences"] == []
    for pair in found["pairs"]:
        assert pair["compared"] == pair["equal_shape"] == 14 and pair["unequal_shape"] == 0
        assert pair["cosine"] == pytest.approx(1, abs=1e-12)
        assert pair["distance"] == pytest.approx(0, abs=1e-6)
        assert pair["verdict"] == "one origin"


def test_distances_are_those_of_whole_matrices(make: Make, tmp_path: Path):
    base, expert = make("base"), make("expert", seed=1, num_hidden_layers=3, rope_theta=5e5)
    mllm = tuned(base, tmp_path / "mllm", 0.1)
    found = compared(base, mllm, expert)
    roles = {"base": base, "mllm": mllm, "expert 1": expert}
    stored = {
        role: {
            name: tensor.double().numpy()
            for name, tensor in load_file(folder / "model.safetensors").items()
        }
        for role, folder in roles.items()
    }
    pairs = [(pair["one"], pair["other"]) for pair in found["pairs"]]
    assert pairs == [("mllm", "base"), ("expert 1", "base"), ("expert 1", "mllm")]
    for row in found["weights"]:
        for (one, other), measures in zip(pairs, row["pairs"], strict=True):
            name = f"model.{row['weight']}.weight"
            if row["layer"] == 2:
                assert (measures is None) == (one == "expert 1" or name not in stored[one])
                continue
            a, b = stored[one][name], stored[other][name]
            distance = np.linalg.norm(a - b) / np.linalg.norm(b)
            cosine = np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b)
            apart = np.hypot(np.linalg.norm(a), np.linalg.norm(b)) / np.linalg.norm(b)
            assert measures["distance"] == pytest.approx(distance, rel=1e-9)
            assert measures["cosine"] == pytest.approx(cosine, rel=1e-9, abs=1e-12)
            assert measures["distance_unrelated"] == pytest.approx(apart, rel=1e-9)
    near, far = pair_of(found, "mllm", "base"), pair_of(found, "expert 1", "base")
    assert near["verdict"] == "one origin" and near["distance"] == pytest.approx(0.1, rel=0.01)
    assert far["verdict"] == "unrelated" and far["only_in_one"] == 7 and far["compared"] == 14


@pytest.mark.parametrize("shape", [(32, 24), (7, 100)])
def test_unrelated_weights_stay_below_the_stated_cosine_as_often_as_stated(shape: tuple[int, int]):
    from lean_merge.studies.compare.distances import unrelated_cosine

    generator = np.random.default_rng(3)
    bound, trials = unrelated_cosine(shape), 4000
    a, b = generator.standard_normal((2, trials, shape[0] * shape[1]), dtype=np.float32)
    cosines = np.sum(a * b, axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    # Of 4000 trials 40 are expected beyond, with a standard deviation of 6.3.
    assert 15 < np.sum(np.abs(cosines) > bound) < 65


def test_no_width_in_common_leaves_the_weights_of_equal_shape(make: Make):
    """Another intermediate size: attention can be compared, the feed-forward layers cannot."""
    base, expert = make("base"), make("expert", seed=2, intermediate_size=64)
    found = compared(base, base, expert)
    pair = pair_of(found, "expert 1", "base")
    assert (pair["equal_shape"], pair["unequal_shape"], pair["compared"]) == (8, 6, 8)
    for row in found["weights"]:
        assert (row["pairs"][1] is None) == (row["module"] in ("gate_proj", "up_proj", "down_proj"))


def test_strips_and_threads_do_not_change_a_number(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    base, expert = make("base"), make("expert", seed=1, num_hidden_layers=3)
    whole = compared(base, base, expert)
    assert compared(base, base, expert, threads=3)["weights"] == whole["weights"]
    monkeypatch.setattr(tiles, "READ_ELEMENTS", 5 * 32)
    cut = compared(base, base, expert)
    assert cut["bytes"] == whole["bytes"]
    for one, other in zip(cut["weights"], whole["weights"], strict=True):
        for a, b in zip(one["pairs"], other["pairs"], strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert a["cosine"] == pytest.approx(b["cosine"], rel=1e-12, abs=1e-15)


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    strip=st.integers(1, 200),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**16),
)
def test_products_of_any_shape_and_strip_are_exact(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
    columns: int,
    strip: int,
    dtype: torch.dtype,
    seed: int,
):
    from lean_merge.checkpoints import TensorReader, open_checkpoint
    from lean_merge.checkpoints.rows import StoredRows, row_block
    from lean_merge.engine import worker_pool
    from lean_merge.studies.compare.distances import products

    folder = tmp_path_factory.mktemp("weights")
    generator = torch.Generator().manual_seed(seed)
    tensors = {n: torch.randn(rows, columns, generator=generator).to(dtype) for n in "ab"}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    specs = open_checkpoint(folder).tensors
    sources = {name: StoredRows(row_block(specs[name], 0, rows)) for name in "ab"}
    with monkeypatch.context() as patch, TensorReader() as reader, worker_pool(1) as workers:
        patch.setattr(tiles, "READ_ELEMENTS", strip)
        found = workers.map(lambda each: products(each, reader, workers), [sources])[0]
    a, b = (tensors[name].double().numpy() for name in "ab")
    assert found.squares["a"] == pytest.approx(np.sum(a * a), rel=1e-12)
    assert found.inner["a", "b"] == pytest.approx(np.sum(a * b), rel=1e-10, abs=1e-10)


def test_an_adapter_and_a_model_without_layers_are_named(make: Make, tmp_path: Path):
    base = make("base")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": "org/other"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    key = "base_model.model.model.layers.9.self_attn.q_proj"
    factors = {f"{key}.lora_A.weight": torch.ones(2, 64), f"{key}.lora_B.weight": torch.ones(64, 2)}
    save_file(factors, adapter / "adapter_model.safetensors")
    vision = tmp_path / "vision"
    vision.mkdir()
    save_file({"patch.weight": torch.ones(4, 4)}, vision / "model.safetensors")
    found = compared(base, vision, adapter)
    faults = {model["role"]: model["fault"] for model in found["models"]}
    assert faults["base"] is None
    assert faults["mllm"] == "has no layers that look like a language model's"
    assert "org/other" in faults["expert 1"]
    assert all(pair["verdict"] == "not comparable" for pair in found["pairs"])
    assert any("the MLLM has no layers" in line for line in differing(found))


def test_numbers_that_are_none_give_no_distance(make: Make, tmp_path: Path):
    base = make("base")
    broken = tuned(base, tmp_path / "broken", 0.1)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] = torch.nan
    tensors["model.layers.0.self_attn.k_proj.weight"].zero_()
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    found = compared(base, base, broken)
    rows = {row["weight"]: row["pairs"][1] for row in found["weights"]}
    nan, zero = (rows[f"layers.0.self_attn.{each}_proj"] for each in "qk")
    assert nan["cosine"] is None and nan["distance"] is None
    assert zero["cosine"] is None and zero["distance"] == pytest.approx(1)


def test_a_ceiling_that_does_not_hold_the_strips_is_an_error(make: Make):
    base = make("base")
    with pytest.raises(BudgetError, match="--memory"):
        compare(recipe(base, base, base), Resources(device="cpu", memory=1 << 20))


def test_memory_is_that_of_strips_and_not_of_weights(tmp_path: Path):
    """One thread over weights of 64 MiB each holds a few strips."""
    folders = []
    rows = torch.arange(1.0, 4097.0).to(torch.bfloat16)
    for role in ("base", "mllm", "expert"):
        (tmp_path / role).mkdir()
        name = "model.layers.0.self_attn.q_proj.weight"
        weight = {name: rows.repeat(8192, 1)}
        save_file(weight, tmp_path / role / "model.safetensors", metadata={"format": "pt"})
        folders.append(tmp_path / role)
    del weight
    gc.collect()
    before = memory.usage().anonymous
    with memory.PeakSampler() as sampler:
        found = compared(*folders)
    grown = sampler.peak.anonymous - before
    strips = 3 * (1 << 18) * (2 + 8)
    assert grown < strips + formulas.SLACK < 64 << 20, f"{grown >> 20} MiB"
    assert found["bytes"]["read"] == 3 * (64 << 20)


def test_a_comparison_is_kept_and_replaced_by_the_next(make: Make, tmp_path: Path):
    base, expert = make("base"), make("expert", num_hidden_layers=3)
    out = tmp_path / "out"
    for reason in ("first", "second"):
        result = write_comparison(recipe(base, base, expert), out, resources=CPU, reason=reason)
        assert result.path == out and result.page == out / "comparison.html"
        stored = json.loads((out / "comparison.json").read_text())
        assert stored["reason"] == reason and stored["version"] == 1
        assert {each.name for each in out.iterdir()} == {
            "comparison.json",
            "comparison.html",
            JOURNAL,
        }
        assert b"number of layers" in result.page.read_bytes()


def test_a_comparison_never_replaces_what_is_no_comparison(make: Make, tmp_path: Path):
    base, expert = make("base"), make("expert", num_hidden_layers=3)
    out = tmp_path / "out"
    write_comparison(recipe(base, base, expert), out, resources=CPU)
    (out / "notes.txt").write_text("mine")
    before = contents(out)
    with pytest.raises(OutputError, match="not empty"):
        write_comparison(recipe(base, base, expert), out, resources=CPU)
    with pytest.raises(OutputError, match="input"):
        write_comparison(recipe(base, base, expert), base, resources=CPU, overwrite=True)
    assert contents(out) == before


def test_a_comparison_that_fails_leaves_nothing(make: Make, tmp_path: Path):
    base = make("base")
    out = tmp_path / "out"
    with pytest.raises(BudgetError):
        write_comparison(recipe(base, base, base), out, resources=Resources(memory=1 << 20))
    assert not out.exists()


def test_without_plotly_a_comparison_is_kept_without_its_page(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pages, "plotly_installed", lambda: False)
    base = make("base")
    result = write_comparison(recipe(base, base, base), tmp_path / "out", resources=CPU)
    assert result.page is None and (tmp_path / "out" / "comparison.json").exists()
