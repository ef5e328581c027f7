"""Synthetic triples at real widths, written by streaming: base, MLLM and expert checkpoints.

    python bench/synthetic.py FOLDER [--size 1b] [--layers 22] [--vocab 32000] [--text]

A task vector is low rank plus noise; on a stated share of the weights the leading right singular
directions of MLLM and expert are planted at a stated cosine, on the rest they are unrelated. Names
are those of a LLaVA checkpoint. Blocks of rows are made one after another, and go to all three
checkpoints at once, so that no tensor is whole in memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lean_merge.checkpoints import as_bytes, safetensors_dtype
from lean_merge.store import OutputFolder, OutputTensor, plan_shards

BLOCK = 1 << 24
"""Numbers of a block of rows."""
WRITERS = 2
"""Tensors that are made at a time."""


@dataclass(frozen=True, slots=True)
class Shapes:
    """The sizes of a Llama language model with a vision tower beside it."""

    hidden: int
    intermediate: int
    layers: int
    kv: int
    vocab: int = 32000
    vision_layers: int = 2
    only: tuple[str, ...] = ()
    """Leaves of the in-scope weights that there are, such as `down_proj`; all if empty."""

    @property
    def weights(self) -> dict[str, tuple[int, int]]:
        """The in-scope weights, by the base's names."""
        return {name: shape for name, shape in _text(self) if _in_scope(name) and len(shape) == 2}

    @property
    def nbytes(self) -> int:
        """Bytes of the three checkpoints, about, at two bytes a number."""
        text = sum(math.prod(shape) for _, shape in _text(self))
        return 2 * (3 * text + sum(math.prod(shape) for _, shape in _vision(self)))


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
    slope: float | None = None
    """If given, the i-th singular value is i^-slope of the first: where it is small, sketches go
    deep. Else 0.9^i."""

    def values(self, rank: int) -> Tensor:
        """The singular values [rank] of a task vector's part of low rank, up to a factor."""
        index = torch.arange(rank, dtype=torch.float32)
        return 0.9**index if self.slope is None else (1 + index) ** -self.slope


def write_triple(
    folder: Path,
    shapes: Shapes,
    recipe: Recipe = Recipe(),
    *,
    text: bool = False,
    classes: bool = True,
) -> dict[str, Path]:
    """Write `base`, `mllm` and `expert` below `folder`; return their folders.

    With `text` there is a fourth, the MLLM's language model alone, with the names of the base.
    Without `classes`, config.json names no class, so that a merge into an adapter starts no process
    that asks transformers for the names of the class's modules.
    """
    wanted = ("base", "mllm", "expert", *(("text",) if text else ()))
    roles = {role: folder / role for role in wanted}
    with ExitStack() as stack:
        writers = {}
        for role, path in roles.items():
            tensors = [(_name(role, name), shape) for name, shape in _text(shapes)]
            tensors += list(_vision(shapes)) if role == "mllm" else []
            writers[role] = stack.enter_context(_Writer(path, tensors, recipe.dtype))

        def write(tensor: tuple[str, tuple[int, ...]]) -> None:
            name, shape = tensor
            for start, block in _blocks(name, shape, recipe):
                for role, writer in writers.items():
                    writer.write(
                        _name(role, name), start, block["mllm" if role == "text" else role]
                    )

        def write_vision(tensor: tuple[str, tuple[int, ...]]) -> None:
            name, shape = tensor
            writers["mllm"].write(name, 0, _noise(shape, 0.02, _generator(recipe.seed, name)))

        with ThreadPoolExecutor(WRITERS) as pool:
            list(pool.map(write, _text(shapes)))
            list(pool.map(write_vision, _vision(shapes)))
        for writer in writers.values():
            writer.seal()
    for role, path in roles.items():
        _write_config(path, role, shapes, recipe, classes=classes)
    return roles


def is_planted(name: str, recipe: Recipe) -> bool:
    """Whether the weight `name`, by the base's names, has the planted alignment."""
    draw = float(torch.rand(1, generator=_generator(recipe.seed, name, "aligned")))
    return draw < recipe.aligned


def _text(shapes: Shapes) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, intermediate, kv = shapes.hidden, shapes.intermediate, shapes.kv
    yield "model.embed_tokens.weight", (shapes.vocab, hidden)
    for layer in range(shapes.layers):
        prefix = f"model.layers.{layer}."
        weights = {
            "mlp.down_proj": (hidden, intermediate),
            "mlp.gate_proj": (intermediate, hidden),
            "mlp.up_proj": (intermediate, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.v_proj": (kv, hidden),
        }
        yield prefix + "input_layernorm.weight", (hidden,)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
        for name, shape in weights.items():
            if not shapes.only or name.split(".")[-1] in shapes.only:
                yield f"{prefix}{name}.weight", shape
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (shapes.vocab, hidden)


def _vision(shapes: Shapes) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "multi_modal_projector.linear_1.weight", (shapes.hidden, 1024)
    for layer in range(shapes.vision_layers):
        for leaf in ("k_proj", "q_proj", "v_proj", "out_proj"):
            name = f"vision_tower.vision_model.encoder.layers.{layer}.self_attn.{leaf}.weight"
            yield name, (1024, 1024)


def _in_scope(name: str) -> bool:
    return name.startswith("model.layers.") and name.endswith("_proj.weight")


def _name(role: str, name: str) -> str:
    return f"language_model.{name}" if role == "mllm" else name


def _generator(*key: object) -> torch.Generator:
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def _noise(shape: tuple[int, ...], deviation: float, generator: torch.Generator) -> Tensor:
    return torch.empty(shape).normal_(0.0, deviation, generator=generator)


@dataclass(frozen=True, slots=True)
class TaskVector:
    """W_role - W_0 [out, in]: left @ right + white noise, all float32.

    left is [out, rank] and right [rank, in], with orthonormal rows.
    """

    left: Tensor
    right: Tensor
    deviation: float
    generator: torch.Generator

    @classmethod
    def of(cls, role: str, name: str, shape: tuple[int, int], recipe: Recipe) -> TaskVector:
        """That of a role and a weight, scaled to the role's share of the weight's norm."""
        out_features, in_features = shape
        rank = min(recipe.rank, *shape)
        shared = _orthonormal(in_features, rank, _generator(recipe.seed, name, "shared"))
        own = _orthonormal(in_features, rank, _generator(recipe.seed, name, role, "own"))
        # Two vectors at cosine sqrt(c) to a shared one are at cosine c to each other.
        cosine = recipe.cosine if is_planted(name, recipe) else 0.0
        right = torch.linalg.qr(shared * math.sqrt(cosine) + own * math.sqrt(1 - cosine))[0]
        left = _orthonormal(out_features, rank, _generator(recipe.seed, name, role, "left"))
        values = recipe.values(rank)
        total = 0.02 * math.sqrt(out_features * in_features)
        total *= recipe.mllm_norm if role == "mllm" else recipe.expert_norm
        values *= total * math.sqrt(1 - recipe.noise**2) / float(values.norm())
        deviation = total * recipe.noise / math.sqrt(out_features * in_features)
        noise = _generator(recipe.seed, name, role, "noise")
        return cls(left * values, right.T.contiguous(), deviation, noise)

    def added_to(self, base: Tensor, rows: slice) -> Tensor:
        """`base` [t, in] with these rows added; rows must be asked for in order."""
        weight = _noise(tuple(base.shape), self.deviation, self.generator)
        return weight.addmm_(self.left[rows], self.right).add_(base)


def _blocks(
    name: str, shape: tuple[int, ...], recipe: Recipe
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """First row and numbers of every block of rows, for each role."""
    generator = _generator(recipe.seed, name)
    vectors = {}
    if _in_scope(name):
        for role in ("mllm", "expert"):
            vectors[role] = TaskVector.of(role, name, (shape[0], shape[1]), recipe)
    height = max(1, BLOCK // math.prod(shape[1:]))
    for start in range(0, shape[0], height):
        rows = slice(start, min(start + height, shape[0]))
        base = _noise((rows.stop - start, *shape[1:]), 0.02, generator)
        block = {"base": base, "mllm": base, "expert": base}
        block |= {role: vector.added_to(base, rows) for role, vector in vectors.items()}
        yield start, block


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    q: Tensor = torch.linalg.qr(torch.randn(rows, columns, generator=generator))[0]
    return q


class _Writer:
    """One checkpoint, written by blocks of rows; a context."""

    def __init__(
        self, path: Path, tensors: list[tuple[str, tuple[int, ...]]], dtype: torch.dtype
    ) -> None:
        self._dtype = dtype
        outputs = [
            OutputTensor(name, safetensors_dtype(dtype), shape, math.prod(shape) * dtype.itemsize)
            for name, shape in tensors
        ]
        shards = plan_shards(outputs, shard_size=5 * 10**9)
        self._shards = {name: shard for shard in shards for name in shard.offsets}
        self._folder = OutputFolder.create(path, shards, inputs=[], overwrite=True)
        self.seal = self._folder.seal

    def write(self, name: str, start: int, block: Tensor) -> None:
        """The rows of a tensor from `start` on, rounded."""
        row = math.prod(block.shape[1:]) * self._dtype.itemsize
        write = self._folder.writer(self._shards[name], name)
        write(start * row, as_bytes(block.to(self._dtype)))

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *error: object) -> None:
        if not self._folder.sealed:
            self._folder.abort()


def _write_config(path: Path, role: str, shapes: Shapes, recipe: Recipe, *, classes: bool) -> None:
    text = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": shapes.hidden,
        "intermediate_size": shapes.intermediate,
        "num_hidden_layers": shapes.layers,
        "num_attention_heads": shapes.hidden // 128,
        "num_key_value_heads": shapes.kv // 128,
        "vocab_size": shapes.vocab,
        "torch_dtype": str(recipe.dtype).removeprefix("torch."),
    }
    config: dict[str, object] = text
    if role == "mllm":
        config = {
            "model_type": "llava",
            "architectures": ["LlavaForConditionalGeneration"],
            "text_config": text,
        }
    if not classes:
        config.pop("architectures")
        text.pop("architectures", None)
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def add_size(parser: argparse.ArgumentParser, *, size: str, layers: int | None) -> None:
    """The options that choose a triple: `shapes_of` reads them."""
    parser.add_argument("--size", choices=SIZES, default=size, help="widths")
    parser.add_argument("--layers", type=int, default=layers, help="of the whole model by default")
    parser.add_argument("--vocab", type=int, help="rows of the embeddings")


def shapes_of(arguments: argparse.Namespace) -> Shapes:
    """The shapes that the options of `add_size` ask for."""
    shapes = SIZES[arguments.size]
    changed = {key: getattr(arguments, key) for key in ("layers", "vocab")}
    return dataclasses.replace(shapes, **{k: v for k, v in changed.items() if v is not None})


def main() -> None:
    """Parse the arguments, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    add_size(parser, size="1b", layers=None)
    parser.add_argument("--text", action="store_true", help="the language model alone too")
    arguments = parser.parse_args()
    write_triple(arguments.folder, shapes_of(arguments), text=arguments.text)


if __name__ == "__main__":
    main()
