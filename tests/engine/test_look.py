"""The early look at a few rows: models that do not fit, and rows in another order."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.families import Triple, load, write_triple
from torch import Tensor

from lean_merge import Expert, Grid, Resources, merge, plan, stream, sweep
from lean_merge.engine import early_look
from lean_merge.errors import CoverageError
from lean_merge.outputs.analysis import AnalysisOutput
from lean_merge.studies.analyze import analyze
from lean_merge.tasks.tiles import LOOK_ROWS, look_blocks, looked_at

H, F, KV, SIZE = 32, 48, 16, 8
SHAPES = {
    f"layers.{n}.{leaf}": shape
    for n in range(2)
    for leaf, shape in {
        "self_attn.q_proj": (H, H),
        "self_attn.k_proj": (KV, H),
        "self_attn.v_proj": (KV, H),
        "self_attn.o_proj": (H, H),
        "mlp.gate_proj": (F, H),
        "mlp.up_proj": (F, H),
        "mlp.down_proj": (H, F),
    }.items()
}
CONFIG = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": H}
Edit = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@pytest.fixture
def triple(tmp_path: Path) -> Triple:
    made = write_triple(tmp_path / "in", SHAPES)
    for folder in (made.base, made.mllm, made.experts[0]):
        (folder / "config.json").write_text(json.dumps(CONFIG))
    return made


def edited(folder: Path, edit: Edit) -> None:
    file = folder / "model.safetensors"
    tensors = {name: tensor.contiguous() for name, tensor in edit(load_file(file)).items()}
    file.unlink()
    save_file(tensors, file)


def warnings_of(triple: Triple, **options: Any) -> str:
    options = {"merge_method": "task_arithmetic", "output": "none"} | options
    return " ".join(merge(triple.recipe(**options)).report["warnings"])


def refusal(triple: Triple, **options: Any) -> str:
    with pytest.raises(CoverageError) as caught:
        warnings_of(triple, **options)
    assert "--force" in str(caught.value)
    return str(caught.value)


# --- what is looked at ----------------------------------------------------------------------


@given(st.integers(1, 300), st.integers(1, 1 << 20), st.text(max_size=5), st.booleans())
def test_blocks_lie_inside_the_weight_apart_and_in_order(
    out: int, width: int, name: str, together: bool
):
    blocks = look_blocks(name, (out, width), together=together)
    assert blocks == look_blocks(name, (out, width), together=together)
    rows = [row for block in blocks for row in range(out)[block]]
    assert rows == sorted(set(rows)) and 1 <= len(rows) <= LOOK_ROWS
    assert len(rows) == sum(block.stop - block.start for block in blocks)
    assert len(blocks) == 1 or not together


@given(st.permutations(sorted(SHAPES)))
def test_the_choice_of_weights_depends_on_their_names_alone(names: list[str]):
    assert looked_at(names) == looked_at(sorted(SHAPES))


def test_the_plan_knows_what_is_looked_at_to_the_byte(triple: Triple):
    work = plan(triple.recipe())
    rows = {"q": H, "k": KV, "v": KV, "o": H, "gate": F, "up": F, "down": H}
    width = {"down": F}
    wanted = sum(2 * min(16, n) * width.get(leaf, H) * 4 * 3 for leaf, n in rows.items())
    assert early_look(work).bytes_read == work.prediction.looked == wanted
    report = merge(triple.recipe(output="none")).report
    assert report["bytes"]["looked"] == wanted


def test_models_that_fit_are_taken_without_a_word(triple: Triple):
    assert warnings_of(triple) == ""


# --- the wrong base -------------------------------------------------------------------------


def other_model(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(9)
    return {n: 0.02 * torch.randn(t.shape, generator=generator) for n, t in tensors.items()}


@pytest.mark.parametrize("wrong", ["base", "mllm", "expert"])
def test_a_model_that_was_hardly_tuned_from_the_base_is_refused(
    triple: Triple, tmp_path: Path, wrong: str
):
    folder = {"base": triple.base, "mllm": triple.mllm, "expert": triple.experts[0]}[wrong]
    edited(folder, other_model)
    role = "expert 1" if wrong == "expert" else "MLLM"
    words = f"the {role} was hardly tuned from this base"
    assert words in refusal(triple)
    for method in ("ip_merging", "ties"):
        assert words in refusal(triple, merge_method=method)
    with pytest.raises(CoverageError, match="hardly tuned"):
        triple.merge(tmp_path / "out", output="checkpoint")
    with pytest.raises(CoverageError, match="hardly tuned"):
        stream(triple.recipe())
    with pytest.raises(CoverageError, match="hardly tuned"):
        sweep(triple.recipe(), Grid(thresholds=(0.2, 0.4)), tmp_path / "sweep")
    assert not (tmp_path / "out").exists() and not (tmp_path / "sweep").exists()
    assert words in warnings_of(triple, force=True)


def test_an_analysis_warns_and_a_merge_from_it_refuses(triple: Triple, tmp_path: Path):
    edited(triple.base, other_model)
    made = analyze(plan(triple.recipe(), output=AnalysisOutput), tmp_path / "analysis", page=False)
    assert any("hardly tuned" in line for line in made.analysis.document["warnings"])
    with pytest.raises(CoverageError, match="hardly tuned"):
        merge(triple.recipe(), tmp_path / "out", analysis=tmp_path / "analysis")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("memory", [None, 1 << 30])
def test_the_verdict_does_not_depend_on_memory_or_threads(triple: Triple, memory: int | None):
    resources = [Resources(device="cpu", threads=n, memory=memory) for n in (1, 3)]
    first, second = (early_look(plan(triple.recipe(), each)) for each in resources)
    assert first == second


# --- rows in another order ------------------------------------------------------------------


def leaves(edit: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Edit:
    """Apply an edit to the tensors of each layer by their leaves, "q_proj" and so on."""

    def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        result = {n: t for n, t in tensors.items() if ".layers." not in n}
        for layer in range(2):
            at = f"model.layers.{layer}."
            found = {n.split(".")[-2]: t for n, t in tensors.items() if n.startswith(at)}
            for leaf, tensor in edit(found).items():
                parent = "mlp" if leaf in ("gate_proj", "up_proj", "down_proj") else "self_attn"
                parent = "mlp" if leaf.endswith(("gate_up_proj", "up_gate_proj")) else parent
                result[f"{at}{parent}.{leaf}.weight"] = tensor
        return result

    return whole


def rope(tensor: Tensor, heads: int) -> Tensor:
    halves = tensor.view(heads, 2, tensor.shape[0] // heads // 2, H)
    return halves.transpose(1, 2).reshape(tensor.shape)


def by_heads(w: dict[str, Tensor]) -> Tensor:
    parts = [w["q_proj"].view(2, 2 * SIZE, H), w["k_proj"].view(2, SIZE, H)]
    return torch.cat([*parts, w["v_proj"].view(2, SIZE, H)], 1).reshape(-1, H)


def fused(leaf: str, join: Callable[[dict[str, Tensor]], Tensor], *parts: str) -> Edit:
    def edit(w: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: t for n, t in w.items() if n not in parts} | {leaf: join(w)}

    return leaves(edit)


QKV, GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


def one_after_another(*names: str) -> Callable[[dict[str, Tensor]], Tensor]:
    return lambda w: torch.cat([w[name] for name in names])


ORDERS: dict[str, tuple[Edit, str]] = {
    "up before gate": (
        fused("gate_up_proj", one_after_another("up_proj", "gate_proj"), *GATE_UP),
        "up, then gate, as in a tensor named up_gate_proj",
    ),
    "gate and up alternate": (
        fused(
            "gate_up_proj",
            lambda w: torch.stack([w["gate_proj"], w["up_proj"]], 1).reshape(-1, H),
            *GATE_UP,
        ),
        "rows of gate and up alternate",
    ),
    "wqkv concatenated": (
        fused("wqkv", one_after_another(*QKV), *QKV),
        "q, then k, then v, as in a tensor named qkv_proj",
    ),
    "qkv by heads": (fused("qkv_proj", by_heads, *QKV), "for each key/value head"),
    "k first": (
        fused("qkv_proj", one_after_another("k_proj", "q_proj", "v_proj"), *QKV),
        "k, then q, then v",
    ),
    "Meta's rope": (
        leaves(lambda w: w | {"q_proj": rope(w["q_proj"], 4), "k_proj": rope(w["k_proj"], 2)}),
        "its heads are in Meta's order",
    ),
    "exchanged": (
        leaves(lambda w: w | {"gate_proj": w["up_proj"], "up_proj": w["gate_proj"]}),
        "are exchanged",
    ),
    "shuffled": (
        leaves(lambda w: w | {"o_proj": w["o_proj"].roll(5, 0)}),
        "as o_proj is row",
    ),
}


@pytest.mark.parametrize("role", ["mllm", "expert"])
@pytest.mark.parametrize("order", ORDERS)
def test_rows_in_another_order_are_refused_and_the_order_is_named(
    triple: Triple, order: str, role: str
):
    edit, words = ORDERS[order]
    edited(triple.mllm if role == "mllm" else triple.experts[0], edit)
    message = refusal(triple)
    assert "in another order than the base" in message
    assert words in message, message
    assert "in another order" in warnings_of(triple, force=True)


def test_rows_of_the_base_in_another_order_are_refused_too(triple: Triple):
    edited(triple.base, ORDERS["Meta's rope"][0])
    assert "the base's heads are in Meta's order" in refusal(triple)


@pytest.mark.parametrize("wrong", ["expert", "parent"])
def test_an_expert_is_judged_by_its_own_parent(tmp_path: Path, wrong: str):
    three = write_triple(tmp_path / "in", SHAPES, experts=2)
    for folder in (three.base, three.mllm, *three.experts):
        (folder / "config.json").write_text(json.dumps(CONFIG))
    expert, parent = three.experts
    tensors = load(expert if wrong == "expert" else parent)

    def told(*, force: bool = False) -> str:
        recipe = replace(three, experts=(expert,)).recipe(
            merge_method="task_arithmetic", output="none", force=force
        )
        own = replace(recipe, experts=(Expert(str(expert), parent=str(parent)),))
        return " ".join(merge(own).report["warnings"])

    assert told() == ""
    folder = expert if wrong == "expert" else parent
    edited(folder, ORDERS["Meta's rope"][0])
    with pytest.raises(CoverageError, match=r"in another order than the parent.*--force"):
        told()
    edited(folder, lambda _: other_model(tensors))
    with pytest.raises(CoverageError, match="the expert 1 was hardly tuned from this parent"):
        told()
    assert "hardly tuned from this parent" in told(force=True)


def test_the_named_order_merges_with_names(triple: Triple, tmp_path: Path):
    """What the refusal advises gives the merge of the plain order."""
    wanted = load(triple.merge(tmp_path / "plain", merge_method="task_arithmetic").path)
    for number, (order, old, new, parts) in enumerate(
        (
            ("up before gate", "gate_up_proj", "up_gate_proj", ("up_proj", "gate_proj")),
            ("wqkv concatenated", "wqkv", "qkv_proj", QKV),
        )
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        save_file(load(triple.mllm), folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(CONFIG))
        edited(folder, ORDERS[order][0])
        work = replace(triple, mllm=folder)
        result = merge(
            work.recipe(
                merge_method="task_arithmetic", names={rf"{old}\.weight$": f"{new}.weight"}
            ),
            tmp_path / f"out{number}",
        )
        found = load(result.path)
        for name, tensor in found.items():
            if name.endswith(f"{old}.weight"):
                stem = name.rsplit(".", 2)[0]
                expected = torch.cat([wanted[f"{stem}.{part}.weight"] for part in parts])
                assert torch.equal(tensor, expected)


# --- relations ------------------------------------------------------------------------------


def test_equal_models_are_named_and_the_result_says_that_nothing_changed(
    triple: Triple, tmp_path: Path
):
    same = replace(triple, experts=(triple.base,))
    report = same.merge(tmp_path / "out", merge_method="task_arithmetic").report
    assert "The expert 1 equals the base in every row" in " ".join(report["warnings"])
    nothing = dict.fromkeys(["relative_update", "relative_to_experts", "kept"])
    assert report["changed"] == {"weights": 0, "of": 14, **nothing}
    assert not any("rounding" in line for line in report["warnings"])
    assert "MLLM's language model equals the base" in warnings_of(replace(triple, mllm=triple.base))
    assert "expert 1 equals the MLLM's" in warnings_of(replace(triple, experts=(triple.mllm,)))


def test_exchanged_roles_are_told_by_the_distances(triple: Triple):
    base, mllm, (expert,) = triple.base, triple.mllm, triple.experts
    assert "base and expert 1 look exchanged" in warnings_of(
        replace(triple, base=expert, experts=(base,))
    )
    assert "base and MLLM look exchanged" in warnings_of(replace(triple, base=mllm, mllm=base))


def test_a_base_that_both_share_a_change_with_is_warned_of(triple: Triple):
    generator = torch.Generator().manual_seed(3)
    edited(
        triple.base,
        lambda tensors: {
            n: t + 0.006 * torch.randn(t.shape, generator=generator) for n, t in tensors.items()
        },
    )
    assert "seem to be tuned from another model" in warnings_of(triple)


def test_the_change_is_measured(triple: Triple, tmp_path: Path):
    result = triple.merge(tmp_path / "out", merge_method="task_arithmetic", scale=0.5)
    before, after = load(triple.mllm), load(result.path)
    names = [name for name in before if ".layers." in name]
    update = sum(float((after[n] - before[n]).double().norm() ** 2) for n in names)
    whole = sum(float(before[n].double().norm() ** 2) for n in names)
    changed = result.report["changed"]
    assert (changed["weights"], changed["of"]) == (14, 14)
    assert changed["relative_update"] == pytest.approx((update / whole) ** 0.5, rel=0.1)
