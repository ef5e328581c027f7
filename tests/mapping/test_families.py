"""Every family that is named is merged, reloaded and compared with the oracle."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from support.agreement import EXACT, MEDIAN, compare
from support.class_table import page_of_classes
from support.families import Triple, cases, load, rows_of
from support.family_table import FAMILIES, Family, build, page, reloaded
from support.form_table import FORMS, Form, as_form, entries
from support.form_table import page as page_of_forms

from lean_merge import MergeResult

README = Path(__file__).parents[2] / "README.md"
DOCS = Path(__file__).parents[2] / "docs" / "families.md"
NAMED = """
LLaVA, LLaVA-NeXT, LLaVA-OneVision, VipLLaVA, LLaVA (original), Qwen2-VL, Qwen2.5-VL, Qwen3-VL,
Idefics2, Idefics3, SmolVLM, InternVL, InternVL (original), Mistral3, Pixtral, Gemma3, PaliGemma,
Mllama, Phi-3-vision (original), Mixture of experts
"""
"""The families that the documentation promises; each must be in the table."""
ROUNDED = MEDIAN / 3
"""Relative error of an update whose task vectors are rounded to 16 bits."""
each_family = pytest.mark.parametrize("entry", FAMILIES, ids=lambda entry: entry.key)


def test_every_family_that_is_named_is_tested():
    assert {name.strip() for name in NAMED.split(",")} <= {entry.name for entry in FAMILIES}
    assert len({entry.key for entry in FAMILIES}) == len(FAMILIES)
    sparse = {entry.layout.mlp for entry in FAMILIES if entry.name == "Mixture of experts"}
    assert sparse == {"each", "rows"}


def plain(name: str) -> str:
    """A name as different pages spell it: "Qwen2-MoE" and "Qwen2Moe", "LLaVA (original)"."""
    return re.sub(r"[^a-z0-9.]", "", name.partition(" (")[0].lower())


def test_the_readme_names_what_is_tested_and_nothing_else():
    text = README.read_text(encoding="utf-8").split("## Families\n")[1].split("\n## ")[0]
    names = re.findall(
        r"[A-Z][\w.]*(?:-[\w.]+)*(?: Vision| \d)?", "\n".join(re.findall(r"^- .*", text, re.M))
    )
    own = {plain(entry.name) for entry in FAMILIES} - {"mixtureofexperts", "textmodels"}
    texts = {plain(each) for entry in FAMILIES for each in (entry.base, entry.text)}
    named = {plain(name) for name in names}
    assert own <= named
    assert named <= own | texts
    originals = {plain(e.name) for e in FAMILIES if "(original)" in e.name} - {"phi3vision"}
    assert text.count("original") == len(originals)


@pytest.mark.parametrize("name", sorted({entry.name for entry in FAMILIES if entry.make}))
def test_every_layout_that_transformers_writes_of_a_family_is_tested(name: str, tmp_path: Path):
    """Under the names of its version 4 and of its version 5, where these differ."""
    entries = [entry for entry in FAMILIES if entry.name == name]
    layouts = [{where.name for where in each.layout.weights().values()} for each in entries]
    for base in {entry.base for entry in entries if entry.convert is dict}:
        model = next(entry for entry in entries if entry.base == base).model()
        for original in (True, False):
            model.save_pretrained(tmp_path / f"{base}{original}", save_original_format=original)
            written = load(tmp_path / f"{base}{original}").keys()
            assert any(layout <= written for layout in layouts), sorted(written)


def numbers(tensors: dict[str, torch.Tensor]) -> set[bytes]:
    """The rows of all matrices, and the columns of stacked ones, as bytes."""
    found = set()
    for tensor in tensors.values():
        if tensor.dim() == 2:
            found.update(row.numpy().tobytes() for row in tensor)
        elif tensor.dim() == 3:
            for way in (tensor, tensor.transpose(1, 2).contiguous()):
                found.update(row.numpy().tobytes() for row in way.flatten(0, 1))
    return found


def check_scope(triple: Triple, result: MergeResult, bar: float) -> None:
    """In scope: every logical weight, decided and computed as the oracle does of the numbers."""
    rows = rows_of(result)
    assert rows.keys() == {slot.canonical for slot in triple.slots}
    compare(list(cases(triple, result)), rows, median=bar, worst=bar)
    kinds: dict[str, set[bool]] = {}
    for slot in triple.slots:
        row = rows[slot.canonical]
        assert row["selected"] is triple.is_aligned(slot.canonical)
        assert row["name"] == slot.mllm
        kinds.setdefault(kind(slot.canonical), set()).add(row["selected"])
    assert all(True in decided for decided in kinds.values()), kinds


def check_rest(triple: Triple, result: MergeResult, *, same_dtype: bool = True) -> None:
    """Out of scope: every byte is the MLLM's; so is what was not selected, if its dtype is kept."""
    before, after, rows = load(triple.mllm), load(result.path), rows_of(result)
    assert after.keys() == before.keys()
    for slot in triple.slots:
        if same_dtype and not rows[slot.canonical]["selected"]:
            assert torch.equal(slot.in_mllm.get(after), slot.in_mllm.get(before))
    scope = {slot.mllm for slot in triple.slots}
    if same_dtype:
        for slot in triple.slots:
            slot.in_mllm.put(after, slot.in_mllm.get(before))
        scope = set()
    for name, tensor in before.items():
        if name not in scope:
            assert after[name].dtype == tensor.dtype
            assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)), name


def check_reload(entry: Family, triple: Triple, result: MergeResult, work: Path) -> None:
    """It loads, whole, and the merged numbers arrive in the model."""
    held, info = reloaded(entry, result.path, work)
    assert not any(info.values()), info
    arrived, after = numbers(held), load(result.path)
    for slot in triple.slots:
        assert all(row.numpy().tobytes() in arrived for row in slot.in_mllm.get(after).contiguous())


@each_family
def test_a_family_is_merged_and_reloaded(entry: Family, tmp_path: Path):
    triple = build(entry, tmp_path / "in", max_shard_size="200KB")
    result = triple.merge(tmp_path / "out")
    check_scope(triple, result, EXACT)
    check_rest(triple, result)
    check_reload(entry, triple, result, tmp_path / "work")

    # What was planned is what was done.
    figures = result.report["bytes"]
    assert figures["read_predicted"] == figures["read_most"]
    assert (figures["read"], figures["written"]) == (
        figures["read_predicted"],
        figures["written_predicted"],
    )


@pytest.mark.parametrize("form", FORMS, ids=lambda form: plain(form.name))
@pytest.mark.parametrize("entry", entries(), ids=lambda entry: entry.key)
def test_a_form_is_merged_and_reloaded(entry: Family, form: Form, tmp_path: Path):
    triple = build(entry, tmp_path / "in", **form.options)
    stored, twin = as_form(form, triple, tmp_path / "twins")
    result = stored.merge(tmp_path / "out", out_dtype="float32")
    check_scope(twin, result, ROUNDED if "dtype" in form.options else EXACT)
    check_rest(twin, result, same_dtype=False)
    check_reload(entry, twin, result, tmp_path / "work")


def kind(canonical: str) -> str:
    """A projection, apart for experts of each sort: "experts.gate_proj"."""
    parts = [part for part in canonical.split(".")[2:] if not part.isdigit()]
    return ".".join(parts)


def test_the_page_of_families_is_up_to_date():
    text = page() + page_of_forms() + page_of_classes()
    if os.environ.get("LEAN_MERGE_WRITE_DOCS") == "1":
        DOCS.write_text(text, encoding="utf-8")
    assert DOCS.read_text(encoding="utf-8") == text, "write it with LEAN_MERGE_WRITE_DOCS=1"
