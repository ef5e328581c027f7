"""Reads adapters as PEFT does, and makes an adapter of what an expert changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from support.families import Triple, as_matrix, load
from support.oracle import Matrix

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG).read_text())


def updates(folder: Path) -> dict[str, Matrix]:
    """The update of every module by name: alpha / r B A, as PEFT scales it."""
    config, tensors = config_of(folder), load_file(folder / WEIGHTS)
    found = {}
    for name in config["target_modules"]:
        key = f"base_model.model.{name}."
        a, b = tensors.pop(f"{key}lora_A.weight"), tensors.pop(f"{key}lora_B.weight")
        rank = config["rank_pattern"].get(name, config["r"])
        alpha = config["alpha_pattern"].get(name, config["lora_alpha"])
        assert a.shape[0] == b.shape[1] == rank
        found[name] = alpha / rank * (as_matrix(b) @ as_matrix(a))
    assert not tensors
    return found


def factors(delta: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """B and A of which scaling * B A is the best approximation of `delta` of that rank."""
    left, sizes, right = torch.linalg.svd(delta.double(), full_matrices=False)
    root = sizes[:rank].sqrt()
    first, second = left[:, :rank] * root / scaling, root[:, None] * right[:rank]
    return first.float().contiguous(), second.float().contiguous()


def by_hand(
    triple: Triple, out: Path, *, rank: int = 4, prefix: str = "base_model.model.", **config: Any
) -> tuple[Path, dict[str, Matrix]]:
    """Write an adapter of every weight of a triple; returns its folder and the changes it makes."""
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ALL}
    settings |= {"base_model_name_or_path": str(triple.base)} | config
    scaling = settings["lora_alpha"] / settings["r"]
    base, expert = load(triple.base), load(triple.experts[0])
    tensors, changes = {}, {}
    for slot in triple.slots:
        b, a = factors((expert[slot.base] - base[slot.base]).float(), rank, scaling)
        stem = prefix + slot.base.removesuffix(".weight")
        tensors |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
        changes[slot.base] = scaling * (b.double() @ a.double()).numpy()
    out.mkdir()
    save_file(tensors, out / "adapter_model.safetensors")
    (out / "adapter_config.json").write_text(json.dumps(settings))
    return out, changes
