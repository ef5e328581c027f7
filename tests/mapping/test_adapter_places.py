"""Which part of a model an adapter changes, which layers it counts, and folders that hold both."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoint_files import decoder_shapes, save_checkpoint, tower_shapes
from support.families import SMALL, Triple, load, write_triple

from lean_merge.checkpoints import open_checkpoint, open_expert
from lean_merge.checkpoints.sidefiles import side_files
from lean_merge.errors import CheckpointError, CoverageError
from lean_merge.mapping import Coverage, map_roles

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
MLLAMA = {
    f"language_model.model.layers.{at}.{rest}": shape
    for layer, at in ((0, 0), (1, 2))
    for name, shape in decoder_shapes().items()
    if name.startswith(f"model.layers.{layer}.")
    for rest in [name.split(f".{layer}.", 1)[1]]
} | {
    f"language_model.model.layers.{at}.cross_attn.{leaf}.weight": (16, 16)
    for at in (1, 3)
    for leaf in ("q_proj", "o_proj")
}
"""Two layers of the base, 0 and 2, with cross-attention layers between and after them."""


def adapter(folder: Path, modules: Iterable[str], **config: Any) -> Path:
    """An adapter of rank 1 that changes modules [16, 16]."""
    folder.mkdir(exist_ok=True)
    stem = "base_model.model."
    factors = {"lora_A": torch.randn(1, 16), "lora_B": torch.randn(16, 1)}
    save_file(
        {f"{stem}{m}.{f}.weight": t.clone() for m in modules for f, t in factors.items()},
        folder / WEIGHTS,
    )
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 1} | config
    (folder / CONFIG).write_text(json.dumps(settings))
    return folder


def mapped(folder: Path, expert: Path, mllm: dict[str, tuple[int, ...]]) -> Coverage:
    base = open_checkpoint(save_checkpoint(folder / "base", decoder_shapes()))
    model = open_checkpoint(save_checkpoint(folder / "mllm", mllm))
    return map_roles(base, model, [open_expert(expert)])


def changed(coverage: Coverage) -> set[str]:
    """The weights of the base that the expert changes."""
    parts = [part for weight in coverage.weights for part in weight.slices]
    return {part.canonical for part in parts if not part.experts[0].zero_because}


# --- which part -----------------------------------------------------------------------------

VISION = tower_shapes("vision_tower.encoder.")


@pytest.mark.parametrize(
    "prefix",
    [
        "vision_tower.vision_model.encoder.layers",
        "model.audio_tower.layers",
        "talker.model.layers",
        "model.encoder.layers",
        "model.blocks",
    ],
)
def test_another_part_is_not_the_language_model_though_shapes_fit(tmp_path: Path, prefix: str):
    modules = [f"{prefix}.{n}.self_attn.{leaf}" for n in range(2) for leaf in ("q_proj", "o_proj")]
    made = adapter(tmp_path / "adapter", modules)
    with pytest.raises(CoverageError, match="changes no weight that the base has") as caught:
        mapped(tmp_path, made, decoder_shapes("language_model.model.") | VISION)
    assert prefix in str(caught.value)


def test_the_language_model_is_taken_and_the_tower_left_with_a_word(tmp_path: Path):
    own = "language_model.model.layers.1.self_attn.q_proj"
    tower = [f"vision_tower.encoder.layers.{n}.self_attn.q_proj" for n in range(2)]
    made = adapter(tmp_path / "adapter", [own, *tower])
    coverage = mapped(tmp_path, made, decoder_shapes("language_model.model.") | VISION)
    assert changed(coverage) == {"layers.1.self_attn.q_proj"}
    assert any("2 parts of the adapter" in line for line in coverage.warnings)


def test_a_matrix_of_the_layers_that_the_base_lacks_stops_the_run(tmp_path: Path):
    """An adapter's modules are gated as a whole model's matrices are."""
    modules = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.extra_proj"]
    made = adapter(tmp_path / "adapter", modules)
    with pytest.raises(CoverageError, match=r"layers\.0\.mlp\.extra_proj: the expert 1 changes it"):
        mapped(tmp_path, made, decoder_shapes("language_model.model."))


# --- which layers ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "config", "layer"),
    [
        ("language_model.model.layers.2.self_attn.q_proj", {}, 1),
        ("model.language_model.layers.2.self_attn.q_proj", {}, 1),
        ("model.layers.1.self_attn.q_proj", {}, 1),
        ("model.layers.0.self_attn.q_proj", {"base_model_name_or_path": "x/mllm"}, 0),
        ("model.layers.2.self_attn.q_proj", {}, 1),
        ("model.layers.1.self_attn.q_proj", {"base_model_name_or_path": "x/base"}, 1),
    ],
)
def test_layers_are_counted_as_the_model_does_that_it_was_trained_on(
    tmp_path: Path, module: str, config: dict[str, str], layer: int
):
    made = adapter(tmp_path / "adapter", [module], **config)
    assert changed(mapped(tmp_path, made, MLLAMA)) == {f"layers.{layer}.self_attn.q_proj"}


def test_a_layer_of_the_mllm_alone_is_left_out_with_a_word(tmp_path: Path):
    prefix = "language_model.model.layers"
    modules = [f"{prefix}.1.cross_attn.q_proj", f"{prefix}.2.self_attn.q_proj"]
    coverage = mapped(tmp_path, adapter(tmp_path / "adapter", modules), MLLAMA)
    assert changed(coverage) == {"layers.1.self_attn.q_proj"}
    assert any("1 parts of the adapter" in line for line in coverage.warnings)


def test_doubt_about_the_numbers_is_an_error(tmp_path: Path):
    base = open_checkpoint(save_checkpoint(tmp_path / "b", decoder_shapes("language_model.model.")))
    mllm = open_checkpoint(save_checkpoint(tmp_path / "m", MLLAMA))
    expert = adapter(tmp_path / "a", ["language_model.model.layers.1.self_attn.q_proj"])
    with pytest.raises(CoverageError, match="as the base does, or as the MLLM"):
        map_roles(base, mllm, [open_expert(expert)])


# --- a model with an adapter beside it ------------------------------------------------------


@pytest.fixture
def triple(tmp_path: Path) -> Triple:
    return write_triple(tmp_path / "in", SMALL)


def beside(folder: Path, **config: Any) -> torch.Tensor:
    """Put an adapter beside a model's weights; return what it adds to q_proj [96, 64]."""
    stem = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    a, b = 0.02 * torch.randn(2, 64), 0.02 * torch.randn(96, 2)
    save_file({f"{stem}A.weight": a, f"{stem}B.weight": b}, folder / WEIGHTS)
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4} | config
    (folder / CONFIG).write_text(json.dumps(settings))
    return 2 * (b.double() @ a.double())


@pytest.mark.parametrize("named", [None, "somewhere/expert1"])
def test_an_expert_with_an_adapter_beside_it_is_both_together(
    triple: Triple, tmp_path: Path, named: str | None
):
    expert = triple.experts[0]
    change = beside(expert, base_model_name_or_path=named)
    result = triple.merge(tmp_path / "out", merge_method="task_arithmetic")
    base, mllm, tuned, out = (load(f) for f in (triple.base, triple.mllm, expert, result.path))
    for slot in triple.slots:
        wanted = mllm[slot.mllm].double() + tuned[slot.base].double() - base[slot.base].double()
        if slot.base.endswith("q_proj.weight"):
            wanted += change
        torch.testing.assert_close(out[slot.mllm].double(), wanted, rtol=0, atol=1e-6)
    figures = result.report["bytes"]
    assert figures["read"] == figures["read_predicted"] == figures["read_most"]
    assert expert / WEIGHTS in open_expert(expert).files


def test_doubt_whether_the_model_or_the_adapter_is_meant_is_an_error(triple: Triple):
    expert = triple.experts[0]
    beside(expert, base_model_name_or_path="meta-llama/Llama-2-7b-hf")
    with pytest.raises(CheckpointError, match="an adapter of 'meta-llama/Llama-2-7b-hf', and"):
        open_expert(expert)
    beside(expert)
    (expert / "config.json").unlink()
    with pytest.raises(CheckpointError, match="a whole model and an adapter, and either may"):
        open_expert(expert)


def test_an_mllm_or_base_is_the_model_and_the_adapter_comes_along(triple: Triple, tmp_path: Path):
    plain = load(triple.merge(tmp_path / "plain", merge_method="task_arithmetic").path)
    for folder in (triple.base, triple.mllm):
        beside(folder, base_model_name_or_path="meta-llama/Llama-2-7b-hf")
    found = triple.merge(tmp_path / "out", merge_method="task_arithmetic").path
    assert (found / WEIGHTS).read_bytes() == (triple.mllm / WEIGHTS).read_bytes()
    assert triple.mllm / WEIGHTS in side_files(triple.mllm)[0]
    out = load_file(found / "model.safetensors")
    assert all(torch.equal(out[name], tensor) for name, tensor in plain.items())
    again = triple.merge(tmp_path / "out", merge_method="task_arithmetic")
    assert again.was_complete


def test_an_adapter_without_its_config_is_not_a_model(triple: Triple, tmp_path: Path):
    beside(triple.base)
    lone = tmp_path / "lone"
    lone.mkdir()
    (triple.base / WEIGHTS).rename(lone / WEIGHTS)
    with pytest.raises(CheckpointError, match=f"has {WEIGHTS} but no {CONFIG}"):
        open_expert(lone)


# --- flags of other parts -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "dropped"),
    [
        ({"tie_word_embeddings": True}, True),
        ({"text_config": {"tie_word_embeddings": True}}, True),
        ({"tie_word_embeddings": False, "llm_config": {"tie_word_embeddings": True}}, True),
        ({"thinker_config": {"text_config": {"tie_word_embeddings": True}}}, True),
        ({"vision_config": {"tie_word_embeddings": True}}, False),
        ({"thinker_config": {"audio_config": {"tie_word_embeddings": True}}}, False),
        ({"talker_config": {"text_config": {"tie_word_embeddings": True}}}, False),
        ({}, False),
    ],
)
def test_only_the_flags_of_the_language_model_tie_its_head(
    tmp_path: Path, config: dict[str, Any], dropped: bool
):
    weight = torch.randn(4, 4)
    torch.save(
        {"model.embed_tokens.weight": weight, "lm_head.weight": weight},
        tmp_path / "pytorch_model.bin",
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert ("lm_head.weight" not in open_checkpoint(tmp_path).tensors) is dropped
