"""Small checkpoints for tests: whole ones, and headers as broken as a test wants them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def raw_file(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    """A file with a header as given (bytes, or what becomes JSON), a stated length, and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    stated = len(text) if length is None else length
    path.write_bytes(stated.to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    """A header's entry for one tensor."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def save_checkpoint(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    config: Mapping[str, Any] | None = None,
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """A checkpoint with tensors of the given shapes, in one file or several with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[number::shards])
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    write_index(folder, weight_map)
    return folder


def write_index(folder: Path, weight_map: Mapping[str, Any]) -> Path:
    """An index with the given weight map."""
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": dict(weight_map)}))
    return path


def decoder_shapes(
    prefix: str = "model.",
    *,
    layers: int = 2,
    hidden: int = 16,
    inner: int = 24,
    pairs: int = 8,
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama-like language model; `pairs` is the rows of k and of v."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(layers):
        at = f"{prefix}layers.{layer}"
        shapes |= {
            f"{at}.self_attn.q_proj.weight": (hidden, hidden),
            f"{at}.self_attn.q_proj.bias": (hidden,),
            f"{at}.self_attn.k_proj.weight": (pairs, hidden),
            f"{at}.self_attn.v_proj.weight": (pairs, hidden),
            f"{at}.self_attn.o_proj.weight": (hidden, hidden),
            f"{at}.mlp.gate_proj.weight": (inner, hidden),
            f"{at}.mlp.up_proj.weight": (inner, hidden),
            f"{at}.mlp.down_proj.weight": (hidden, inner),
            f"{at}.input_layernorm.weight": (hidden,),
        }
    return shapes


def tower_shapes(prefix: str, *, layers: int = 2, hidden: int = 16) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a CLIP-like tower, which shares leaf names with a language model."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(layers):
        at = f"{prefix}layers.{layer}"
        for leaf in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes[f"{at}.self_attn.{leaf}.weight"] = (hidden, hidden)
        shapes[f"{at}.mlp.fc1.weight"] = (2 * hidden, hidden)
    return shapes
