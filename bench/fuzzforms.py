"""Other forms of weights for bench/fuzz.py: PyTorch's archives, adapters, fp8 with scales."""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from lean_merge.checkpoints import TensorReader, open_checkpoint, open_expert
from lean_merge.mapping import map_roles

Mutate = Callable[[bytes, random.Random], bytes]
BIN = "pytorch_model.bin"
BIN_INDEX = "pytorch_model.bin.index.json"
_ODD = [0.0, -0.0, -1.0, float("nan"), float("inf"), 1e-45, 3e38]


def write_forms(root: Path) -> None:
    """The base in other forms: one archive, archives in shards, fp8; and an adapter of it."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted((root / "base").glob("*.safetensors")):
        tensors |= load_file(file)
    folders = {name: root / name for name in ("bin", "bins", "fp8", "adapter")}
    for folder in folders.values():
        folder.mkdir()
        if folder.name != "adapter":
            config = json.loads((root / "base" / "config.json").read_text())
            if folder.name == "fp8":
                settings = {"quant_method": "fp8", "weight_block_size": [4, 2]}
                config["quantization_config"] = settings
            (folder / "config.json").write_text(json.dumps(config))
    torch.save(tensors, folders["bin"] / BIN)
    where = {}
    for number in (1, 2):
        name = f"pytorch_model-{number:05d}-of-00002.bin"
        part = dict(list(tensors.items())[number - 1 :: 2])
        torch.save(part, folders["bins"] / name)
        where |= dict.fromkeys(part, name)
    (folders["bins"] / BIN_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    coded, factors = {}, {}
    for name, tensor in tensors.items():
        if tensor.ndim < 2:
            coded[name] = tensor
            continue
        coded[name] = tensor.to(torch.float8_e4m3fn)
        coded[f"{name}_scale_inv"] = torch.ones(-(-tensor.shape[0] // 4), 2)
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        factors[f"{stem}.lora_A.weight"] = torch.ones(2, tensor.shape[1])
        factors[f"{stem}.lora_B.weight"] = torch.ones(tensor.shape[0], 2)
    save_file(coded, folders["fp8"] / "model.safetensors")
    save_file(factors, folders["adapter"] / "adapter_model.safetensors")
    adapter = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "rank_pattern": {"q_proj": 2, r"layers\.1\..*up_proj": 2},
        "alpha_pattern": {r"layers\.(0|1)\.[a-z_]+\.q_proj": 7, "up_proj": 0.5},
        "base_model_name_or_path": "o/base",
        "target_modules": ["q_proj", "up_proj"],
        "init_lora_weights": True,
        "use_dora": False,
    }
    (folders["adapter"] / "adapter_config.json").write_text(json.dumps(adapter))


def use_roles(base: Path, mllm: Path, expert: Path) -> None:
    """Open and map them, and read every row of every weight."""
    roles = open_checkpoint(base), open_checkpoint(mllm), open_expert(expert)
    coverage = map_roles(*roles[:2], [roles[2]], allow_partial=True)
    with TensorReader() as reader:
        for mapped in coverage.weights:
            for weight in mapped.slices:
                for source in weight.roles:
                    rows = source.load(reader)
                    name = f"{weight.canonical} read"
                    rows.read(slice(0, rows.shape[0]), reader, _buffer, name)


def _buffer(_: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def change_archive(whole: bytes, rng: random.Random, mutate: Mutate) -> bytes:
    """An archive with mutated bytes: anywhere, in its directory, or in one entry made to fit."""
    kind = rng.random()
    if kind < 0.2:
        return mutate(whole, rng)
    if kind < 0.4:
        start = int.from_bytes(whole[-6:-2], "little")
        return whole[:start] + mutate(whole[start:], rng)
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(stream, "w") as new:
        names = old.namelist()
        pickles = [name for name in names if name.endswith("/data.pkl")]
        chosen = rng.choice(pickles if rng.random() < 0.8 else names)
        for name in names:
            data = old.read(name)
            new.writestr(name, mutate(data, rng) if name == chosen else data)
    return stream.getvalue()


def change_scales(whole: bytes, rng: random.Random) -> bytes:
    """A safetensors file with one to three of its numbers replaced by odd ones."""
    start = 8 + int.from_bytes(whole[:8], "little")
    data = bytearray(whole)
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = start + 4 * rng.randrange((len(data) - start) // 4)
        odd = struct.pack("<f", rng.choice(_ODD))
        data[at : at + 4] = rng.choice((odd, rng.randbytes(4)))
    return bytes(data)
