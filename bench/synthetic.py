"""Synthetic triples at real widths, written by streaming: base, MLLM and expert checkpoints.

A task vector is low rank plus noise; on a stated share of the weights the leading right singular
directions of MLLM and expert are planted at a stated cosine, on the rest they are unrelated. Names
are those of a LLaVA checkpoint. One tensor is in memory at a time.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lean_merge.checkpoints import as_bytes, safetensors_dtype
from lean_merge.output import OutputFolder, OutputTensor, plan_shards


@dataclass(frozen=True, slots=True)
class Shapes:
    """The sizes of a Llama language model with a vision tower beside it."""

    hidden: int
    intermediate: int
    layers: int
    kv: int
    vocab: int = 32000
    vision_layers: int = 2

    @property
    def in_scope(self) -> int:
        """Parameters of the in-scope weights."""
        attention = 2 * self.hidden**2 + 2 * self.kv * self.hidden
        return self.layers * (attention + 3 * self.hidden * self.intermediate)


SIZES = {
    "tiny": Shapes(512, 1376, 2, 512, vocab=1000, vision_layers=1),
    "1b": Shapes(2048, 5632, 22, 256),
    "3b": Shapes(3072, 8192, 28, 1024),
    "7b": Shapes(4096, 11008, 32, 4096),
    "13b": Shapes(5120, 13824, 40, 5120),
    "33b": Shapes(6656, 17920, 60, 6656),
    "70b": Shapes(8192, 28672, 80, 1024),
    "405b": Shapes(16384, 53248, 126, 1024),
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the task vectors are made."""

    seed: int = 0
    dtype: torch.dtype = torch.bfloat16
    mllm_norm: float = 0.02
    expert_norm: float = 0.02
    rank: int = 16
    noise: float = 0.7
    """Share of a task vector's norm that is white noise."""
    cosine: float = 0.7
    aligned: float = 0.5
    """Share of the weights with planted alignment."""


def write_triple(folder: Path, shapes: Shapes, recipe: Recipe = Recipe()) -> dict[str, Path]:
    """Write `base`, `mllm` and `expert` below `folder`; return their folders."""
    roles = {role: folder / role for role in ("base", "mllm", "expert")}
    weights = list(_weights(shapes))
    for role, path in roles.items():
        tensors = [(_name(role, name), shape) for name, shape in weights]
        if role == "mllm":
            tensors += list(_vision(shapes))
        _write(path, tensors, recipe, _maker(role, recipe))
        _write_config(path, role, shapes, recipe)
    return roles


def _weights(shapes: Shapes) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, intermediate, kv = shapes.hidden, shapes.intermediate, shapes.kv
    yield "model.embed_tokens.weight", (shapes.vocab, hidden)
    for layer in range(shapes.layers):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (hidden,)
        yield prefix + "mlp.down_proj.weight", (hidden, intermediate)
        yield prefix + "mlp.gate_proj.weight", (intermediate, hidden)
        yield prefix + "mlp.up_proj.weight", (intermediate, hidden)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
        yield prefix + "self_attn.k_proj.weight", (kv, hidden)
        yield prefix + "self_attn.o_proj.weight", (hidden, hidden)
        yield prefix + "self_attn.q_proj.weight", (hidden, hidden)
        yield prefix + "self_attn.v_proj.weight", (kv, hidden)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (shapes.vocab, hidden)


def _vision(shapes: Shapes) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "multi_modal_projector.linear_1.weight", (shapes.hidden, 1024)
    for layer in range(shapes.vision_layers):
        for leaf in ("k_proj", "q_proj", "v_proj", "out_proj"):
            name = f"vision_tower.vision_model.encoder.layers.{layer}.self_attn.{leaf}.weight"
            yield name, (1024, 1024)


def _name(role: str, name: str) -> str:
    return f"language_model.{name}" if role == "mllm" else name


def _generator(*key: object) -> torch.Generator:
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def _maker(role: str, recipe: Recipe) -> Callable[[str, tuple[int, ...]], Tensor]:
    def make(name: str, shape: tuple[int, ...]) -> Tensor:
        common = name.removeprefix("language_model.")
        weight = torch.empty(shape, dtype=torch.float32)
        weight.normal_(0.0, 0.02, generator=_generator(recipe.seed, common))
        if role != "base" and len(shape) == 2 and "proj.weight" in name and ".layers." in name:
            weight += task_vector(role, common, (shape[0], shape[1]), recipe)
        return weight.to(recipe.dtype)

    return make


def task_vector(role: str, name: str, shape: tuple[int, int], recipe: Recipe) -> Tensor:
    """Low rank plus noise [out, in] float32, scaled to the role's share of the weight's norm."""
    out_features, in_features = shape
    rank = min(recipe.rank, *shape)
    shared = _orthonormal(in_features, rank, _generator(recipe.seed, name, "shared"))
    own = _orthonormal(in_features, rank, _generator(recipe.seed, name, role, "own"))
    draw = float(torch.rand(1, generator=_generator(recipe.seed, name, "aligned")))
    # Two vectors at cosine sqrt(c) to a shared one are at cosine c to each other.
    cosine = recipe.cosine if draw < recipe.aligned else 0.0
    right = torch.linalg.qr(shared * math.sqrt(cosine) + own * math.sqrt(1 - cosine))[0]
    left = _orthonormal(out_features, rank, _generator(recipe.seed, name, role, "left"))
    values = 0.9 ** torch.arange(rank, dtype=torch.float32)
    total = 0.02 * math.sqrt(out_features * in_features)
    total *= recipe.mllm_norm if role == "mllm" else recipe.expert_norm
    values *= total * math.sqrt(1 - recipe.noise**2) / float(values.norm())
    task = torch.empty(shape)
    task.normal_(
        0.0,
        total * recipe.noise / math.sqrt(out_features * in_features),
        generator=_generator(recipe.seed, name, role, "noise"),
    )
    return task.addmm_(left * values, right.T)


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    q: Tensor = torch.linalg.qr(torch.randn(rows, columns, generator=generator))[0]
    return q


def _write(
    path: Path,
    tensors: list[tuple[str, tuple[int, ...]]],
    recipe: Recipe,
    make: Callable[[str, tuple[int, ...]], Tensor],
) -> None:
    dtype = safetensors_dtype(recipe.dtype)
    outputs = [
        OutputTensor(name, dtype, shape, math.prod(shape) * recipe.dtype.itemsize)
        for name, shape in tensors
    ]
    shapes = dict(tensors)
    shards = plan_shards(outputs, shard_size=5 * 10**9)
    with OutputFolder.create(path, shards, inputs=[], overwrite=True) as folder:
        for shard in shards:
            for name, offset in shard.offsets.items():
                folder.write_at(shard, offset, as_bytes(make(name, shapes[name])))
        folder.seal()


def _write_config(path: Path, role: str, shapes: Shapes, recipe: Recipe) -> None:
    text = {
        "model_type": "llama",
        "hidden_size": shapes.hidden,
        "intermediate_size": shapes.intermediate,
        "num_hidden_layers": shapes.layers,
        "num_attention_heads": shapes.hidden // 128,
        "num_key_value_heads": shapes.kv // 128,
        "vocab_size": shapes.vocab,
        "torch_dtype": str(recipe.dtype).removeprefix("torch."),
    }
    config = {"model_type": "llava", "text_config": text} if role == "mllm" else text
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
