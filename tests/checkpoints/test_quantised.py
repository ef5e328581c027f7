"""Quantised checkpoints that cannot be merged are refused by name, before anything is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoint_files import save_checkpoint
from support.families import SMALL, write_triple
from torch import Tensor

from lean_merge import open_checkpoint
from lean_merge.errors import CheckpointError

SHAPES = {"model.layers.0.self_attn.q_proj.weight": (4, 4)}
STEM = "model.layers.0.self_attn.q_proj"
INTEGERS = {"type": "int", "num_bits": 4}
CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"quant_method": "gptq", "bits": 4}, "GPTQ"),
    ({"quant_method": "awq"}, "AWQ"),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes (4 bit)"),
    ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes (8 bit)"),
    ({"quant_method": "gguf"}, "GGUF"),
    ({"quant_method": "eetq"}, "EETQ"),
    ({"quant_method": "hqq"}, "HQQ"),
    ({"quant_method": "aqlm"}, "AQLM"),
    ({"quant_method": "quanto"}, "Quanto"),
    ({"quant_method": "torchao"}, "torchao"),
    ({"quant_method": "mxfp4"}, "MXFP4"),
    ({"quant_method": "bitnet"}, "BitNet"),
    ({"quant_method": "auto-round"}, "AutoRound"),
    (
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        "compressed-tensors (pack-quantized)",
    ),
    (
        {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": INTEGERS}}},
        "compressed-tensors (int4)",
    ),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "'modelopt'"),
    ({"quant_method": "new-method"}, "'new-method'"),
    ({"bits": 3}, "an unnamed method"),
]


@pytest.mark.parametrize(("settings", "named"), CONFIGS, ids=[named for _, named in CONFIGS])
@pytest.mark.parametrize("nested", [False, True])
def test_a_config_gives_the_method_away(
    tmp_path: Path, settings: dict[str, Any], named: str, nested: bool
):
    config: dict[str, Any] = {"quantization_config": settings}
    save_checkpoint(tmp_path, SHAPES, config={"text_config": config} if nested else config)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}: is quantised with {named}")
    assert "pass that checkpoint" in message


def integers(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


LAYOUTS: list[tuple[dict[str, Tensor], str]] = [
    ({"qweight": integers(4), "qzeros": integers(1), "scales": torch.ones(1)}, "GPTQ or AWQ"),
    ({"weight": integers(8, 1), "weight.absmax": torch.ones(1)}, "bitsandbytes (4 bit)"),
    ({"weight": integers(8, 1), "weight.quant_map": torch.ones(16)}, "bitsandbytes (4 bit)"),
    ({"weight": torch.zeros(4, 4, dtype=torch.int8), "SCB": torch.ones(4)}, "bitsandbytes (8 bit)"),
    ({"weight_packed": integers(4), "weight_scale": torch.ones(4)}, "compressed-tensors (packed)"),
    (
        {"weight": torch.zeros(4, 4, dtype=torch.int8), "weight_scale": torch.ones(4)},
        "8-bit integers",
    ),
    (
        {
            "weight": integers(4, 2),
            "weight_scale": torch.ones(4),
            "weight_scale_2": torch.ones(1),
        },
        "NVFP4",
    ),
    ({"experts_blocks": integers(4), "experts_scales": integers(4)}, "MXFP4"),
    ({"codebooks": torch.ones(2), "codes": integers(4)}, "AQLM"),
    ({"W_q": integers(4)}, "HQQ"),
]


@pytest.mark.parametrize(("layout", "named"), LAYOUTS, ids=[str(n) for n in range(len(LAYOUTS))])
def test_names_of_tensors_give_the_method_away(
    tmp_path: Path, layout: dict[str, Tensor], named: str
):
    tensors = {f"{STEM}.{name}": tensor for name, tensor in layout.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    message = str(caught.value)
    assert f"is quantised with {named}; merging needs" in message
    assert STEM in message and str(tmp_path / "model.safetensors") in message


@pytest.mark.parametrize("role", ["base", "mllm", "expert1"])
def test_nothing_is_written_where_a_role_is_quantised(tmp_path: Path, role: str):
    triple = write_triple(tmp_path / "in", SMALL)
    config = {"quantization_config": {"quant_method": "gptq"}}
    (tmp_path / "in" / role / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"{role}: is quantised with GPTQ"):
        triple.merge(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_integers_that_are_no_weights_are_copied(tmp_path: Path):
    triple = write_triple(tmp_path / "in", SMALL)
    file = triple.mllm / "model.safetensors"
    extra = {"table.weight": integers(3, 3), "steps": torch.arange(4), "gate_scales": torch.ones(2)}
    save_file(load_file(file) | extra, file)
    stored = load_file(triple.merge(tmp_path / "out").path / "model.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in extra.items())


def test_an_empty_config_is_no_quantisation(tmp_path: Path):
    save_checkpoint(tmp_path, SHAPES, config={"quantization_config": {}, "text_config": None})
    assert set(open_checkpoint(tmp_path).tensors) == set(SHAPES)
