"""The merge as an adapter: loaded by PEFT itself, it does what the whole merge does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from support.adapters import CONFIG, WEIGHTS, config_of, updates
from support.families import SMALL, Triple, as_matrix, load, relative_error, rows_of, write_triple
from support.family_table import FAMILIES, SAVED, SAVED_NAMES, Family, build
from support.oracle import Matrix
from torch import Tensor

from lean_merge import (
    MergeRecipe,
    MergeResult,
    OutputError,
    RecipeError,
    Resources,
    merge,
    plan,
)
from lean_merge.demo.run import family_recipe
from lean_merge.linalg.truncation import truncate
from lean_merge.outputs import peft as adapter_module
from lean_merge.outputs.cutting import ADAPTER_ERROR
from lean_merge.outputs.peft import AdapterModule, StoredFactors, adapter_layout, write_adapter
from lean_merge.store import BlockStore, OutputFolder

# PEFT asks transformers by a name that it has given another since.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
CPU = Resources(device="cpu", threads=1)
LOGITS = 1e-3
"""Largest relative difference of the changes of logits."""
Adapted = Callable[[str], tuple[Triple, MergeResult, MergeResult]]


def logits(model: Any, size: int) -> Tensor:
    """Of a fixed text; words that may stand for an image are left out."""
    words = torch.randint(3, size, (2, 9), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        return model.eval()(input_ids=words).logits.double()


def load_model(loader: str, folder: Path) -> Any:
    transformers.utils.logging.disable_progress_bar()
    return getattr(transformers, loader).from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def adapted(
    family: Callable[..., Triple], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Triple, MergeResult, MergeResult]]:
    """A family merged whole and as an adapter."""
    made: dict[str, tuple[Triple, MergeResult, MergeResult]] = {}

    def get(name: str) -> tuple[Triple, MergeResult, MergeResult]:
        if name not in made:
            triple, folder = family(name), tmp_path_factory.mktemp("adapted")
            whole = triple.merge(folder / "whole")
            made[name] = triple, whole, triple.merge(folder / "adapter", output="lora")
        return made[name]

    return get


# --- through PEFT -------------------------------------------------------------------------


def check_logits(loader: str, mllm: Path, whole: Path, adapter: Path, *, words: int) -> Any:
    """Assert that PEFT's model changes the logits as the whole merge does; returns that model."""
    model = load_model(loader, mllm)
    before = logits(model, words)
    wanted = logits(load_model(loader, whole), words) - before
    adapted = peft.PeftModel.from_pretrained(model, adapter)
    found = logits(adapted, words) - before
    # The merge changes a good part of them, or nothing would be shown.
    assert float(wanted.norm()) > 5e-3 * float(before.norm())
    assert float((found - wanted).norm() / wanted.norm()) <= LOGITS
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted, words), before)
    return adapted


def loaded_as_it_is(entry: Family) -> bool:
    """Whether transformers loads a dense family's layout, in its older version if it has two."""
    older = {each.name for each in FAMILIES if each.version == 4}
    dense = entry.layout.mlp in ("split", "fused")
    if (entry.name, entry.version) in SAVED.values() or entry.name == "Text models":
        return False
    return entry.back is None and dense and (entry.version == 4 or entry.name not in older)


@pytest.mark.parametrize(
    "entry", [each for each in FAMILIES if loaded_as_it_is(each)], ids=lambda each: each.key
)
def test_every_dense_family_takes_its_adapter(entry: Family, tmp_path: Path):
    triple = build(entry, tmp_path / "in")
    whole, adapter = triple.merge(tmp_path / "whole"), triple.merge(tmp_path / "a", output="lora")
    check_logits(triple.loader, triple.mllm, whole.path, adapter.path, words=80)


def test_the_families_with_adapters_are_those_that_are_named():
    tested = {entry.name for entry in FAMILIES if loaded_as_it_is(entry)}
    tested |= {name for name, _ in SAVED.values()}
    promised = "LLaVA, LLaVA-NeXT, LLaVA-OneVision, VipLLaVA, Qwen2-VL, Qwen2.5-VL, Qwen3-VL, "
    promised += (
        "Idefics2, Idefics3, SmolVLM, InternVL, Mistral3, Pixtral, Gemma3, PaliGemma, Mllama"
    )
    assert set(promised.split(", ")) <= tested


@pytest.mark.parametrize(
    "entry",
    [each for each in FAMILIES if each.layout.mlp in ("each", "rows", "columns")],
    ids=lambda each: each.key,
)
def test_every_mixture_takes_an_adapter_of_all_but_its_experts(entry: Family, tmp_path: Path):
    """What the error of `test_experts_of_a_mixture_are_refused_by_name` names as the way out."""
    triple = build(entry, tmp_path / "in")
    options: dict[str, Any] = {"exclude": ("experts",)}
    whole = triple.merge(tmp_path / "whole", **options)
    adapter = triple.merge(tmp_path / "a", output="lora", **options)
    check_logits(triple.loader, triple.mllm, whole.path, adapter.path, words=80)
    modules = config_of(adapter.path)["target_modules"]
    assert any(name.endswith("q_proj") for name in modules)
    shared = [name for name in modules if ".shared_expert." in name]
    assert bool(shared) is bool(entry.layout.shared)


@pytest.mark.parametrize("name", SAVED_NAMES)
def test_peft_changes_the_logits_as_the_whole_merge_does(adapted: Adapted, name: str):
    triple, whole, adapter = adapted(name)
    model = check_logits(triple.loader, triple.mllm, whole.path, adapter.path, words=90)
    layers = {n for n, m in model.named_modules() if hasattr(m, "lora_A")}
    prefix = "base_model.model."
    assert layers == {prefix + name for name in config_of(adapter.path)["target_modules"]}
    assert not any("visual" in layer or "vision" in layer for layer in layers)


def test_peft_folds_the_adapter_into_the_merged_weights(adapted: Adapted):
    triple, whole, adapter = adapted("llava-old")
    model = peft.PeftModel.from_pretrained(load_model(triple.loader, triple.mllm), adapter.path)
    folded = model.merge_and_unload().state_dict()
    wanted = load_model(triple.loader, whole.path).state_dict()
    before = load_model(triple.loader, triple.mllm).state_dict()
    assert folded.keys() == wanted.keys()
    for name, weight in wanted.items():
        if torch.equal(weight, before[name]):
            assert torch.equal(folded[name], weight)
            continue
        change = as_matrix(weight) - as_matrix(before[name])
        assert relative_error(as_matrix(folded[name]) - as_matrix(before[name]), change) < 1e-3


def test_an_adapter_is_scaled_while_the_model_runs(adapted: Adapted):
    triple, _, adapter = adapted("phi3")
    model = peft.PeftModel.from_pretrained(load_model(triple.loader, triple.mllm), adapter.path)
    wanted = updates(adapter.path)
    layers = {n.removeprefix("base_model.model."): m for n, m in model.named_modules()}
    found = [logits(model, 90)]
    for scale in (0.5, 0.0):
        for name, update in wanted.items():
            layers[name].set_scale("default", scale)
            delta = as_matrix(layers[name].get_delta_weight("default").detach())
            assert np.allclose(delta, scale * update, atol=1e-7)
        found.append(logits(model, 90))
    with model.disable_adapter():
        assert torch.equal(found[2], logits(model, 90))
    assert not torch.allclose(found[0], found[1]) and not torch.allclose(found[1], found[2])


def test_the_embedded_family_as_an_adapter(tmp_path: Path):
    recipe = family_recipe(out_dtype="float32")
    whole = merge(recipe, tmp_path / "whole", resources=CPU)
    adapter = merge(family_recipe(output="lora"), tmp_path / "adapter", resources=CPU)
    mllm = Path(recipe.mllm_model)
    loader = "LlavaForConditionalGeneration"
    check_logits(loader, mllm, whole.path, adapter.path, words=50)
    assert adapter.report["counts"]["merged"] == whole.report["counts"]["merged"] > 0


def test_an_adapter_in_sixteen_bits_is_loaded_and_near(adapted: Adapted, tmp_path: Path):
    triple, _, exact = adapted("llava")
    half = triple.merge(tmp_path / "half", output="lora", out_dtype="bfloat16")
    assert {t.dtype for t in load_file(half.path / WEIGHTS).values()} == {torch.bfloat16}
    peft.PeftModel.from_pretrained(load_model(triple.loader, triple.mllm), half.path)
    near = updates(half.path)
    for name, update in updates(exact.path).items():
        assert relative_error(near[name], update) < 2**-7


# --- against the whole merge --------------------------------------------------------------


@pytest.mark.parametrize("name", SAVED_NAMES)
def test_the_factors_are_the_whole_merges_updates(adapted: Adapted, name: str):
    triple, whole, adapter = adapted(name)
    found = updates(adapter.path)
    before, after = (
        load_model(triple.loader, folder).state_dict() for folder in (triple.mllm, whole.path)
    )
    changed = {n for n in after if not torch.equal(after[n], before[n])}
    assert changed == {f"{module}.weight" for module in found}
    for module, update in found.items():
        change = as_matrix(after[f"{module}.weight"]) - as_matrix(before[f"{module}.weight"])
        assert relative_error(update, change) < 1e-3
    rows = rows_of(adapter)
    for key, row in rows_of(whole).items():
        same = [n for n in row if n not in ("update_kept", "lora_rank", "lora_error")]
        assert {n: rows[key][n] for n in same} == {n: row[n] for n in same}


def test_interleaved_weights_are_put_at_their_rows(tmp_path: Path):
    (entry,) = (each for each in FAMILIES if each.layout.qkv == "interleaved")
    triple = build(entry, tmp_path / "in")
    before, after = load(triple.mllm), load(triple.merge(tmp_path / "whole").path)
    found = updates(triple.merge(tmp_path / "adapter", output="lora").path)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert found.keys() == {name.removesuffix(".weight") for name in changed}
    assert any(name.endswith("wqkv") for name in found)
    for name, update in found.items():
        change = as_matrix(after[f"{name}.weight"]) - as_matrix(before[f"{name}.weight"])
        assert relative_error(update, change) < 1e-3


def test_several_experts_share_a(two_experts: Triple, tmp_path: Path):
    result = two_experts.merge(tmp_path / "out", output="lora", own=[{"scale": 0.5}, {}])
    whole = two_experts.merge(tmp_path / "whole", own=[{"scale": 0.5}, {}])
    before, after = load(two_experts.mllm), load(whole.path)
    for module, update in updates(result.path).items():
        tensor = f"{module}.weight"
        assert relative_error(update, as_matrix(after[tensor]) - as_matrix(before[tensor])) < 1e-3
    for key, tensor in load_file(result.path / WEIGHTS).items():
        if ".lora_A." in key:
            kept = tensor[tensor.any(dim=1)]
            gram = as_matrix(kept) @ as_matrix(kept).T
            assert len(kept) and np.allclose(gram, np.eye(len(gram)), atol=1e-5)


def test_fused_weights_are_block_diagonal(adapted: Adapted):
    triple, _, adapter = adapted("phi3")
    tensors = load_file(adapter.path / WEIGHTS)
    rows = rows_of(adapter)
    seen = 0
    for module in config_of(adapter.path)["target_modules"]:
        slots = [s for s in triple.slots if s.mllm == f"{module}.weight"]
        if len(slots) == 1:
            continue
        b = tensors[f"base_model.model.{module}.lora_B.weight"]
        start = 0
        for slot in slots:
            rank = rows[slot.canonical]["lora_rank"] or 0
            block = b[slot.in_mllm.rows]
            outside = torch.cat([block[:, :start], block[:, start + rank :]], dim=1)
            assert not outside.any()
            assert rank == 0 or bool(block[:, start : start + rank].any())
            start += rank
        assert start <= b.shape[1] and not b[:, start:].any()
        seen += 1
    assert seen


# --- the rank -----------------------------------------------------------------------------


def test_the_cut_is_bounded_and_reported_exactly(small: Triple, tmp_path: Path):
    options = {"temperature": 1.0}
    full = updates(small.merge(tmp_path / "full", output="lora", lora_rank=64, **options).path)
    auto = small.merge(tmp_path / "auto", output="lora", **options)
    for number, warns in ((1, True), (3, True), (50, False)):
        cut = small.merge(tmp_path / f"{number}", output="lora", lora_rank=number, **options)
        assert config_of(cut.path)["r"] == number
        check_errors(cut, full)
        assert warns is any(row["lora_error"] > 0.05 for row in cut.report["weights"])
        assert warns is any("cuts off" in line for line in cut.report["warnings"])
    check_errors(auto, full)
    for row in auto.report["weights"]:
        assert 1 < row["lora_rank"] and row["lora_error"] <= ADAPTER_ERROR
        _, sigma, _ = np.linalg.svd(full[row["name"].removesuffix(".weight")])
        tails = np.sqrt(np.cumsum(sigma[::-1] ** 2)[::-1] / np.sum(sigma**2))
        assert row["lora_rank"] == int((tails > ADAPTER_ERROR).sum())


def check_errors(result: MergeResult, full: dict[str, Matrix]) -> None:
    """Assert that the report states the error of each update against the uncut one."""
    found = updates(result.path)
    for row in result.report["weights"]:
        module = row["name"].removesuffix(".weight")
        error = relative_error(found[module], full[module])
        assert row["lora_error"] == pytest.approx(error, rel=1e-3, abs=2e-6)


@settings(deadline=None, max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 12), st.integers(1, 40)),
    decay=st.floats(0.05, 1.0),
    orthonormal=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_truncation_is_the_best_of_its_rank(
    shape: tuple[int, int, int], decay: float, orthonormal: bool, seed: int
):
    rows, inner, columns = shape
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, inner, generator=generator) * decay ** torch.arange(inner)
    right = torch.randn(inner, columns, generator=generator)
    if orthonormal and inner <= columns:
        right = torch.linalg.qr(right.T)[0].T.contiguous()
    whole = as_matrix(left) @ as_matrix(right)
    sigma = np.linalg.svd(whole, compute_uv=False)
    tails = np.sqrt(np.append(np.cumsum(sigma[::-1] ** 2)[::-1], 0.0) / np.sum(sigma**2))
    for wanted in (None, 1, 3, 40):
        cut = truncate(left, right, error=1e-3, rank=wanted)
        kept = as_matrix(left @ cut.of_left) @ as_matrix(cut.of_right @ right)
        error = float(np.linalg.norm(whole - kept) / np.linalg.norm(whole))
        assert error == pytest.approx(cut.error, abs=3e-5)
        assert cut.error == pytest.approx(tails[cut.rank], abs=1e-6)
        if wanted is None:
            assert cut.error <= 1e-3
            assert cut.rank == 0 or tails[cut.rank - 1] > 1e-3 * (1 - 1e-6)
        else:
            assert cut.rank <= wanted


def test_a_truncation_of_nothing_has_no_rank():
    cut = truncate(torch.zeros(5, 3), torch.eye(3, 4), error=1e-3)
    assert (cut.rank, cut.error) == (0, 0.0)


# --- one rank for all ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava", "phi3"])
def test_one_alpha_scales_every_module_whoever_divides_it(adapted: Adapted, name: str):
    """llama.cpp divides the one lora_alpha by the rank of each tensor."""
    _, _, adapter = adapted(name)
    config, tensors = config_of(adapter.path), load_file(adapter.path / WEIGHTS)
    ranks = {t.shape[0] for key, t in tensors.items() if ".lora_A." in key}
    assert ranks == {config["r"]} == {config["lora_alpha"]}
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    kept = [row["lora_rank"] or 0 for row in rows_of(adapter).values()]
    assert len(set(kept)) > 1, "all ranks were equal anyway"


def test_without_padding_each_module_has_its_own_rank(adapted: Adapted, tmp_path: Path):
    triple, _, padded = adapted("phi3")
    own = triple.merge(tmp_path / "own", output="lora", lora_uniform_rank=False)
    config, tensors = config_of(own.path), load_file(own.path / WEIGHTS)
    added: dict[str, int] = {}
    for row in rows_of(own).values():
        module = row["name"].removesuffix(".weight")
        added[module] = added.get(module, 0) + (row["lora_rank"] or 0)
    ranks = {key[17 : -len(".lora_A.weight")]: t.shape[0] for key, t in tensors.items()
             if ".lora_A." in key}  # fmt: skip
    assert ranks == {module: rank for module, rank in added.items() if rank}
    assert config["r"] == config["lora_alpha"] == max(ranks.values())
    smaller = {module: rank for module, rank in ranks.items() if rank < config["r"]}
    assert config["rank_pattern"] == config["alpha_pattern"] == smaller != {}
    for key, tensor in load_file(padded.path / WEIGHTS).items():
        side = 0 if ".lora_A." in key else 1
        rank = tensors[key].shape[side]
        kept, zeros = tensor.split([rank, config["r"] - rank], side)
        assert torch.equal(kept, tensors[key]) and not zeros.any()


# --- what it costs ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava", "phi3"])
def test_no_row_is_read_twice_and_nothing_out_of_scope(adapted: Adapted, name: str):
    triple, _, adapter = adapted(name)
    base = load(triple.base)
    in_scope = {slot.base for slot in triple.slots}
    read = adapter.report["bytes"]
    assert read["read"] == read["read_predicted"] == 3 * sum(base[n].nbytes for n in in_scope)
    assert read["read"] == read["read_most"] and not read["written_predicted_exactly"]
    size = (adapter.path / WEIGHTS).stat().st_size
    assert read["written"] == size <= read["written_predicted"]
    assert adapter.report["counts"]["copied"] == 0


def test_a_plan_predicts_the_disk_with_the_factors_before(small: Triple):
    plans = [plan(small.recipe(output="lora", lora_rank=rank), CPU) for rank in (2, 4)]
    some, more = (each.prediction for each in plans)
    numbers = sum(2 * sum(shape) for shape in SMALL.values())
    assert some.disk == some.bytes_written + 4 * numbers
    assert more.disk == more.bytes_written + 2 * 4 * numbers
    assert more.bytes_written - some.bytes_written == pytest.approx(4 * numbers, abs=16)
    assert not some.exact_writes


# --- the folder ---------------------------------------------------------------------------


def test_the_file_is_what_save_file_writes(adapted: Adapted, tmp_path: Path):
    _, _, adapter = adapted("qwen2-vl")
    save_file(load_file(adapter.path / WEIGHTS), tmp_path / WEIGHTS, metadata={"format": "pt"})
    assert (tmp_path / WEIGHTS).read_bytes() == (adapter.path / WEIGHTS).read_bytes()
    assert sorted(each.name for each in adapter.path.iterdir()) == [
        "README.md",
        CONFIG,
        WEIGHTS,
        "lean_merge_journal.jsonl",
        "lean_merge_recipe.yml",
        "lean_merge_report.json",
        "lean_merge_summary.txt",
    ]
    card = (adapter.path / "README.md").read_text()
    # A folder is no id of the hub, so that no field of the card names it.
    assert "library_name: peft" in card and "base_model" not in card.split("---")[1]
    again = MergeRecipe.from_yaml((adapter.path / "lean_merge_recipe.yml").read_text())
    assert again.output == "lora"


def test_another_run_with_more_threads_gives_the_same_bytes(adapted: Adapted, tmp_path: Path):
    triple, _, first = adapted("qwen2.5-vl")
    again = triple.merge(tmp_path / "again", output="lora", threads=2)
    assert (again.path / WEIGHTS).read_bytes() == (first.path / WEIGHTS).read_bytes()
    assert (again.path / CONFIG).read_bytes() == (first.path / CONFIG).read_bytes()


def test_an_adapter_is_replaced_only_when_told(small: Triple, tmp_path: Path):
    first = small.merge(tmp_path / "out", output="lora")
    assert small.merge(tmp_path / "out", output="lora").was_complete
    with pytest.raises(OutputError, match="--overwrite"):
        small.merge(tmp_path / "out", output="lora", lora_rank=1)
    recipe = small.recipe(output="lora", lora_rank=1)
    again = merge(recipe, tmp_path / "out", resources=CPU, overwrite=True)
    assert config_of(again.path)["r"] == 1
    assert again.path == first.path


def test_a_failure_leaves_no_adapter(
    small: Triple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(store: BlockStore, *args: Any) -> None:
        raise OutputError("the disk is gone")

    monkeypatch.setattr(BlockStore, "put", fail)
    with pytest.raises(OutputError, match="gone"):
        small.merge(tmp_path / "out", output="lora")
    names = [each.name for each in (tmp_path / "out").iterdir()]
    assert names == ["lean_merge_journal.jsonl.partial"]
    monkeypatch.undo()
    small.merge(tmp_path / "out", output="lora")
    assert (tmp_path / "out" / WEIGHTS).exists()


def test_an_adapter_that_was_not_sealed_is_visibly_unfinished(
    small: Triple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(folder: OutputFolder) -> None:
        raise OutputError("the power is gone")

    monkeypatch.setattr(OutputFolder, "seal", fail)
    with pytest.raises(OutputError, match="gone"):
        small.merge(tmp_path / "out", output="lora")
    assert not (tmp_path / "out" / WEIGHTS).exists()
    with pytest.raises(SafetensorError):
        load_file(tmp_path / "out" / f"{WEIGHTS}.partial")
    monkeypatch.undo()
    done = small.merge(tmp_path / "out", output="lora")
    assert updates(done.path)
    assert not list(tmp_path.rglob("*.partial"))


def test_an_adapter_of_nothing_is_refused(small: Triple, tmp_path: Path):
    with pytest.raises(OutputError, match="lower --threshold"):
        small.merge(tmp_path / "out", output="lora", threshold=1.0)
    assert not (tmp_path / "out" / WEIGHTS).exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stages": ("select",)}, "full rank.*project"),
        ({"stages": ("select", "rescale")}, "full rank.*project"),
        ({"merge_method": "task_arithmetic"}, "full rank.*task_arithmetic.*ip_merging"),
        ({"lora_rank": 0}, "lora_rank must be"),
        ({"lora_rank": "many"}, "lora_rank must be"),
        ({"output": "lorra"}, "output must be one of checkpoint, lora, none"),
    ],
)
def test_what_no_adapter_can_be_is_refused_before_anything_is_written(
    small: Triple, tmp_path: Path, options: dict[str, Any], words: str
):
    with pytest.raises(RecipeError, match=words):
        small.merge(tmp_path / "out", **{"output": "lora"} | options)
    assert not (tmp_path / "out").exists()


def test_experts_of_a_mixture_are_refused_by_name_and_may_be_left_out(tmp_path: Path):
    shapes = SMALL | {"layers.0.mlp.experts.0.up_proj": (48, 64)}
    triple = write_triple(tmp_path, shapes)
    with pytest.raises(RecipeError, match=r"experts\.0\.up_proj.*--exclude 'mlp\.experts'"):
        triple.merge(tmp_path / "out", output="lora")
    result = triple.merge(tmp_path / "out", output="lora", exclude=("experts",))
    assert config_of(result.path)["target_modules"] == [f"model.{name}" for name in sorted(SMALL)]


# --- factors on the disk ------------------------------------------------------------------


@settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    heights=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 4)), min_size=1, max_size=4),
    columns=st.integers(1, 9),
    chunk=st.integers(1, 40),
    gap=st.integers(0, 3),
    extra=st.integers(0, 3),
    shuffle=st.randoms(use_true_random=False),
)
def test_parts_are_put_together_whatever_their_ranks_rows_and_the_chunks(
    tmp_path: Path,
    heights: list[tuple[int, int]],
    columns: int,
    chunk: int,
    gap: int,
    extra: int,
    shuffle: Any,
):
    heights = [*heights, (2, 1)]
    generator = torch.Generator().manual_seed(len(heights))
    folder = Path(tmp_path / f"{len(list(tmp_path.iterdir()))}")
    blocks, parts, done = [], [], 0
    order = list(range(gap + sum(rows for rows, _ in heights)))
    shuffle.shuffle(order)
    with (
        pytest.MonkeyPatch.context() as patch,
        OutputFolder.create(folder, (), inputs=(), overwrite=False) as out,
    ):
        patch.setattr(adapter_module, "_CHUNK", max(chunk, extra + sum(r for _, r in heights)))
        for rows, rank in heights:
            b, a = (torch.randn(s, generator=generator) for s in ((rows, rank), (rank, columns)))
            blocks.append(as_matrix(b) @ as_matrix(a))
            runs = tuple((row, first, 1) for row, first in enumerate(order[done : done + rows]))
            of_a = out.blocks.put(f"{done}.a", a.shape, [a])
            of_b = out.blocks.put(f"{done}.b", b.shape, [b])
            parts.append(StoredFactors(runs, rank, of_a, of_b))
            done += rows
        # Rows that no part has stay as they are, and zeros fill the rank.
        blocks.append(np.zeros((gap, columns)))
        least = extra + sum(rank for _, rank in heights)
        module = AdapterModule("m", len(order), columns, tuple(parts), least)
        out.blocks.finish("m", None)
        write_adapter(out, [module], dtype=torch.float32, base_model="x")
        out.seal()
    assert np.allclose(updates(folder)["m"][order], np.concatenate(blocks), atol=1e-5)
    size = (folder / WEIGHTS).stat().st_size
    assert adapter_layout([module], torch.float32).size == size
