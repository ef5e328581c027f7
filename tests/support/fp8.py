"""Quantises checkpoints to fp8 by hand, in the layouts that users meet, with a float32 twin."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lean_merge.checkpoints import TensorReader, WeightSource
from support.families import load

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def block_of(layout: str, shape: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns that share a scale."""
    rows, columns = shape
    return {
        "block": (32, 24),
        "tensor": (rows, columns),
        "channel": (1, columns),
        "group": (1, 16),
        "default": (128, 128),
    }[layout]


CONFIGS: dict[str, dict[str, Any]] = {
    "block": {"quant_method": "fp8", "weight_block_size": [32, 24], "activation_scheme": "dynamic"},
    "default": {"quant_method": "fp8", "activation_scheme": "dynamic"},
    "tensor": {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {"weights": {"type": "float", "num_bits": 8}}},
    },
    "channel": {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
    "group": {"quant_method": "compressed-tensors", "format": "float-quantized"},
}


def expand(scale: Tensor, block: tuple[int, int], shape: tuple[int, ...]) -> Tensor:
    """The factor of every number, by repeating: nothing is shared with the package."""
    wide = scale.double().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return wide[: shape[0], : shape[1]]


def quantise(
    weight: Tensor, block: tuple[int, int], dtype: torch.dtype = torch.float8_e4m3fn
) -> tuple[Tensor, Tensor]:
    """(fp8 numbers, float32 scale of each block) of a matrix."""
    rows, columns = weight.shape
    high, wide = math.ceil(rows / block[0]), math.ceil(columns / block[1])
    scale = torch.empty(high, wide)
    for i in range(high):
        for j in range(wide):
            part = weight[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            scale[i, j] = part.abs().max().float().clamp(min=1e-6) / torch.finfo(dtype).max
    return (weight.double() / expand(scale, block, weight.shape)).to(dtype), scale


def to_fp8(folder: Path, twin: Path, layout: str, *, dtype: torch.dtype) -> None:
    """Quantise every linear weight of `folder` in place; `twin` gets the same numbers in float32.

    The twin's other tensors are those of `folder`, byte for byte.
    """
    shutil.copytree(folder, twin)
    stored, plain = {}, {}
    for name, tensor in load(folder).items():
        if not (name.endswith("proj.weight") or ("linear_" in name and name.endswith(".weight"))):
            stored[name] = plain[name] = tensor
            continue
        block = block_of(layout, tensor.shape)
        numbers, scale = quantise(tensor.float(), block, dtype)
        stored[name] = numbers
        plain[name] = (numbers.double() * expand(scale, block, tensor.shape)).float()
        suffix = "_scale_inv" if layout in ("block", "default") else "_scale"
        stored[name + suffix] = scale.reshape(()) if layout == "tensor" else scale
        stored[name.removesuffix("weight") + "input_scale"] = torch.ones(1)
    for place, tensors in ((folder, stored), (twin, plain)):
        for file in [*place.glob("*.safetensors"), *place.glob("*.index.json")]:
            file.unlink()
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = CONFIGS[layout]
    (folder / "config.json").write_text(json.dumps(config))


def same_bytes(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(
        first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8)
    )


class Buffers:
    """Counts what reading asks for."""

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}

    def __call__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        self.sizes[name] = max(self.sizes.get(name, 0), math.prod(shape) * dtype.itemsize)
        return torch.full(shape, 77, dtype=torch.float32).to(dtype)


def read_rows(source: WeightSource, rows: slice) -> Tensor:
    """The rows, after checking that reading them costs the bytes that planning counts on."""
    buffers = Buffers()
    with TensorReader() as reader:
        ready = source.load(reader)
        assert reader.bytes_read == source.loaded
        values = ready.read(rows, reader, buffers, "x")
        assert reader.bytes_read == source.loaded + source.nbytes(rows)
    scratch = sum(buffers.sizes.values()) - buffers.sizes["x"]
    assert scratch == source.scratch(rows.stop - rows.start)
    held = getattr(ready, "factors", None)
    kept = [held] if isinstance(held, Tensor) else held or []
    assert source.held == source.loaded + sum(each.nbytes for each in kept)
    assert values.shape == (rows.stop - rows.start, source.shape[1])
    return values.clone()
