"""The modules of an adapter: their names and rows are those that transformers itself gives them."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.families import SMALL, Triple, load, write_triple

from lean_merge import RecipeError
from lean_merge.outputs import modules
from lean_merge.outputs.loading import ask
from lean_merge.outputs.modules import rows_inside
from lean_merge.outputs.peft import gaps

# PEFT asks transformers by a name that it has given another since.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
BENCH = Path(__file__).parents[2] / "bench"
RENAMINGS = {
    "idefics3": "as the files have it",
    "llava": "under another prefix",
    "lfm3_vl": "with other names inside a layer",
    "minimax_m3_vl": "two tensors become one module",
    "molmo2": "one tensor becomes several modules",
    "qwen2_5_omni": "inside a part of the model, under another prefix",
}


@pytest.fixture(scope="module")
def families() -> Any:
    """The command that builds every multimodal class tiny."""
    sys.path.insert(0, str(BENCH))
    import families

    sys.path.remove(str(BENCH))
    return families


def question(folder: Path) -> dict[str, Any]:
    """All matrices, as the files have them."""
    tensors = load(folder)
    return {
        "config": json.loads((folder / "config.json").read_text()),
        "shapes": {name: list(tensor.shape) for name, tensor in tensors.items()},
        "wanted": [name for name, tensor in tensors.items() if tensor.dim() == 2],
    }


@pytest.mark.parametrize("kind", RENAMINGS)
def test_every_row_of_a_module_is_that_of_the_file(kind: str, families: Any, tmp_path: Path):
    """The class itself, which wrote the files, tells whose rows are whose."""
    import transformers

    torch.manual_seed(1)
    model = getattr(transformers, families.classes()[kind])(families.tiny(kind)).float()
    inside, decoder = families.language_model(model)
    families.randomise(decoder, 1)
    model.save_pretrained(tmp_path)
    files, held = load(tmp_path), model.state_dict()
    rows = {row.numpy().tobytes() for n, t in held.items() if n.startswith(inside) and t.dim() == 2
            for row in t}  # fmt: skip
    asked = question(tmp_path)
    asked["wanted"] = [n for n in asked["wanted"] if files[n][0].numpy().tobytes() in rows]
    found = ask(**asked)
    asked["wanted"] = [name for name in asked["wanted"] if name not in found["refused"]]
    found = ask(**asked)
    assert found["refused"] == {} and len(asked["wanted"]) > 6
    filled: dict[str, list[int]] = {}
    for name, pieces in found["pieces"].items():
        for module, runs in pieces:
            for here, there, count in runs:
                weight = held[f"{module}.weight"]
                assert torch.equal(files[name][here : here + count], weight[there : there + count])
                filled.setdefault(module, []).extend(range(there, there + count))
        assert sum(run[2] for _, runs in pieces for run in runs) == len(files[name])
    for module, own in filled.items():
        assert sorted(own) == list(range(held[f"{module}.weight"].shape[0]))
        assert found["sizes"][module] == list(held[f"{module}.weight"].shape)
    # The case is of the kind that it stands for.
    counts = {len(pieces) for pieces in found["pieces"].values()}
    as_it_is = {name.removesuffix(".weight") for name in asked["wanted"]} == filled.keys()
    tails = [{n.removesuffix(".weight").rpartition("layers.")[2] for n in names}
             for names in (asked["wanted"], filled)]  # fmt: skip
    assert as_it_is is (kind == "idefics3")
    assert (tails[0] == tails[1]) is (kind in ("idefics3", "llava", "qwen2_5_omni"))
    assert (max(counts) > 1) is (kind == "molmo2")
    assert (len(filled) < len(asked["wanted"])) is (kind == "minimax_m3_vl")


@pytest.mark.parametrize("kind", ["minimax_m3_vl", "qwen2_5_omni", "glm4v_moe"])
def test_a_class_takes_its_adapter_whole_or_is_refused_by_name(
    kind: str, families: Any, tmp_path: Path
):
    """The same, from merge to PEFT, and as docs/families.md says."""
    row = families.tried(kind, families.classes()[kind], tmp_path)
    assert row["whole"], row
    written = json.loads(families.RESULTS.read_text())["classes"][kind]
    told = ("class", "merged", "adapter refused", "left out", "modules", "applied", "whole")
    assert {key: row.get(key) for key in told} == {key: written.get(key) for key in told}


# --- what has no rules --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"architectures": ["InternVLChatModel"], "model_type": "internvl_chat"}, "no class for"),
        ({"architectures": ["Other"], "model_type": ["qwen2_vl"]}, "no class for"),
        ({"architectures": ["Other"], "model_type": "llava"}, "has no module for model.layers.0."),
        ({"model_type": "llava"}, "names no class under architectures"),
        ({}, "names no class under architectures"),
    ],
)
def test_without_rules_modules_are_named_as_the_files_and_a_note_says_so(
    small: Triple, tmp_path: Path, config: dict[str, Any], words: str
):
    triple = write_triple(tmp_path, SMALL)
    (triple.mllm / "config.json").write_text(json.dumps(config))
    result = triple.merge(tmp_path / "out", output="lora")
    found = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["target_modules"]
    assert found == [f"model.{name}" for name in sorted(SMALL)]
    (note,) = [each for each in result.report["warnings"] if "named as the MLLM's files" in each]
    assert words in note


def test_without_transformers_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(modules, "find_spec", lambda name: None)
    monkeypatch.setattr(modules, "_ANSWERS", {})
    triple = write_triple(tmp_path, SMALL)
    (triple.mllm / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    result = triple.merge(tmp_path / "out", output="lora")
    assert any("transformers is not installed" in each for each in result.report["warnings"])


def test_a_class_that_cannot_be_built_is_refused_before_anything_is_written(tmp_path: Path):
    triple = write_triple(tmp_path, SMALL)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    for wrong, words in (
        ({"hidden_size": "wide"}, "cannot build LlamaForCausalLM"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"hidden_size": 32}, "gives model.layers.0.* the shape"),
    ):
        (triple.mllm / "config.json").write_text(json.dumps(config | wrong))
        with pytest.raises(RecipeError, match=words):
            triple.merge(tmp_path / "out", output="lora")
        assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_a_process_of_its_own_gives_the_same_answer(tmp_path: Path):
    """It is asked where transformers was not imported before."""
    triple = write_triple(tmp_path, SMALL)
    asked = question(triple.mllm)
    asked["config"]["num_hidden_layers"] = 1
    here = ask(**asked)
    assert modules._asked_alone(json.dumps(asked).encode()) == here


# --- rows ---------------------------------------------------------------------------------------


@settings(deadline=None)
@given(rows=st.integers(1, 24), seed=st.integers(0, 10**6), broken=st.integers(0, 24))
def test_rows_are_found_wherever_runs_begin_and_end(rows: int, seed: int, broken: int):
    """Against a table with an entry for every row; few rows are moved, or all."""
    draw = random.Random(seed)
    order, moved = list(range(rows)), list(range(rows))
    for each in (order, moved):
        for _ in range(broken):
            cut = draw.randrange(rows)
            each[:] = each[cut:] + each[:cut]
            at = draw.randrange(rows)
            each[at], each[-1] = each[-1], each[at]
    moved = moved[: draw.randint(0, rows)]
    runs = joined([(row,) for row in order])
    piece = joined(list(enumerate(moved)))
    found = rows_inside([(first, count) for first, count in runs], tuple(piece))
    wanted = {(order.index(here), there) for here, there in enumerate(moved)}
    every = [(a + n, b + n) for a, b, count in found for n in range(count)]
    assert set(every) == wanted and len(every) == len(wanted)
    left = [row for first, count in gaps(found, rows) for row in range(first, first + count)]
    assert left == sorted(set(range(rows)) - set(moved))


def joined(rows: list[Any]) -> list[Any]:
    """Rows that follow each other in every respect, as runs with a count at the end."""
    runs: list[Any] = []
    for row in rows:
        last = runs[-1] if runs else None
        if last is not None and tuple(start + last[-1] for start in last[:-1]) == row:
            runs[-1] = (*last[:-1], last[-1] + 1)
        else:
            runs.append((*row, 1))
    return runs
