"""Tied embeddings and vocabularies of different sizes: out of scope, so never in the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import as_matrix, load
from support.family_models import TEXT
from support.oracle import ip_merging

from lean_merge import MergeRecipe, Resources, merge

KINDS = {"llama": ("LlamaForCausalLM", "LlamaConfig"), "qwen2": ("Qwen2ForCausalLM", "Qwen2Config")}


def save(folder: Path, kind: str, *, role: int, vocabulary: int, tied: bool, form: str) -> None:
    """A text model whose weights in scope share a leading direction with the other roles'."""
    import transformers as tf

    model_name, config_name = KINDS[kind]
    config = getattr(tf, config_name)(
        **TEXT | {"vocab_size": vocabulary, "tie_word_embeddings": tied}
    )
    torch.manual_seed(7)
    model = getattr(tf, model_name)(config)
    shared = torch.Generator().manual_seed(1)
    own = torch.Generator().manual_seed(10 + role)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() < 2 or "layers" not in name:
                continue
            start = 0.02 * torch.randn(weight.shape, generator=shared)
            right = torch.randn(1, weight.shape[1], generator=shared)
            left = torch.randn(weight.shape[0], 1, generator=own)
            noise = torch.randn(weight.shape, generator=own)
            weight.copy_(start + (role > 0) * (0.01 * left @ right + 0.001 * noise))
    model.save_pretrained(folder)
    if form == "bin":
        # As torch saves a module: a tied head is named beside its embedding.
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("tied", [(True, True, True), (False, True, False), (True, False, True)])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_the_mllms_embeddings_stay_and_all_else_merges(
    tmp_path: Path, kind: str, tied: tuple[bool, bool, bool], form: str
):
    import transformers as tf

    sizes = {"base": 96, "mllm": 104, "math": 100}
    for role, (name, size) in enumerate(sizes.items()):
        save(tmp_path / name, kind, role=role, vocabulary=size, tied=tied[role], form=form)
    recipe = MergeRecipe(
        *(str(tmp_path / name) for name in ("base", "mllm")), (str(tmp_path / "math"),)
    )
    result = merge(recipe, tmp_path / "out", resources=Resources(device="cpu", threads=1))
    assert result.report["counts"]["merged"] == 14
    _, info = getattr(tf, KINDS[kind][0]).from_pretrained(
        result.path, dtype="auto", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    out = load(result.path)
    assert ("lm_head.weight" in out) is not tied[1]
    roles: dict[str, dict[str, Any]] = {name: _tensors(tmp_path / name) for name in sizes}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in out:
            assert torch.equal(out[name], roles["mllm"][name])
            assert out[name].shape == (104, 64)
    weight = "model.layers.1.mlp.up_proj.weight"
    start, before, expert = (as_matrix(roles[name][weight]) for name in sizes)
    update = ip_merging(start, before, expert).update
    change = as_matrix(out[weight]) - before
    assert abs(change - update).max() <= 2e-4 * abs(update).max()


def _tensors(folder: Path) -> dict[str, Any]:
    file = folder / "pytorch_model.bin"
    return torch.load(file, weights_only=True) if file.exists() else load(folder)
