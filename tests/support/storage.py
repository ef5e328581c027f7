"""Triples whose roles store the same weights in different ways."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from support.families import Slot, Triple, tune
from support.layouts import EXPERT_INNER, HEADS, INNER, PAIRS, SIZE, Layout, stored_as

ONE = (0,)
SPLIT = Layout(numbers=ONE)
FUSED = Layout(qkv="fused", mlp="fused", numbers=ONE)
INTERN = Layout(
    qkv="interleaved",
    attention="attention",
    feed_forward="feed_forward",
    leaves=(("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2"), ("o_proj", "wo")),
    numbers=ONE,
)
EACH = Layout(mlp="each", numbers=ONE)
ROWS = Layout(mlp="rows", numbers=ONE)
COLUMNS = Layout(mlp="columns", qkv="fused", numbers=ONE)
CONFIG = dict(hidden_size=64, num_attention_heads=HEADS, num_key_value_heads=PAIRS, head_dim=SIZE)


def shapes(layout: Layout) -> dict[str, tuple[int, int]]:
    """The shapes of the weights by canonical name."""
    rows = {"q_proj": HEADS * SIZE, "k_proj": PAIRS * SIZE, "v_proj": PAIRS * SIZE, "o_proj": 64}
    found = {}
    for canonical in layout.weights():
        leaf = canonical.rpartition(".")[2]
        inner = EXPERT_INNER if "experts" in canonical else INNER
        found[canonical] = (64, inner) if leaf == "down_proj" else (rows.get(leaf, inner), 64)
    return found


def write_stored(
    folder: Path,
    base: Layout,
    mllm: Layout,
    expert: Layout,
    *,
    experts: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Triple:
    """A triple whose roles hold the same weights in any layouts; a norm is out of scope."""
    plain = EACH if base.mlp in ("each", "rows", "columns") else SPLIT
    paths = []
    for number, layout in enumerate((base, mllm, *[expert] * experts)):
        role = ("base", "mllm")[number] if number < 2 else f"expert{number - 1}"
        tensors = {"model.norm.weight": torch.full((8,), 1.0 + number, dtype=dtype)}
        for at, (canonical, shape) in enumerate(shapes(plain).items()):
            weight = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(at))
            if number:
                weight = tune(weight, canonical, number - 1)
            tensors[plain.weights()[canonical].name] = weight.to(dtype)
        paths.append(folder / role)
        paths[-1].mkdir(parents=True)
        stored = stored_as(plain, layout)(tensors)
        save_file(stored, paths[-1] / "model.safetensors", metadata={"format": "pt"})
        (paths[-1] / "config.json").write_text(json.dumps(CONFIG))
    own, theirs = mllm.weights(), base.weights()
    slots = tuple(Slot(canonical, theirs[canonical], own[canonical]) for canonical in own)
    return Triple(paths[0], paths[1], tuple(paths[2:]), slots)
